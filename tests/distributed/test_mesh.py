from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, PartitionSpec

from grm_jax.distributed import MESH_AXES, RULES, logical_to_sharding, make_mesh, tree_shardings
from grm_jax.errors import UsageError


@pytest.fixture(scope="module", autouse=True)
def eight_devices() -> None:
    assert jax.device_count() == 8, "tests/conftest.py simulates eight devices"


# --- the mesh ---


@pytest.mark.parametrize(
    ("shape", "sizes"),
    [
        (None, (1, 8, 1, 1)),
        ({"data": 8}, (8, 1, 1, 1)),
        ({"tensor": 2, "fsdp": -1}, (1, 4, 2, 1)),
        ({"data": 2, "fsdp": 2, "tensor": 2}, (2, 2, 2, 1)),
        ({"data": 1, "expert": 8}, (1, 1, 1, 8)),
        ({"data": 8, "fsdp": -1}, (8, 1, 1, 1)),
    ],
)
def test_mesh_has_all_four_axes(
    shape: dict[str, int] | None, sizes: tuple[int, int, int, int]
) -> None:
    mesh = make_mesh(shape)
    assert mesh.axis_names == MESH_AXES
    assert mesh.axis_sizes == sizes
    assert mesh.axis_types == (AxisType.Auto,) * 4
    assert set(mesh.devices.flat) == set(jax.devices())


def test_mesh_of_some_devices() -> None:
    mesh = make_mesh({"tensor": 2}, jax.devices()[2:4])
    assert list(mesh.devices.flat) == jax.devices()[2:4]
    assert make_mesh({}, jax.devices()[:1]).size == 1
    assert make_mesh(devices=jax.devices()[:3]).shape["fsdp"] == 3


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"data": 3}, "mesh data=3 needs 3 devices, but there are 8; fsdp=8 would fit"),
        ({"data": 2}, "mesh data=2 needs 2 devices, but there are 8; data=2, fsdp=4 would fit"),
        ({"fsdp": 4, "tensor": 4}, "needs 16 devices, but there are 8; fsdp=2, tensor=4 would fit"),
        ({"tensor": 3, "data": -1}, "tensor=3, data=-1 needs a multiple of 3 devices"),
        ({}, "mesh of one device needs 1 devices, but there are 8; fsdp=8 would fit"),
        ({"data": -1, "fsdp": -1}, "mesh data=-1, fsdp=-1: only one axis may be -1"),
        ({"data": 0}, "mesh axis 'data' is 0; give a positive size, or -1 for the rest"),
        ({"data": -2}, "mesh axis 'data' is -2"),
        ({"tensr": 2}, "mesh axis 'tensr' does not exist; did you mean 'tensor'?"),
        ({"x": 2}, "mesh axis 'x' does not exist; it can be data, fsdp, tensor, expert"),
    ],
)
def test_mesh_that_does_not_fit(shape: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        make_mesh(shape)
    assert message in str(caught.value)


# --- shardings ---


@pytest.mark.parametrize(
    ("axes", "spec"),
    [
        (("vocab", "embed"), (("tensor",), ("fsdp",))),
        (("layers", "mlp", "embed"), (None, ("tensor",), ("fsdp",))),
        (("heads", "head_dim", "embed"), (("tensor",), None, ("fsdp",))),
        ((None, "kv_heads", "head_dim", "embed"), (None, ("tensor",), None, ("fsdp",))),
        (("batch", "length", "embed_act"), (("data", "fsdp"), None, None)),
        (("batch", "length", "vocab"), (("data", "fsdp"), None, ("tensor",))),
        (("samples", "kv_heads", "cache_length"), (("data", "fsdp"), ("tensor",), None)),
        (("norm",), (None,)),
        ((), ()),
    ],
)
def test_rules(axes: tuple[str | None, ...], spec: tuple[tuple[str, ...] | None, ...]) -> None:
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    assert logical_to_sharding(axes, mesh).spec == PartitionSpec(*spec)


def test_mesh_axes_of_size_one_are_left_out() -> None:
    mesh = make_mesh({"data": 4, "tensor": 2})
    assert logical_to_sharding(("batch", "embed"), mesh, {**RULES, "batch": ("data",)}).spec == (
        PartitionSpec(("data",), None)
    )
    assert logical_to_sharding(("batch",), mesh).spec == PartitionSpec(("data",))


def test_default_rules_name_only_axes_of_the_mesh() -> None:
    mesh = make_mesh()
    for name, parts in RULES.items():
        assert set(parts) <= set(MESH_AXES)
        logical_to_sharding((name,), mesh)


def test_an_axis_that_cannot_be_divided_stays_whole() -> None:
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    three_heads = logical_to_sharding(("kv_heads", "embed"), mesh, shape=(3, 64))
    assert three_heads.spec == PartitionSpec(None, ("fsdp",))
    assert three_heads.shard_shape((3, 64)) == (3, 32)
    # Six rows do not go around data x fsdp = 4, although they would around one of the two.
    assert logical_to_sharding(("batch",), mesh, shape=(6,)).spec == PartitionSpec(None)
    assert logical_to_sharding(("batch",), mesh, shape=(4,)).spec == PartitionSpec(("data", "fsdp"))


def test_array_lands_where_the_sharding_says() -> None:
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    kernel = jax.device_put(
        jnp.arange(8 * 16.0).reshape(8, 16),
        logical_to_sharding(("mlp", "embed"), mesh, shape=(8, 16)),
    )
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(4, 4)}
    assert len({str(shard.index) for shard in kernel.addressable_shards}) == 8
    rows = jax.device_put(jnp.ones((8, 16)), logical_to_sharding(("batch", "embed_act"), mesh))
    product = jax.jit(lambda x, w: x @ w.T)(rows, kernel)
    assert jnp.array_equal(product, jnp.broadcast_to(kernel.sum(axis=1), (8, 8)))


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        (("heads", "mlp"), "'heads' and 'mlp' of one array are both split over mesh axis 'tensor'"),
        (("embed", "embed"), "'embed' and 'embed' of one array are both split over mesh axis"),
        (("batch", "samples"), "'batch' and 'samples' of one array are both split over"),
        (("batch", "embed"), "'batch' and 'embed' of one array are both split over mesh axis"),
        (("head",), "logical axis 'head' has no rule; did you mean 'heads'?"),
    ],
)
def test_axes_that_cannot_be_placed(axes: tuple[str, ...], message: str) -> None:
    for mesh in (make_mesh(), make_mesh({}, jax.devices()[:1])):  # one device hides no mistake
        with pytest.raises(UsageError) as caught:
            logical_to_sharding(axes, mesh)
        assert message in str(caught.value)


def test_rule_for_a_mesh_axis_that_does_not_exist() -> None:
    with pytest.raises(UsageError, match="rule of logical axis 'mlp' names mesh axis 'model'"):
        logical_to_sharding(("mlp",), make_mesh(), {"mlp": ("model",)})


def test_shape_of_another_rank() -> None:
    with pytest.raises(UsageError, match=r"2 axis names .* for an array of shape \(4,\)"):
        logical_to_sharding(("mlp", "embed"), make_mesh(), shape=(4,))


# --- trees ---


class State(NamedTuple):
    kernel: object
    scale: object


def test_tree_of_axes() -> None:
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    axes = {"a": State(kernel=("mlp", "embed"), scale=("norm",)), "b": [(), (None,)]}
    shapes = {
        "a": State(kernel=jax.ShapeDtypeStruct((3, 8), jnp.float32), scale=jnp.ones(8)),
        "b": [jnp.zeros(()), jnp.zeros(5)],
    }
    placed = tree_shardings(axes, mesh, shapes)
    assert jax.tree.structure(placed) == jax.tree.structure(shapes)
    assert placed["a"].kernel.spec == PartitionSpec(None, ("fsdp",))
    assert tree_shardings(axes, mesh)["a"].kernel.spec == PartitionSpec(("tensor",), ("fsdp",))
    assert placed["b"][0].spec == PartitionSpec()
