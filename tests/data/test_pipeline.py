import json
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grm_jax.data.pipeline import Ahead, Batches, Mapped, RandomAccess, Source, Subset, batches
from grm_jax.errors import UsageError


def source(name: str, count: int, weight: float | None = None) -> Source[str]:
    return Source(name=name, records=[f"{name}{index}" for index in range(count)], weight=weight)


ONE = [source("a", 11)]
STRUNG = [source("a", 11), source("b", 4)]
WEIGHTED = [source("a", 11, 0.7), source("b", 4, 0.3)]
MIXES = {"one": ONE, "strung": STRUNG, "weighted": WEIGHTED}


def start(
    sources: Sequence[Source[str]] = ONE,
    *,
    batch_size: int = 4,
    seed: int = 5,
    threads: int = 0,
    **options: Any,
) -> Batches[list[str]]:
    return batches(sources, batch_size=batch_size, seed=seed, threads=threads, **options)


def flat(stream: Batches[list[str]], count: int | None = None) -> list[str]:
    return [record for batch in islice(stream, count) for record in batch]


def saved(stream: Batches[Any]) -> dict[str, Any]:
    """The state as it is after a stay in a file."""
    return json.loads(json.dumps(stream.get_state()))


# --- order ---


@pytest.mark.parametrize("sources", [ONE, STRUNG])
def test_every_record_comes_once_an_epoch(sources: Sequence[Source[str]]) -> None:
    everything = sorted(record for item in sources for record in item.records)
    size = len(everything)
    got = flat(start(sources, epochs=3))
    epochs = [got[first : first + size] for first in range(0, 3 * size, size)]
    assert len(got) == 3 * size
    assert all(sorted(epoch) == everything for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_batches_reach_over_the_end_of_an_epoch() -> None:
    sizes = [len(batch) for batch in start(epochs=2)]
    assert sizes == [4, 4, 4, 4, 4, 2]


def test_order_follows_from_the_seed() -> None:
    first = flat(start(STRUNG, epochs=1))
    assert flat(start(STRUNG, epochs=1)) == first
    assert flat(start(STRUNG, epochs=1, seed=6)) != first


def test_order_is_the_same_for_ever() -> None:
    """Written down once: with another order, saved positions would be worth nothing."""
    assert flat(start(epochs=2)) == [
        f"a{index}"
        for index in (7, 8, 4, 3, 5, 6, 2, 10, 0, 1, 9, 7, 10, 1, 3, 6, 8, 9, 2, 0, 5, 4)
    ]


def test_seeds_do_not_share_epochs() -> None:
    """A seed's second epoch is not the next seed's first."""
    assert flat(start(epochs=2))[11:] != flat(start(epochs=1, seed=6))


def test_unshuffled_records_come_as_they_are() -> None:
    expected = [record for item in STRUNG for record in item.records]
    assert flat(start(STRUNG, shuffle=False, epochs=2)) == expected * 2


def test_endless_with_any_batch_size() -> None:
    assert len(flat(start(batch_size=1), 40)) == 40
    [batch] = islice(start(batch_size=64), 1)
    assert Counter(Counter(batch).values()) == {6: 9, 5: 2}  # 64 of 11 records


@given(share=st.floats(0.05, 0.95))
@settings(max_examples=20)
def test_weights_are_shares_of_every_stretch(share: float) -> None:
    mixed = [source("a", 11, share), source("b", 4, 1 - share)]
    got = flat(start(mixed, batch_size=50), 20)
    for end in range(50, 1001, 50):
        count = sum(record[0] == "a" for record in got[:end])
        assert abs(count - share * end) <= 2 + 0.01 * end


def test_weighted_sources_have_their_own_epochs() -> None:
    got = flat(start(WEIGHTED), 60)
    for item in WEIGHTED:
        own = [record for record in got if record[0] == item.name]
        size = len(item.records)
        epochs = [own[first : first + size] for first in range(0, len(own) - size, size)]
        assert len(epochs) > 10
        assert all(sorted(epoch) == sorted(item.records) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) > 5


# --- hosts ---


@pytest.mark.parametrize("name", MIXES)
@pytest.mark.parametrize("hosts", [2, 3, 6])
def test_hosts_share_out_each_batch(name: str, hosts: int) -> None:
    whole = start(MIXES[name], batch_size=6)
    parts = [
        start(MIXES[name], batch_size=6, shard_index=index, shard_count=hosts)
        for index in range(hosts)
    ]
    for _ in range(12):
        rows = [next(part) for part in parts]
        assert {len(row) for row in rows} == {6 // hosts}
        assert [record for row in rows for record in row] == next(whole)
    assert all(part.get_state() == whole.get_state() for part in parts)


@given(records=st.integers(1, 20), epochs=st.integers(1, 3), hosts=st.integers(1, 5))
@settings(max_examples=30)
def test_hosts_are_disjoint_and_complete(records: int, epochs: int, hosts: int) -> None:
    parts = [
        list(
            start(
                [source("a", records)],
                batch_size=hosts * 2,
                epochs=epochs,
                shard_index=index,
                shard_count=hosts,
            )
        )
        for index in range(hosts)
    ]
    assert {len(part) for part in parts} == {-(-records * epochs // (2 * hosts))}
    last = [len(part[-1]) for part in parts]
    assert max(last) - min(last) <= 1
    seen = Counter(record for part in parts for batch in part for record in batch)
    assert seen == {f"a{index}": epochs for index in range(records)}


def test_a_host_reads_its_own_records_only() -> None:
    read: list[str] = []

    def note(record: str) -> str:
        read.append(record)
        return record

    item = Source(name="a", records=Mapped(ONE[0].records, note))
    got = flat(start([item], batch_size=4, shard_index=1, shard_count=2, epochs=1))
    assert read == got
    assert len(got) in (5, 6)


# --- going on ---


@pytest.mark.parametrize("name", MIXES)
@pytest.mark.parametrize("threads", [0, 3])
def test_going_on_from_every_position_of_two_epochs(name: str, threads: int) -> None:
    sources = MIXES[name]
    steps = 2 * sum(len(item.records) for item in sources) // 2 + 1
    whole = start(sources, batch_size=2)
    states, expected = [saved(whole)], []
    for _ in range(steps + 4):
        expected.append(next(whole))
        states.append(saved(whole))
    for step in range(steps):
        stream = start(sources, batch_size=2, threads=threads)
        stream.set_state(states[step])
        assert saved(stream) == states[step]
        assert list(islice(stream, 4)) == expected[step : step + 4]
        assert saved(stream) == states[step + 4]
        stream.close()


@given(data=st.data(), name=st.sampled_from(sorted(MIXES)))
@settings(max_examples=40)
def test_batch_size_hosts_and_threads_may_change(data: st.DataObject, name: str) -> None:
    """However often the run is cut, what all hosts consume together is the same."""
    expected = flat(start(MIXES[name], batch_size=1), 400)
    got: list[str] = []
    state = saved(start(MIXES[name]))
    for _ in range(3):
        hosts = data.draw(st.integers(1, 3))
        size = hosts * data.draw(st.integers(1, 4))
        count = data.draw(st.integers(0, 5))
        parts = [
            start(
                MIXES[name],
                batch_size=size,
                shard_index=index,
                shard_count=hosts,
                threads=data.draw(st.sampled_from([0, 2])),
            )
            for index in range(hosts)
        ]
        for part in parts:
            part.set_state(state)
        for _ in range(count):
            got += [record for part in parts for record in next(part)]
        [state] = {json.dumps(part.get_state()): saved(part) for part in parts}.values()
        assert state["consumed"] == parts[0].consumed == len(got)
        for part in parts:
            part.close()
    assert got == expected[: len(got)]


def test_reading_ahead_is_not_consuming() -> None:
    lock, read = threading.Lock(), [0]

    def note(record: str) -> str:
        with lock:
            read[0] += 1
        return record

    stream = start([Source(name="a", records=Mapped(ONE[0].records, note))], threads=4)
    next(stream)
    limit = time.monotonic() + 10
    while read[0] < 16 and time.monotonic() < limit:
        time.sleep(0.001)
    assert read[0] >= 16
    assert stream.consumed == stream.get_state()["consumed"] == 4
    stream.close()


def test_a_used_iterator_can_go_back() -> None:
    stream = start(threads=2)
    state = saved(stream)
    first = flat(stream, 5)
    stream.set_state(state)
    assert flat(stream, 5) == first
    stream.close()


def test_going_on_at_the_end() -> None:
    stream = start(epochs=2)
    flat(stream)
    state = saved(stream)
    again = start(epochs=2)
    again.set_state(state)
    assert list(again) == []
    more = start(epochs=3)
    more.set_state(state)
    assert flat(more) == flat(start(epochs=3))[22:]
    with pytest.raises(UsageError, match="after record 22, and this run ends after 11; raise"):
        start(epochs=1).set_state(state)


def test_state_is_not_a_view() -> None:
    stream = start()
    stream.get_state()["order"]["sources"].clear()
    stream.set_state(saved(start()))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (start(seed=6), "belongs to seed 6, and this run has 5; use the same, or start anew"),
        (start(shuffle=False), "belongs to shuffle False, and this run has True"),
        (start([source("a", 12)]), "belongs to sources .*'records': 12.*this run has .*11"),
        (start([source("b", 11)]), "belongs to sources .*'b'"),
        (start([source("a", 11, 1.0)]), "belongs to sources .*'weight': 1.0"),
        (start(STRUNG), "belongs to sources"),
    ],
)
def test_position_in_another_order(other: Batches[list[str]], message: str) -> None:
    stream = start()
    with pytest.raises(UsageError, match=message):
        stream.set_state(saved(other))
    assert flat(stream, 3) == flat(start(), 3)  # as if nothing had been asked


@pytest.mark.parametrize("state", [{}, {"consumed": 1}, {"consumed": "x", "order": {}}])
def test_no_position_at_all(state: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="this is not a saved position"):
        start().set_state(state)


# --- views ---


def test_views() -> None:
    numbers: RandomAccess[int] = list(range(10))
    some = Subset(numbers, [7, 2, 5])
    doubled = Mapped(some, lambda number: 2 * number)
    assert [doubled[index] for index in range(len(doubled))] == [14, 4, 10]
    got = next(
        batches([Source(name="x", records=doubled)], batch_size=3, seed=0, shuffle=False, threads=0)
    )
    assert got == [14, 4, 10]


def test_an_error_while_reading_arrives() -> None:
    def fail(record: str) -> str:
        raise UsageError(f"{record} is wrong")

    for threads in (0, 2):
        stream = start([Source(name="a", records=Mapped(["x"], fail))], threads=threads)
        with pytest.raises(UsageError, match="x is wrong"):
            next(stream)
        stream.close()


# --- mistakes ---


@pytest.mark.parametrize(
    ("sources", "options", "message"),
    [
        ([], {}, "there is no source of records"),
        ([source("a", 0)], {}, "source 'a' has no records; leave it out"),
        ([source("a", 1), source("a", 2)], {}, "two sources are called 'a'"),
        ([source("a", 1, 1.0), source("b", 1)], {}, "some sources have a weight and some"),
        ([source("a", 1, 0.0)], {}, "source 'a' has the weight 0.0; it must be positive"),
        ([source("a", 1, float("nan"))], {}, "has the weight nan"),
        (WEIGHTED, {"epochs": 1}, "weighted sources have epochs of their own"),
        (ONE, {"epochs": 0}, "epochs is 0; it must be 1 or more"),
        (ONE, {"seed": -1}, "seed is -1; it must not be negative"),
        (ONE, {"threads": -1}, "threads is -1; it must be 0 or more"),
        (ONE, {"batch_size": 0}, "batch_size is 0; it must be a positive multiple"),
        (ONE, {"shard_count": 3}, "batch_size is 4; it must be a positive multiple of the 3 hosts"),
        (ONE, {"shard_index": 2, "shard_count": 2}, "shard_index is 2; it must be 0 to 1"),
        (ONE, {"shard_index": -1}, "shard_index is -1"),
    ],
)
def test_wrong_arguments(sources: list[Source[str]], options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        start(sources, **options)


def test_weights_that_are_equal_to_one_another_are_the_same_mix() -> None:
    tenfold = [replace(item, weight=10 * (item.weight or 0)) for item in WEIGHTED]
    assert flat(start(tenfold), 20) == flat(start(WEIGHTED), 20)


def test_batches_with_the_one_behind_them() -> None:
    def begin() -> Ahead[list[int]]:
        source = Source(name="a", records=list(range(10)))
        return Ahead(batches([source], batch_size=4, seed=0, shuffle=False, epochs=1, threads=0))

    ahead = begin()
    start = ahead.get_state()
    found = [next(ahead)]
    position = ahead.get_state()
    found += [next(ahead), next(ahead)]
    assert found == [
        ([0, 1, 2, 3], [4, 5, 6, 7]),
        ([4, 5, 6, 7], [8, 9]),
        ([8, 9], None),
    ]
    with pytest.raises(StopIteration):
        next(ahead)
    # A run that goes on sees again what was behind its last batch.
    other = begin()
    assert other.get_state() == start
    other.set_state(position)
    assert other.get_state() == position
    assert next(other) == found[1]
    ahead.close()
    other.close()
