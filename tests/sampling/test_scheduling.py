import itertools
from collections.abc import Hashable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

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


@dataclass
class Recorded:
    """A stream in which a run ends some of the jobs.

    Attributes:
      shape: Of its jobs.
      log: For each run of any stream, the jobs that entered and all that then ran.
      share: One in so many of the running jobs ends in a run.
      latest: Whether it is the latest ones that end first.
      jobs: What runs.
    """

    shape: str
    log: list[tuple[list[Job], list[Job]]]
    share: int = 1
    latest: bool = True
    jobs: dict[Any, Job] = field(default_factory=dict)

    @property
    def running(self) -> int:
        return len(self.jobs)

    @property
    def room(self) -> int:
        return LIMITS[self.shape] - len(self.jobs)

    def run(self, jobs: Mapping[Any, Job], *, steps: int | None = None) -> dict[Any, str]:
        assert len(jobs) <= self.room
        self.jobs |= jobs
        self.log.append((list(jobs.values()), list(self.jobs.values())))
        order = sorted(self.jobs, key=list(self.jobs).index, reverse=self.latest)
        ends = order[: max(1, len(self.jobs) // self.share)]
        return {key: "{}.{}".format(*self.jobs.pop(key)) for key in ends}

    def drop(self, keys: Set[Hashable]) -> None:
        raise AssertionError("nothing is given up")


def run_all(
    items: Sequence[Item], lookahead: int = 64, share: int = 1, latest: bool = True
) -> tuple[list[tuple[Item, list[str]]], list[tuple[list[Job], list[Job]]]]:
    """What `run_in_order` yields, and the log of its streams."""
    log: list[tuple[list[Job], list[Job]]] = []
    results = run_in_order(
        items,
        jobs=jobs_of,
        shape=lambda job: job[2],
        open_stream=lambda shape: Recorded(shape, log, share, latest),
        lookahead=lookahead,
    )
    return list(results), log


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


# --- streams ---


def test_results_come_in_order_whatever_ran_first() -> None:
    items = [(0, ["a", "b", "a"]), (1, ["b"]), (2, []), (3, ["a", "c"])]
    results, _ = run_all(items)
    assert results == [
        ((0, ["a", "b", "a"]), ["0.0", "0.1", "0.2"]),
        ((1, ["b"]), ["1.0"]),
        ((2, []), []),
        ((3, ["a", "c"]), ["3.0", "3.1"]),
    ]


def test_streams_are_filled_from_the_items_ahead() -> None:
    _, log = run_all([(number, ["c"]) for number in range(7)])
    assert [[job[0] for job in ran] for _, ran in log] == [[0, 1, 2, 3, 4], [5, 6]]


def test_jobs_enter_as_others_end() -> None:
    _, log = run_all([(number, ["c"]) for number in range(8)], share=3)
    assert [[job[0] for job in new] for new, _ in log] == [
        [0, 1, 2, 3, 4], [5], [6], [7], [], [], [], [],
    ]  # fmt: skip


def test_few_enter_while_the_first_waits_for_another_shape() -> None:
    items = [(0, ["c", "b"]), *((number, ["c"]) for number in range(1, 20))]
    _, log = run_all(items, share=5, latest=False)
    shapes = [ran[0][2] for _, ran in log]
    # The first job ends at once; ten more enter and end; then the stream of the second begins.
    assert shapes == ["c"] * 15 + ["b"] + ["c"] * 5
    assert [len(new) for new, _ in log[:17]] == [5] + [1] * 10 + [0] * 4 + [1, 5]


def test_items_without_jobs_run_nothing() -> None:
    assert run_all([(0, []), (1, [])]) == ([((0, []), []), ((1, []), [])], [])


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
        open_stream=lambda shape: Recorded(shape, [], 2),
        lookahead=lookahead,
    )
    assert taken == []
    for number, _ in enumerate(results):
        assert len(taken) <= number + lookahead
    assert taken == list(range(40))


@given(
    st.lists(st.lists(st.sampled_from("abc"), max_size=5), max_size=15).map(
        lambda shapes: list(enumerate(shapes))
    ),
    st.integers(1, 8),
    st.integers(1, 5),
    st.booleans(),
)
def test_every_job_runs_once_in_streams_of_one_shape(
    items: list[Item], lookahead: int, share: int, latest: bool
) -> None:
    results, log = run_all(items, lookahead, share, latest)
    assert [item for item, _ in results] == items
    for (number, shapes), done in results:
        assert done == [f"{number}.{place}" for place in range(len(shapes))]

    everything = [job for item in items for job in jobs_of(item)]
    assert sorted(job for new, _ in log for job in new) == everything
    entered: set[Job] = set()
    overtaken = 0
    for number, (new, ran) in enumerate(log):
        assert len({shape for _, _, shape in ran}) == 1
        assert len(ran) <= LIMITS[ran[0][2]]
        after = log[number + 1][1] if number + 1 < len(log) else []
        ended = entered | {job for job in ran if job not in after}
        first = next(job for job in everything if job in ran or job not in entered)
        # The oldest job that has not ended runs, or few have overtaken it.
        overtaken = 0 if first in ran else overtaken + len(new)
        assert overtaken <= 2 * LIMITS[ran[0][2]]
        assert all(job[0] < first[0] + lookahead for job in new)
        entered = ended | set(ran)


# --- rounds ---


def test_items_that_want_more_run_together_and_keep_their_order() -> None:
    """Each item asks for as many further jobs, one at a time, as its number says."""
    log: list[tuple[list[Job], list[Job]]] = []

    def more(item: Item, results: Sequence[str]) -> list[Job]:
        assert list(results) == [f"{item[0]}.{place}" for place in range(len(results))]
        return [(item[0], len(results), "c")] if len(results) <= item[0] else []

    found = run_in_order(
        [(number, ["c"]) for number in range(4)],
        jobs=jobs_of,
        shape=lambda job: job[2],
        open_stream=lambda shape: Recorded(shape, log),
        more=more,
    )
    assert [(item[0], len(results)) for item, results in found] == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert [len(ran) for _, ran in log] == [4, 3, 2, 1]
