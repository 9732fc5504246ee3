"""Rewards by rule for reinforcement learning, and the advantages they give."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


def outcome_reward(
    scores: ArrayLike, valid: ArrayLike, best: ArrayLike, num_responses: ArrayLike
) -> jax.Array:
    """Rewards a judgement that puts the best response strictly above all others.

    The rule of eq 11 for two or more responses, which is also the test of a correct trajectory in
    eq 10 (arXiv:2504.02495). A tie with the best is as wrong as a defeat, since a reward for ties
    would teach the model to score everything alike; the order of the others does not matter. An
    unreadable text is wrong, never neutral, so no reward for format is needed.

    With one response there is nothing to beat and this rule never holds, so the reward is -1: use
    `pointwise_outcome_reward` there.

    Args:
      scores: `f32[..., N]`, one score a response; places from `num_responses` on are ignored.
      valid: `bool[...]`, whether the scores were readable.
      best: `i32[...]`, index of the best response, in the order of `scores`; the reward
        is -1 where there is no such response.
      num_responses: `i32[...]` or a scalar, how many responses there are.

    Returns:
      `f32[...]`, +1 or -1.
    """
    scores = jnp.asarray(scores, jnp.float32)
    best, num_responses = jnp.asarray(best), jnp.asarray(num_responses)
    place = jnp.arange(scores.shape[-1])
    present = place < num_responses[..., None]
    is_best = place == best[..., None]
    best_score = jnp.max(scores, axis=-1, where=present & is_best, initial=-jnp.inf)
    rival_score = jnp.max(scores, axis=-1, where=present & ~is_best, initial=-jnp.inf)
    # A comparison with NaN is false, so a score that is not a number cannot win.
    won = (best_score > rival_score) & (num_responses >= 2)
    return jnp.where(jnp.asarray(valid) & won, 1.0, -1.0).astype(jnp.float32)


def pointwise_outcome_reward(score: ArrayLike, valid: ArrayLike, truth: ArrayLike) -> jax.Array:
    """Rewards the score of a single response for being the true one.

    The rule of eqs 10 and 11 for one response (arXiv:2504.02495), where the truth is 1 for a
    correct answer to a verifiable question and 0 for a wrong one.

    Args:
      score: `f32[...]`, the score of the only response.
      valid: `bool[...]`, whether the score was readable.
      truth: `f32[...]` or `i32[...]`, the score it should have.

    Returns:
      `f32[...]`, +1 where the score is readable and equals the truth, otherwise -1.
    """
    right = jnp.asarray(valid) & (jnp.asarray(score) == jnp.asarray(truth))
    return jnp.where(right, 1.0, -1.0).astype(jnp.float32)


def group_advantages(
    rewards: ArrayLike, *, floor: float = 1e-3, deviation: bool = True
) -> jax.Array:
    """Standardises the rewards of each group of rollouts of one prompt.

    The advantage of eq 15 (arXiv:2504.02495), the reward less the mean of its group over their
    standard deviation. The paper does not say which deviation: this is the population's,
    `sqrt(mean((r - mean)**2))`, so the advantages of a group have mean square 1 at any group size.
    Implementations that divide by the sample's deviation get values smaller by a factor of
    `sqrt(1 - 1/G)`.

    A group of equal rewards has nothing to teach and gets exactly 0, never a rounding error blown
    up by a deviation near 0.

    Args:
      rewards: `f32[..., G]`, the rewards of each group.
      floor: the least deviation to divide by; no group of rewards of +1 and -1 comes near it.
      deviation: whether to divide by the deviation. Without it a group that is nearly all right or
        all wrong counts for no more than its rewards say (Dr. GRPO, arXiv:2503.20783).

    Returns:
      `f32[..., G]`, the advantages.
    """
    rewards = jnp.asarray(rewards, jnp.float32)
    # Of equal rewards, differences from one member are exactly 0; those from the mean may not be.
    shifted = rewards - rewards[..., :1]
    centred = shifted - jnp.mean(shifted, axis=-1, keepdims=True)
    if not deviation:
        return centred
    variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
    # The floor stands inside the root, whose gradient at 0 is infinite.
    return centred / jnp.sqrt(jnp.maximum(variance, floor**2))
