"""Reads scores from sampled tokens on the device, with the automaton of `grm_jax.grammar`."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from grm_jax import grammar
from grm_jax.errors import UsageError

# So many tokens, and so many for each response, are the end of a text that is read at first.
_TAIL, _TAIL_EACH = 16, 4
# Symbols that are read before asking whether any text goes on, which devices have to agree on.
_STEPS = 32
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
    closed: jax.Array  # bool[...], whether there was a complete box


class _Cursor(NamedTuple):
    """The next symbol of each text: `i32[...]` twice, its token and its place in the token."""

    token: jax.Array
    place: jax.Array


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
        closed=reader.closed | closes,
    )


def _next_symbol(
    tokens: jax.Array, table: grammar.TokenTable, at: _Cursor, end: jax.Array
) -> tuple[jax.Array, jax.Array, _Cursor]:
    """The symbol at the cursor, `i32[...]`, whether there is one, and the cursor behind it.

    A token that spells nothing takes a step without a symbol.
    """
    vocabulary, width = table.symbols.shape
    place = jnp.minimum(at.token, tokens.shape[-1] - 1)
    token = jnp.take_along_axis(tokens, place[..., None], axis=-1, mode="clip")[..., 0]
    known = (token >= 0) & (token < vocabulary)
    spelled = jnp.where(known, _look_up(table.lengths, token), 1)
    row = jnp.clip(token, 0, vocabulary - 1)
    symbol = _look_up(jnp.ravel(table.symbols), row * width + at.place).astype(jnp.int32)
    there = (at.token < end) & (at.place < spelled)
    ends = at.place + 1 >= spelled
    behind = _Cursor(
        token=jnp.where(at.token < end, at.token + ends, at.token),
        place=jnp.where(ends, 0, at.place + 1),
    )
    return jnp.where(known, symbol, grammar.OTHER), there, behind


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
    are independent, so an array sharded over its leading dimensions is read where it lies. A text
    whose last tokens hold its box costs no more if it is longer.

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
    # Made from the arguments, so that it has their common shape and sharding.
    zero = 0 * (jnp.sum(tokens, axis=-1) + lengths + num_responses)
    zeros = zero[..., None] + jnp.zeros(max_responses, jnp.int32)
    unread = _Reader(zero, zero, zero, zero, zeros, zeros, zero > 0, zero > 0)
    tokens = tokens + zero[..., None]
    end = jnp.clip(lengths + zero, 0, tokens.shape[-1])

    def read(begin: jax.Array) -> _Reader:
        """Moves the automaton of every text from a token on to its end."""

        def step(_: ArrayLike, carry: tuple[_Reader, _Cursor]) -> tuple[_Reader, _Cursor]:
            reader, at = carry
            symbol, there, at = _next_symbol(tokens, table, at, end)
            moved = _read_symbol(reader, symbol, num_responses, low, high)
            return _select(there, moved, reader), at

        def steps(carry: tuple[_Reader, _Cursor]) -> tuple[_Reader, _Cursor]:
            return lax.fori_loop(0, _STEPS, step, carry)

        def goes_on(carry: tuple[_Reader, _Cursor]) -> jax.Array:
            return jnp.any(carry[1].token < end)

        return lax.while_loop(goes_on, steps, (unread, _Cursor(begin, zero)))[0]

    # Most texts end in their box, and what stands before a box that opens and closes does not
    # matter. Of the others, those that could have a box are read from their beginning.
    late = read(jnp.maximum(0, end - _TAIL - _TAIL_EACH * max_responses))

    def could_have_one(rest: jax.Array) -> jax.Array:
        opening = jnp.any(jnp.asarray(table.symbols) == grammar.BACKSLASH, axis=-1)
        return rest & jnp.any(_look_up(opening, tokens), axis=-1)

    rest = ~late.closed
    rest = lax.cond(jnp.any(rest), could_have_one, lambda rest: rest, rest)
    reader = _select(late.closed, late, read(jnp.where(rest, 0, end)))
    valid = reader.valid & (num_responses <= max_responses)
    wanted = jnp.arange(max_responses) < num_responses[..., None]
    return jnp.where(valid[..., None] & wanted, reader.scores, 0).astype(jnp.float32), valid
