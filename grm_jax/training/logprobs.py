"""Log-probabilities of given tokens, with logits that are never all in memory.

The logits of a batch are `[B, T, V]`, the largest array of training by far: 8 rows of 4096 tokens
over a vocabulary of 262,144 are 34 GB. What a loss needs of them is one number a token. So the
vocabulary is visited in chunks: forwards with a running maximum and sum, backwards with logits
computed again. Memory follows the chunk and not the vocabulary.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal, NamedTuple, TypeVar, overload

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from grm_jax.errors import UsageError

# Below any logit, and yet finite: differences of two such are 0 and not NaN.
_LOWEST = -1e30

_Carry = TypeVar("_Carry")


@overload
def token_logprobs(
    hidden: jax.Array,
    matrix: jax.Array,
    targets: jax.Array,
    *,
    temperature: ArrayLike = 1.0,
    softcap: float | None = None,
    chunk: int = 4096,
    vocab_shards: int = 1,
    with_entropy: Literal[False] = False,
) -> jax.Array: ...


@overload
def token_logprobs(
    hidden: jax.Array,
    matrix: jax.Array,
    targets: jax.Array,
    *,
    temperature: ArrayLike = 1.0,
    softcap: float | None = None,
    chunk: int = 4096,
    vocab_shards: int = 1,
    with_entropy: Literal[True],
) -> tuple[jax.Array, jax.Array]: ...


def token_logprobs(
    hidden: jax.Array,
    matrix: jax.Array,
    targets: jax.Array,
    *,
    temperature: ArrayLike = 1.0,
    softcap: float | None = None,
    chunk: int = 4096,
    vocab_shards: int = 1,
    with_entropy: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Log-probabilities of target tokens, from final hidden states and the output matrix.

    Equal to `log_softmax(softcap * tanh(hidden @ matrix.T / softcap) / temperature)` at the
    targets. Products are taken in the type of `hidden` and summed in float32, and all that follows
    is float32. One function serves to learn and to check a sampler: a temperature that is left out
    on one side is a wrong ratio everywhere.

    Temporary memory is a few arrays of `B * T * chunk` float32 numbers, whatever the size of the
    vocabulary, and backwards one of `B * T * D`; the gradient of the matrix is written in place,
    in its own type. A vocabulary that `chunk` does not divide costs a second, smaller program.

    Where the matrix is split by vocabulary over devices, name the number of parts: each device then
    works on its own rows of every chunk, and results meet once, after the last chunk. The result
    does not depend on `vocab_shards`.

    There are gradients for `hidden` and `matrix`. The entropy has none, nor has the temperature.

    Args:
      hidden: `[B, T, D]`, hidden states after the final norm.
      matrix: `[V, D]`, the output matrix.
      targets: `i32[B, T]`, from 0 to V - 1; what stands for any other number means nothing.
      temperature: A scalar above 0, traced or not.
      softcap: The bound on logits, before the temperature, of families that have one (Gemma 2).
      chunk: Tokens of the vocabulary in one step, over all devices together.
      vocab_shards: Number of equal parts that the vocabulary is split in; it must divide V.
      with_entropy: Whether to return the entropy of each token's distribution as well.

    Returns:
      `f32[B, T]`, the log-probabilities; with `with_entropy` a pair of them and the entropies,
      `f32[B, T]`, in nats.

    Raises:
      UsageError: A setting is out of its range, or shapes do not go together.
    """
    vocab = matrix.shape[0]
    if hidden.shape[:-1] != targets.shape or hidden.shape[-1:] != matrix.shape[1:]:
        raise UsageError(
            f"hidden {hidden.shape}, matrix {matrix.shape} and targets {targets.shape} do not go "
            "together; give [B, T, D], [V, D] and [B, T]"
        )
    if isinstance(temperature, int | float) and temperature <= 0:
        raise UsageError(f"temperature is {temperature}; give one above 0")
    if chunk < 1:
        raise UsageError(f"chunk is {chunk}; give at least 1")
    if vocab_shards < 1 or vocab % vocab_shards:
        raise UsageError(f"vocab_shards={vocab_shards} does not divide a vocabulary of {vocab}")
    part = vocab // vocab_shards
    settings = _Settings(
        softcap=softcap,
        shards=vocab_shards,
        rows=min(part, max(1, chunk // vocab_shards)),
        with_entropy=with_entropy,
    )
    scale = 1 / lax.stop_gradient(jnp.asarray(temperature, jnp.float32))
    logprobs, entropy = _logprobs(settings, hidden, matrix, targets, scale)
    return (logprobs, lax.stop_gradient(entropy)) if with_entropy else logprobs


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Settings:
    """What the program depends on: `rows` of each of the `shards` parts make a chunk."""

    softcap: float | None
    shards: int
    rows: int
    with_entropy: bool


class _Sums(NamedTuple):
    """Of each token over what was visited, in each part of the vocabulary; all `f32[B, T, S]`.

    Attributes:
      top: The largest logit.
      total: The sum of `exp(logit - top)`.
      moment: The sum of `exp(logit - top) * (logit - top)`; stays 0 if no entropy is wanted.
      target: The target's logit; 0 in parts that do not hold it.
    """

    top: jax.Array
    total: jax.Array
    moment: jax.Array
    target: jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _logprobs(
    settings: _Settings, hidden: jax.Array, matrix: jax.Array, targets: jax.Array, scale: jax.Array
) -> tuple[jax.Array, jax.Array]:
    return _forward(settings, hidden, matrix, targets, scale)[0]


_Residuals = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]


def _forward(
    settings: _Settings, hidden: jax.Array, matrix: jax.Array, targets: jax.Array, scale: jax.Array
) -> tuple[tuple[jax.Array, jax.Array], _Residuals]:
    parts = _in_parts(settings, matrix)

    def visit(start: ArrayLike, rows: int, sums: _Sums) -> _Sums:
        logits, _ = _logits(settings, hidden, _block(parts, start, rows, hidden), scale)
        hit = _is_target(parts, start, rows, targets)
        top = jnp.maximum(sums.top, jnp.max(logits, axis=-1))
        shifted = logits - top[..., None]
        weights = jnp.exp(shifted)
        fallen = sums.top - top
        kept = jnp.exp(fallen)
        moment = sums.moment
        if settings.with_entropy:
            moment = kept * (moment + fallen * sums.total) + jnp.sum(weights * shifted, axis=-1)
        return _Sums(
            top=top,
            total=kept * sums.total + jnp.sum(weights, axis=-1),
            moment=moment,
            target=sums.target + jnp.sum(logits, axis=-1, where=hit),
        )

    nothing = jnp.zeros((*targets.shape, settings.shards), jnp.float32)
    sums = _over_chunks(settings, parts, visit, _Sums(nothing + _LOWEST, nothing, nothing, nothing))
    # The parts meet here, and nowhere before.
    top = jnp.max(sums.top, axis=-1)
    fallen = sums.top - top[..., None]
    kept = jnp.exp(fallen)
    total = jnp.sum(kept * sums.total, axis=-1)
    log_total = jnp.log(total)
    logprobs = jnp.sum(sums.target, axis=-1) - top - log_total
    moment = jnp.sum(kept * (sums.moment + fallen * sums.total), axis=-1)
    entropy = log_total - moment / total
    return (logprobs, entropy), (hidden, matrix, targets, scale, top + log_total)


def _backward(
    settings: _Settings, residuals: _Residuals, gradients: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array, None, None]:
    hidden, matrix, targets, scale, log_normaliser = residuals
    parts = _in_parts(settings, matrix)
    incoming = (gradients[0] * scale)[..., None, None]

    def visit(
        start: ArrayLike, rows: int, carry: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        d_hidden, d_parts = carry
        block = _block(parts, start, rows, hidden)
        logits, slope = _logits(settings, hidden, block, scale)
        probabilities = jnp.exp(logits - log_normaliser[..., None, None])
        hit = _is_target(parts, start, rows, targets)
        d_logits = incoming * (hit - probabilities) * slope
        # The products of autodiff: operands in the type of the forward product, sums in float32.
        d_logits = d_logits.astype(hidden.dtype)
        d_hidden += _product("btsr,srd->sbtd", d_logits, block)
        d_block = _product("btsr,btd->srd", d_logits, hidden).astype(matrix.dtype)
        return d_hidden, lax.dynamic_update_slice_in_dim(d_parts, d_block, start, axis=1)

    # A sum for each part of the vocabulary, so that devices need not exchange it in every step.
    carry = jnp.zeros((settings.shards, *hidden.shape), jnp.float32), jnp.zeros_like(parts)
    d_hidden, d_parts = _over_chunks(settings, parts, visit, carry)
    d_hidden = jnp.sum(d_hidden, axis=0).astype(hidden.dtype)
    return d_hidden, d_parts.reshape(matrix.shape), None, None


_logprobs.defvjp(_forward, _backward)


def _over_chunks(
    settings: _Settings,
    parts: jax.Array,
    visit: Callable[[ArrayLike, int, _Carry], _Carry],
    carry: _Carry,
) -> _Carry:
    """Runs `visit(start, rows, carry)` over all rows of the parts, `settings.rows` at a time."""
    full, rest = divmod(parts.shape[1], settings.rows)
    # The rest has a program of its own, as a padded matrix would be a copy of the whole. It comes
    # first, because what is written to a large carry after its loop is written to a copy.
    carry = visit(full * settings.rows, rest, carry) if rest else carry
    return lax.fori_loop(
        0, full, lambda index, kept: visit(index * settings.rows, settings.rows, kept), carry
    )


def _in_parts(settings: _Settings, matrix: jax.Array) -> jax.Array:
    """`[S, V / S, D]`, where each part is whole on its devices."""
    return matrix.reshape(settings.shards, -1, matrix.shape[1])


def _block(parts: jax.Array, start: ArrayLike, rows: int, hidden: jax.Array) -> jax.Array:
    """`[S, rows, D]`, the same rows of each part, in the type that products are taken in."""
    return lax.dynamic_slice_in_dim(parts, start, rows, axis=1).astype(hidden.dtype)


def _logits(
    settings: _Settings, hidden: jax.Array, block: jax.Array, scale: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Logits `f32[B, T, S, rows]` and the slope of the soft cap, 1 without one."""
    logits = _product("btd,srd->btsr", hidden, block)
    if settings.softcap is None:
        return logits * scale, jnp.ones((), jnp.float32)
    bent = jnp.tanh(logits / settings.softcap)
    return settings.softcap * bent * scale, 1 - jnp.square(bent)


def _is_target(parts: jax.Array, start: ArrayLike, rows: int, targets: jax.Array) -> jax.Array:
    """`bool[B, T, S, rows]`, which logit is the target's."""
    first = parts.shape[1] * jnp.arange(parts.shape[0]) + start
    token = first[:, None] + jnp.arange(rows)
    return targets[..., None, None] == token


def _product(equation: str, left: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.einsum(equation, left, right, preferred_element_type=jnp.float32)
