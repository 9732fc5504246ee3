"""Attention over a sequence, or over parallel samples, and the cached segments before it.

A query attends to several `Segment`s of cached keys and values. Each part is reduced on its own
to a maximum, a sum of exponentials and a weighted sum of values, and the parts are then joined
exactly by log-sum-exp. That is what keeps samples cheap: the prompt is one segment which all
samples of a row share, so that their k queries meet its keys in one matrix product, while what each
sample has written is a segment of its own.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from grm_jax.models.branches import branched_attention
from grm_jax.models.kernels import causal_attention

KeysValues = tuple[Any, Any]
"""Keys and values: arrays of one layer or stack, or tuples over all; values may be None."""

QUERY_BLOCK = 512
"""Queries scored at once in a long sequence: bounds memory and skips keys that lie ahead."""


class Segment(NamedTuple):
    """Keys and values of consecutive tokens, in one layer or in all of them.

    Over all layers, keys and values are tuples: of one array for each stack of layers, with a
    leading axis for its layers, or of one array a layer where layers are not scanned.

    The batch axes are `[B]` for tokens that a whole row attends to, or `[B, K]` where each of K
    parallel samples has its own.

    Attributes:
      keys: `[..., batch, kv_heads, head_dim, S]`; the transpose makes the score product contiguous.
      values: `[..., batch, kv_heads, S, value_dim]`, or None where the keys are the values too.
      start: `i32[batch]`, position of the first token.
      length: `i32[batch]`, how many of the S tokens are there; the rest is padding.
    """

    keys: Any
    values: Any
    start: jax.Array
    length: jax.Array


class _Part(NamedTuple):
    """Attention to one segment before it is joined: all float32, last axis 1, 1 and head_dim."""

    top: jax.Array
    total: jax.Array
    mixed: jax.Array


class Bounds(NamedTuple):
    """Where the current tokens and the cached segments begin and end; the same in every layer.

    Attributes:
      start: `i32[B]`, position of the first current token (`[B, K]` for parallel samples).
      length: `i32[B]`, real current tokens (`[B, K]` for parallel samples).
      past: For each shared segment, its start and length, `i32[B]`.
      own: The start and length of the samples' own segment, `i32[B, K]`, or None.
      segment_ids: `i32[B, T]`, where rows hold several sequences that do not see one another.
      branches: `i32[B, G, T']`, positions of the last `G * T'` tokens where these are G texts that
        follow those before them and do not see one another; `length` is then of what they follow.
    """

    start: jax.Array
    length: jax.Array
    past: tuple[tuple[jax.Array, jax.Array], ...]
    own: tuple[jax.Array, jax.Array] | None
    segment_ids: jax.Array | None = None
    branches: jax.Array | None = None


class Cache(NamedTuple):
    """Cached keys and values that go with `Bounds`, in one layer or in all."""

    past: tuple[KeysValues, ...]
    own: KeysValues | None

    def at(self, index: int) -> "Cache":
        """That of one stack, or of one layer where layers are not scanned."""
        own = None if self.own is None else (self.own[0][index], self.own[1][index])
        return Cache(tuple((keys[index], values[index]) for keys, values in self.past), own)


def cached_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array | None,
    bounds: Bounds,
    cache: Cache,
    window: jax.Array,
    windows: tuple[int, ...],
    softcap: float | None = None,
) -> tuple[jax.Array, KeysValues]:
    """Attention of one layer, of consecutive tokens or of parallel samples as the cache says.

    Args:
      query: `[B, T, heads, head_dim]` (`[B, K, …]` for parallel samples), scaled and rotated.
      key: `[B, T, kv_heads, head_dim]`, rotated.
      value: `[B, T, kv_heads, value_dim]`, or None where the keys are the values too.
      bounds: Where tokens and segments begin and end.
      cache: Earlier keys and values.
      window: `i32[]`, how many tokens back a query sees, itself included.
      windows: The values that `window` may take.
      softcap: Scores are kept within this by a tanh; None for no cap.

    Returns:
      `[B, T, heads, value_dim]`, and the keys and values of these tokens, to be cached.
    """
    past = tuple(Segment(*kv, *bound) for kv, bound in zip(cache.past, bounds.past, strict=True))
    if cache.own is not None and bounds.own is not None:
        names = ("batch", None, "kv_heads", "head_dim")
        key, value = _constrain(key, names), _constrain(value, names)
        own = Segment(*cache.own, *bounds.own)
        mixed = attend_parallel(query, key, value, past, own, window, softcap)
        return mixed, (key, value)
    keys = _constrain(key.transpose(0, 2, 3, 1), ("batch", "kv_heads", "head_dim", "length"))
    values = None if value is None else value.transpose(0, 2, 1, 3)
    values = _constrain(values, ("batch", "kv_heads", "length", "head_dim"))
    if value is not None and not past:
        mixed = self_attention(query, key, value, bounds, window, windows, softcap)
        return mixed, (keys, values)
    current = Segment(keys, values, bounds.start, bounds.length)
    return attend(query, current, past, window, softcap), (keys, values)


def self_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bounds: Bounds,
    window: jax.Array,
    windows: tuple[int, ...],
    softcap: float | None = None,
) -> jax.Array:
    """Attention of tokens with nothing before them; arguments as of `cached_attention`.

    Returns:
      `[B, T, heads, value_dim]`.
    """
    if bounds.branches is not None:
        return branched_attention(
            query,
            key,
            value,
            length=bounds.length,
            positions=bounds.branches,
            window=window,
            windows=windows,
            softcap=softcap,
        )
    return causal_attention(
        query,
        key,
        value,
        length=bounds.length,
        window=window,
        windows=windows,
        softcap=softcap,
        segment_ids=bounds.segment_ids,
    )


def _constrain(x: Any, names: tuple[str | None, ...]) -> Any:
    return None if x is None else nn.with_logical_constraint(x, names)


def attend(
    query: jax.Array,
    current: Segment,
    past: tuple[Segment, ...],
    window: jax.Array,
    softcap: float | None = None,
) -> jax.Array:
    """Attends to the past segments and causally to the current one.

    Args:
      query: `[B, T, heads, head_dim]`, already scaled and rotated.
      current: Keys and values of the same `T` tokens as the queries.
      past: Segments before it; every token in them precedes every query.
      window: `i32[]`, how many tokens back a query sees, itself included.
      softcap: Scores are kept within this by a tanh; None for no cap.

    Returns:
      `[B, T, heads, value_dim]`. Rows at or beyond `current.length` hold finite nonsense.
    """
    batch, time, heads, head_dim = query.shape
    kv_heads = current.keys.shape[-3]
    grouped = query.reshape(batch, time, kv_heads, heads // kv_heads, head_dim)
    grouped = grouped.transpose(0, 2, 3, 1, 4)  # [B, kv_heads, group, T, head_dim]
    blocks = []
    for begin in range(0, time, QUERY_BLOCK):
        end = min(begin + QUERY_BLOCK, time)
        block = grouped[:, :, :, begin:end]
        offsets = jnp.arange(begin, end)
        positions = current.start[:, None] + offsets  # [B, Q]
        parts = [
            _part(block, segment, _visible(segment, positions, window)[:, None, None], softcap)
            for segment in past
        ]
        values = None if current.values is None else current.values[..., :end, :]
        ahead = Segment(current.keys[..., :end], values, *current[2:])
        back = offsets[:, None] - jnp.arange(end)
        seen = (back >= 0) & (back < window) & (jnp.arange(end) < current.length[:, None, None])
        # A padded query would see nothing; itself keeps its softmax finite.
        parts.append(_part(block, ahead, (seen | (back == 0))[:, None, None], softcap))
        blocks.append(_join(parts))
    out = blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks, axis=3)
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, time, heads, -1).astype(query.dtype)


def attend_parallel(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array | None,
    past: tuple[Segment, ...],
    own: Segment,
    window: jax.Array,
    softcap: float | None = None,
) -> jax.Array:
    """Attention of K parallel samples, one new token each, that do not see one another.

    Args:
      query: `[B, K, heads, head_dim]`, already scaled and rotated.
      key: `[B, K, kv_heads, head_dim]`, of the same tokens.
      value: `[B, K, kv_heads, value_dim]`, or None where the key is the value too.
      past: Segments that all samples of a row share.
      own: What each sample has written, batch axes `[B, K]`.
      window: `i32[]`, how many tokens back a query sees, itself included.
      softcap: Scores are kept within this by a tanh; None for no cap.

    Returns:
      `[B, K, heads, value_dim]`.
    """
    batch, samples, heads, head_dim = query.shape
    kv_heads = key.shape[2]
    group = heads // kv_heads
    grouped = query.reshape(batch, samples, kv_heads, group, head_dim)
    positions = own.start + own.length  # [B, K]
    shared = grouped.transpose(0, 2, 1, 3, 4)  # [B, kv_heads, K, group, head_dim]
    parts = []
    for segment in past:
        mask = _visible(segment, positions, window)[:, None, :, None]
        part = _part(shared, segment, mask, softcap)
        parts.append(_Part(*(leaf.transpose(0, 2, 1, 3, 4) for leaf in part)))
    mask = _visible(own, positions[..., None], window)[:, :, None]
    parts.append(_part(grouped, own, mask, softcap))
    scores = (grouped * key[:, :, :, None]).sum(axis=-1, keepdims=True, dtype=jnp.float32)
    value = key if value is None else value
    mixed = jnp.broadcast_to(value[:, :, :, None], (*grouped.shape[:-1], value.shape[-1])).astype(
        jnp.float32
    )
    parts.append(_Part(soft_cap(scores, softcap), jnp.ones_like(scores), mixed))
    return _join(parts).reshape(batch, samples, heads, -1).astype(query.dtype)


def soft_cap(x: jax.Array, cap: float | None) -> jax.Array:
    """Keeps numbers within the cap by a tanh; None leaves them alone."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def _visible(segment: Segment, positions: jax.Array, window: jax.Array) -> jax.Array:
    """Which tokens of a segment queries at `positions [batch, Q]` see: `bool[batch, Q, S]`."""
    index = jnp.arange(segment.keys.shape[-1])
    there = index < segment.length[..., None]
    back = positions[..., None] - (segment.start[..., None] + index)[..., None, :]
    return there[..., None, :] & (back < window)


def _part(query: jax.Array, segment: Segment, mask: jax.Array, softcap: float | None) -> _Part:
    """Attention of `query [batch, kv_heads, ..., head_dim]` to one segment.

    A row that sees nothing has a maximum of the lowest finite number and drops out of the join.
    """
    batch = "bh" if segment.keys.ndim == 4 else "bkh"
    free = "xyz"[: query.ndim - segment.keys.ndim + 1]
    scores = jnp.einsum(
        f"{batch}{free}d,{batch}ds->{batch}{free}s",
        query,
        segment.keys,
        preferred_element_type=jnp.float32,
    )
    lowest = jnp.finfo(jnp.float32).min
    scores = jnp.where(mask, soft_cap(scores, softcap), -jnp.inf)
    top = jnp.maximum(scores.max(axis=-1, keepdims=True), lowest)
    weights = jnp.exp(scores - top)
    values, axes = (segment.keys, "ds") if segment.values is None else (segment.values, "sd")
    mixed = jnp.einsum(
        f"{batch}{free}s,{batch}{axes}->{batch}{free}d",
        weights.astype(values.dtype),
        values,
        preferred_element_type=jnp.float32,
    )
    return _Part(top, weights.sum(axis=-1, keepdims=True), mixed)


def _join(parts: list[_Part]) -> jax.Array:
    """The softmax over all parts together, from the softmaxes of each."""
    top = parts[0].top
    for part in parts[1:]:
        top = jnp.maximum(top, part.top)
    total = jnp.zeros_like(top)
    mixed = jnp.zeros_like(parts[0].mixed)
    for part in parts:
        factor = jnp.exp(part.top - top)
        total += factor * part.total
        mixed += factor * part.mixed
    return mixed / total
