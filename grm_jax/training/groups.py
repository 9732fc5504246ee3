"""What reinforcement learning asks of a group of rollouts besides its advantages."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from grm_jax.errors import UsageError


def informative(rewards: ArrayLike) -> jax.Array:
    """Marks the rollouts of groups whose rewards differ.

    A group that is all right or all wrong has advantages of 0 and teaches nothing, but it still
    counts as rows of the batch and still feels the divergence from the reference policy. With this
    in the mask of the loss it is as if it had not been sampled (DAPO, arXiv:2503.14476). The mean
    is the share of useful groups, which is worth watching.

    Args:
      rewards: `f32[..., G]`, the rewards of each group, before anything but the rule is added.

    Returns:
      `bool[..., G]`, the same for all members of a group.
    """
    rewards = jnp.asarray(rewards)
    differ = jnp.any(rewards != rewards[..., :1], axis=-1, keepdims=True)
    return jnp.broadcast_to(differ, rewards.shape)


def overlong_penalty(
    lengths: ArrayLike, *, max_length: int, buffer: int, scale: float = 1.0
) -> jax.Array:
    """A penalty, to be added to rewards, that grows over the last tokens before the limit.

    It is 0 up to `max_length - buffer` tokens, falls in a straight line, and is `-scale` at
    `max_length` (eq 13 of DAPO, arXiv:2503.14476): being cut off does not come out of the blue.

    Args:
      lengths: `i32[...]`, tokens of each rollout.
      max_length: The limit.
      buffer: Over how many tokens before the limit the penalty grows; 1 to `max_length`.
      scale: The size of the penalty.

    Returns:
      `f32[...]`, from `-scale` to 0.

    Raises:
      UsageError: The buffer is not within the limit.
    """
    if not 1 <= buffer <= max_length:
        raise UsageError(f"buffer is {buffer}; give one from 1 to max_length={max_length}")
    over = jnp.asarray(lengths, jnp.float32) - (max_length - buffer)
    return -scale * jnp.clip(over / buffer, 0.0, 1.0)
