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

QUERY_BLOCK = 512
"""Queries scored at once in a long sequence: bounds memory and skips keys that lie ahead."""


class Segment(NamedTuple):
    """Keys and values of consecutive tokens, in one layer or in all of them.

    All layers are stacked along a leading axis L or, where layers are not scanned, a tuple of one
    array a layer.

    The batch axes are `[B]` for tokens that a whole row attends to, or `[B, K]` where each of K
    parallel samples has its own.

    Attributes:
      keys: `[..., batch, kv_heads, head_dim, S]`; the transpose makes the score product contiguous.
      values: `[..., batch, kv_heads, S, head_dim]`.
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


def rope_tables(positions: jax.Array, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of the rotary embedding (arXiv:2104.09864), halves convention.

    Args:
      positions: `i32[...]`.
      head_dim: Size of one head.
      theta: The base.

    Returns:
      Two `f32[..., head_dim // 2]`.
    """
    exponent = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    angles = positions[..., None].astype(jnp.float32) * (1.0 / theta**exponent)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates `x [B, T, heads, head_dim]` by tables `[B, T, head_dim // 2]`, in float32."""
    halves = x.astype(jnp.float32).reshape(*x.shape[:-1], 2, -1)
    sines = jnp.stack([-sin, sin], axis=-2)[:, :, None]
    # Swapping the halves fuses into the sum; a concatenation would not.
    turned = halves * cos[:, :, None, None] + jnp.flip(halves, axis=-2) * sines
    return turned.reshape(x.shape).astype(x.dtype)


def attend(
    query: jax.Array, current: Segment, past: tuple[Segment, ...], window: jax.Array
) -> jax.Array:
    """Attends to the past segments and causally to the current one.

    Args:
      query: `[B, T, heads, head_dim]`, already scaled and rotated.
      current: Keys and values of the same `T` tokens as the queries.
      past: Segments before it; every token in them precedes every query.
      window: `i32[]`, how many tokens back a query sees, itself included.

    Returns:
      `[B, T, heads, head_dim]`. Rows at or beyond `current.length` hold finite nonsense.
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
            _part(block, segment, _visible(segment, positions, window)[:, None, None])
            for segment in past
        ]
        ahead = Segment(current.keys[..., :end], current.values[..., :end, :], *current[2:])
        back = offsets[:, None] - jnp.arange(end)
        seen = (back >= 0) & (back < window) & (jnp.arange(end) < current.length[:, None, None])
        # A padded query would see nothing; itself keeps its softmax finite.
        parts.append(_part(block, ahead, (seen | (back == 0))[:, None, None]))
        blocks.append(_join(parts))
    out = blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks, axis=3)
    return out.transpose(0, 3, 1, 2, 4).reshape(query.shape).astype(query.dtype)


def attend_parallel(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    past: tuple[Segment, ...],
    own: Segment,
    window: jax.Array,
) -> jax.Array:
    """Attention of K parallel samples, one new token each, that do not see one another.

    Args:
      query: `[B, K, heads, head_dim]`, already scaled and rotated.
      key: `[B, K, kv_heads, head_dim]`, of the same tokens.
      value: `[B, K, kv_heads, head_dim]`.
      past: Segments that all samples of a row share.
      own: What each sample has written, batch axes `[B, K]`.
      window: `i32[]`, how many tokens back a query sees, itself included.

    Returns:
      `[B, K, heads, head_dim]`.
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
        part = _part(shared, segment, mask)
        parts.append(_Part(*(leaf.transpose(0, 2, 1, 3, 4) for leaf in part)))
    parts.append(_part(grouped, own, _visible(own, positions[..., None], window)[:, :, None]))
    itself = (grouped * key[:, :, :, None]).sum(axis=-1, keepdims=True, dtype=jnp.float32)
    mixed = jnp.broadcast_to(value[:, :, :, None], grouped.shape).astype(jnp.float32)
    parts.append(_Part(itself, jnp.ones_like(itself), mixed))
    return _join(parts).reshape(query.shape).astype(query.dtype)


def _visible(segment: Segment, positions: jax.Array, window: jax.Array) -> jax.Array:
    """Which tokens of a segment queries at `positions [batch, Q]` see: `bool[batch, Q, S]`."""
    index = jnp.arange(segment.keys.shape[-1])
    there = index < segment.length[..., None]
    back = positions[..., None] - (segment.start[..., None] + index)[..., None, :]
    return there[..., None, :] & (back < window)


def _part(query: jax.Array, segment: Segment, mask: jax.Array) -> _Part:
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
    scores = jnp.where(mask, scores, -jnp.inf)
    top = jnp.maximum(scores.max(axis=-1, keepdims=True), lowest)
    weights = jnp.exp(scores - top)
    mixed = jnp.einsum(
        f"{batch}{free}s,{batch}sd->{batch}{free}d",
        weights.astype(segment.values.dtype),
        segment.values,
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
