"""Drawing one token from logits."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

_CDF_BLOCK = 128


class Controls(NamedTuple):
    """Sampling settings that may change without recompiling; each is a scalar.

    Attributes:
      temperature: `f32[]`, at least 0; not read when sampling is greedy.
      top_p: `f32[]`, in (0, 1].
      max_new_tokens: `i32[]`.
    """

    temperature: jax.Array
    top_p: jax.Array
    max_new_tokens: jax.Array


def draw_token(
    key: jax.Array,
    logits: jax.Array,
    controls: Controls,
    *,
    mask: jax.Array | None,
    edges: tuple[jax.Array, jax.Array, jax.Array] | None,
    greedy: bool,
    top_k: int,
    nucleus: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One token of a sample.

    Args:
      key: Random key.
      logits: `f32[V]`.
      controls: Temperature and nucleus mass.
      mask: `bool[V]`, the tokens of a layout's free text; not read without `edges`.
      edges: From `grm_jax.sampling.layout.allowed_edges`; None for any token.
      greedy: Take the likeliest token.
      top_k: Sample among this many likeliest tokens; 0 for all.
      nucleus: Whether `controls.top_p` is applied.

    Returns:
      The token `i32[]`, its log-probability `f32[]` under the whole vocabulary at the temperature,
      and that under what it was drawn from (0 if greedy).
    """
    scaled = logits if greedy else logits / controls.temperature
    top = scaled.max()
    log_total = jnp.log(jnp.exp(scaled - top).sum()) + top
    kept = scaled if mask is None or edges is None else jnp.where(mask, scaled, -jnp.inf)
    kept = truncate(kept, top_k=top_k, top_p=controls.top_p if nucleus else None)
    token, log_kept = draw(key, kept, greedy=greedy)
    if edges is not None:
        free, candidates, open_ = edges
        few = jnp.where(open_, scaled[candidates], -jnp.inf)
        place, log_few = draw(key, few, greedy=greedy)
        # A sample that has ended has no edge left; what it goes on with must still be a token.
        token = jnp.where(free, token, jnp.maximum(candidates[place], 0))
        log_kept = jnp.where(free, log_kept, log_few)
    chosen = scaled[token]
    sampled = jnp.zeros_like(chosen) if greedy else chosen - log_kept
    return token, chosen - log_total, sampled


def draw(key: jax.Array, scaled: jax.Array, *, greedy: bool) -> tuple[jax.Array, jax.Array]:
    """A draw from `softmax(scaled)` and the log of the normaliser.

    One uniform number is looked up in the cumulative distribution, block by block: a pass over the
    vocabulary instead of one random number for each of its tokens.
    """
    top = scaled.max()
    if greedy:
        return scaled.argmax().astype(jnp.int32), top
    weights = jnp.exp(scaled - top)
    padded = jnp.pad(weights, (0, -weights.shape[0] % _CDF_BLOCK)).reshape(-1, _CDF_BLOCK)
    block_sums = padded.sum(axis=-1)
    cumulative = jnp.cumsum(block_sums)
    total = cumulative[-1]
    target = jax.random.uniform(key) * total
    block = _first_above(cumulative, target, block_sums)
    rest = jnp.maximum(target - (cumulative[block] - block_sums[block]), 0.0)
    inside = padded[block]
    place = _first_above(jnp.cumsum(inside), rest, inside)
    return (block * _CDF_BLOCK + place).astype(jnp.int32), jnp.log(total) + top


def _first_above(cumulative: jax.Array, target: jax.Array, weights: jax.Array) -> jax.Array:
    """First index whose cumulative weight exceeds the target; never one of zero weight."""
    index = (cumulative <= target).sum()
    positive = jnp.where(weights > 0, jnp.arange(weights.shape[0]), 0)
    return jnp.minimum(index, positive.max())


def truncate(scaled: jax.Array, *, top_k: int = 0, top_p: jax.Array | None = None) -> jax.Array:
    """Logits `f32[V]` with all but the likeliest tokens at -inf.

    Args:
      scaled: Logits after the temperature.
      top_k: Keep this many (and what ties with the last of them); 0 keeps all.
      top_p: Keep the fewest likeliest tokens whose probability, among those `top_k` left, reaches
        this; None keeps all.
    """
    if top_k == 0 and top_p is None:
        return scaled
    ordered = jnp.sort(scaled, descending=True)
    if top_k:
        floor = ordered[min(top_k, scaled.shape[0]) - 1]
        scaled = jnp.where(scaled >= floor, scaled, -jnp.inf)
        ordered = jnp.where(ordered >= floor, ordered, -jnp.inf)
    if top_p is not None:
        probabilities = jax.nn.softmax(ordered)
        before = jnp.cumsum(probabilities) - probabilities
        floor = jnp.where(before < top_p, ordered, jnp.inf).min()
        scaled = jnp.where(scaled >= floor, scaled, -jnp.inf)
    return scaled
