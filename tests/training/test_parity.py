"""Losses and their gradients against TRL's trainers and PyTorch, on the same arrays.

TRL computes its losses in methods of trainers. They are called here on stand-ins that hold the
settings and answer for a model with the arrays, so the code that runs is TRL's own.
"""

import collections
import types
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from trl import GRPOTrainer, RewardTrainer
from trl.rewards import get_soft_overlong_punishment

from grm_jax.training import (
    binary_reward_loss,
    bradley_terry_loss,
    grpo_loss,
    loss_denominator,
    overlong_penalty,
    truncated_importance,
)

ROWS, LENGTH = 6, 11
MAX_LENGTH = 16
LOSS_TYPES = {"grpo": "sequence", "bnpo": "token", "dapo": "token", "dr_grpo": "sum"}
"""TRL's names of ways to average, and ours."""

ACCELERATOR = types.SimpleNamespace(
    num_processes=1,
    gather=lambda values: values,
    gather_for_metrics=lambda values: values,
    reduce=lambda values, reduction: values,
)


class Batch(NamedTuple):
    """Arrays of a batch, `[B, T]`, and the advantages, `[B]`."""

    logprobs: np.ndarray
    old: np.ndarray
    ref: np.ndarray
    weights: np.ndarray
    mask: np.ndarray
    advantages: np.ndarray


def random_batch(seed):
    rng = np.random.default_rng(seed)
    shape = ROWS, LENGTH
    old = -rng.gamma(1.0, 1.0, shape)
    lengths = rng.integers(1, LENGTH + 1, ROWS)
    lengths[0] = LENGTH
    arrays = (
        old + 0.3 * rng.normal(size=shape),
        old,
        old + 0.5 * rng.normal(size=shape),
        rng.gamma(2.0, 0.5, shape),
    )
    mask = np.arange(LENGTH) < lengths[:, None]
    advantages = rng.normal(size=ROWS).astype(np.float32)
    return Batch(*(array.astype(np.float32) for array in arrays), mask, advantages)


def trl_loss(batch, *, loss_type, clip, clip_high, beta, ratio, old, weights):
    """Loss, gradient by the log-probabilities, and metrics of TRL's trainer."""
    logprobs = torch.tensor(batch.logprobs, requires_grad=True)
    trainer = types.SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (
            logprobs,
            torch.zeros_like(logprobs),
            None,
        ),
        _entropy_bonus_enabled=False,
        _metrics={"train": collections.defaultdict(list)},
        accelerator=ACCELERATOR,
        args=types.SimpleNamespace(
            use_bias_correction_kl=False, delta=None, steps_per_generation=1
        ),
        aux_loss_enabled=False,
        beta=beta,
        current_gradient_accumulation_steps=1,
        epsilon_high=clip_high,
        epsilon_low=clip,
        importance_sampling_level=ratio,
        loss_type=loss_type,
        max_completion_length=MAX_LENGTH,
        model=types.SimpleNamespace(training=True),
        off_policy_mask_threshold=None,
        top_entropy_quantile=1.0,
        use_vllm=weights,
        vllm_importance_sampling_correction=weights,
    )
    ids = torch.zeros(batch.mask.shape, dtype=torch.long)
    mask = torch.tensor(batch.mask, dtype=torch.long)
    inputs = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": mask[:, :1],
        "completion_ids": ids,
        "completion_mask": mask,
        "advantages": torch.tensor(batch.advantages),
        "num_items_in_batch": mask.sum(),
        "ref_per_token_logps": torch.tensor(batch.ref),
        "importance_sampling_ratio": torch.tensor(batch.weights),
        "old_per_token_logps": torch.tensor(batch.old) if old else None,
    }
    loss = GRPOTrainer._compute_loss(trainer, None, inputs)
    loss.backward()
    metrics = {name: values[0] for name, values in trainer._metrics["train"].items()}
    return loss.item(), logprobs.grad.numpy(), metrics


def our_loss(batch, *, loss_type, clip, clip_high, beta, ratio, old, weights, denominator=None):
    def function(logprobs):
        return grpo_loss(
            logprobs=logprobs,
            old_logprobs=batch.old if old else None,
            ref_logprobs=batch.ref if beta else None,
            advantages=batch.advantages,
            mask=batch.mask,
            clip=clip,
            clip_high=clip_high,
            beta=beta,
            aggregate=LOSS_TYPES[loss_type],
            ratio=ratio,
            max_length=MAX_LENGTH,
            importance_weights=batch.weights if weights else None,
            denominator=denominator,
        )

    (loss, metrics), gradient = jax.value_and_grad(function, has_aux=True)(
        jnp.asarray(batch.logprobs)
    )
    return loss, gradient, metrics


def assert_close(ours, theirs):
    for mine, other in zip(ours[:2], theirs[:2], strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize(
    ("clip", "clip_high", "beta"),
    [(0.2, 0.2, 0.0), (0.2, 0.2, 0.08), (0.1, 0.28, 0.0), (0.05, 0.1, 1.0)],
)
@pytest.mark.parametrize(("old", "weights"), [(True, False), (False, False), (True, True)])
def test_grpo_equals_trl(loss_type, ratio, clip, clip_high, beta, old, weights):
    batch = random_batch(0)
    settings = {
        "loss_type": loss_type,
        "clip": clip,
        "clip_high": clip_high,
        "beta": beta,
        "ratio": ratio,
        "old": old,
        "weights": weights,
    }
    ours, theirs = our_loss(batch, **settings), trl_loss(batch, **settings)
    assert_close(ours, theirs)
    assert np.any(theirs[1])
    if beta:
        np.testing.assert_allclose(ours[2]["kl"], theirs[2]["kl"], rtol=1e-5)
    if ratio == "token":  # TRL counts rows and not tokens where the ratio is the row's
        for name, other in (("clip_low", "low_mean"), ("clip_high", "high_mean")):
            np.testing.assert_allclose(
                ours[2][name], theirs[2][f"clip_ratio/{other}"], rtol=1e-5, atol=1e-7
            )
            assert (theirs[2][f"clip_ratio/{other}"] > 0) == old


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_grpo_equals_trl_with_empty_rows(loss_type):
    """TRL counts a row that is masked out among the rows; with a denominator so do we."""
    batch = random_batch(1)
    batch.mask[2] = False
    settings = {
        "loss_type": loss_type,
        "clip": 0.2,
        "clip_high": 0.2,
        "beta": 0.08,
        "ratio": "token",
        "old": True,
        "weights": False,
    }
    token = LOSS_TYPES[loss_type] == "token"
    denominator = loss_denominator(batch.mask, aggregate="token") if token else ROWS
    assert_close(our_loss(batch, **settings, denominator=denominator), trl_loss(batch, **settings))


@pytest.mark.parametrize("centre", [0.0, 0.01])
@pytest.mark.parametrize("with_margin", [False, True])
def test_bradley_terry_equals_trl(with_margin, centre):
    rng = np.random.default_rng(2)
    chosen, rejected, margin = 3 * rng.normal(size=(3, 9)).astype(np.float32)
    rewards = torch.tensor(np.concatenate([chosen, rejected]), requires_grad=True)
    trainer = types.SimpleNamespace(
        _metrics={"train": collections.defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        accelerator=ACCELERATOR,
        args=types.SimpleNamespace(center_rewards_coefficient=centre),
        model=types.SimpleNamespace(training=True),
    )
    inputs = {"attention_mask": torch.ones(18, 1)}
    if with_margin:
        inputs["margin"] = torch.tensor(margin)

    def model(**_):
        return types.SimpleNamespace(logits=rewards[:, None])

    theirs = RewardTrainer.compute_loss(trainer, model, inputs)
    theirs.backward()

    def function(chosen, rejected):
        return bradley_terry_loss(
            chosen=chosen,
            rejected=rejected,
            margin=margin if with_margin else None,
            centre=centre,
        )

    (ours, metrics), gradients = jax.value_and_grad(function, argnums=(0, 1), has_aux=True)(
        chosen, rejected
    )
    np.testing.assert_allclose(ours, theirs.item(), rtol=1e-5)
    np.testing.assert_allclose(np.concatenate(gradients), rewards.grad, rtol=1e-5, atol=1e-7)
    recorded = trainer._metrics["train"]
    np.testing.assert_allclose(metrics["accuracy"], recorded["accuracy"][0], rtol=1e-5)
    np.testing.assert_allclose(metrics["gap"], recorded["margin"][0], rtol=1e-5, atol=1e-6)


def test_binary_reward_equals_torch():
    rng = np.random.default_rng(3)
    logits = (10 * rng.normal(size=20)).astype(np.float32)
    labels = (rng.random(20) < 0.3).astype(np.float32)
    parameter = torch.tensor(logits, requires_grad=True)
    theirs = torch.nn.functional.binary_cross_entropy_with_logits(parameter, torch.tensor(labels))
    theirs.backward()
    ours, gradient = jax.value_and_grad(
        lambda logits: binary_reward_loss(logits=logits, labels=labels)[0]
    )(logits)
    np.testing.assert_allclose(ours, theirs.item(), rtol=1e-5)
    np.testing.assert_allclose(gradient, parameter.grad, rtol=1e-5, atol=1e-7)


def test_overlong_penalty_equals_trl():
    lengths = np.arange(0, 130, 3)
    punish = get_soft_overlong_punishment(max_completion_len=100, soft_punish_cache=20)
    theirs = punish([[0] * int(length) for length in lengths])
    ours = overlong_penalty(lengths, max_length=100, buffer=20)
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_truncated_importance_in_the_loss():
    """From the sampler's log-probabilities to the loss, as TRL weights vLLM's samples."""
    batch = random_batch(4)
    sampler = batch.old + 0.5 * np.sin(np.arange(LENGTH, dtype=np.float32))
    capped = np.minimum(np.exp(batch.old - sampler), 1.3)
    weights, metrics = truncated_importance(
        logprobs=batch.old, sampler_logprobs=sampler, mask=batch.mask, cap=1.3
    )
    assert 0 < metrics["importance_capped"] < 1
    settings = {
        "loss_type": "grpo",
        "clip": 0.2,
        "clip_high": 0.2,
        "beta": 0.08,
        "ratio": "token",
        "old": True,
        "weights": True,
    }
    ours = our_loss(batch._replace(weights=np.asarray(weights)), **settings)
    assert_close(ours, trl_loss(batch._replace(weights=capped), **settings))
