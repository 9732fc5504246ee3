"""Which samples run together: streams of one shape, results in the order of the records.

A device program runs on one shape, so prompts are padded to a few lengths and grouped by shape. The
shape of a prompt follows from the prompt alone, never from its neighbours, so that what is sampled
for a record is the same whatever it was batched with.
"""

import itertools
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar, final

Item = TypeVar("Item")
Job = TypeVar("Job")
Job_contra = TypeVar("Job_contra", contravariant=True)
Key = TypeVar("Key", bound=Hashable)
Result = TypeVar("Result")
Shape = TypeVar("Shape", bound=Hashable)


class Stream(Protocol[Job_contra, Result]):
    """A batch of jobs of one shape, which enter and leave it while it runs."""

    @property
    def room(self) -> int:
        """Jobs that may be added."""

    @property
    def running(self) -> int:
        """Jobs that are in it."""

    def run(self, jobs: Mapping[Key, Job_contra], *, steps: int | None = None) -> dict[Key, Result]:
        """Adds jobs and runs on for a while, until some have ended.

        Args:
          jobs: At most `room`, by names of their own.
          steps: The most steps to run before returning, with results or without.

        Returns:
          The results of those that have ended, whenever they were added. There is one at least if
          any were running and `steps` is None.
        """

    def drop(self, keys: Set[Hashable]) -> None:
        """Gives up jobs that are running, by the names they were added with."""


LENGTHS = tuple(size << doubling for doubling in range(13) for size in (32, 48))
"""Padded lengths, in tokens: two to a doubling, so that few programs are compiled."""


def bucket(size: int, sizes: Sequence[int] = LENGTHS) -> int:
    """The least of `sizes` that holds `size`."""
    for candidate in sizes:
        if size <= candidate:
            return candidate
    raise ValueError(f"{size} is beyond the largest bucket, {sizes[-1]}")


def power_of_two(size: int) -> int:
    """The least power of two that is at least `size`."""
    return 1 << max(0, size - 1).bit_length()


@final
class Scheduler(Generic[Key, Job, Shape, Result]):
    """Runs jobs in one stream at a time, and decides what may enter it.

    A stream is opened for the oldest unfinished job and takes jobs of its shape. Once the oldest
    is of another shape, only so many more enter, and the next stream begins when this one is empty:
    so the wait of no job depends on how many come after it.

    Args:
      open_stream: Makes the stream of a job's shape.
      overtaking: How many jobs may enter while the oldest waits for another stream, as a multiple
        of those a stream holds.

    Attributes:
      running: The jobs in the stream.
    """

    def __init__(
        self, open_stream: Callable[[Key, Shape], Stream[Job, Result]], *, overtaking: int = 0
    ) -> None:
        self.running: set[Key] = set()
        self._open_stream = open_stream
        self._overtaking = overtaking
        self._overtaken = 0
        self._stream: Stream[Job, Result] | None = None
        self._shape: Shape | None = None

    def run(
        self, unfinished: Iterable[tuple[Key, Job, Shape]], *, steps: int | None = None
    ) -> dict[Key, Result]:
        """Lets jobs enter and runs the stream for a while.

        Args:
          unfinished: Jobs without a result, the oldest first, with names of their own and their
            shapes; those that run are among them.
          steps: As of `Stream.run`.

        Returns:
          The results of those that have ended.
        """
        rest = iter(unfinished)
        oldest = next(rest, None)
        if oldest is None:
            return {}
        key, _, shape = oldest
        if self._stream is None or (not self.running and shape != self._shape):
            # The room of the last one, before there is room for another.
            self._stream = None
            self._stream, self._shape = self._open_stream(key, shape), shape
        stream, room = self._stream, self._stream.room
        waits = key not in self.running and shape != self._shape
        if waits:
            room = min(room, self._overtaking * (room + stream.running) - self._overtaken)
        waiting = (
            (key, job)
            for key, job, shape in itertools.chain([oldest], rest)
            if shape == self._shape and key not in self.running
        )
        new = dict(itertools.islice(waiting, room))
        self._overtaken = self._overtaken + len(new) if waits else 0
        self.running |= new.keys()
        results = stream.run(new, steps=steps)
        self.running -= results.keys()
        return results

    def drop(self, keys: Set[Key]) -> None:
        """Gives up jobs, by their names; those that run make room."""
        keys = keys & self.running
        if self._stream is not None and keys:
            self._stream.drop(keys)
            self.running -= keys

    def reset(self) -> None:
        """Gives up the stream with all that runs in it."""
        self._stream, self.running = None, set()


@dataclass(kw_only=True, eq=False)
class _Held(Generic[Item, Job, Shape, Result]):
    """An item whose turn has not come: its jobs with their shapes, and results by place."""

    item: Item
    jobs: list[tuple[Job, Shape]]
    results: dict[int, Result] = field(default_factory=dict)

    def found(self) -> list[Result] | None:
        """The results of all jobs, or None while one is missing."""
        places = range(len(self.jobs))
        complete = len(self.results) == len(self.jobs)
        return [self.results[place] for place in places] if complete else None


def run_in_order(
    items: Iterable[Item],
    *,
    jobs: Callable[[Item], Sequence[Job]],
    shape: Callable[[Job], Shape],
    open_stream: Callable[[Shape], Stream[Job, Result]],
    more: Callable[[Item, Sequence[Result]], Sequence[Job]] = lambda item, results: (),
    lookahead: int = 64,
) -> Iterator[tuple[Item, list[Result]]]:
    """Runs the jobs of many items in streams of equal shape and yields items in order.

    As a `Scheduler` does it, with the items' order for age: while the oldest job waits for another
    stream, at most twice as many enter as a stream holds, since rows run empty at the end of each.
    So the wait for the next result to be yielded is bounded.

    Args:
      items: Read only as far ahead as `lookahead`.
      jobs: The jobs of an item; none is allowed.
      shape: What jobs must share to run in one stream.
      open_stream: Makes the stream of a shape; there is one at a time.
      more: Further jobs of an item, of which all so far have these results; none ends it.
      lookahead: Items held at once.

    Yields:
      Each item with its results, in the order of its jobs.
    """
    source = enumerate(items)
    window: dict[int, _Held[Item, Job, Shape, Result]] = {}
    scheduler: Scheduler[tuple[int, int], Job, Shape, Result] = Scheduler(
        lambda key, shape: open_stream(shape), overtaking=2
    )

    def shaped(jobs: Iterable[Job]) -> list[tuple[Job, Shape]]:
        return [(job, shape(job)) for job in jobs]

    def unfinished() -> Iterator[tuple[tuple[int, int], Job, Shape]]:
        for number, held in window.items():
            for place, (job, its_shape) in enumerate(held.jobs):
                if place not in held.results:
                    yield (number, place), job, its_shape

    while True:
        for number, item in itertools.islice(source, lookahead - len(window)):
            window[number] = _Held(item=item, jobs=shaped(jobs(item)))
        if not window:
            return
        first = next(iter(window))
        if (complete := window[first].found()) is not None:
            yield window.pop(first).item, complete
            continue
        results = scheduler.run(unfinished())
        for (number, place), result in results.items():
            window[number].results[place] = result
        for number in sorted({number for number, _ in results}):
            held = window[number]
            # At once, so that the next rounds of different items run together.
            if (complete := held.found()) is not None:
                held.jobs += shaped(more(held.item, complete))
