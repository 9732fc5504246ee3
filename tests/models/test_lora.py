"""Adapters and quantised kernels, on small decoders of every shape."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from grm_jax.distributed import make_mesh, tree_shardings
from grm_jax.errors import UsageError
from grm_jax.models import (
    DecoderConfig,
    Experts,
    Latent,
    Lora,
    Params,
    abstract_params,
    add_lora,
    dequantise_params,
    family_config,
    join_lora,
    logits,
    lora_targets,
    merge_lora,
    param_axes,
    quantise_params,
    remove_lora,
    split_lora,
)
from grm_jax.models.layers import Adapter, adapted_product, gated_pair
from grm_jax.models.quantization import NORMAL_FLOAT, dequantise, quantise

SIZES: dict[str, Any] = {
    "vocab_size": 48,
    "num_layers": 3,
    "width": 32,
    "num_heads": 4,
    "num_kv_heads": 2,
    "mlp_dim": 48,
    "max_context": 64,
}
LATENT = Latent(query_rank=None, rank=16, nope_dim=8, rope_dim=4, value_dim=6)
EXPERTS = Experts(count=4, per_token=2, mlp_dim=16, shared_dim=8, dense_layers=1)
CONFIGS = {
    "qwen2": family_config("qwen2", **SIZES),
    "gemma3": family_config("gemma3", **SIZES),
    "deepseek_v2": family_config("deepseek_v2", **SIZES, latent=LATENT, experts=EXPERTS),
    "deepseek_v3": family_config(
        "deepseek_v3",
        **SIZES,
        latent=dataclasses.replace(LATENT, query_rank=12),
        experts=dataclasses.replace(EXPERTS, gating="sigmoid"),
    ),
}
TOKENS = np.random.default_rng(0).integers(0, 48, (2, 9), np.int32)
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
run = functools.partial(jax.jit, static_argnums=1, compiler_options=QUICK)(logits)


def random_params(config: DecoderConfig, seed: int = 0) -> Params:
    generator = np.random.default_rng(seed)

    def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        centre = 1.0 - config.norm_offset if path[-1].key == "scale" else 0.0
        return jnp.asarray(centre + 0.25 * generator.standard_normal(leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, abstract_params(config))


@functools.cache
def base(name: str) -> tuple[DecoderConfig, Params, np.ndarray]:
    config = CONFIGS[name]
    params = random_params(config)
    return config, params, np.asarray(run(params, config, TOKENS))


def adapted(name: str, targets: tuple[str, ...] | None = None) -> tuple[DecoderConfig, Params]:
    """With adapters that do something."""
    config, params, _ = base(name)
    lora = Lora(rank=3, alpha=5.0, targets=targets or lora_targets(config))
    config, params = add_lora(config, params, lora, jax.random.key(0))
    adapters, rest = split_lora(params)
    rng = np.random.default_rng(1)
    adapters = jax.tree.map(
        lambda leaf: jnp.asarray(0.2 * rng.standard_normal(leaf.shape), leaf.dtype), adapters
    )
    return config, join_lora(adapters, rest)


@pytest.mark.parametrize("name", ["gemma3", pytest.param("deepseek_v2", marks=pytest.mark.slow)])
def test_fresh_adapters_change_nothing(name: str) -> None:
    config, params, wanted = base(name)
    lora = Lora(rank=3, alpha=5.0, targets=lora_targets(config))
    changed, more = add_lora(config, params, lora, jax.random.key(0))
    np.testing.assert_allclose(run(more, changed, TOKENS), wanted, atol=1e-5)
    adapters, rest = split_lora(more)
    assert jax.tree.structure(rest) == jax.tree.structure(params)
    flat = flatten_dict(adapters)
    assert {leaf.dtype for leaf in flat.values()} == {jnp.dtype("float32")}
    for path, leaf in flat.items():
        assert bool((leaf != 0).all()) == path[-1].endswith("lora_a"), path


@pytest.mark.parametrize(
    "name",
    ["qwen2", *(pytest.param(name, marks=pytest.mark.slow) for name in CONFIGS if name != "qwen2")],
)
def test_merged_equals_applied_and_off_equals_base(name: str) -> None:
    _, _, plain = base(name)
    config, params = adapted(name)
    applied = run(params, config, TOKENS)
    assert np.abs(applied - plain).max() > 0.1, "the adapters should matter"
    merged_config, merged = merge_lora(config, params)
    assert merged_config == CONFIGS[name]
    np.testing.assert_allclose(
        jax.nn.log_softmax(run(merged, merged_config, TOKENS)),
        jax.nn.log_softmax(applied),
        atol=1e-5,
    )
    off_config, off = remove_lora(config, params)
    np.testing.assert_array_equal(run(off, off_config, TOKENS), plain)


@pytest.mark.parametrize(
    "name",
    ["qwen2", *(pytest.param(name, marks=pytest.mark.slow) for name in CONFIGS if name != "qwen2")],
)
def test_each_target_alone_matters_and_only_it_is_added(name: str) -> None:
    """Also where it is fused with another: the other kernel stays as it was."""
    _, params, plain = base(name)
    for target in lora_targets(CONFIGS[name]):
        config, some = adapted(name, (target,))
        merged_config, merged = merge_lora(config, some)
        before, after = flatten_dict(params), flatten_dict(merged)
        changed = [path for path in before if not np.array_equal(before[path], after[path])]
        nodes = {path[-1] if target == "experts" else path[-2] for path in changed}
        fused = {"k": "kv", "v": "kv", "gate": "gate_up", "up": "gate_up"}
        assert nodes == (
            {"gate_up", "down"} if target == "experts" else {fused.get(target, target)}
        )
        if target in fused:
            for path in changed:
                other = 0 if target in ("v", "up") else 1
                np.testing.assert_array_equal(before[path][:, other], after[path][:, other])
        if target in ("v", "up", "kv_b", "experts"):
            found = run(some, config, TOKENS)
            assert np.abs(found - plain).max() > 1e-3
            np.testing.assert_allclose(
                found, run(merged, merged_config, TOKENS), atol=1e-5 * np.abs(found).max()
            )


@pytest.mark.slow
def test_adapters_on_a_mesh() -> None:
    config, params = adapted("deepseek_v2")
    mesh = make_mesh({"fsdp": 2, "tensor": 2, "expert": 2})
    placed = jax.device_put(
        params, tree_shardings(param_axes(config), mesh, abstract_params(config))
    )
    found = run(placed, config, TOKENS)
    np.testing.assert_allclose(found, run(params, config, TOKENS), atol=1e-4, rtol=1e-4)


def test_only_the_adapters_take_gradients_over_a_quantised_base() -> None:
    config, params, _ = base("qwen2")
    config, params = quantise_params(config, params, "int4")
    lora = Lora(rank=2, alpha=4.0, targets=("q", "v"))
    config, params = add_lora(config, params, lora, jax.random.key(0))
    adapters, frozen = split_lora(params)

    def loss(adapters: Params) -> jax.Array:
        return (logits(join_lora(adapters, frozen), config, TOKENS) ** 2).mean()

    grads = flatten_dict(jax.jit(jax.grad(loss), compiler_options=QUICK)(adapters))
    assert len(grads) == 4
    for path, grad in grads.items():
        # One half of each adapter is still zero, so the other has no gradient yet.
        assert bool(jnp.any(grad != 0)) == (path[-1] == "lora_b"), path


@pytest.mark.parametrize("places", [(0, 1), (1,)])
def test_many_rows_meet_the_whole_kernel_and_the_gradients_are_the_same(places: Any) -> None:
    keys = jax.random.split(jax.random.key(3), 5)
    x, kernel, down, up, weights = (
        jax.random.normal(key, shape)
        for key, shape in zip(
            keys,
            [(5, 7, 6), (2 * 4, 6), (len(places), 3, 6), (len(places), 4, 3), (5, 7, 8)],
            strict=True,
        )
    )

    def whole(x: jax.Array, kernel: jax.Array, down: jax.Array, up: jax.Array) -> jax.Array:
        out = adapted_product(x, kernel, Adapter(down, up, places), 2)
        return jnp.sum(jnp.sin(out) * weights)

    def apart(x: jax.Array, kernel: jax.Array, down: jax.Array, up: jax.Array) -> jax.Array:
        out = (x @ kernel.T).reshape(5, 7, 2, 4)
        for index, place in enumerate(places):
            out = out.at[:, :, place].add(x @ down[index].T @ up[index].T)
        return jnp.sum(jnp.sin(out.reshape(5, 7, 8)) * weights)

    got = jax.value_and_grad(whole, argnums=(0, 1, 2, 3))(x, kernel, down, up)
    wanted = jax.value_and_grad(apart, argnums=(0, 1, 2, 3))(x, kernel, down, up)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


def test_adapters_cost_what_their_own_gradients_do() -> None:
    """Products with a frozen kernel: one forwards, one backwards, and none for its gradient."""
    rows, size, rank = 512, 256, 4
    shapes = ((rows, size), (size, size), (1, rank, size), (1, size, rank))
    x, kernel, down, up = (jnp.ones(shape) for shape in shapes)

    def loss(x: jax.Array, down: jax.Array, up: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(adapted_product(x, kernel, Adapter(down, up, (0,)), 1)))

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(x, down, up).compile()
    cost = compiled.cost_analysis()
    assert cost is not None
    assert 2.0 <= cost["flops"] / (2 * rows * size * size) <= 2.25


def test_the_gradient_of_gate_and_up() -> None:
    config = CONFIGS["qwen2"]
    both = jax.random.normal(jax.random.key(0), (3, 2, 5))

    def pair(both: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(gated_pair(config, both)))

    def plain(both: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(jax.nn.silu(both[:, 0]) * both[:, 1]))

    np.testing.assert_allclose(jax.grad(pair)(both), jax.grad(plain)(both), rtol=1e-5, atol=1e-6)


def test_wrong_targets() -> None:
    config, params, _ = base("qwen2")
    with pytest.raises(UsageError, match="LoRA targets w; it can target q, k, v, out"):
        Lora(rank=2, alpha=4.0, targets=("w",))
    with pytest.raises(UsageError, match="rank is 0"):
        Lora(rank=0, alpha=4.0, targets=("q",))
    lora = Lora(rank=2, alpha=4.0, targets=("q", "experts"))
    with pytest.raises(UsageError, match="a qwen2 decoder has no projection 'experts'"):
        add_lora(config, params, lora, jax.random.key(0))
    more = add_lora(config, params, Lora(rank=2, alpha=4.0, targets=("q",)), jax.random.key(0))
    with pytest.raises(UsageError, match="adapters already"):
        add_lora(*more, lora, jax.random.key(0))


# --- quantised kernels ---


def test_codes_by_hand() -> None:
    codes, scales = quantise("int8", jnp.asarray([[1.27, -0.6, 0.004, 0.0]]))
    np.testing.assert_array_equal(codes, [[127, -60, 0, 0]])
    np.testing.assert_allclose(scales, [[0.01]], rtol=1e-6)
    kernel = 3.0 * jnp.asarray([NORMAL_FLOAT])
    codes, scales = quantise("int4", kernel)
    np.testing.assert_array_equal(codes, [[16 * (2 * i + 1) + 2 * i for i in range(8)]])
    np.testing.assert_array_equal(scales, [[3.0]])
    np.testing.assert_allclose(dequantise("int4", codes, scales), kernel, rtol=1e-6)
    np.testing.assert_array_equal(
        dequantise("int4", *quantise("int4", jnp.zeros((2, 4)))), jnp.zeros((2, 4))
    )


@pytest.mark.parametrize(("quantization", "worst"), [("int8", 1 / 254), ("int4", 0.16)])
def test_error_is_within_half_a_step_of_each_block(quantization: Any, worst: float) -> None:
    kernel = jax.random.normal(jax.random.key(0), (3, 5, 192))
    codes, scales = quantise(quantization, kernel)
    found = dequantise(quantization, codes, scales)
    blocks = kernel.reshape(3, 5, -1, 192 // scales.shape[-1])
    top = jnp.abs(blocks).max(axis=-1, keepdims=True)
    error = jnp.abs(found.reshape(blocks.shape) - blocks) / top
    assert worst / 4 < float(error.max()) <= worst * 1.001


@pytest.mark.parametrize("quantization", ["int8", "int4"])
@pytest.mark.parametrize("name", ["qwen2", pytest.param("deepseek_v3", marks=pytest.mark.slow)])
def test_quantised_decoders(name: str, quantization: Any) -> None:
    config, params, wanted = base(name)
    small_config, small = quantise_params(config, params, quantization)
    # What `abstract_params` promises is what there is, so that it can be restored and placed.
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), abstract_params(small_config))
    assert shapes == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), small)
    found = run(small, small_config, TOKENS)
    plain_config, plain = dequantise_params(small_config, small)
    assert plain_config == config
    np.testing.assert_allclose(found, run(plain, config, TOKENS), atol=1e-4, rtol=1e-4)
    error = np.abs(np.asarray(found) - wanted).mean() / wanted.std()
    assert 0 < error < (0.1 if quantization == "int8" else 0.6)


@pytest.mark.parametrize(("quantization", "bits"), [("int8", 8 + 32 / 512), ("int4", 4 + 32 / 64)])
def test_a_quantised_base_takes_the_bytes_it_should(quantization: Any, bits: float) -> None:
    config = family_config("llama", **(SIZES | {"width": 512, "mlp_dim": 512, "head_dim": 512}))
    params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), abstract_params(config))
    small_config, small = quantise_params(config, params, quantization)
    flat = flatten_dict(params)
    kernels = sum(leaf.size for path, leaf in flat.items() if path[-1] == "kernel")
    others = sum(leaf.nbytes for path, leaf in flat.items() if path[-1] != "kernel")
    taken = sum(
        shard.data.nbytes for leaf in jax.tree.leaves(small) for shard in leaf.addressable_shards
    )
    assert taken - others == kernels * bits / 8
    with pytest.raises(UsageError, match="quantised already"):
        quantise_params(small_config, small, "int8")
