"""Which samples run together: batches of one shape, results in the order of the records.

A device program runs on one shape, so prompts are padded to a few lengths and grouped by shape. The
shape of a prompt follows from the prompt alone, never from its neighbours, so that what is sampled
for a record is the same whatever it was batched with.
"""

from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import TypeVar

Item = TypeVar("Item")
Job = TypeVar("Job")
Result = TypeVar("Result")
Shape = TypeVar("Shape", bound=Hashable)

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
    limit: Callable[[Shape], int],
    run: Callable[[Sequence[Job]], Sequence[Result]],
    more: Callable[[Item, Sequence[Result]], Sequence[Job]] = lambda item, results: (),
    lookahead: int = 64,
) -> Iterator[tuple[Item, list[Result]]]:
    """Runs the jobs of many items in batches of equal shape and yields items in order.

    Each batch begins with the first unfinished job of the first unfinished item, and is filled with
    jobs of its shape from the items ahead. So the next result to be yielded is always being worked
    on, and the wait for it is bounded.

    Args:
      items: Read only as far ahead as `lookahead`.
      jobs: The jobs of an item; none is allowed.
      shape: What jobs must share to run in one batch.
      limit: Most jobs in a batch of a shape.
      run: Runs a batch and returns one result for each job.
      more: Further jobs of an item, of which all so far have these results; none ends it.
      lookahead: Items held at once.

    Yields:
      Each item with its results, in the order of its jobs.
    """
    source = iter(items)
    window: deque[tuple[Item, list[Job], dict[int, Result]]] = deque()

    def refill() -> None:
        while len(window) < lookahead:
            try:
                item = next(source)
            except StopIteration:
                return
            window.append((item, list(jobs(item)), {}))

    while True:
        refill()
        if not window:
            return
        item, todo, done = window[0]
        if len(done) == len(todo):
            window.popleft()
            yield item, [done[index] for index in range(len(todo))]
            continue
        waiting = [
            (index, job, finished)
            for _, pending, finished in window
            for index, job in enumerate(pending)
            if index not in finished
        ]
        wanted = shape(waiting[0][1])
        batch = [entry for entry in waiting if shape(entry[1]) == wanted][: limit(wanted)]
        results = run([job for _, job, _ in batch])
        for (index, _, finished), result in zip(batch, results, strict=True):
            finished[index] = result
        # At once, so that the next rounds of different items run together.
        touched = {id(finished) for _, _, finished in batch}
        for item, todo, finished in window:
            if id(finished) in touched and len(finished) == len(todo):
                todo += more(item, [finished[index] for index in range(len(todo))])
