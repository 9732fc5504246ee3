"""Costs read from compiled text, on text that is short enough to count by hand."""

import pytest

from grm_jax.plan.costs import Collective, program_cost

TEXT = """
HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[8,16]{1,0})->f32[8,4]{1,0}}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%product (p0: f32[8,16], p1: f32[5,16,4], p2: s32[]) -> f32[8,4] {
  %p0 = f32[8,16]{1,0} parameter(0)
  %p1 = f32[5,16,4]{2,1,0} parameter(1)
  %p2 = s32[] parameter(2)
  %zero = s32[] constant(0)
  %slice = f32[1,16,4]{2,1,0} dynamic-slice(%p1, %p2, %zero, %zero), dynamic_slice_sizes={1,16,4}
  %flat = f32[16,4]{1,0} bitcast(%slice)
  ROOT %dot = f32[8,4]{1,0} dot(%p0, %flat), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%body (state: (s32[], f32[8,16], f32[5,16,4])) -> (s32[], f32[8,16], f32[5,16,4]) {
  %state = (s32[], f32[8,16]{1,0}, /*index=2*/f32[5,16,4]{2,1,0}) parameter(0)
  %step = s32[] get-tuple-element(%state), index=0
  %x = f32[8,16]{1,0} get-tuple-element(%state), index=1
  %w = f32[5,16,4]{2,1,0} get-tuple-element(%state), index=2
  %one = s32[] constant(1)
  %next = s32[] add(%step, %one)
  %y = f32[8,4]{1,0} fusion(%x, %w, %step), kind=kOutput, calls=%product
  %whole = f32[8,16]{1,0} all-gather(%y), channel_id=1, replica_groups=[2,4]<=[8], dimensions={1}
  ROOT %out = (s32[], f32[8,16]{1,0}, f32[5,16,4]{2,1,0}) tuple(%next, %whole, %w)
}

%condition (state.1: (s32[], f32[8,16], f32[5,16,4])) -> pred[] {
  %state.1 = (s32[], f32[8,16]{1,0}, f32[5,16,4]{2,1,0}) parameter(0)
  %step.1 = s32[] get-tuple-element(%state.1), index=0
  %limit = s32[] constant(5)
  ROOT %less = pred[] compare(%step.1, %limit), direction=LT
}

ENTRY %main (x.1: f32[8,16], w.1: f32[5,16,4]) -> f32[8,16] {
  %x.1 = f32[8,16]{1,0} parameter(0)
  %w.1 = f32[5,16,4]{2,1,0} parameter(1)
  %start = s32[] constant(0)
  %begin = (s32[], f32[8,16]{1,0}, f32[5,16,4]{2,1,0}) tuple(%start, %x.1, %w.1)
  %loop = (s32[], f32[8,16]{1,0}, f32[5,16,4]{2,1,0}) while(%begin), condition=%condition, body=%body
  %last = f32[8,16]{1,0} get-tuple-element(%loop), index=1
  ROOT %reduced = f32[8,16]{1,0} all-reduce(%last), channel_id=2, replica_groups={{0,4},{1,5},{2,6},{3,7}}, to_apply=%add
}
"""  # noqa: E501


def test_loops_are_multiplied_out() -> None:
    cost = program_cost(TEXT)
    assert cost.flops == 5 * 2 * 8 * 16 * 4
    assert program_cost(TEXT, unroll=False).flops == 2 * 8 * 16 * 4
    assert cost.unknown == 0


def test_the_number_of_turns_may_be_stated() -> None:
    stated = TEXT.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"3"}}')
    assert program_cost(stated).flops == 3 * 2 * 8 * 16 * 4
    # Where data decides, the caller says how many turns there are.
    unknown = TEXT.replace("direction=LT", "direction=NE")
    cost = program_cost(unknown, turns=7)
    assert cost.flops == 7 * 2 * 8 * 16 * 4
    assert cost.unknown == 1


def test_a_loop_may_count_in_larger_steps() -> None:
    twos = TEXT.replace("%one = s32[] constant(1)", "%one = s32[] constant(2)")
    assert program_cost(twos).flops == 3 * 2 * 8 * 16 * 4
    # What is added to the counter cannot be read.
    fused = TEXT.replace("add(%step, %one)", "fusion(%step), kind=kLoop, calls=%add")
    assert program_cost(fused).flops == 5 * 2 * 8 * 16 * 4


def test_bytes_are_those_of_what_is_not_fused() -> None:
    x, w, y = 4 * 8 * 16, 4 * 16 * 4, 4 * 8 * 4
    # Of the weights, the fusion reads one slice; its index is a number of four bytes.
    turn = (x + w + 4 + y) + (y + x) + (4 + 4 + 4) + (4 + 4 + 1)
    assert program_cost(TEXT).moved == 5 * turn + 2 * x


def test_what_a_fusion_in_a_fusion_slices_or_updates() -> None:
    text = """
%inner (w: f32[5,16,4], i: s32[]) -> f32[16,4] {
  %w = f32[5,16,4]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %slice = f32[1,16,4]{2,1,0} dynamic-slice(%w, %i, %zero, %zero), dynamic_slice_sizes={1,16,4}
  ROOT %flat = f32[16,4]{1,0} bitcast(%slice)
}

%write (r: f32[9,4], u: f32[1,4], j: s32[]) -> f32[9,4] {
  %r = f32[9,4]{1,0} parameter(0)
  %u = f32[1,4]{1,0} parameter(1)
  %j = s32[] parameter(2)
  ROOT %new = f32[9,4]{1,0} dynamic-update-slice(%r, %u, %j, %j)
}

%outer (x: f32[1,16], w1: f32[5,16,4], i1: s32[], room: f32[9,4]) -> (f32[9,4], f32[1,4]) {
  %w1 = f32[5,16,4]{2,1,0} parameter(1)
  %x = f32[1,16]{1,0} parameter(0)
  %i1 = s32[] parameter(2)
  %room = f32[9,4]{1,0} parameter(3)
  %layer = f32[16,4]{1,0} fusion(%w1, %i1), kind=kLoop, calls=%inner
  %dot = f32[1,4]{1,0} dot(%x, %layer), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %kept = f32[9,4]{1,0} fusion(%room, %dot, %i1), kind=kLoop, calls=%write
  ROOT %both = (f32[9,4]{1,0}, f32[1,4]{1,0}) tuple(%kept, %dot)
}

ENTRY %main (x2: f32[1,16], w2: f32[5,16,4], i2: s32[], r2: f32[9,4]) -> (f32[9,4], f32[1,4]) {
  %x2 = f32[1,16]{1,0} parameter(0)
  %w2 = f32[5,16,4]{2,1,0} parameter(1)
  %i2 = s32[] parameter(2)
  %r2 = f32[9,4]{1,0} parameter(3)
  ROOT %done = (f32[9,4]{1,0}, f32[1,4]{1,0}) fusion(%x2, %w2, %i2, %r2), kind=kOutput, calls=%outer
}
"""
    # The row, a layer's weights and the index are read; the product is written twice, once in the
    # place of a row of what is kept.
    assert program_cost(text).moved == 4 * (16 + 16 * 4 + 1) + 4 * (4 + 4)


def test_a_slice_of_a_sum_is_a_reduce_scatter() -> None:
    text = """
%scatter (p: f32[8,64], i: s32[]) -> f32[8,16] {
  %p = f32[8,64]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %sum = f32[8,64]{1,0} all-reduce(%p), replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %part = f32[8,16]{1,0} dynamic-slice(%sum, %i, %i), dynamic_slice_sizes={8,16}
}

ENTRY %main (x: f32[8,64], i1: s32[]) -> f32[8,16] {
  %x = f32[8,64]{1,0} parameter(0)
  %i1 = s32[] parameter(1)
  ROOT %done = f32[8,16]{1,0} fusion(%x, %i1), kind=kCustom, calls=%scatter
}
"""
    (found,) = program_cost(text).collectives.items()
    assert found[0] == Collective("reduce-scatter", 4, False)
    whole = 4 * 8 * 64
    assert (found[1].count, found[1].payload, found[1].wire) == (1, whole, 3 / 4 * whole)
    summed = text.replace("ROOT %part", "%part").replace("%sum = ", "ROOT %sum = ")
    (found,) = program_cost(summed).collectives.items()
    assert (found[0].kind, found[1].wire) == ("all-reduce", 2 * 3 / 4 * whole)


def test_collectives_by_kind_and_size() -> None:
    found = program_cost(TEXT, slice_of=lambda chip: chip // 4).collectives
    assert set(found) == {Collective("all-gather", 4, False), Collective("all-reduce", 2, True)}
    gathered = found[Collective("all-gather", 4, False)]
    assert (gathered.count, gathered.payload) == (5, 5 * 4 * 8 * 16)
    assert gathered.wire == pytest.approx(5 * 4 * 8 * 16 * 3 / 4)
    reduced = found[Collective("all-reduce", 2, True)]
    assert (reduced.count, reduced.payload, reduced.wire) == (1, 512, 512)


# A product as TPUs write it: rows by features, a batch of 3 as a window that meets one tap each.
CONVOLUTION = """
HloModule m

ENTRY %main (a: bf16[6,32], b: bf16[32,9]) -> f32[6,9] {
  %a = bf16[6,32]{1,0} parameter(0)
  %b = bf16[32,9]{1,0} parameter(1)
  ROOT %c = f32[6,9]{1,0} convolution(%a, %b), dim_labels=bf_io->bf
}
"""
BATCHED = """
HloModule m

ENTRY %main (a: bf16[3,6,32], b: bf16[3,32,9]) -> f32[3,6,9] {
  %a = bf16[3,6,32]{2,1,0} parameter(0)
  %b = bf16[3,32,9]{2,1,0} parameter(1)
  ROOT %c = f32[3,6,9]{2,1,0} convolution(%a, %b), window={size=3 stride=2 pad=0_0 lhs_dilate=3}, dim_labels=0bf_0io->0bf
}
"""  # noqa: E501


def test_products_that_are_written_as_convolutions() -> None:
    assert program_cost(CONVOLUTION).flops == 2 * 6 * 32 * 9
    assert program_cost(BATCHED).flops == 2 * 3 * 6 * 32 * 9


def test_asynchronous_pairs_count_once() -> None:
    text = """
HloModule m

ENTRY %main (a: f32[4]) -> f32[16] {
  %a = f32[4]{0} parameter(0)
  %s = (f32[4]{0}, f32[16]{0}) all-gather-start(%a), replica_groups=[1,4]<=[4], dimensions={0}
  ROOT %d = f32[16]{0} all-gather-done(%s)
}
"""
    found = program_cost(text).collectives
    assert found[Collective("all-gather", 4, False)].payload == 64
    assert found[Collective("all-gather", 4, False)].count == 1


def test_attributes_may_have_lines_of_their_own() -> None:
    text = TEXT.replace(
        "calls=%product", 'calls=%product, frontend_attributes={kernel_metadata={\n"a":"{1}"\n}}'
    )
    assert program_cost(text).flops == program_cost(TEXT).flops
