"""Reads scores from sampled tokens on the device, with the automaton of `grm_jax.grammar`."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from grm_jax import grammar
from grm_jax.errors import UsageError

# Scores are returned as float32, which holds every integer up to here exactly.
_GREATEST_HIGH = 2**24 - 1


class _Reader(NamedTuple):
    """Where the automaton stands in each text."""

    state: jax.Array  # i32[...], control state of `grammar.TRANSITIONS`
    depth: jax.Array  # i32[...], braces open in the box; 0 outside a box
    value: jax.Array  # i32[...], the number being read
    found: jax.Array  # i32[...], numbers of this box already finished
    numbers: jax.Array  # i32[..., N], those numbers
    scores: jax.Array  # i32[..., N], what the last complete box held
    valid: jax.Array  # bool[...], whether that box was readable


def _look_up(table: ArrayLike, index: jax.Array) -> jax.Array:
    """Takes `table[index]`, clipped to the table and sharded as `index` is."""
    # Where shardings are part of types, a gather has to be told its own.
    sharding = jax.typeof(index).sharding
    return jnp.asarray(table).at[index].get(mode="clip", out_sharding=sharding)


def _select(chosen: jax.Array, then: _Reader, otherwise: _Reader) -> _Reader:
    """Takes each text's reader from `then` where it is chosen, `bool[...]`."""

    def pick(new: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.where(chosen[..., None] if new.ndim > chosen.ndim else chosen, new, old)

    return jax.tree.map(pick, then, otherwise)


def _read_symbol(
    reader: _Reader, symbol: jax.Array, num_responses: jax.Array, low: int, high: int
) -> _Reader:
    """Moves the automaton of every text over one symbol, `i32[...]`."""
    left, right = symbol == grammar.LEFT_BRACE, symbol == grammar.RIGHT_BRACE
    digit = symbol - grammar.ZERO

    after_number = (reader.state == grammar.IN_NUMBER) | (reader.state == grammar.AFTER_NUMBER)
    item_ends = after_number & (right | (symbol == grammar.COMMA))
    in_range = (reader.value >= low) & (reader.value <= high)
    here = jnp.arange(reader.numbers.shape[-1]) == reader.found[..., None]
    numbers = jnp.where(item_ends[..., None] & here, reader.value[..., None], reader.numbers)
    found = reader.found + item_ends

    state = _look_up(grammar.TRANSITIONS.ravel(), reader.state * len(grammar.SYMBOLS) + symbol)
    state = jnp.where(item_ends & ~in_range, grammar.UNMATCHED, state.astype(jnp.int32))
    opens = left & (state == grammar.BEFORE_NUMBER)
    nested = jnp.where(reader.depth > 0, reader.depth + left - right, 0)

    closes = right & (reader.depth == 1)
    readable = item_ends & in_range & (found == num_responses)
    # One more than `high` is as far as a number need be followed, and it can never overflow.
    grown = jnp.minimum(reader.value * 10 + digit, high + 1)
    value = jnp.where(digit >= 0, grown, reader.value)
    return _Reader(
        state=state,
        depth=jnp.where(opens, 1, nested),
        value=jnp.where(state == grammar.BEFORE_NUMBER, 0, value),
        found=jnp.where(opens, 0, found),
        numbers=numbers,
        scores=jnp.where(closes[..., None], numbers, reader.scores),
        valid=jnp.where(closes, readable, reader.valid),
    )


@partial(jax.jit, static_argnames=("max_responses", "low", "high"))
def extract_scores(
    tokens: ArrayLike,
    lengths: ArrayLike,
    table: grammar.TokenTable,
    num_responses: ArrayLike,
    *,
    max_responses: int,
    low: int = grammar.DEFAULT_LOW,
    high: int = grammar.DEFAULT_HIGH,
) -> tuple[jax.Array, jax.Array]:
    r"""Reads the scores each generated text ends in, without leaving the device.

    The last complete `\boxed{...}` decides, by the rules in `grm_jax.grammar`; this is `f_extract`
    of eq 7 (arXiv:2504.02495). It agrees on every input with `grm_jax.prompts.parse_scores`. Texts
    are independent, so an array sharded over its leading dimensions is read where it lies. Time
    grows with `T` times the width of the table.

    Args:
      tokens: `i32[..., T]`, generated token ids, without the prompt. An id outside the vocabulary
        counts as a character that no number contains.
      lengths: `i32[...]`, how many tokens of each text were generated; the rest are ignored.
      table: the vocabulary in the automaton's symbols, from `grm_jax.grammar.token_table`.
      num_responses: `i32[...]` or a scalar, how many scores each text must hold.
      max_responses: `N`, the width of the result. A text that must hold more is not valid.
      low: the least score allowed.
      high: the greatest score allowed, below `2**24`.

    Returns:
      `scores f32[..., N]`, in the order of the box, 0 beyond `num_responses` and throughout a text
      that is not valid; and `valid bool[...]`, whether the text was readable.

    Raises:
      UsageError: if `high` is too large to be read exactly.
    """
    if high > _GREATEST_HIGH:
        raise UsageError(f"high={high} is too large to read exactly: use at most {_GREATEST_HIGH}")
    tokens = jnp.asarray(tokens, jnp.int32)
    lengths = jnp.asarray(lengths, jnp.int32)
    num_responses = jnp.asarray(num_responses, jnp.int32)
    vocabulary, width = table.symbols.shape

    def read_token(reader: _Reader, at: tuple[jax.Array, jax.Array]) -> tuple[_Reader, None]:
        index, token = at
        known = (token >= 0) & (token < vocabulary)
        symbols = jnp.where(known[..., None], _look_up(table.symbols, token), grammar.OTHER)
        spelled = jnp.where(known, _look_up(table.lengths, token), 1)
        spelled = jnp.where(index < lengths, spelled, 0)

        def read(reader: _Reader, at: tuple[jax.Array, jax.Array]) -> tuple[_Reader, None]:
            place, symbol = at
            moved = _read_symbol(reader, symbol.astype(jnp.int32), num_responses, low, high)
            return _select(place < spelled, moved, reader), None

        return lax.scan(read, reader, (jnp.arange(width), jnp.moveaxis(symbols, -1, 0)))

    # Made from the arguments, so that it has their common shape and sharding.
    zero = 0 * (jnp.sum(tokens, axis=-1) + lengths + num_responses)
    zeros = zero[..., None] + jnp.zeros(max_responses, jnp.int32)
    reader = _Reader(zero, zero, zero, zero, zeros, zeros, zero > 0)
    steps = (jnp.arange(tokens.shape[-1]), jnp.moveaxis(tokens, -1, 0))
    reader, _ = lax.scan(read_token, reader, steps)
    valid = reader.valid & (num_responses <= max_responses)
    wanted = jnp.arange(max_responses) < num_responses[..., None]
    return jnp.where(valid[..., None] & wanted, reader.scores, 0).astype(jnp.float32), valid
