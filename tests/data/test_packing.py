import json
from itertools import islice
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grm_jax.data.packing import (
    PackedRows,
    TokenSequence,
    TooLong,
    packed_batches,
    pad_prompts,
)
from grm_jax.data.pipeline import Batches, Mapped, Source
from grm_jax.errors import UsageError

Sequences = list[tuple[tuple[int, ...], tuple[bool, ...]]]


def bucket(size: int) -> int:
    for candidate in (4, 6, 8):
        if size <= candidate:
            return candidate
    raise ValueError(f"{size} is beyond 8")


def source(sequences: Sequences) -> Source[TokenSequence]:
    return Source(name="s", records=[TokenSequence(*sequence) for sequence in sequences])


def pack(sequences: Sequences, **options: Any) -> Batches[PackedRows]:
    defaults: dict[str, Any] = {"rows": 2, "length": 6, "seed": 3, "threads": 0}
    return packed_batches([source(sequences)], **(defaults | options))


def unpack(packed: PackedRows) -> Sequences:
    """The sequences in the rows, checked on the way."""
    found: Sequences = []
    for tokens, segments, positions, mask in zip(*packed, strict=True):
        end = 0
        for segment in range(1, segments.max() + 1):
            [where] = np.nonzero(segments == segment)
            assert where.tolist() == list(range(end, end + len(where)))
            assert positions[where].tolist() == list(range(len(where)))
            end += len(where)
            found.append((tuple(tokens[where].tolist()), tuple(mask[where].tolist())))
        assert not segments[end:].any()
        assert not positions[end:].any()
        assert not mask[end:].any()
    return found


def numbered(lengths: list[int]) -> Sequences:
    """Sequences that differ in every token, some of which are 0."""
    ends = np.cumsum([0, *lengths])
    return [
        (tuple(range(first, last)), tuple(token % 3 == 0 for token in range(first, last)))
        for first, last in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)
    ]


# --- packing ---


def test_worked_out_by_hand() -> None:
    sequences: Sequences = [
        ((0, 0, 7, 0), (False, False, True, True)),
        ((8, 9, 10), (True, True, True)),
        ((11, 12), (False, True)),
        ((13, 14, 15, 16), (True, True, True, True)),
    ]
    first, second = pack(sequences, shuffle=False, epochs=1)
    assert first.tokens.tolist() == [[0, 0, 7, 0, 11, 12], [8, 9, 10, 0, 0, 0]]
    assert first.segment_ids.tolist() == [[1, 1, 1, 1, 2, 2], [1, 1, 1, 0, 0, 0]]
    assert first.positions.tolist() == [[0, 1, 2, 3, 0, 1], [0, 1, 2, 0, 0, 0]]
    assert first.loss_mask.astype(int).tolist() == [[0, 0, 1, 1, 0, 1], [1, 1, 1, 0, 0, 0]]
    assert second.tokens.tolist() == [[13, 14, 15, 16, 0, 0], [0, 0, 0, 0, 0, 0]]
    assert second.segment_ids.tolist() == [[1, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0]]


def test_types_and_shapes() -> None:
    [packed] = pack(numbered([3, 2]), rows=4, epochs=1)
    assert all(array.shape == (4, 6) for array in packed)
    assert [array.dtype for array in packed] == [np.int32, np.int32, np.int32, np.bool_]


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=40),
    rows=st.integers(1, 5),
    shuffle=st.booleans(),
)
@settings(max_examples=60)
def test_no_token_is_lost_or_mixed(lengths: list[int], rows: int, shuffle: bool) -> None:
    sequences = numbered(lengths)
    stream = pack(sequences, rows=rows, length=9, shuffle=shuffle, epochs=2)
    found = []
    for packed in stream:
        assert packed.tokens.shape == (rows, 9)
        found += unpack(packed)
        assert stream.consumed == len(found)
    assert sorted(found) == sorted(sequences * 2)


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=30))
@settings(max_examples=40)
def test_first_fit(lengths: list[int]) -> None:
    """The rows are those of a plain first-fit loop."""
    rows: list[list[int]] = [[], []]
    expected = [rows]
    for length in lengths:
        fits = [row for row in rows if sum(row) + length <= 9]
        if not fits:
            rows = [[], []]
            expected.append(rows)
            fits = rows
        fits[0].append(length)
    stream = pack(numbered(lengths), length=9, shuffle=False, epochs=1)
    got = [[np.bincount(row)[1:].tolist() for row in packed.segment_ids] for packed in stream]
    assert got == expected


def test_a_sequence_too_long_is_an_error() -> None:
    stream = pack([((1, 2, 3), (True,) * 3), ((1,) * 7, (True,) * 7)], shuffle=False, epochs=1)
    with pytest.raises(UsageError, match="record 1 of s has 7 tokens and a row has 6; make rows"):
        next(stream)


@pytest.mark.parametrize(
    ("too_long", "tokens"), [("keep_start", [1, 2, 3, 4]), ("keep_end", [4, 5, 6, 7])]
)
def test_a_sequence_too_long_is_cut_as_named(too_long: TooLong, tokens: list[int]) -> None:
    sequence = (tuple(range(1, 8)), tuple(token % 2 == 0 for token in range(1, 8)))
    [packed] = pack([sequence], rows=1, length=4, epochs=1, too_long=too_long)
    assert packed.tokens.tolist() == [tokens]
    assert packed.loss_mask.tolist() == [[token % 2 == 0 for token in tokens]]


@pytest.mark.parametrize(
    ("sequence", "message"),
    [
        (((), ()), "record 0 of s has no tokens; leave it out"),
        (((1, 2), (True,)), r"tokens of shape \(2,\) and a loss mask of shape \(1,\)"),
        ((((1, 2),), ((True, True),)), "both must be lists of one length"),
    ],
)
def test_no_proper_sequence(sequence: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        next(pack([sequence]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": 0}, "rows is 0; it must be a positive multiple"),
        ({"rows": 3, "shard_count": 2}, "rows is 3; it must be a positive multiple of the 2 hosts"),
        ({"length": 0}, "length is 0; it must be 1 or more"),
        ({"too_long": "cut"}, "too_long is 'cut'; it must be one of error, keep_start, keep_end"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        pack(numbered([1]), **options)


# --- going on, hosts ---

LENGTHS = [3, 5, 1, 6, 2, 2, 4, 6, 1, 3, 5]


@pytest.mark.parametrize("threads", [0, 2])
def test_going_on_from_every_position_of_two_epochs(threads: int) -> None:
    whole = pack(numbered(LENGTHS))
    states, expected = [json.dumps(whole.get_state())], []
    while whole.consumed < 2 * len(LENGTHS):
        expected.append(next(whole))
        states.append(json.dumps(whole.get_state()))
    for step, state in enumerate(states[:-1]):
        stream = pack(numbered(LENGTHS), threads=threads)
        stream.set_state(json.loads(state))
        for want, after in zip(expected[step:], states[step + 1 :], strict=True):
            got = next(stream)
            assert all(np.array_equal(*pair) for pair in zip(got, want, strict=True))
            assert json.dumps(stream.get_state()) == after
        stream.close()


@pytest.mark.parametrize("epochs", [None, 1])
def test_hosts_share_out_the_rows(epochs: int | None) -> None:
    whole = list(islice(pack(numbered(LENGTHS), rows=6, epochs=epochs), 7))
    parts = [
        list(
            islice(
                pack(numbered(LENGTHS), rows=6, epochs=epochs, shard_index=index, shard_count=3),
                7,
            )
        )
        for index in range(3)
    ]
    assert {len(part) for part in parts} == {len(whole)}
    for want, *got in zip(whole, *parts, strict=True):
        for name in PackedRows._fields:
            arrays = [getattr(rows, name) for rows in got]
            assert [len(array) for array in arrays] == [2, 2, 2]
            assert np.array_equal(np.concatenate(arrays), getattr(want, name))


def test_going_on_with_other_hosts_and_rows_loses_nothing() -> None:
    first = pack(numbered(LENGTHS), rows=2, epochs=1, shard_index=1, shard_count=2)
    whole = pack(numbered(LENGTHS), rows=2, epochs=1)
    found = unpack(next(whole))
    next(first)
    assert first.get_state() == whole.get_state()
    rest = pack(numbered(LENGTHS), rows=3, length=7, epochs=1)
    rest.set_state(first.get_state())
    for packed in rest:
        found += unpack(packed)
    assert sorted(found) == sorted(numbered(LENGTHS))


def test_sequences_are_made_when_read() -> None:
    words = ["ab", "c"]
    made = Mapped(words, lambda word: TokenSequence(list(word.encode()), [True] * len(word)))
    [packed] = packed_batches(
        [Source(name="words", records=made)], rows=1, length=4, seed=0, shuffle=False, epochs=1
    )
    assert packed.tokens.tolist() == [[97, 98, 99, 0]]


# --- padding ---


def test_padding() -> None:
    padded = pad_prompts([[1, 2, 0], [3, 4, 5, 6, 0]], bucket=bucket)
    assert padded.tokens.tolist() == [[1, 2, 0, 0, 0, 0], [3, 4, 5, 6, 0, 0]]
    assert padded.lengths.tolist() == [3, 5]
    assert padded.tokens.dtype == padded.lengths.dtype == np.int32


def test_padding_to_the_longest_of_all_hosts() -> None:
    assert pad_prompts([[1]], bucket=bucket, longest=7).tokens.shape == (1, 8)
    assert pad_prompts([[1] * 5], bucket=bucket, longest=2).tokens.shape == (1, 6)


def test_a_prompt_beyond_the_buckets_is_an_error() -> None:
    message = "a prompt of 9 tokens fits no padded length: 9 is beyond 8; shorten it"
    with pytest.raises(UsageError, match=message):
        pad_prompts([[1] * 9], bucket=bucket)


def test_a_bucket_that_does_not_hold_its_prompt() -> None:
    with pytest.raises(UsageError, match="the padded length of 3 tokens is 2; it must hold them"):
        pad_prompts([[1, 2, 3]], bucket=lambda size: size - 1)


def test_no_prompts() -> None:
    with pytest.raises(UsageError, match="there are no prompts to pad"):
        pad_prompts([], bucket=bucket)
