"""What the text of compiled modules says, on lines of it."""

import pytest

from grm_jax.plan.hlo import arrays_of, parse, replica_groups

TEXT = """
HloModule m, is_scheduled=true

%product (p0: f32[8,16], p1: f32[16,4]) -> f32[8,4] {
  %p0 = f32[8,16]{1,0} parameter(0)
  %p1 = f32[16,4]{1,0} parameter(1)
  ROOT %dot = f32[8,4]{1,0} dot(%p0, %p1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (x: f32[8,16], w: f32[16,4]) -> f32[8,4] {
  %x = f32[8,16]{1,0} parameter(0)
  %w = f32[16,4]{1,0} parameter(1)
  ROOT %y = f32[8,4]{1,0} fusion(%x, %w), kind=kOutput, calls=%product
}
"""


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,1},{2,3}}, x=1", [(0, 1), (2, 3)]),
        ("replica_groups=[2,2]<=[4]", [(0, 1), (2, 3)]),
        ("replica_groups=[2,2]<=[2,2]T(1,0), x=1", [(0, 2), (1, 3)]),
        ("replica_groups=[4,2]<=[2,2,2]T(2,0,1)", [(0, 2), (4, 6), (1, 3), (5, 7)]),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=2] {'axis_1'}, x", [(0, 1), (2, 3)]),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=2] {'axis_0'}, x", [(0, 2), (1, 3)]),
    ],
)
def test_both_ways_of_writing_groups(text: str, groups: list[tuple[int, ...]]) -> None:
    assert list(replica_groups(text)) == groups


def test_types() -> None:
    (one,) = arrays_of("bf16[3,5]{1,0:T(8,128)(2,1)S(1)}")
    assert (one.size, one.fast) == (30, True)
    small, flag = arrays_of("(s4[3]{0}, /*index=1*/pred[2]{0})")
    assert (small.size, flag.size) == (2, 2)


def test_fusions_are_named_in_the_text() -> None:
    computations, entry = parse(TEXT)
    assert entry == "main"
    assert [one.opcode for one in computations["product"]][-1] == "dot"
    (call,) = (one for one in computations["main"] if one.root)
    assert (call.operands, call.called("calls")) == (("x", "w"), ("product",))
    assert computations["product"][-1].numbers("lhs_contracting_dims") == (1,)
