import itertools
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grm_jax.sampling import LENGTHS, bucket, power_of_two, run_in_order

Item = tuple[int, list[str]]
Job = tuple[int, int, str]
"""The item's number, the job's number in it, and its shape."""

LIMITS = {"a": 1, "b": 2, "c": 5}


def jobs_of(item: Item) -> list[Job]:
    return [(item[0], place, shape) for place, shape in enumerate(item[1])]


def run_all(
    items: Sequence[Item], lookahead: int = 64
) -> tuple[list[tuple[Item, list[str]]], list[list[Job]]]:
    """What `run_in_order` yields, and the batches that it ran."""
    batches: list[list[Job]] = []

    def run(batch: Sequence[Job]) -> list[str]:
        batches.append(list(batch))
        return [f"{item}.{place}" for item, place, _ in batch]

    results = run_in_order(
        items,
        jobs=jobs_of,
        shape=lambda job: job[2],
        limit=LIMITS.__getitem__,
        run=run,
        lookahead=lookahead,
    )
    return list(results), batches


# --- sizes ---


def test_bucket_is_the_least_size_that_holds() -> None:
    sizes = (4, 8, 16)
    assert [bucket(size, sizes) for size in (0, 1, 4, 5, 8, 9, 16)] == [4, 4, 4, 8, 8, 16, 16]


def test_a_size_beyond_all_buckets_is_refused() -> None:
    with pytest.raises(ValueError, match="17 is beyond the largest bucket, 16"):
        bucket(17, (4, 8, 16))


def test_the_lengths_rise_and_waste_at_most_half() -> None:
    assert list(LENGTHS) == sorted(set(LENGTHS))
    assert LENGTHS[0] == 32
    for smaller, larger in itertools.pairwise(LENGTHS):
        assert larger <= 1.5 * smaller
        assert bucket(smaller) == smaller
        assert bucket(smaller + 1) == larger


def test_power_of_two() -> None:
    sizes = (0, 1, 2, 3, 4, 5, 31, 32, 33)
    assert [power_of_two(size) for size in sizes] == [1, 1, 2, 4, 4, 8, 32, 32, 64]


@given(st.integers(1, 10**9))
def test_power_of_two_is_the_least_one_that_holds(size: int) -> None:
    power = power_of_two(size)
    assert power.bit_count() == 1
    assert power // 2 < size <= power


# --- batches ---


def test_results_come_in_order_whatever_ran_first() -> None:
    items = [(0, ["a", "b", "a"]), (1, ["b"]), (2, []), (3, ["a", "c"])]
    results, _ = run_all(items)
    assert results == [
        ((0, ["a", "b", "a"]), ["0.0", "0.1", "0.2"]),
        ((1, ["b"]), ["1.0"]),
        ((2, []), []),
        ((3, ["a", "c"]), ["3.0", "3.1"]),
    ]


def test_batches_are_filled_from_the_items_ahead() -> None:
    _, batches = run_all([(number, ["c"]) for number in range(7)])
    assert [[job[0] for job in batch] for batch in batches] == [[0, 1, 2, 3, 4], [5, 6]]


def test_items_without_jobs_run_nothing() -> None:
    results, batches = run_all([(0, []), (1, [])])
    assert results == [((0, []), []), ((1, []), [])]
    assert batches == []


def test_no_items_give_no_results() -> None:
    assert run_all([]) == ([], [])


@pytest.mark.parametrize("lookahead", [1, 3, 10])
def test_the_source_is_read_only_as_far_as_the_lookahead(lookahead: int) -> None:
    taken = []

    def source() -> Iterator[Item]:
        for number in range(40):
            taken.append(number)
            yield number, ["c"]

    results = run_in_order(
        source(),
        jobs=jobs_of,
        shape=lambda job: job[2],
        limit=lambda shape: 100,
        run=list,
        lookahead=lookahead,
    )
    assert taken == []
    for number, _ in enumerate(results):
        assert len(taken) <= number + lookahead
    assert taken == list(range(40))


def test_a_batch_that_loses_a_result_is_an_error() -> None:
    results = run_in_order(
        [(0, ["a", "a"])],
        jobs=jobs_of,
        shape=lambda job: job[2],
        limit=lambda shape: 2,
        run=lambda batch: batch[:1],
    )
    with pytest.raises(ValueError, match="shorter"):
        next(results)


@given(
    st.lists(st.lists(st.sampled_from("abc"), max_size=5), max_size=15).map(
        lambda shapes: list(enumerate(shapes))
    ),
    st.integers(1, 8),
)
def test_every_job_runs_once_in_batches_of_one_shape(items: list[Item], lookahead: int) -> None:
    results, batches = run_all(items, lookahead)
    assert [item for item, _ in results] == items
    for (number, shapes), done in results:
        assert done == [f"{number}.{place}" for place in range(len(shapes))]

    everything = [job for item in items for job in jobs_of(item)]
    assert sorted(job for batch in batches for job in batch) == everything
    unfinished = everything
    for batch in batches:
        shapes = {shape for _, _, shape in batch}
        assert len(shapes) == 1
        assert len(batch) <= LIMITS[shapes.pop()]
        assert batch[0] == unfinished[0]
        assert all(job[0] < unfinished[0][0] + lookahead for job in batch)
        unfinished = [job for job in unfinished if job not in batch]


# --- rounds ---


def test_items_that_want_more_run_together_and_keep_their_order() -> None:
    """Each item asks for as many further jobs, one at a time, as its number says."""
    batches: list[list[Job]] = []

    def run(batch: Sequence[Job]) -> list[int]:
        batches.append(list(batch))
        return [place for _, place, _ in batch]

    def more(item: Item, results: Sequence[int]) -> list[Job]:
        assert list(results) == list(range(len(results)))
        return [(item[0], len(results), "c")] if len(results) <= item[0] else []

    found = run_in_order(
        [(number, ["c"]) for number in range(4)],
        jobs=jobs_of,
        shape=lambda job: job[2],
        limit=lambda shape: 5,
        run=run,
        more=more,
    )
    assert [(item[0], len(results)) for item, results in found] == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert [len(batch) for batch in batches] == [4, 3, 2, 1]
