"""Prompts of a batch: their keys and values, computed once and held in common by their samples."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from grm_jax.distributed import BATCH_AXES
from grm_jax.models import DecoderConfig, Params, Segment, forward, layer_of


@functools.partial(jax.jit, static_argnames="config")
def prefill(params: Params, config: DecoderConfig, tokens: jax.Array, length: jax.Array) -> Segment:
    """Keys and values of prompts.

    Args:
      params: Parameters of the decoder.
      config: Its configuration.
      tokens: `i32[B, P]`, left-aligned.
      length: `i32[B]`, tokens to attend to later.

    Returns:
      A `Segment` over all layers.
    """
    return forward(params, config, tokens, length=length)[1]


def empty_prefix(
    config: DecoderConfig, *, rows: int, size: int, mesh: Mesh | None = None
) -> Segment:
    """Room for the prompts of `rows` rows, for `place_prefix` to fill; an empty row has length 0.

    Args:
      config: Of the decoder that runs the loop: its `scan_layers` says whether layers are stacked.
      rows: B, a multiple of the parts of the mesh.
      size: P, at least the padded length of every prompt to come.
      mesh: Over whose devices the rows are split; None for one device.
    """
    heads, key, value = config.cache_heads
    axis = rows_axis(config)
    cached = None if mesh is None else NamedSharding(mesh, _split(axis))
    each = None if mesh is None else NamedSharding(mesh, _split(0))

    def room(*sizes: int) -> tuple[jax.Array, ...]:
        return tuple(
            jnp.zeros((*lead, rows, heads, *sizes), config.dtype, device=cached)
            for lead in config.cache_leads
        )

    zeros = jnp.zeros(rows, jnp.int32, device=each)
    values = (None,) * len(config.cache_leads) if value is None else room(size, value)
    return Segment(room(key, size), values, zeros, jnp.zeros_like(zeros))


@functools.partial(jax.jit, static_argnames=("config", "reader", "mesh"), donate_argnums=0)
def place_prefix(
    prefix: Segment,
    segment: Segment,
    rows: jax.Array | np.ndarray,
    prompts: jax.Array | np.ndarray,
    count: jax.Array | np.ndarray | int,
    config: DecoderConfig,
    reader: DecoderConfig,
    mesh: Mesh | None = None,
) -> Segment:
    """Writes prompts into rows, one after another and in place.

    Rows that are split over D parts of a mesh get prompts that were read in the same part; rows and
    prompts are counted within it.

    Args:
      prefix: From `empty_prefix`; used up.
      segment: From `prefill`.
      rows: `i32[D * M]`, rows to write to.
      prompts: `i32[D * M]`, which prompt of the segment each of them gets.
      count: `i32[D]`, how many of the M are to be written; the others only keep the shape the same.
      config: Of the decoder that runs the loop.
      reader: Of the one that read the prompts, whose layers may be stacked where the other's are
        not.
      mesh: Over whose devices rows and prompts are split; None for one device.

    Returns:
      The prefix with the prompts in their rows.
    """
    counts = jnp.asarray(count).reshape(-1)
    arguments = (prefix, segment, jnp.asarray(rows), jnp.asarray(prompts), counts)
    place = functools.partial(_place_prefix, config=config, reader=reader)
    if mesh is None:
        return place(*arguments)
    split = jax.shard_map(
        place,
        mesh=mesh,
        in_specs=(_split_rows(config), _split_rows(reader), *(_split(0) for _ in arguments[2:])),
        out_specs=_split_rows(config),
        axis_names=set(BATCH_AXES),
        check_vma=False,
    )
    return split(*arguments)


def rows_axis(config: DecoderConfig) -> int:
    """Which axis of cached keys and values, over all layers, is that of the rows."""
    return 1 if config.scan_layers else 0


def _split(axis: int) -> PartitionSpec:
    """An axis split over the mesh as batches are."""
    return PartitionSpec(*(None for _ in range(axis)), BATCH_AXES)


def _split_rows(config: DecoderConfig) -> Any:
    """The partition of a `Segment` over all layers."""
    cached = _split(rows_axis(config))
    rows: Any = _split(0)
    return Segment(cached, cached, rows, rows)


def _place_prefix(
    prefix: Segment,
    segment: Segment,
    rows: jax.Array,
    prompts: jax.Array,
    count: jax.Array,
    *,
    config: DecoderConfig,
    reader: DecoderConfig,
) -> Segment:
    """`place_prefix` of one part."""
    axis = rows_axis(config)
    keys, values = segment.keys, segment.values
    if reader.scan_layers and not config.scan_layers:
        keys, values = (
            tuple(layer_of(stacked, reader, layer) for layer in range(config.num_layers))
            for stacked in (keys, values)
        )

    def put(index: jax.Array, held: Segment) -> Segment:
        row, prompt = rows[index], prompts[index]

        def write(room: jax.Array, new: jax.Array) -> jax.Array:
            one = jax.lax.dynamic_index_in_dim(new, prompt, axis).astype(room.dtype)
            place = [jnp.int32(0)] * room.ndim
            place[axis] = row
            return jax.lax.dynamic_update_slice(room, one, place)

        return Segment(
            jax.tree.map(write, held.keys, keys),
            jax.tree.map(write, held.values, values),
            held.start.at[row].set(segment.start[prompt]),
            held.length.at[row].set(segment.length[prompt]),
        )

    return jax.lax.fori_loop(0, count[0], put, prefix)
