"""Caches that tests fill by hand, token by token."""

from typing import Any

import jax
import jax.numpy as jnp

from grm_jax.models import DecoderConfig, Segment


def empty_own(config: DecoderConfig, start: jax.Array, samples: int, capacity: int) -> Segment:
    """Room for what K samples of each row will write behind their prompts."""
    heads, key, value = config.cache_heads
    shapes = [(*lead, len(start), samples, heads) for lead in config.cache_leads]
    return Segment(
        tuple(jnp.zeros((*shape, key, capacity)) for shape in shapes),
        tuple(None if value is None else jnp.zeros((*shape, capacity, value)) for shape in shapes),
        jnp.tile(start[:, None], (1, samples)),
        jnp.zeros((len(start), samples), jnp.int32),
    )


def appended(own: Segment, new: Any, step: int) -> Segment:
    """The samples' segment with the keys and values of one more token."""
    return own._replace(
        keys=jax.tree.map(lambda room, key: room.at[..., step].set(key), own.keys, new[0]),
        values=jax.tree.map(lambda room, v: room.at[..., step, :].set(v), own.values, new[1]),
        length=own.length + 1,
    )
