r"""What a score looks like in generated text, defined once for every reader and writer of it.

A judgement is laid out as `Specific Criteria:`, `Analysis:` and `Scores:`, and ends in a box that
holds one integer for each response, as in `\boxed{7, 4}` (arXiv:2504.02495, appendix G). Headings
vary from model to model and the box does not, so scores are read from the box alone:

- A box opens at the bytes `\boxed{`. Braces inside it are counted, escaped or not, and it is
  complete at the `}` that balances its own. A `\boxed{` inside an open box replaces that box: the
  latest opened one is followed and what was around it is abandoned.
- The last complete box decides. An unfinished box after it is ignored; a complete box that cannot
  be read, coming after one that can, leaves the text unreadable.
- The content is readable when it is integers separated by commas, as many as there are responses,
  each from `low` to `high`. An integer is a run of ASCII digits, leading zeros allowed; ASCII white
  space may stand around it. Signs, decimals, other scripts' digits or spaces, empty items and a
  trailing comma are unreadable, and nothing is clipped, padded or guessed.
- Only generated text is read, never the prompt.

Two readers follow this definition and agree on every input: `grm_jax.prompts.parse_scores`, plain
code on a string, and `grm_jax.rewards.extract_scores`, a finite automaton over token ids that runs
on the device. This module holds what the automaton is made of. Bytes fall into the symbols of
`SYMBOLS`; `TRANSITIONS` moves between control states, of which 0 to 6 count the bytes of `\boxed{`
matched so far and the last three read numbers in a box that is still readable; `token_table` spells
a vocabulary in symbols. The nesting depth and the numbers themselves are counters beside the
control state, kept by the reader.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from grm_jax.errors import UsageError

CRITERIA = "Specific Criteria:"
ANALYSIS = "Analysis:"
SCORES = "Scores:"
BOX_OPEN = "\\boxed{"
BOX_CLOSE = "}"
DEFAULT_LOW = 1
DEFAULT_HIGH = 10

# Every byte that no rule mentions is ".", and every ASCII white space is " ".
SYMBOLS = b". ,{}\\boxed0123456789"
OTHER = SYMBOLS.index(b".")
SPACE = SYMBOLS.index(b" ")
COMMA = SYMBOLS.index(b",")
LEFT_BRACE = SYMBOLS.index(b"{")
RIGHT_BRACE = SYMBOLS.index(b"}")
BACKSLASH = SYMBOLS.index(b"\\")
ZERO = SYMBOLS.index(b"0")

# Control states. The first seven have matched that many bytes of BOX_OPEN, and stand outside a box
# or in an unreadable one.
UNMATCHED = 0
BEFORE_NUMBER = len(BOX_OPEN)
IN_NUMBER = BEFORE_NUMBER + 1
AFTER_NUMBER = BEFORE_NUMBER + 2
NUM_STATES = BEFORE_NUMBER + 3

_MARKER = BOX_OPEN.encode()
_WORD = _MARKER[1:-1]


def _transitions() -> np.ndarray:
    """Builds the table of control states, `uint8[states, symbols]`."""
    table = np.full((NUM_STATES, len(SYMBOLS)), UNMATCHED, np.uint8)
    # A backslash occurs only at the head of the marker, so a failed match can resume nowhere else.
    table[:, BACKSLASH] = 1
    for matched, byte in enumerate(_MARKER):
        table[matched, SYMBOLS.index(byte)] = matched + 1
    digits = slice(ZERO, ZERO + 10)
    table[BEFORE_NUMBER, SPACE] = BEFORE_NUMBER
    table[BEFORE_NUMBER, digits] = IN_NUMBER
    table[IN_NUMBER, digits] = IN_NUMBER
    table[IN_NUMBER, SPACE] = AFTER_NUMBER
    table[AFTER_NUMBER, SPACE] = AFTER_NUMBER
    table[IN_NUMBER, COMMA] = BEFORE_NUMBER
    table[AFTER_NUMBER, COMMA] = BEFORE_NUMBER
    table.setflags(write=False)
    return table


TRANSITIONS = _transitions()


class TokenTable(NamedTuple):
    """A vocabulary spelled in the automaton's symbols, one row a token id.

    Attributes:
      symbols: `uint8[V, W]`, indices into `SYMBOLS`; what lies beyond a row's length is `OTHER`.
      lengths: `int32[V]`, how many symbols of each row count; 0 for a token that adds no text.
    """

    symbols: np.ndarray
    lengths: np.ndarray


def _byte_classes() -> bytes:
    """The symbol of each of the 256 bytes, as a table for `bytes.translate`."""
    white = b" \t\n\r\v\f"
    space, other = b" ."
    return bytes(
        space if byte in white else byte if byte in SYMBOLS else other for byte in range(256)
    )


def _marker_pieces() -> re.Pattern[bytes]:
    """Matches what a token may hold of a marker, as group 1, or else a single byte of one.

    The marker's letters can matter in two places: at the start of a token, up to a brace or the
    token's end, where they may go on with a marker begun in an earlier token; and after a
    backslash, likewise up to a brace or the token's end.
    """
    size = len(_WORD)
    pieces = {_WORD[start:stop] for start in range(size) for stop in range(start + 1, size + 1)}
    inside = b"|".join(sorted(pieces))
    tails = b"|".join(_WORD[start:] for start in range(size))
    heads = b"|".join(_WORD[:stop] for stop in range(size, -1, -1))
    alive = rb"^(?:%b)$|^(?:%b)(?=\{)|\\%b(?=\{)|\\(?:%b)$" % (inside, tails, _WORD, heads)
    return re.compile(rb"(%b)|[\\%b]" % (alive, _WORD), re.MULTILINE)


_BYTE_CLASSES = _byte_classes()
_MARKER_PIECES = _marker_pieces()
# A stretch without braces or markers that no readable box can hold, which is worth one OTHER.
_UNREADABLE = re.compile(rb"[ ,\d]*(?:\.|, ?,|\d \d)[ ,\d.]*")
_TO_SYMBOLS = bytes.maketrans(SYMBOLS, bytes(range(len(SYMBOLS))))


def token_table(token_bytes: Sequence[bytes]) -> TokenTable:
    """Spells every token of a vocabulary in the automaton's symbols.

    Inside a token, what the automaton cannot tell apart is written as one symbol: runs of white
    space, and any stretch that would make a box unreadable wherever it stood. Letters of the marker
    count only where they can be part of one. Most tokens shrink to a single symbol, which keeps the
    table narrow.

    Args:
      token_bytes: the bytes each token id adds to the text, in order of id, as
        `Tokenizer.token_bytes` lists them. Bytes need not be whole characters.

    Returns:
      The table, with `V = len(token_bytes)` rows as wide as the longest spelling.

    Raises:
      UsageError: if there are no tokens.
    """
    if not token_bytes:
        raise UsageError(
            "a token table needs at least one token: pass the bytes of the whole vocabulary"
        )
    # White space becomes " ", so a line feed is free to part the tokens; `^` and `$` bound each.
    text = b"\n".join(token.translate(_BYTE_CLASSES) for token in token_bytes)
    text = re.sub(rb"  +", b" ", text)
    text = _MARKER_PIECES.sub(lambda piece: piece[1] or b".", text)
    text = _UNREADABLE.sub(b".", text)
    rows = text.split(b"\n")
    width = max(1, *map(len, rows))
    padded = b"".join(row.ljust(width, b".") for row in rows)
    symbols = np.frombuffer(padded.translate(_TO_SYMBOLS), np.uint8).reshape(len(rows), width)
    return TokenTable(symbols, np.fromiter(map(len, rows), np.int32, len(rows)))
