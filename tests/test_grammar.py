"""The grammar itself: texts and their scores, for both readers, and the table of tokens."""

import random

import numpy as np
import pytest

from grm_jax import grammar
from grm_jax.errors import UsageError
from grm_jax.grammar import token_table
from grm_jax.prompts.scores import parse_scores
from grm_jax.rewards import extract_scores

# Text, number of responses, scores or None. Scores range from 1 to 10.
TEXTS = [
    # Plain boxes and where they stand.
    (r"\boxed{8, 5}", 2, [8, 5]),
    (r"\boxed{8}", 1, [8]),
    (r"\boxed{1,2,3,4,5,6}", 6, [1, 2, 3, 4, 5, 6]),
    ("**Scores:** \\boxed{7, 9}\n", 2, [7, 9]),
    ("Specific Criteria: 1. Tone.\nAnalysis: fine.\nScores: \\boxed{10, 1}", 2, [10, 1]),
    (r"$\boxed{4, 4}$.", 2, [4, 4]),
    (r"\fbox{\boxed{4, 4}}", 2, [4, 4]),
    (r"}}{ \boxed{4, 4} {{", 2, [4, 4]),
    (r"\\boxed{4, 4}", 2, [4, 4]),
    (r"\boxed\boxed{4, 4}", 2, [4, 4]),
    ("é→\U0001f600\\boxed{4, 4}→", 2, [4, 4]),
    # The last complete box decides.
    (r"\boxed{8, 5} \boxed{2, 3}", 2, [2, 3]),
    (r"\boxed{8, 5} [2, 3] (4, 5)", 2, [8, 5]),
    (r"\boxed{8, 5} \boxed{2, ", 2, [8, 5]),
    (r"\boxed{8, 5} \boxed{{2, 3}", 2, [8, 5]),
    (r"\boxed{8, 5} \boxed{x}", 2, None),
    (r"\boxed{8, 5} \boxed{2}", 2, None),
    (r"\boxed{x} \boxed{8, 5}", 2, [8, 5]),
    (r"\boxed{2} \boxed{8, 5}", 2, [8, 5]),
    # Braces inside a box, and boxes inside a box.
    (r"\boxed{{8, 5}}", 2, None),
    (r"\boxed{8, {5}}", 2, None),
    (r"\boxed{8, 5{}", 2, None),
    (r"\boxed{8, 5{}}", 2, None),
    (r"\boxed{\{8, 5\}}", 2, None),
    (r"\boxed{\text{\boxed{8, 5}}}", 2, [8, 5]),
    (r"\boxed{9, \boxed{8, 5}}", 2, [8, 5]),
    (r"\boxed{9, 9 \boxed{8, 5", 2, None),
    (r"\boxed{9, 9 \boxed{8, 5} 7, 7}", 2, [8, 5]),
    (r"\boxed{1, 1} \boxed{9 \boxed{8, 5", 2, [1, 1]),
    # No box at all.
    ("", 1, None),
    ("8", 1, None),
    ("boxed{8}", 1, None),
    (r"\boxed 8", 1, None),
    (r"\boxed {8}", 1, None),
    (r"\Boxed{8}", 1, None),
    (r"\boxed{8", 1, None),
    (r"\bboxed{8}", 1, None),
    # How many.
    (r"\boxed{}", 1, None),
    (r"\boxed{ }", 1, None),
    (r"\boxed{}", 0, None),
    (r"\boxed{8}", 0, None),
    (r"\boxed{8}", -1, None),
    (r"\boxed{8, 5}", 1, None),
    (r"\boxed{8, 5}", 3, None),
    (r"\boxed{8, 5,}", 2, None),
    (r"\boxed{,8, 5}", 2, None),
    (r"\boxed{8,, 5}", 2, None),
    (r"\boxed{8, , 5}", 3, None),
    # White space.
    ("\\boxed{ \t8\n,\r\v5\f }", 2, [8, 5]),
    (r"\boxed{8 5}", 2, None),
    (r"\boxed{1 0}", 1, None),
    ("\\boxed{8,\u00a05}", 2, None),
    ("\\boxed{8,\u30005}", 2, None),
    ("\\boxed{8,\x1c5}", 2, None),
    ("\\boxed{8,\x855}", 2, None),
    # What an integer is, and its range.
    (r"\boxed{08, 0010}", 2, [8, 10]),
    (r"\boxed{00000000000000000000000000000007}", 1, [7]),
    (r"\boxed{0, 5}", 2, None),
    (r"\boxed{11, 5}", 2, None),
    (r"\boxed{5, 11}", 2, None),
    (r"\boxed{99999999999999999999999999999999}", 1, None),
    (r"\boxed{4294967304}", 1, None),  # 8 modulo 2**32
    (r"\boxed{8.0, 5}", 2, None),
    (r"\boxed{8.5, 5}", 2, None),
    (r"\boxed{-8, 5}", 2, None),
    (r"\boxed{+8, 5}", 2, None),
    (r"\boxed{8; 5}", 2, None),
    (r"\boxed{8/10, 5/10}", 2, None),
    (r"\boxed{1e0}", 1, None),
    (r"\boxed{1_0}", 1, None),
    ("\\boxed{\uff18}", 1, None),
    ("\\boxed{\u0668}", 1, None),
    ("\\boxed{8\u00b2}", 1, None),
    (r"\boxed{eight}", 1, None),
    (r"\boxed{8, 5, \ldots}", 2, None),
]
OTHER_RANGES = [
    (r"\boxed{0}", 0, 1, [0]),
    (r"\boxed{1}", 0, 1, [1]),
    (r"\boxed{2}", 0, 1, None),
    (r"\boxed{00}", 0, 1, [0]),
    (r"\boxed{100}", 0, 100, [100]),
    (r"\boxed{101}", 0, 100, None),
    (r"\boxed{16777215}", 1, 2**24 - 1, [16777215]),
    (r"\boxed{16777216}", 1, 2**24 - 1, None),
    (r"\boxed{5}", 6, 4, None),
]
BYTES = token_table([bytes([byte]) for byte in range(256)])
WIDEST, LONGEST = 6, 128


def on_device(text: str, num_responses: int, low: int = 1, high: int = 10) -> list[int] | None:
    """Reads a text one byte a token, in the form of the host parser."""
    encoded = np.frombuffer(text.encode(), np.uint8)
    tokens = np.full(LONGEST, ord("}"), np.int32)  # padding that would close a box
    tokens[: len(encoded)] = encoded
    scores, valid = extract_scores(
        tokens, len(encoded), BYTES, num_responses, max_responses=WIDEST, low=low, high=high
    )
    assert not np.any(scores[max(num_responses, 0) if valid else 0 :])
    return [int(score) for score in scores[:num_responses]] if valid else None


@pytest.mark.parametrize("read", [parse_scores, on_device])
@pytest.mark.parametrize(("text", "num_responses", "scores"), TEXTS)
def test_readers_follow_the_grammar(read, text, num_responses, scores):
    assert read(text, num_responses) == scores


@pytest.mark.parametrize("read", [parse_scores, on_device])
@pytest.mark.parametrize(("text", "low", "high", "scores"), OTHER_RANGES)
def test_readers_keep_to_the_range(read, text, low, high, scores):
    assert read(text, 1, low, high) == scores


def spelling(token: bytes, *others: bytes) -> bytes:
    """The symbols of one token of a vocabulary."""
    table = token_table([token, *others])
    return bytes(grammar.SYMBOLS[symbol] for symbol in table.symbols[0, : table.lengths[0]])


@pytest.mark.parametrize(
    ("token", "symbols"),
    [
        (b"", b""),
        (b"the", b"."),
        (b" the", b"."),
        (b" \n\t ", b" "),
        (b"\n", b" "),
        (b", ", b", "),
        (b",,,", b"."),
        (b", ,", b"."),
        (b"10", b"10"),
        (b" 10, 7", b" 10, 7"),
        (b"1 0", b"."),
        (b"7.5, 3", b"."),
        (b"{x}}", b"{.}}"),
        (b"5 {", b"5 {"),
        (b"\xe2\x86", b"."),
        # The marker and its pieces.
        (b"\\boxed{", b"\\boxed{"),
        (b"Scores: \\boxed{8", b".\\boxed{8"),
        (b"boxed", b"boxed"),
        (b"ox", b"ox"),
        (b"ed{7", b"ed{7"),
        (b"\\", b"\\"),
        (b"=\\bo", b".\\bo"),
        (b"xed{ \\b", b"xed{ \\b"),
        # Letters that can be no part of it.
        (b"box{", b".{"),
        (b"boxes", b"."),
        (b"bed", b"."),
        (b" boxed{", b".{"),
        (b"\\bold{", b".{"),
        (b"\\\\", b".\\"),
        (b"\\}", b".}"),
        (b"d}", b".}"),
    ],
)
def test_spelling_of_a_token(token, symbols):
    assert spelling(token) == symbols
    assert spelling(token, b"\\boxed{{{{{", b"x", b"", b"oxed") == symbols


def test_table_has_a_row_for_each_token():
    table = token_table([b"a", b"{}", b"", b"\\boxed{"])
    assert table.symbols.shape == (4, 7)
    assert table.symbols.dtype == np.uint8
    assert table.lengths.dtype == np.int32
    assert table.lengths.tolist() == [1, 2, 0, 7]
    assert np.max(table.symbols) < len(grammar.SYMBOLS)


def test_table_of_nothing_but_empty_tokens():
    table = token_table([b"", b""])
    assert table.lengths.tolist() == [0, 0]


def test_a_vocabulary_is_needed():
    with pytest.raises(UsageError, match="at least one token"):
        token_table([])


def walk(symbols: bytes, state: int) -> tuple[int, list[tuple[int, bool]]]:
    """Where symbols lead from a control state, and which braces end a marker or a number."""
    braces = []
    for symbol in symbols:
        if symbol == ord("{"):
            braces.append((symbol, state == grammar.BEFORE_NUMBER - 1))
        elif symbol == ord("}"):
            braces.append((symbol, state >= grammar.IN_NUMBER))
        state = int(grammar.TRANSITIONS[state, grammar.SYMBOLS.index(symbol)])
    return state, braces


def test_shrinking_a_token_changes_nothing():
    rng = random.Random(0)
    atoms = [b"\\boxed{", b"\\", b"b", b"ox", b"e", b"d", b"{", b"}", b",", b" ", b"7", b"#"]
    tokens = [b"".join(rng.choices(atoms, k=rng.randint(0, 6))) for _ in range(20_000)]
    table = token_table(tokens)
    shrunk = 0
    for token, row, length in zip(tokens, table.symbols, table.lengths, strict=True):
        spelled = bytes(grammar.SYMBOLS[symbol] for symbol in row[:length])
        exact = token.replace(b"#", b".")
        if spelled != exact:
            shrunk += 1
            for state in range(grammar.NUM_STATES):
                assert walk(spelled, state) == walk(exact, state), (token, spelled, state)
    assert shrunk > 5_000
