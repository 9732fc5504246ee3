"""Attention of a prompt to itself, and of texts that all follow it and do not see one another.

A row is the prompt and then its G texts, one after another. What the prompt's tokens cost is paid
once for all texts, and the queries of all of them meet its keys in one matrix product.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from grm_jax.models.kernels import ROWS, causal_attention


def branched_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    length: jax.Array,
    positions: jax.Array,
    window: jax.Array,
    windows: tuple[int, ...],
    softcap: float | None = None,
) -> jax.Array:
    """Attends causally within prompts, and from each text to its prompt and itself.

    Args:
      query: `[B, P + G * T, heads, head_dim]`, already scaled and rotated.
      key: `[B, P + G * T, kv_heads, head_dim]`; `kv_heads` divides `heads`.
      value: `[B, P + G * T, kv_heads, value_dim]`.
      length: `i32[B]`, real tokens of each prompt.
      positions: `i32[B, G, T]`, of the texts' tokens; those of a prompt begin at 0.
      window: `i32[]`, how many tokens back a query sees, itself included.
      windows: The values that `window` may take.
      softcap: Scores become `softcap * tanh(scores / softcap)`, if not None.

    Returns:
      `[B, P + G * T, heads, value_dim]` in the type of `query`.
    """
    batch, branches, time = positions.shape
    size = query.shape[1] - branches * time
    of_prompt = causal_attention(
        *(x[:, :size] for x in (query, key, value)),
        length=length,
        window=window,
        windows=windows,
        softcap=softcap,
    )
    kv_heads = key.shape[2]
    shape = (batch, branches, time, kv_heads)
    # [B, kv_heads, G, heads / kv_heads, T, head_dim]
    queries = query[:, size:].reshape(*shape, -1, query.shape[-1]).transpose(0, 3, 1, 4, 2, 5)
    queries = _by_heads(queries)
    prompt = (
        _by_heads(key[:, :size].transpose(0, 2, 3, 1)),
        _by_heads(value[:, :size].transpose(0, 2, 1, 3)),
    )
    own_keys = _by_heads(key[:, size:].reshape(*shape, -1).transpose(0, 3, 1, 4, 2))
    own_values = _by_heads(value[:, size:].reshape(*shape, -1).transpose(0, 3, 1, 2, 4))
    # Scores are computed again for the gradient.
    block: Any = jax.checkpoint(functools.partial(_block, softcap=softcap), prevent_cse=False)
    parts = []
    for begin in range(0, time, ROWS):
        end = min(begin + ROWS, time)
        parts.append(
            block(
                queries[..., begin:end, :],
                prompt,
                (own_keys[..., :end], own_values[..., :end, :]),
                length,
                positions[..., begin:end],
                window,
            )
        )
    texts = jnp.concatenate(parts, axis=4).transpose(0, 2, 4, 1, 3, 5)
    texts = texts.reshape(batch, branches * time, query.shape[2], -1)
    return jnp.concatenate([of_prompt, texts.astype(query.dtype)], axis=1)


def _by_heads(x: jax.Array) -> jax.Array:
    """Says how `[B, kv_heads, ...]` is shared out. Left to itself, the compiler gathers scores."""
    return nn.with_logical_constraint(x, ("batch", "kv_heads", *(None,) * (x.ndim - 2)))


def _block(
    query: jax.Array,
    prompt: tuple[jax.Array, jax.Array],
    own: tuple[jax.Array, jax.Array],
    length: jax.Array,
    positions: jax.Array,
    window: jax.Array,
    *,
    softcap: float | None,
) -> jax.Array:
    """Attention of `[B, kv_heads, G, group, Q, head_dim]` queries, the last Q of what is there.

    Args:
      query: The queries.
      prompt: Keys `[B, kv_heads, head_dim, P]` and values `[B, kv_heads, P, value_dim]`.
      own: Keys `[B, kv_heads, G, head_dim, S]` and values `[B, kv_heads, G, S, value_dim]`.
      length: As of `branched_attention`, like the rest.
      positions: `i32[B, G, Q]`.
      window: Likewise.
      softcap: Likewise.
    """
    rows, keys = query.shape[4], own[0].shape[-1]
    index = jnp.arange(prompt[0].shape[-1])
    near = positions[..., None] - index < window
    there = (near & (index < length[:, None, None, None]))[:, None, :, None]
    behind = jnp.arange(keys - rows, keys)[:, None] - jnp.arange(keys)
    before = _scores("bkghqd,bkds->bkghqs", query, prompt[0], there, softcap)
    inside = _scores(
        "bkghqd,bkgds->bkghqs", query, own[0], (behind >= 0) & (behind < window), softcap
    )
    # A query sees itself at least.
    top = jnp.maximum(before.max(axis=-1, keepdims=True), inside.max(axis=-1, keepdims=True))
    top = jax.lax.stop_gradient(top)
    shared, alone = jnp.exp(before - top), jnp.exp(inside - top)
    mixed = _mixed("bkghqs,bksd->bkghqd", shared, prompt[1])
    mixed += _mixed("bkghqs,bkgsd->bkghqd", alone, own[1])
    total = shared.sum(axis=-1, keepdims=True) + alone.sum(axis=-1, keepdims=True)
    return _by_heads(mixed / total)


def _scores(
    equation: str, query: jax.Array, keys: jax.Array, seen: jax.Array, softcap: float | None
) -> jax.Array:
    scores = _by_heads(jnp.einsum(equation, query, keys, preferred_element_type=jnp.float32))
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    return jnp.where(seen, scores, jnp.finfo(jnp.float32).min)


def _mixed(equation: str, weights: jax.Array, values: jax.Array) -> jax.Array:
    return jnp.einsum(
        equation, weights.astype(values.dtype), values, preferred_element_type=jnp.float32
    )
