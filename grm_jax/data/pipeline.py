"""Batches of records for training: shuffled, mixed, shared out to hosts, and exactly resumable.

Everything is a function of one number, how many records were consumed. The order of the records is
a random-access sequence that follows from the seed and the sources alone; a batch is the next
stretch of it; a host takes its part of the stretch. So the position is the same on every host,
fits in a line of JSON, and a run may go on with another number of hosts, another batch size or
other threads and still sees the records that an uninterrupted run would have seen.

Importing this module imports grain; `grm_jax.data` alone does not.
"""

import bisect
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any, Generic, Protocol, TypeVar, final

import grain
import numpy as np

from grm_jax.errors import UsageError

Record = TypeVar("Record")
Record_co = TypeVar("Record_co", covariant=True)
Result = TypeVar("Result")
Batch = TypeVar("Batch")
Batch_co = TypeVar("Batch_co", covariant=True)

# Records in an order without end; grain's own endless length overflows where it is rounded up.
_ENDLESS = 1 << 48


class RandomAccess(Protocol[Record_co]):
    """What records are read from: a list, a split of a TFDS dataset, or anything alike."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Record_co: ...


@final
@dataclass(frozen=True, kw_only=True)
class Source(Generic[Record]):
    """One source of records.

    Attributes:
      name: Tells the source from others and its data from earlier data, when a run goes on.
      records: The records. They may be read from several threads.
      weight: Share of this source among all, in any unit; without weights, sources are strung
        together and every record comes once an epoch.
    """

    name: str
    records: RandomAccess[Record]
    weight: float | None = None


@final
@dataclass(frozen=True)
class Mapped(Generic[Record, Result]):
    """Records with a function applied to each when it is read, as in making prompts or tokens.

    Attributes:
      records: The records.
      function: Applied to a record; must depend on nothing else.
    """

    records: RandomAccess[Record]
    function: Callable[[Record], Result]

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int, /) -> Result:
        return self.function(self.records[index])


@final
@dataclass(frozen=True)
class Subset(Generic[Record]):
    """Some of the records, as those of a split that are neither too easy nor too long.

    Attributes:
      records: The records.
      indices: Which of them, in their new order.
    """

    records: RandomAccess[Record]
    indices: Sequence[int]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int, /) -> Record:
        return self.records[int(self.indices[index])]


@final
class RecordOrder(Generic[Record]):
    """The sequence in which the records of all sources come, epoch after epoch.

    Attributes:
      identity: What the order follows from, as a JSON-ready object.
      length: How many records there are before it ends; `None` if it does not.
    """

    def __init__(
        self,
        sources: Sequence[Source[Record]],
        *,
        seed: int,
        shuffle: bool = True,
        epochs: int | None = None,
    ) -> None:
        """Puts the records in order.

        With weights, source `i` has its share of every stretch of records, to within one per cent
        of the weight, and begins its own next epoch whenever it is used up. Shuffling differs from
        epoch to epoch and from source to source.

        Args:
          sources: Where the records come from.
          seed: Of the shuffling; any integer that is not negative.
          shuffle: Whether to shuffle each epoch; if not, records come in the order of the sources.
          epochs: How often every record comes, or `None` for no end, which weights call for.

        Raises:
          UsageError: The sources or the other arguments make no order.
        """
        _check_sources(sources, seed, epochs)
        self._sources = tuple(sources)
        self._ends = list(accumulate(len(source.records) for source in sources))
        self.identity: dict[str, object] = {
            "seed": seed,
            "shuffle": shuffle,
            "sources": [
                {"name": source.name, "records": len(source.records), "weight": source.weight}
                for source in sources
            ],
        }
        self.length = None if epochs is None else epochs * self._ends[-1]
        weights = [source.weight for source in sources if source.weight is not None]
        if weights:
            starts = [0, *self._ends]
            parts = [
                _passes(_ENDLESS, starts[number], end, (seed, number) if shuffle else None)
                for number, end in enumerate(self._ends)
            ]
            self._indices = grain.MapDataset.mix(parts, weights)
        else:
            length = _ENDLESS if self.length is None else self.length
            self._indices = _passes(length, 0, self._ends[-1], (seed, 0) if shuffle else None)

    def after(self, consumed: int) -> grain.MapDataset[int]:
        """Returns the indices, for `read`, of the records after the first `consumed` ones."""
        return self._indices[consumed:]

    def read(self, index: int) -> Record:
        """Reads a record by its index in the sources strung together."""
        source, position = self._locate(index)
        return source.records[position]

    def name(self, index: int) -> str:
        """Names a record in a message."""
        source, position = self._locate(index)
        return f"record {position} of {source.name}"

    def _locate(self, index: int) -> tuple[Source[Record], int]:
        number = bisect.bisect_right(self._ends, index)
        source = self._sources[number]
        return source, index - self._ends[number] + len(source.records)


@final
class Batches(Iterator[Batch]):
    """An iterator of batches whose position can be saved and restored.

    `get_state` is the position after the batch that was returned last, whatever was read ahead.
    Where batches are held back between this iterator and their use, save the state that was taken
    with the batch, not the latest.
    """

    def __init__(
        self,
        order: RecordOrder[Any],
        begin: Callable[[int], grain.DatasetIterator[tuple[Batch, int]]],
    ) -> None:
        """Stands before the first batch.

        Args:
          order: The order of the records.
          begin: Given how many records of the order were consumed, returns an iterator of the
            batches to come, each with how many records all hosts together consume with it.
        """
        self._order = order
        self._begin = begin
        self._consumed = 0
        self._iterator = begin(0)

    @property
    def consumed(self) -> int:
        """How many records all hosts together have consumed, over all epochs."""
        return self._consumed

    def __next__(self) -> Batch:
        batch, count = next(self._iterator)
        self._consumed += count
        return batch

    def get_state(self) -> dict[str, Any]:
        """Returns the position as a small JSON-ready object; it is the same on every host."""
        return {"consumed": self._consumed, "order": copy.deepcopy(self._order.identity)}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes to a position that `get_state` returned, here or in another process.

        The number of hosts, the batch size, the threads and the number of epochs may differ from
        the run that saved it: the records that follow are the same.

        Args:
          state: The position.

        Raises:
          UsageError: It is a position in another order of records.
        """
        consumed = _read_state(state, self._order)
        self.close()
        self._consumed = consumed
        self._iterator = self._begin(consumed)

    def close(self) -> None:
        """Ends the reading ahead; the iterator is of no more use."""
        self._iterator.close()


class Resumable(Protocol[Batch_co]):
    """What a run reads its batches from; see `Batches` for each."""

    def __next__(self) -> Batch_co: ...

    def get_state(self) -> dict[str, Any]: ...

    def set_state(self, state: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


@final
class Ahead(Generic[Batch]):
    """Batches, each with the one behind it, which is None for the last.

    Positions are those behind the first of the two: a run that goes on there sees the second again.
    """

    def __init__(self, batches: Batches[Batch]) -> None:
        self._batches = batches
        self._position = batches.get_state()
        # What comes next, and the position behind it.
        self._next: tuple[Batch, dict[str, Any]] | None = None
        self._began = False

    def __next__(self) -> tuple[Batch, Batch | None]:
        if not self._began:
            self._began = True
            self._next = self._read()
        if self._next is None:
            raise StopIteration
        batch, self._position = self._next
        self._next = self._read()
        return batch, None if self._next is None else self._next[0]

    def get_state(self) -> dict[str, Any]:
        return copy.deepcopy(self._position)

    def set_state(self, state: Mapping[str, Any]) -> None:
        self._batches.set_state(state)
        self._position, self._began = self._batches.get_state(), False

    def close(self) -> None:
        self._batches.close()

    def _read(self) -> tuple[Batch, dict[str, Any]] | None:
        try:
            batch = next(self._batches)
        except StopIteration:
            return None
        return batch, self._batches.get_state()


def batches(
    sources: Sequence[Source[Record]],
    *,
    batch_size: int,
    seed: int,
    shuffle: bool = True,
    epochs: int | None = None,
    shard_index: int = 0,
    shard_count: int = 1,
    threads: int = 2,
) -> Batches[list[Record]]:
    """Iterates over records in batches.

    A batch may reach over the end of an epoch, so that none is short and no record is left out.
    Only the last batch of the last epoch may be short; over several hosts its parts differ by at
    most one record and may be empty, but each host has as many batches as the others.

    Args:
      sources: Where the records come from; see `RecordOrder` for how they are mixed.
      batch_size: Records in a batch, over all hosts.
      seed: Of the shuffling.
      shuffle: Whether to shuffle each epoch.
      epochs: How often every record comes, or `None` for no end.
      shard_index: Which host this is, as `jax.process_index()` tells.
      shard_count: How many hosts there are.
      threads: How many batches are read ahead, each in a thread of its own; 0 reads when asked.

    Returns:
      The batches of this host: `batch_size / shard_count` records each, in the rows that follow
      those of the host before it. Its state is the same on every host.

    Raises:
      UsageError: An argument is wrong.
    """
    check_shards("batch_size", batch_size, shard_index, shard_count)
    order = RecordOrder(sources, seed=seed, shuffle=shuffle, epochs=epochs)

    def part(indices: Sequence[int]) -> tuple[list[Record], int]:
        first, last = (
            len(indices) * index // shard_count for index in (shard_index, shard_index + 1)
        )
        return [order.read(index) for index in indices[first:last]], len(indices)

    def begin(consumed: int) -> grain.DatasetIterator[tuple[list[Record], int]]:
        parts = order.after(consumed).batch(batch_size, batch_fn=list).map(part)
        return iter(parts.to_iter_dataset(read_options(threads, ahead=threads)))

    return Batches(order, begin)


def read_options(threads: int, *, ahead: int) -> grain.ReadOptions:
    """Reads `ahead` elements ahead in `threads` threads, or none without threads."""
    if threads < 0:
        raise UsageError(f"threads is {threads}; it must be 0 or more")
    size = max(threads, ahead) if threads else 0
    return grain.ReadOptions(num_threads=threads, prefetch_buffer_size=size)


def check_shards(name: str, size: int, shard_index: int, shard_count: int) -> None:
    """Raises a UsageError unless `size`, which is called `name`, can be shared out to the hosts."""
    if not 0 <= shard_index < shard_count:
        raise UsageError(f"shard_index is {shard_index}; it must be 0 to {shard_count - 1}")
    if size < 1 or size % shard_count:
        raise UsageError(
            f"{name} is {size}; it must be a positive multiple of the {shard_count} hosts"
        )


def _passes(
    length: int, start: int, end: int, seed: tuple[int, ...] | None
) -> grain.MapDataset[int]:
    """The numbers from `start` to `end`, over and over, shuffled anew each time if there is a seed.

    grain's own shuffle draws numbers until one is small enough, which is slow for some sizes, and
    of two neighbouring seeds the one's second epoch is the other's first. Here each epoch sorts raw
    random bits, whose sequence NumPy never changes: a saved position outlives an upgrade.
    """
    size = end - start

    # Threads that read ahead may be on both sides of the end of an epoch.
    @lru_cache(maxsize=2)
    def permutation(epoch: int) -> np.ndarray:
        bits = np.random.PCG64(np.random.SeedSequence([*(seed or ()), epoch]))
        return np.argsort(bits.random_raw(size), kind="stable")

    def at(position: int) -> int:
        epoch, place = divmod(position, size)
        return start + (place if seed is None else int(permutation(epoch)[place]))

    return grain.MapDataset.range(length).map(at)


def _check_sources(sources: Sequence[Source[Any]], seed: int, epochs: int | None) -> None:
    if not sources:
        raise UsageError("there is no source of records; give at least one")
    names = [source.name for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"two sources are called {name!r}; give each a name of its own")
    for source in sources:
        if not len(source.records):
            raise UsageError(f"source {source.name!r} has no records; leave it out")
        if source.weight is not None and not 0 < source.weight < float("inf"):
            raise UsageError(
                f"source {source.name!r} has the weight {source.weight}; it must be positive"
            )
    weighted = sum(source.weight is not None for source in sources)
    if weighted not in (0, len(sources)):
        raise UsageError("some sources have a weight and some have none; give it to all or to none")
    if weighted and epochs is not None:
        raise UsageError("weighted sources have epochs of their own; leave out `epochs` or weights")
    if epochs is not None and epochs < 1:
        raise UsageError(f"epochs is {epochs}; it must be 1 or more")
    if seed < 0:
        raise UsageError(f"seed is {seed}; it must not be negative")


def _read_state(state: Mapping[str, Any], order: RecordOrder[Any]) -> int:
    try:
        consumed, saved = int(state["consumed"]), dict(state["order"])
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError("this is not a saved position; give what `get_state` returned") from error
    for key, value in order.identity.items():
        if saved.get(key) != value:
            raise UsageError(
                f"the saved position belongs to {key} {saved.get(key)!r}, and this run has "
                f"{value!r}; use the same, or start anew"
            )
    if not 0 <= consumed <= (_ENDLESS if order.length is None else order.length):
        raise UsageError(
            f"the saved position is after record {consumed}, and this run ends after "
            f"{order.length}; raise `epochs`"
        )
    return consumed
