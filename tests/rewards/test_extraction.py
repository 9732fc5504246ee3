"""Scores read on the device, against the host parser on many texts and in every arrangement."""

import random
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from grm_jax.errors import UsageError
from grm_jax.grammar import TokenTable, token_table
from grm_jax.prompts.scores import parse_scores
from grm_jax.rewards import extract_scores

# Fixed sizes, so that each range of scores is compiled once for all batches.
TEXTS_A_BATCH, LONGEST, WIDTH, MAX_RESPONSES = 1000, 48, 8, 5
RANGES = [(1, 10), (0, 1), (3, 250)]
ATOMS = [
    *["\\boxed{"] * 4,
    *["}"] * 4,
    *["{", "\\", "\\box", "box", "ed{", "boxed", "\\boxed", "\\boxed {", "\\text{", "\\}", "x"],
    *[
        ",",
        ", ",
        " ,",
        ",,",
        " ",
        "\n",
        "\t",
        "\r\n",
        "\v",
        "\f",
        "\u00a0",
        "\u3000",
        "\x85",
        "\x1c",
    ],
    *["0", "1", "2", "7", "10", "11", "08", "000", "250", "251", "4294967297", "9" * 30, "0" * 12],
    *["-", "+", ".", ".0", "_", "\uff17", "\u0667", "\u00b2", "e", "d", "é", "→", "\U0001f600"],
    *["Scores: ", "Analysis:", "[7, 2]", "$", "**", "the", "\ufffd"],
]


def box(rng: random.Random, count: int, low: int, high: int) -> str:
    """A box that can be read if it is given the right count, in one of the ways of writing it."""
    gap = rng.choice(["", " ", " ", "\n", " \t "])
    zeros = rng.choice(["", "", "", "0", "000"])
    numbers = [f"{zeros}{rng.randint(low, high)}" for _ in range(count)]
    return "\\boxed{" + f"{gap},{gap}".join(numbers) + rng.choice(["", gap]) + "}"


def soup(rng: random.Random, size: int) -> str:
    return "".join(rng.choices(ATOMS, k=rng.randint(0, size)))


def random_text(rng: random.Random, count: int, low: int, high: int) -> str:
    """Something a model might write, from well formed to hopeless."""
    kind = rng.random()
    if kind < 0.15:
        return soup(rng, 14)
    text = box(rng, count if rng.random() < 0.9 else rng.randint(0, 6), low, high)
    if kind < 0.55:
        # A slip somewhere in a box that was right.
        start = rng.randint(0, len(text))
        stop = min(len(text), start + rng.choice([0, 0, 1, 1, 2]))
        text = text[:start] + rng.choice(ATOMS) + text[stop:]
    if kind < 0.8:
        text = soup(rng, 4) + text
    if kind > 0.7:
        text += soup(rng, 4)
    if rng.random() < 0.1:
        text = "\\boxed{" + text
    if rng.random() < 0.1:
        text += box(rng, count, low, high)[: rng.randint(0, 12)]
    return text


def random_vocabulary(rng: random.Random) -> list[bytes]:
    """Every byte, empty tokens, and stretches of texts cut anywhere, even within a character."""
    pieces = {
        b"\\boxed{",
        b"\\boxed",
        b"boxed",
        b"boxed{",
        b"\\",
        b"ed{",
        b" \\",
        b"}.",
        b"}}",
        b", ",
    }
    while len(pieces) < 600:
        text = random_text(rng, rng.randint(1, 5), 1, 10).encode()
        start = rng.randint(0, len(text))
        pieces.add(text[start : start + rng.randint(2, WIDTH)])
    vocabulary = [bytes([byte]) for byte in range(256)] + [b""] * 3 + sorted(pieces - {b""})
    rng.shuffle(vocabulary)
    return vocabulary


def split(rng: random.Random, text: bytes, ids: dict[bytes, int]) -> list[int]:
    """Cuts a text into tokens, by chance of any length that the vocabulary has there."""
    tokens, start = [], 0
    while start < len(text) and len(tokens) < LONGEST:
        size = min(1 + int(WIDTH * rng.random()), len(text) - start)
        while text[start : start + size] not in ids:
            size -= 1
        tokens.append(ids[text[start : start + size]])
        start += size
        if rng.random() < 0.05:
            tokens.append(ids[b""])
    return tokens[:LONGEST]


def padded(table: TokenTable) -> TokenTable:
    """The same table at the width shared by all batches."""
    missing = WIDTH - table.symbols.shape[1]
    return TokenTable(np.pad(table.symbols, ((0, 0), (0, missing))), table.lengths)


def test_agrees_with_the_host_parser_on_random_texts():
    seen: Counter[str] = Counter()

    @settings(
        max_examples=105, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(seed=st.integers(0, 2**64), bounds=st.sampled_from(RANGES))
    def check(seed, bounds):
        rng = random.Random(seed)
        low, high = bounds
        vocabulary = random_vocabulary(rng)
        ids = {piece: index for index, piece in enumerate(vocabulary)}
        # What lies beyond a text's length is garbage of its own.
        tokens = np.random.default_rng(seed).integers(0, len(ids), (TEXTS_A_BATCH, LONGEST))
        lengths, counts = np.zeros((2, TEXTS_A_BATCH), np.int32)
        expected = []
        for index in range(TEXTS_A_BATCH):
            count = rng.randint(1, 4) if rng.random() < 0.95 else rng.randint(-1, 7)
            row = split(rng, random_text(rng, max(count, 0), low, high).encode(), ids)
            tokens[index, : len(row)] = row
            lengths[index], counts[index] = len(row), count
            text = b"".join(vocabulary[token] for token in row).decode("utf-8", "replace")
            answer = parse_scores(text, count, low, high)
            expected.append(answer if answer is None or count <= MAX_RESPONSES else None)
            seen["texts"] += 1
            seen["readable"] += answer is not None
            seen["boxes"] += "\\boxed{" in text
        scores, valid = extract_scores(
            tokens.astype(np.int32), lengths, padded(token_table(vocabulary)), counts,
            max_responses=MAX_RESPONSES, low=low, high=high,
        )  # fmt: skip
        scores, valid = np.asarray(scores).astype(int).tolist(), np.asarray(valid).tolist()
        for index, answer in enumerate(expected):
            zeros = [0] * (MAX_RESPONSES - len(answer or []))
            assert (scores[index], valid[index]) == (
                (answer or []) + zeros,
                answer is not None,
            ), (
                b"".join(vocabulary[token] for token in tokens[index, : lengths[index]]),
                counts[index],
            )

    check()
    assert seen["texts"] >= 100_000
    assert seen["readable"] > seen["texts"] // 5
    assert seen["boxes"] - seen["readable"] > seen["texts"] // 5


PIECES = sorted({atom.encode() for atom in ATOMS})
PIECE_TABLE = token_table(PIECES)


@settings(max_examples=300, deadline=None, database=None)
@given(row=st.lists(st.integers(0, len(PIECES) - 1), max_size=LONGEST), count=st.integers(0, 3))
def test_agrees_with_the_host_parser_on_chosen_pieces(row, count):
    text = b"".join(PIECES[token] for token in row).decode()
    tokens = np.zeros(LONGEST, np.int32)
    tokens[: len(row)] = row
    scores, valid = extract_scores(
        tokens, len(row), PIECE_TABLE, count, max_responses=MAX_RESPONSES
    )
    answer = parse_scores(text, count)
    assert bool(valid) == (answer is not None)
    assert scores.tolist() == (answer or []) + [0] * (MAX_RESPONSES - len(answer or []))


# A vocabulary small enough to write token ids by hand.
WORDS = [b"\\", b"boxed{", b"}", b",", b" ", *(b"%d" % digit for digit in range(10)), b"end", b""]
TABLE = token_table(WORDS)
IDS = {word: index for index, word in enumerate(WORDS)}


def encode(*texts: str) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of texts made of the words above, padded with closing braces, and their lengths."""
    rows = [[IDS[word.encode()] for word in re.findall(r"boxed{|end|.", text)] for text in texts]
    tokens = np.full((len(rows), max(map(len, rows)) + 2), IDS[b"}"], np.int32)
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids)] = ids
    return tokens, np.array([len(ids) for ids in rows], np.int32)


BATCH = encode(
    r"\boxed{8, 5}", r"\boxed{3}end", r"end", r"\boxed{1,2,10}", r"\boxed{8, 5}\boxed{7", ""
)
COUNTS = np.array([2, 1, 1, 3, 2, 1], np.int32)
BATCH_SCORES = [[8, 5, 0, 0], [3, 0, 0, 0], [0] * 4, [1, 2, 10, 0], [8, 5, 0, 0], [0] * 4]
BATCH_VALID = [True, True, False, True, True, False]


def read_batch(tokens, lengths, counts):
    return extract_scores(tokens, lengths, TABLE, counts, max_responses=4)


def test_a_batch_by_hand(transform):
    scores, valid = transform(read_batch)(*BATCH, COUNTS)
    assert scores.dtype == jnp.float32
    assert valid.dtype == jnp.bool_
    np.testing.assert_array_equal(scores, BATCH_SCORES)
    np.testing.assert_array_equal(valid, BATCH_VALID)


@pytest.mark.parametrize("jitted", [False, True])
def test_a_single_text(jitted):
    function = jax.jit(read_batch) if jitted else read_batch
    scores, valid = function(BATCH[0][0], BATCH[1][0], 2)
    assert scores.shape == (4,)
    assert valid.shape == ()
    np.testing.assert_array_equal(scores, BATCH_SCORES[0])


def test_leading_dimensions_and_broadcasting():
    tokens, lengths = (array.reshape(2, 3, *array.shape[1:]) for array in BATCH)
    scores, valid = read_batch(tokens, lengths, np.array([[2], [3]]))
    assert scores.shape == (2, 3, 4)
    np.testing.assert_array_equal(valid, [[True, False, False], [True, False, False]])
    np.testing.assert_array_equal(scores[:, 0], [[8, 5, 0, 0], [1, 2, 10, 0]])
    # One text, asked about in several ways.
    scores, valid = read_batch(BATCH[0][3], BATCH[1][3], np.arange(6))
    np.testing.assert_array_equal(valid, np.arange(6) == 3)
    np.testing.assert_array_equal(scores[3], [1, 2, 10, 0])


def test_tokens_beyond_the_length_are_ignored():
    tokens, _ = encode(r"\boxed{8, 5}\boxed{7, 7}")
    closed = [index + 1 for index, token in enumerate(tokens[0]) if token == IDS[b"}"]]
    lengths = np.arange(tokens.shape[1] + 5)
    _, valid = read_batch(np.broadcast_to(tokens, (len(lengths), tokens.shape[1])), lengths, 2)
    np.testing.assert_array_equal(valid, lengths >= closed[0])
    scores, _ = read_batch(tokens, np.array([closed[1] - 1]), 2)
    np.testing.assert_array_equal(scores, [[8, 5, 0, 0]])
    scores, _ = read_batch(tokens, np.array([closed[1]]), 2)
    np.testing.assert_array_equal(scores, [[7, 7, 0, 0]])


def test_a_negative_length_and_no_tokens_read_nothing():
    assert not read_batch(BATCH[0][0], -1, 2)[1]
    scores, valid = read_batch(np.zeros((3, 0), np.int32), np.zeros(3, np.int32), 1)
    assert scores.shape == (3, 4)
    assert not np.any(valid)


@pytest.mark.parametrize("stranger", [-1, len(WORDS), 2**31 - 1, -(2**31)])
def test_an_unknown_token_is_a_strange_character(stranger):
    tokens, lengths = encode(r"end\boxed{8, 5}end")
    size = lengths[0]
    changed = np.repeat(tokens, size, axis=0)
    changed[np.arange(size), np.arange(size)] = stranger
    _, valid = read_batch(changed, np.repeat(lengths, size), 2)
    # It does no harm outside the box and spoils it inside.
    np.testing.assert_array_equal(valid, [True] + [False] * (size - 2) + [True])


def test_an_empty_token_adds_nothing():
    tokens, lengths = encode(r"\boxed{10, 5}")
    spread = np.full((1, 2 * tokens.shape[1]), IDS[b""], np.int32)
    spread[:, ::2] = tokens
    scores, valid = read_batch(spread, 2 * lengths, 2)
    assert valid[0]
    np.testing.assert_array_equal(scores, [[10, 5, 0, 0]])


def test_more_responses_than_places_are_not_valid():
    tokens, lengths = encode(r"\boxed{8, 5, 7}")
    scores, valid = extract_scores(tokens, lengths, TABLE, 3, max_responses=2)
    assert not valid[0]
    np.testing.assert_array_equal(scores, [[0, 0]])


@pytest.mark.parametrize("digits", ["9" * 5000, "1" + "0" * 5000, "0" * 5000 + "11"])
def test_endless_digits_do_not_overflow(digits):
    tokens, lengths = encode(r"\boxed{" + digits + "}")
    assert not read_batch(tokens, lengths, 1)[1][0]
    assert parse_scores(r"\boxed{" + digits + "}", 1) is None


def test_endless_zeros_are_allowed():
    tokens, lengths = encode(r"\boxed{" + "0" * 5000 + "7}")
    scores, valid = read_batch(tokens, lengths, 1)
    assert valid[0]
    assert scores[0, 0] == 7
    assert parse_scores(r"\boxed{" + "0" * 5000 + "7}", 1) == [7]


def test_too_great_a_range_is_refused():
    with pytest.raises(UsageError, match="too large"):
        extract_scores(*BATCH, TABLE, COUNTS, max_responses=4, high=2**24)


def test_table_may_lie_on_the_device():
    table = TokenTable(*map(jnp.asarray, TABLE))
    scores, _ = extract_scores(*BATCH, table, COUNTS, max_responses=4)
    np.testing.assert_array_equal(scores, BATCH_SCORES)


def test_reading_stays_sharded(run_sharded):
    tokens, lengths = (np.tile(array, (4, 1)[: array.ndim]) for array in BATCH)
    scores, valid = run_sharded(read_batch, tokens, lengths, np.tile(COUNTS, 4), agreeing=True)
    np.testing.assert_array_equal(scores, BATCH_SCORES * 4)
    np.testing.assert_array_equal(valid, BATCH_VALID * 4)
