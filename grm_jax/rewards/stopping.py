"""When the rest of the samples need not be drawn, as they would hardly change the winner."""

import functools

import jax
import jax.numpy as jnp
from jax.scipy.special import betainc
from jax.typing import ArrayLike

STATED_ERROR = 0.02
"""The chance of another winner at which sampling stops, unless said otherwise."""

_FIRST_LOOK = 4
# Imagined samples that prefer none, and the standard deviation of a difference in them.
_PRIOR_SAMPLES = 2.0
_PRIOR_DEVIATION = 2.0


def looks(samples: int) -> tuple[int, ...]:
    """After how many samples to ask whether more are needed.

    Each round adds an even number, so that balanced orders stay balanced, and about a quarter of
    what was drawn, so that there are few of them.

    Args:
      samples: K, the most samples.

    Returns:
      Rising numbers, all below K.
    """
    found, drawn = [], _FIRST_LOOK
    while drawn < samples:
        found.append(drawn)
        drawn += 2 * max(1, drawn // 8)
    return tuple(found)


@functools.partial(jax.jit, static_argnames="span")
def flip_chance(
    scores: ArrayLike,
    valid: ArrayLike,
    num_responses: ArrayLike,
    left: ArrayLike,
    *,
    span: float = 9.0,
) -> jax.Array:
    """The chance that further samples put another response first, as those drawn suggest.

    For each rival of the leader, the difference of their scores is taken to be normal with unknown
    mean and variance, about which two imagined samples without preference and with a deviation of 2
    know a little already: they keep a few equal samples from looking like certainty. The sum of the
    differences to come then follows Student's t. The rivals' chances are added up. Where even the
    widest difference in every sample left could not make up for the lead, the chance is 0.

    A rule that stops where this is at most e changes the winner in at most a share e of the
    comparisons that a judge meets, as long as it has a preference in most of them. Of comparisons
    among which it has none at all, it may change twice as many.

    Args:
      scores: `f32[..., K, N]`, in input order, of the samples drawn so far.
      valid: `bool[..., K]`, which samples were drawn and could be read; the scores of the others
        may be anything.
      num_responses: `i32[...]` or a scalar, responses of each comparison.
      left: `i32[...]` or a scalar, samples still to draw.
      span: The widest difference of two scores.

    Returns:
      `f32[...]`, 1 where nothing could be read or the lead is shared.
    """
    scores, valid = jnp.asarray(scores, jnp.float32), jnp.asarray(valid)
    scores = jnp.where(valid[..., None], scores, 0.0)
    place = jnp.arange(scores.shape[-1])
    present = place < jnp.asarray(num_responses)[..., None]
    totals = jnp.where(present, scores.sum(axis=-2), -jnp.inf)
    leader = place == totals.argmax(axis=-1)[..., None]
    ahead = jnp.sum(scores, axis=-1, where=leader[..., None, :], keepdims=True) - scores
    seen = valid.sum(axis=-1)[..., None] + _PRIOR_SAMPLES
    lead = jnp.sum(ahead, axis=-2)
    mean = lead / seen
    off = jnp.square(ahead - mean[..., None, :])
    squares = jnp.sum(off, axis=-2, where=valid[..., None])
    squares += _PRIOR_SAMPLES * (_PRIOR_DEVIATION**2 + jnp.square(mean))
    freedom = seen - 1
    left = jnp.asarray(left)[..., None]
    # What is to come has its own noise, and the mean is known only from what was seen.
    variance = squares / freedom * (left + jnp.square(left) / seen)
    behind = jnp.square(lead + left * mean)
    # The lower tail of Student's t, at minus the root of behind / variance.
    chance = 0.5 * betainc(freedom / 2, 0.5, freedom * variance / (freedom * variance + behind))
    chance = jnp.where(lead > span * left, 0.0, jnp.where(lead > 0, chance, 1.0))
    summed = jnp.sum(chance, axis=-1, where=present & ~leader)
    return jnp.where(valid.any(axis=-1), jnp.minimum(summed, 1.0), 1.0)
