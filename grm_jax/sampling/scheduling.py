"""Which samples run together: streams of one shape, results in the order of the records.

A device program runs on one shape, so prompts are padded to a few lengths and grouped by shape. The
shape of a prompt follows from the prompt alone, never from its neighbours, so that what is sampled
for a record is the same whatever it was batched with.
"""

import itertools
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence, Set
from typing import Protocol, TypeVar

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


# How many jobs may enter a stream while the oldest waits for another one, in streams' full.
_OVERTAKING = 2

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

    A stream begins with the first unfinished job of the first unfinished item, and is filled with
    jobs of its shape from the items ahead. Once that first job is of another shape, at most twice
    as many enter as the stream holds, since rows run empty at the end of each stream; then the next
    one begins. So the wait for the next result to be yielded is bounded.

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
    window: deque[tuple[int, Item, list[Job], dict[int, Result]]] = deque()
    flying: set[tuple[int, int]] = set()
    stream: Stream[Job, Result] | None = None
    opened: Shape | None = None
    overtaken = 0

    def refill() -> None:
        while len(window) < lookahead:
            try:
                number, item = next(source)
            except StopIteration:
                return
            window.append((number, item, list(jobs(item)), {}))

    while True:
        refill()
        if not window:
            return
        number, item, todo, done = window[0]
        if len(done) == len(todo):
            window.popleft()
            yield item, [done[index] for index in range(len(todo))]
            continue
        first = next(index for index in range(len(todo)) if index not in done)
        if stream is None or (not flying and shape(todo[first]) != opened):
            # The room of the last one, before there is room for another.
            stream = None
            opened = shape(todo[first])
            stream = open_stream(opened)
        waits = (number, first) not in flying and shape(todo[first]) != opened
        left = _OVERTAKING * (stream.room + stream.running) - overtaken if waits else stream.room
        waiting = (
            ((number, index), job)
            for number, _, todo, done in window
            for index, job in enumerate(todo)
            if index not in done and (number, index) not in flying and shape(job) == opened
        )
        new = dict(itertools.islice(waiting, min(stream.room, left)))
        overtaken = overtaken + len(new) if waits else 0
        flying |= new.keys()
        results = stream.run(new)
        flying -= results.keys()
        for number, item, todo, done in window:
            found = {index: result for (owner, index), result in results.items() if owner == number}
            done |= found
            # At once, so that the next rounds of different items run together.
            if found and len(done) == len(todo):
                todo += more(item, [done[index] for index in range(len(todo))])
