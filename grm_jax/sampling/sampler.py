"""Sampling k judgements of one prompt: one prefill, then one loop for all samples.

The prompt's keys and values are computed once. Decoding is a `lax.while_loop` over a step in which
the samples of a prompt run in parallel and hold its segment in common, so that their k reads of it
are one matrix product. Several prompts may share a batch.

A sample depends on its own key and prompt and on nothing else in the batch: the padded length of a
prompt comes from its own length and randomness from its own key. What a row computes does not
depend on the others as long as the number of rows is the same, so the caller keeps to one.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from grm_jax.distributed import Axes, logical_to_sharding
from grm_jax.models import DecoderConfig, Params, Segment, forward_parallel, unembed
from grm_jax.sampling.drawing import Controls, draw_token
from grm_jax.sampling.layout import Layout, LayoutState, advance, allowed_edges
from grm_jax.sampling.prefix import rows_axis


class Rollouts(NamedTuple):
    """Sampled continuations of B prompts, K samples each.

    Attributes:
      tokens: `i32[B, K, T]`; beyond `length` they mean nothing.
      length: `i32[B, K]`, sampled tokens, the end-of-turn token included.
      stopped: `bool[B, K]`, whether the last token is an end of turn (else the budget ran out).
      logprobs: `f32[B, K, T]`, log-probability of each token under the whole vocabulary at the
        sampling temperature (at 1 when sampling is greedy): what a learner recomputes.
      sampled_logprobs: `f32[B, K, T]`, the same under the distribution that was really sampled
        from, after top-k, top-p and the layout; 0 when sampling is greedy.
    """

    tokens: jax.Array
    length: jax.Array
    stopped: jax.Array
    logprobs: jax.Array
    sampled_logprobs: jax.Array


class Decoding(NamedTuple):
    """A batch of B rows, K samples each, between two tokens.

    Attributes:
      step: `i32[B]`, tokens sampled in a row since its prompt was admitted.
      token: `i32[B, K]`, the tokens to go on from.
      own: What each sample has written.
      at: Where each stands in its row's layout.
      out: What has been sampled.
    """

    step: jax.Array
    token: jax.Array
    own: Segment
    at: LayoutState
    out: Rollouts


@functools.partial(jax.jit, static_argnames=("config", "samples", "capacity", "mesh"))
def begin(
    prefix: Segment, config: DecoderConfig, *, samples: int, capacity: int, mesh: Mesh | None = None
) -> Decoding:
    """A batch in which every row has ended, for `admit` to fill.

    Args:
      prefix: From `empty_prefix` or `prefill`; only its shapes count.
      config: Of the decoder that runs the loop.
      samples: K.
      capacity: T.
      mesh: Over whose devices the rows are split; None for one device.
    """
    shape = (prefix.length.shape[0], samples)
    zeros = jnp.zeros(shape, jnp.int32)

    def room(cached: jax.Array, axis: int) -> jax.Array:
        lead, (heads, *sizes) = cached.shape[:-4], cached.shape[-3:]
        sizes[axis] = capacity
        return jnp.zeros((*lead, *shape, heads, *sizes), cached.dtype)

    batch = Decoding(
        step=zeros[:, 0],
        token=zeros,
        own=Segment(
            jax.tree.map(lambda leaf: room(leaf, 1), prefix.keys),
            jax.tree.map(lambda leaf: room(leaf, 0), prefix.values),
            zeros,
            zeros,
        ),
        at=LayoutState(zeros, zeros),
        out=Rollouts(
            tokens=jnp.zeros((*shape, capacity), jnp.int32),
            length=zeros,
            stopped=jnp.ones(shape, bool),
            logprobs=jnp.zeros((*shape, capacity), jnp.float32),
            sampled_logprobs=jnp.zeros((*shape, capacity), jnp.float32),
        ),
    )
    return _placed(batch, config, mesh)


def _placed(batch: Decoding, config: DecoderConfig, mesh: Mesh | None) -> Decoding:
    """The batch where it is to live, always the same: else a program would be compiled again."""
    if mesh is None:
        return batch
    stacked = ("layers",) if config.scan_layers else ()

    def place(leaf: jax.Array, axes: Axes) -> jax.Array:
        return jax.lax.with_sharding_constraint(
            leaf, logical_to_sharding(axes, mesh, shape=leaf.shape)
        )

    def cached(leaf: jax.Array) -> jax.Array:
        return place(leaf, (*stacked, "batch", None, "kv_heads", None, None))

    def other(leaf: jax.Array) -> jax.Array:
        return place(leaf, ("batch", *(None,) * (leaf.ndim - 1)))

    keys, values = jax.tree.map(cached, (batch.own.keys, batch.own.values))
    rest = jax.tree.map(other, batch._replace(own=batch.own._replace(keys=None, values=None)))
    return rest._replace(own=rest.own._replace(keys=keys, values=values))


@functools.partial(jax.jit, static_argnames=("config", "mesh"), donate_argnums=0)
def admit(
    batch: Decoding,
    prefix: Segment,
    last_token: jax.Array | np.ndarray,
    fresh: jax.Array | np.ndarray,
    active: jax.Array | np.ndarray,
    config: DecoderConfig,
    mesh: Mesh | None = None,
) -> Decoding:
    """Begins rows anew, with the prompts that the prefix now has in them.

    Args:
      batch: From `begin` or `decode_until`; used up.
      prefix: The prompts of all rows, each without its last token.
      last_token: `i32[B]`, the last token of each fresh row's prompt.
      fresh: `bool[B]`, the rows that begin; the others go on as they are.
      active: `bool[B, K]`, which samples of the fresh rows are wanted; the others have ended.
      config: Of the decoder that runs the loop.
      mesh: Over whose devices the rows are split; None for one device.
    """
    fresh, last_token, active = map(jnp.asarray, (fresh, last_token, active))
    rows = fresh[:, None]

    def anew(value: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.where(fresh if old.ndim == 1 else rows, value, old)

    begun = Decoding(
        step=anew(jnp.int32(0), batch.step),
        token=anew(last_token[:, None], batch.token),
        own=batch.own._replace(
            start=anew(prefix.length[:, None], batch.own.start),
            length=anew(jnp.int32(0), batch.own.length),
        ),
        at=LayoutState(*(anew(jnp.int32(0), leaf) for leaf in batch.at)),
        out=batch.out._replace(
            length=anew(jnp.int32(0), batch.out.length),
            stopped=anew(~active, batch.out.stopped),
        ),
    )
    return _placed(begun, config, mesh)


@functools.partial(
    jax.jit,
    static_argnames=("config", "eos_ids", "greedy", "top_k", "nucleus", "mesh"),
    donate_argnums=3,
)
def decode_until(
    params: Params,
    config: DecoderConfig,
    prefix: Segment,
    batch: Decoding,
    keys: jax.Array,
    controls: Controls,
    ended: jax.Array | int,
    steps: jax.Array | int,
    layout: Layout | None = None,
    text_mask: jax.Array | None = None,
    *,
    eos_ids: tuple[int, ...],
    greedy: bool = False,
    top_k: int = 0,
    nucleus: bool = False,
    mesh: Mesh | None = None,
) -> Decoding:
    """Goes on with a batch until enough of its rows have ended.

    Args:
      params: Parameters of the decoder.
      config: Its configuration.
      prefix: The prompts without their last token, at least one token each.
      batch: From `admit`; used up.
      keys: `[B, K]` random keys, one a sample.
      controls: Temperature, nucleus mass and length limit.
      ended: `i32[]`, rows that are to have ended; a row ends with its last sample.
      steps: `i32[]`, the most tokens to sample before returning.
      layout: As of `decode`, like the rest.
      text_mask: Likewise.
      eos_ids: Likewise.
      greedy: Likewise.
      top_k: Likewise.
      nucleus: Likewise.
      mesh: Over whose devices the rows are split; None for one device.

    Returns:
      The batch, further on. What a row computes depends on neither the other rows nor the number of
      tokens that were sampled in them before it began.
    """
    eos = jnp.asarray(eos_ids, jnp.int32)

    def pick(
        key: jax.Array, logits: jax.Array, at: LayoutState, layout: Layout | None
    ) -> tuple[jax.Array, jax.Array, jax.Array, LayoutState]:
        token, logprob, sampled = draw_token(
            key,
            logits,
            controls,
            mask=text_mask,
            edges=None if layout is None else allowed_edges(layout, at),
            greedy=greedy,
            top_k=top_k,
            nucleus=nucleus,
        )
        if layout is not None:
            at = advance(layout, at, token)
        return token, logprob, sampled, at

    pick_rows = jax.vmap(jax.vmap(pick, in_axes=(0, 0, 0, None)))
    fold_rows = jax.vmap(jax.vmap(jax.random.fold_in, (0, None)))
    rows = jnp.arange(keys.shape[0])

    def body(carry: tuple[jax.Array, Decoding]) -> tuple[jax.Array, Decoding]:
        count, (step, token, own, at, out) = carry
        hidden, new = forward_parallel(params, config, token, past=(prefix,), own=own)
        logits = unembed(params, config, hidden)
        token, logprob, sampled, at = pick_rows(fold_rows(keys, step), logits, at, layout)
        alive = ~finished(out, controls.max_new_tokens)
        goes_on = alive.any(axis=-1)
        # The place is `step`, but known only once a token is: else XLA, which cannot tell that the
        # cache is read before it is written, would copy it.
        own = _append(own, new, jnp.minimum(step, step + token.min()), goes_on, config)

        def put(into: jax.Array, value: jax.Array) -> jax.Array:
            # Of a row that has ended nothing is kept, not even at the end of its room.
            at = jnp.where(goes_on, step, into.shape[-1])
            return into.at[rows, :, at].set(value, mode="drop")

        ended = (token[..., None] == eos).any(axis=-1)
        out = Rollouts(
            tokens=put(out.tokens, token),
            length=out.length + alive,
            stopped=out.stopped | (alive & ended),
            logprobs=put(out.logprobs, logprob),
            sampled_logprobs=put(out.sampled_logprobs, sampled),
        )
        return count + 1, Decoding(step + goes_on, token, own, at, out)

    def wanted(carry: tuple[jax.Array, Decoding]) -> jax.Array:
        count, batch = carry
        done = finished(batch.out, controls.max_new_tokens).all(axis=-1)
        return (done.sum() < ended) & (count < steps)

    batch = jax.lax.while_loop(wanted, body, (jnp.int32(0), batch))[1]
    return _placed(batch, config, mesh)


@functools.partial(
    jax.jit, static_argnames=("config", "eos_ids", "capacity", "greedy", "top_k", "nucleus")
)
def decode(
    params: Params,
    config: DecoderConfig,
    prefix: Segment,
    last_token: jax.Array,
    keys: jax.Array,
    controls: Controls,
    layout: Layout | None = None,
    text_mask: jax.Array | None = None,
    active: jax.Array | None = None,
    *,
    eos_ids: tuple[int, ...],
    capacity: int,
    greedy: bool = False,
    top_k: int = 0,
    nucleus: bool = False,
) -> Rollouts:
    """Samples K continuations of each of B prompts, until all have ended.

    Args:
      params: Parameters of the decoder.
      config: Its configuration.
      prefix: The prompts without their last token, from `prefill`; at least one token each.
      last_token: `i32[B]`, the last token of each prompt.
      keys: `[B, K]` random keys, one a sample.
      controls: Temperature, nucleus mass and length limit.
      layout: The automaton each prompt's samples follow, with leading axis B; None for free text.
      text_mask: `bool[V]`, the tokens allowed in a layout's free text; needed with `layout`.
      active: `bool[B, K]`, the samples that are wanted; the others only fill the batch up, and the
        loop does not wait for them. All if None.
      eos_ids: Tokens that end a sample.
      capacity: T, at least `controls.max_new_tokens`.
      greedy: Take the likeliest token instead of sampling.
      top_k: Sample among this many likeliest tokens; 0 for all.
      nucleus: Whether `controls.top_p` is applied.

    Returns:
      The samples, as `Rollouts`.
    """
    rows, samples = keys.shape
    batch = begin(prefix, config, samples=samples, capacity=capacity)
    wanted = jnp.ones(keys.shape, bool) if active is None else active
    batch = admit(batch, prefix, last_token, jnp.ones(rows, bool), wanted, config)
    return decode_until(
        params,
        config,
        prefix,
        batch,
        keys,
        controls,
        rows,
        capacity,
        layout,
        text_mask,
        eos_ids=eos_ids,
        greedy=greedy,
        top_k=top_k,
        nucleus=nucleus,
    ).out


def _append(
    own: Segment,
    new: tuple[Any, Any],
    place: jax.Array,
    goes_on: jax.Array,
    config: DecoderConfig,
) -> Segment:
    """The samples' segment with the keys and values of one more token, where each row is."""
    rows = rows_axis(config)

    def write(axis: int, cache: jax.Array, token: jax.Array) -> jax.Array:
        def one(cache: jax.Array, token: jax.Array, place: jax.Array) -> jax.Array:
            token = jnp.expand_dims(token, axis)
            return jax.lax.dynamic_update_slice_in_dim(cache, token, place, axis)

        return jax.vmap(one, in_axes=(rows, rows, 0), out_axes=rows)(cache, token, place)

    return Segment(
        jax.tree.map(functools.partial(write, -1), own.keys, new[0]),
        jax.tree.map(functools.partial(write, -2), own.values, new[1]),
        own.start,
        own.length + goes_on[:, None],
    )


def finished(out: Rollouts, max_new_tokens: jax.Array | int) -> jax.Array:
    """Which samples `bool[B, K]` go no further: an end of turn or the limit has come."""
    return out.stopped | (out.length >= max_new_tokens)
