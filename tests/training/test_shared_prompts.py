"""Prompts that are computed once for their rollouts, against rows that are computed one by one."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grm_jax.distributed import make_mesh, on_mesh, tree_shardings
from grm_jax.models import DecoderConfig, Experts, Latent, Params, branches, param_axes
from grm_jax.models.config import GLOBAL_WINDOW, family_config
from grm_jax.training.grpo import Experience, kept_together, make_loss
from grm_jax.training.losses import loss_denominator
from grm_jax.training.model import completion_logprobs, next_token_logprobs
from tests.training import plain, tiny

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "num_layers": 2,
    "width": 32,
    "num_heads": 4,
    "num_kv_heads": 2,
    "mlp_dim": 48,
    "max_context": 64,
}
EXPERTS = Experts(count=4, per_token=2, mlp_dim=16, shared_dim=16, dense_layers=1)
CONFIGS: dict[str, DecoderConfig] = {
    "llama": family_config("llama", **SIZES),
    "remat": family_config("llama", **SIZES, remat=True),
    "gemma2": family_config(
        "gemma2",
        **SIZES,
        windows=(5, GLOBAL_WINDOW),
        attention_softcap=3.0,
        logit_softcap=4.0,
        remat=True,
    ),
    "deepseek_v2": family_config(
        "deepseek_v2",
        **{**SIZES, "num_kv_heads": 4},
        latent=Latent(query_rank=8, rank=12, nope_dim=8, rope_dim=4, value_dim=8),
        experts=EXPERTS,
    ),
    "deepseek_v3": family_config(
        "deepseek_v3",
        **{**SIZES, "num_kv_heads": 4},
        latent=Latent(query_rank=None, rank=12, nope_dim=8, rope_dim=4, value_dim=8),
        experts=dataclasses.replace(EXPERTS, gating="sigmoid", groups=2, normalise=True),
    ),
    "adapters": tiny.LORA,
}
LOSS = dataclasses.replace(plain.LOSS, importance_cap=1.5, max_length=7, temperature=0.7)
# Compiling takes nearly all the time of these tests.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@functools.cache
def params_of(name: str) -> Params:
    return jax.tree.map(jnp.asarray, tiny.random_params(CONFIGS[name]))


def gradients(loss: Any) -> Any:
    return jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=QUICK)


@functools.cache
def one_by_one(name: str, *, of_policy: bool) -> tuple[Experience, Any]:
    """A micro-batch, and loss, metrics and gradients of its rows one by one.

    Args:
      name: Of the decoder.
      of_policy: Whether the policy that sampled is the one that learns.
    """
    batch = plain.experience(CONFIGS[name].vocab_size)
    if of_policy:
        batch = batch._replace(old_logprobs=None)
    part = jax.tree.map(lambda leaf: leaf[0], batch)
    found = gradients(lambda params: plain.loss(params, CONFIGS[name], part, LOSS))
    return part, found(params_of(name))


def assert_same(found: Any, wanted: Any) -> None:
    (value, metrics), gradient = found
    (wanted_value, wanted_metrics), wanted_gradient = wanted
    assert float(value) == pytest.approx(float(wanted_value), rel=1e-5)
    assert set(metrics) == set(wanted_metrics)
    for key, number in wanted_metrics.items():
        assert float(metrics[key]) == pytest.approx(float(number), rel=1e-5, abs=1e-5), key
    for path, leaf in jax.tree_util.tree_leaves_with_path(wanted_gradient):
        ours = functools.reduce(lambda tree, key: tree[key.key], path, gradient)
        most = float(jnp.max(jnp.abs(leaf)))
        assert most > 1e-3 or path[-1].key == "router_bias", path
        np.testing.assert_allclose(ours, leaf, rtol=1e-5, atol=1e-5 * most, err_msg=str(path))


@pytest.mark.parametrize(
    ("name", "rows"), [*((name, 512) for name in CONFIGS), ("llama", 3), ("gemma2", 3)]
)
def test_loss_metrics_and_gradients_are_those_of_rows_one_by_one(
    name: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of queries in one block or in blocks of three, behind other or the same old policies."""
    monkeypatch.setattr(branches, "ROWS", rows)
    part, wanted = one_by_one(name, of_policy=rows == 3)
    config, mesh = CONFIGS[name], make_mesh(devices=jax.devices()[:1])
    denominator = loss_denominator(part.mask.reshape(-1, 7), aggregate="sequence")
    loss = make_loss(config, mesh, LOSS, chunk=24)
    found = gradients(lambda params: loss(params, part, denominator, jax.random.key(0)))
    assert_same(found(params_of(name)), wanted)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("gemma2", {"data": 2, "fsdp": 2, "tensor": 2}),
        ("deepseek_v2", {"fsdp": 2, "tensor": 2, "expert": 2}),
        ("adapters", {"fsdp": 4, "tensor": 2}),
    ],
)
def test_on_a_mesh(name: str, shape: dict[str, int]) -> None:
    part, wanted = one_by_one(name, of_policy=False)
    config, mesh = CONFIGS[name], make_mesh(shape)
    params = params_of(name)
    params = jax.device_put(params, tree_shardings(param_axes(config), mesh, params))
    loss = make_loss(config, mesh, LOSS, chunk=24)
    with on_mesh(mesh):
        denominator = loss_denominator(part.mask.reshape(-1, 7), aggregate="sequence")
        found = gradients(lambda params: loss(params, part, denominator, jax.random.key(0)))(params)
    assert_same(found, wanted)


def test_a_prompt_costs_as_much_as_one_row() -> None:
    """Prompts of 64, 8 completions of 16 each: 64 + 8 * 16 tokens in place of 8 * (64 + 16)."""
    config = family_config("llama", **{**SIZES, "width": 64, "mlp_dim": 256, "max_context": 128})
    batch = plain.experience(64, prompts=2, group=8, size=64, time=16)
    part = jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), batch)
    tokens, lengths, _ = plain.rows(part)
    mesh = make_mesh(devices=jax.devices()[:1])

    def together(params: Params) -> jax.Array:
        return completion_logprobs(
            params, config, part.prompts, part.tokens, lengths=part.prompt_lengths, mesh=mesh
        )[0].sum()

    def apart(params: Params) -> jax.Array:
        return next_token_logprobs(
            params, config, jnp.asarray(tokens), lengths=jnp.asarray(lengths), mesh=mesh
        )[0].sum()

    params = jax.tree.map(jnp.asarray, tiny.random_params(config))
    ours, theirs = (
        jax.jit(jax.grad(one)).lower(params).compile().cost_analysis()["flops"]  # type: ignore[index]
        for one in (together, apart)
    )
    assert ours / theirs < 1.1 * (64 + 8 * 16) / (8 * (64 + 16))


@pytest.mark.parametrize(
    ("rows", "group", "parts", "together"),
    [(32, 4, 8, 4), (512, 4, 512, 1), (512, 4, 256, 2), (24, 6, 4, 6), (36, 6, 9, 2)],
)
def test_groups_are_kept_together_where_they_can_be(
    rows: int, group: int, parts: int, together: int
) -> None:
    assert kept_together(rows, group, parts) == together
