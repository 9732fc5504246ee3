"""Training: log-probabilities of tokens, and the losses and group statistics made of them."""

from grm_jax.training.groups import informative, overlong_penalty
from grm_jax.training.logprobs import token_logprobs
from grm_jax.training.losses import (
    Aggregate,
    Metrics,
    Ratio,
    binary_reward_loss,
    bradley_terry_loss,
    grpo_loss,
    loss_denominator,
    sft_loss,
    truncated_importance,
)

__all__ = [
    "Aggregate",
    "Metrics",
    "Ratio",
    "binary_reward_loss",
    "bradley_terry_loss",
    "grpo_loss",
    "informative",
    "loss_denominator",
    "overlong_penalty",
    "sft_loss",
    "token_logprobs",
    "truncated_importance",
]
