import functools
from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from grm_jax.errors import UsageError
from grm_jax.models import kernels
from grm_jax.models.kernels import Implementation, causal_attention

EVERYTHING = 2**30


class Case(NamedTuple):
    """Sizes and options of one call."""

    time: int
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    value_dim: int = 16
    window: int = EVERYTHING
    softcap: float | None = None
    segments: bool = False


# What every implementation must serve; lengths are ragged in all of them.
CASES = {
    "one short block": Case(time=10),
    "two blocks, the last ragged": Case(time=600),
    "window inside a block": Case(time=200, window=7),
    "window across blocks": Case(time=600, heads=2, kv_heads=1, window=300),
    "soft cap": Case(time=40, softcap=2.0),
    "no groups, smaller values": Case(time=40, heads=3, kv_heads=3, head_dim=24, value_dim=16),
    "segments": Case(time=300, segments=True),
    "everything": Case(time=300, kv_heads=1, value_dim=8, window=100, softcap=3.0, segments=True),
}


class Inputs(NamedTuple):
    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    length: np.ndarray
    segment_ids: np.ndarray | None


def make_inputs(case: Case, batch: int = 2, dtype: Any = np.float32) -> Inputs:
    rng = np.random.default_rng(case.time)

    def normal(heads: int, size: int) -> np.ndarray:
        return rng.normal(size=(batch, case.time, heads, size)).astype(dtype)

    ids = np.sort(rng.integers(1, 4, size=(batch, case.time)), axis=1).astype(np.int32)
    return Inputs(
        normal(case.heads, case.head_dim),
        normal(case.kv_heads, case.head_dim),
        normal(case.kv_heads, case.value_dim),
        np.linspace(case.time, case.time // 3, batch).astype(np.int32),
        ids if case.segments else None,
    )


def dense(xp: ModuleType, case: Case, rest: Inputs, query: Any, key: Any, value: Any) -> Any:
    """The whole softmax at once, head by head, with numpy or jax.numpy."""
    group = case.heads // case.kv_heads
    index = np.arange(case.time)
    back = index[:, None] - index
    seen = (back >= 0) & (back < case.window)
    seen = np.broadcast_to(seen, (len(rest.length), case.time, case.time))
    if rest.segment_ids is not None:
        seen = seen & (rest.segment_ids[:, :, None] == rest.segment_ids[:, None])
    heads = []
    for head in range(case.heads):
        keys, values = key[:, :, head // group], value[:, :, head // group]
        scores = xp.einsum("bqd,bsd->bqs", query[:, :, head], keys)
        if case.softcap is not None:
            scores = case.softcap * xp.tanh(scores / case.softcap)
        weights = xp.where(seen, xp.exp(scores), 0)
        weights = weights / weights.sum(axis=-1, keepdims=True)
        heads.append(xp.einsum("bqs,bsd->bqd", weights, values))
    real = (index < rest.length[:, None])[..., None, None]
    return xp.where(real, xp.stack(heads, axis=2), 0)


def run(
    case: Case, rest: Inputs, query: Any, key: Any, value: Any, *, implementation: Any = "xla"
) -> jax.Array:
    return causal_attention(
        query,
        key,
        value,
        length=jnp.asarray(rest.length),
        window=jnp.int32(case.window),
        windows=(case.window,),
        softcap=case.softcap,
        segment_ids=None if rest.segment_ids is None else jnp.asarray(rest.segment_ids),
        implementation=implementation,
    )


def gradients(attend: Any, *operands: Any) -> tuple[jax.Array, ...]:
    """Of a smooth function of the real tokens' outputs by query, key and value."""
    grad = jax.grad(lambda *qkv: jnp.sin(attend(*qkv)).sum(), argnums=(0, 1, 2))
    return jax.jit(grad)(*operands)


def splash_is_slow(names: Iterable[str], fast: Sequence[str] = ()) -> list[Any]:
    """Cases for both implementations; interpreted kernels take a while to compile."""
    marks = {name: () if name in fast else (pytest.mark.slow,) for name in names}
    return [(name, "xla") for name in names] + [
        pytest.param(name, "splash", marks=marks[name]) for name in names
    ]


@pytest.mark.parametrize(
    ("name", "implementation"),
    splash_is_slow(CASES, fast=("no groups, smaller values", "everything")),
)
def test_outputs_are_those_of_a_dense_softmax(name: str, implementation: Implementation) -> None:
    case = CASES[name]
    inputs = make_inputs(case)
    out = run(case, inputs, *inputs[:3], implementation=implementation)
    assert out.shape == (2, case.time, case.heads, case.value_dim)
    np.testing.assert_allclose(out, dense(np, case, inputs, *inputs[:3]), atol=2e-5)


@pytest.mark.parametrize(
    ("name", "implementation"), splash_is_slow(("window across blocks", "everything"))
)
def test_gradients_are_those_of_a_dense_softmax(name: str, implementation: Implementation) -> None:
    case = CASES[name]
    inputs = make_inputs(case)
    wanted = gradients(lambda *qkv: dense(jnp, case, inputs, *qkv), *inputs[:3])
    got = gradients(
        lambda *qkv: run(case, inputs, *qkv, implementation=implementation), *inputs[:3]
    )
    for left, right in zip(got, wanted, strict=True):
        np.testing.assert_allclose(left, right, atol=1e-4)


@pytest.mark.parametrize("name", ["window inside a block", "everything"])
def test_long_sequences_run_in_a_loop(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    inputs = make_inputs(case)
    monkeypatch.setattr(kernels, "ROWS", 64)
    monkeypatch.setattr(kernels, "MOST_BLOCKS", 2)
    causal_attention.clear_cache()
    try:
        traced = str(jax.make_jaxpr(functools.partial(run, case, inputs))(*inputs[:3]))
        assert "while" in traced or "scan" in traced
        out = run(case, inputs, *inputs[:3])
        found = gradients(lambda *qkv: run(case, inputs, *qkv), *inputs[:3])
    finally:
        causal_attention.clear_cache()
    np.testing.assert_allclose(out, dense(np, case, inputs, *inputs[:3]), atol=2e-5)
    wanted = gradients(lambda *qkv: dense(jnp, case, inputs, *qkv), *inputs[:3])
    for left, right in zip(found, wanted, strict=True):
        np.testing.assert_allclose(left, right, atol=1e-4)


def test_tokens_beyond_the_length_change_nothing() -> None:
    case = Case(time=30)
    inputs = make_inputs(case)
    beyond = (np.arange(case.time) >= inputs.length[:, None])[..., None, None]
    assert beyond.any()
    altered = [np.where(beyond, np.float32(1e4), x) for x in inputs[:3]]
    before = run(case, inputs, *inputs[:3])
    np.testing.assert_array_equal(run(case, inputs, *altered), before)
    assert not np.asarray(before)[np.broadcast_to(beyond, before.shape)].any()


def test_half_precision_stays_close_and_keeps_its_type() -> None:
    case = Case(time=100, softcap=5.0)
    inputs = make_inputs(case, dtype=jnp.bfloat16)
    out = run(case, inputs, *inputs[:3])
    assert out.dtype == jnp.bfloat16
    wide = [x.astype(np.float32) for x in inputs[:3]]
    np.testing.assert_allclose(out.astype(np.float32), dense(np, case, inputs, *wide), atol=0.03)


@pytest.mark.parametrize("implementation", ["xla", "splash"])
def test_layers_are_scanned_over_with_windows_as_data(implementation: Implementation) -> None:
    windows = (5, EVERYTHING, 5)
    case = Case(time=40)
    inputs = make_inputs(case)

    @jax.jit
    def layers(query: jax.Array) -> jax.Array:
        def layer(x: jax.Array, window: jax.Array) -> tuple[jax.Array, None]:
            out = causal_attention(
                x,
                jnp.asarray(inputs.key),
                jnp.asarray(inputs.value),
                length=jnp.asarray(inputs.length),
                window=window,
                windows=windows,
                implementation=implementation,
            )
            return out, None

        return jax.lax.scan(layer, query, jnp.asarray(windows, jnp.int32))[0]

    wanted = inputs.query
    for window in windows:
        one = case._replace(window=window)
        wanted = dense(np, one, inputs, wanted, inputs.key, inputs.value)
    np.testing.assert_allclose(layers(jnp.asarray(inputs.query)), wanted, atol=2e-5)


@pytest.mark.parametrize("implementation", ["xla", "splash"])
def test_a_further_axis_is_mapped_over(implementation: Implementation) -> None:
    case = Case(time=20, window=6)
    inputs = make_inputs(case)
    operands = [np.stack([x, 2 * x]) for x in inputs[:3]]
    out = jax.vmap(lambda *qkv: run(case, inputs, *qkv, implementation=implementation))(*operands)
    for index in range(2):
        wanted = dense(np, case, inputs, *(x[index] for x in operands))
        np.testing.assert_allclose(out[index], wanted, atol=2e-5)


@pytest.mark.parametrize(
    ("batch", "heads", "kv_heads"),
    [
        pytest.param(4, 4, 2, id="all divide", marks=pytest.mark.slow),
        pytest.param(4, 4, 1, id="a shared head is repeated"),
        pytest.param(3, 6, 3, id="rows do not divide", marks=pytest.mark.slow),
        pytest.param(4, 3, 3, id="heads do not divide", marks=pytest.mark.slow),
    ],
)
def test_kernels_work_on_the_rows_and_heads_of_each_device(
    batch: int, heads: int, kv_heads: int
) -> None:
    mesh = jax.make_mesh(
        (2, 2, 2, 1), ("data", "fsdp", "tensor", "expert"), axis_types=(AxisType.Auto,) * 4
    )
    case = Case(time=20, heads=heads, kv_heads=kv_heads, head_dim=8, value_dim=8, segments=True)
    inputs = make_inputs(case, batch=batch)
    plain = gradients(lambda *qkv: run(case, inputs, *qkv), *inputs[:3])
    with jax.set_mesh(mesh):
        split = gradients(
            lambda *qkv: run(case, inputs, *qkv, implementation="splash"), *inputs[:3]
        )
    for left, right in zip(split, plain, strict=True):
        np.testing.assert_allclose(left, right, atol=1e-5)


def test_keys_ahead_and_scores_for_the_gradient_are_left_out() -> None:
    """The gradient needs clearly less memory in blocks than in one piece."""
    case = Case(time=2048, heads=2, kv_heads=1)
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    query, key = shape((1, 2048, 2, 16)), shape((1, 2048, 1, 16))
    rest = Inputs(*make_inputs(Case(time=1), batch=1)[:3], np.array([2048], np.int32), None)

    def loss(*qkv: jax.Array) -> jax.Array:
        return run(case, rest, *qkv).sum()

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(query, key, key).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    everything = 4 * 2 * 2048**2  # bytes of all scores; in one piece, three times as many are held
    assert memory.temp_size_in_bytes < 2 * everything


def lowered(platform: str, dtype: Any = jnp.bfloat16, **options: Any) -> str:
    """The program of outputs and gradients for a platform, under the default choice."""
    case = Case(time=256, head_dim=64, value_dim=64)._replace(**options)
    inputs = make_inputs(case, dtype=dtype)

    def both(*qkv: jax.Array) -> Any:
        attend = functools.partial(run, case, inputs, implementation=None)
        return attend(*qkv), gradients(attend, *qkv)

    return jax.jit(both).trace(*inputs[:3]).lower(lowering_platforms=(platform,)).as_text()


def test_the_platform_that_is_compiled_for_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    # Without a GPU, JAX has no cuDNN that it could ask for its version.
    monkeypatch.setattr(
        "jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91100
    )
    tpu = lowered("tpu")
    assert tpu.count("call @tpu_custom_call(") == 4  # outputs, outputs again, and two gradients
    cuda = lowered("cuda", window=100)
    assert "sliding_window_length\\22: 100," in cuda
    assert "__cudnn$fmhaSoftmax(" in cuda
    assert "__cudnn$fmhaSoftmaxBackward(" in cuda
    for platform in ("cpu", "rocm"):
        assert "custom_call @__cudnn" not in lowered(platform)
        assert "tpu_custom_call" not in lowered(platform)


@pytest.mark.parametrize(
    "options",
    [
        {"softcap": 50.0},
        {"segments": True},
        {"dtype": np.float32},
        {"value_dim": 80},
        {"head_dim": 60},
    ],
    ids=str,
)
def test_what_cudnn_does_not_serve_is_left_to_xla(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91100
    )
    assert "__cudnn" not in lowered("cuda", **options)


@pytest.mark.parametrize("installed", [False, True])
def test_asking_for_cudnn_where_there_is_no_gpu_gives_the_same_numbers(
    installed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if installed:
        monkeypatch.setattr(
            "jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91100
        )
    case = Case(time=20 + installed)  # another shape is traced anew
    inputs = make_inputs(case, dtype=jnp.bfloat16)
    np.testing.assert_array_equal(
        run(case, inputs, *inputs[:3], implementation="cudnn"), run(case, inputs, *inputs[:3])
    )


def test_an_unknown_implementation_is_named() -> None:
    case = Case(time=4)
    inputs = make_inputs(case)
    with pytest.raises(UsageError, match="'flash' does not exist"):
        run(case, inputs, *inputs[:3], implementation="flash")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("head_dim", "value_dim", "dtype"),
    [(64, 64, jnp.bfloat16), (192, 128, jnp.bfloat16), (256, 256, jnp.float32)],
)
@pytest.mark.parametrize("devices", [1, 4])
def test_kernels_compile_for_real_tpus(
    devices: int, head_dim: int, value_dim: int, dtype: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("libtpu", reason="compiles for TPUs with their compiler")
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")  # there is no TPU host to ask about itself
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    shape = (1, devices // 2 or 1, min(devices, 2), 1)
    mesh = jax.sharding.Mesh(
        np.array(topology.devices[:devices]).reshape(shape),
        ("data", "fsdp", "tensor", "expert"),
        axis_types=(AxisType.Auto,) * 4,
    )
    rows, split = NamedSharding(mesh, P("fsdp")), NamedSharding(mesh, P("fsdp", None, "tensor"))

    def struct(heads: int, size: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((2, 1024, heads, size), dtype, sharding=split)

    ints = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)

    def loss(query: Any, key: Any, value: Any, length: Any, ids: Any, window: Any) -> jax.Array:
        out = causal_attention(
            query,
            key,
            value,
            length=length,
            window=window,
            windows=(256, EVERYTHING),
            softcap=50.0,
            segment_ids=ids,
        )
        return out.astype(jnp.float32).sum()

    with jax.set_mesh(mesh):
        compiled = (
            jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
            .trace(
                struct(4, head_dim),
                struct(2, head_dim),
                struct(2, value_dim),
                ints((2,), sharding=rows),
                ints((2, 1024), sharding=rows),
                ints((), sharding=NamedSharding(mesh, P())),
            )
            .lower()
            .compile()
        )
    program = compiled.as_text()
    # Forward, and both halves of the gradient, for each of the two windows.
    assert program.count('custom_call_target="tpu_custom_call"') == 6
    assert "all-gather" not in program
