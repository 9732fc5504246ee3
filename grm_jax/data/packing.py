"""Token sequences in arrays of one shape: packed for training on them, padded for sampling.

S is the length of a row. What is padding and what is trained on follows from lengths alone, never
from the values of tokens: an end-of-text token may well be the padding token too.

Importing this module imports grain; `grm_jax.data` alone does not.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple, assert_never, get_args

import grain
import numpy as np

from grm_jax.data.pipeline import Batches, RecordOrder, Source, check_shards, read_options
from grm_jax.errors import UsageError

TooLong = Literal["error", "keep_start", "keep_end"]
"""What becomes of a sequence longer than a row: an error, or its first or last S tokens."""


class TokenSequence(NamedTuple):
    """A sequence of tokens to train on.

    Attributes:
      tokens: `i32[T]`.
      loss_mask: `bool[T]`, whether the token is learnt, as those of a prompt are not.
    """

    tokens: Sequence[int] | np.ndarray
    loss_mask: Sequence[bool] | np.ndarray


class PackedRows(NamedTuple):
    """Rows that hold several sequences each, one after the other.

    Attributes:
      tokens: `i32[B, S]`.
      segment_ids: `i32[B, S]`, 1 for the first sequence of a row, 2 for the second and so on; 0 is
        padding. A token attends only to those with its number.
      positions: `i32[B, S]`, position within the sequence, from 0.
      loss_mask: `bool[B, S]`, false on padding.
    """

    tokens: np.ndarray
    segment_ids: np.ndarray
    positions: np.ndarray
    loss_mask: np.ndarray


class PaddedPrompts(NamedTuple):
    """Prompts in one array.

    Attributes:
      tokens: `i32[B, P]`, padded at the end.
      lengths: `i32[B]`.
    """

    tokens: np.ndarray
    lengths: np.ndarray


def packed_batches(
    sources: Sequence[Source[TokenSequence]],
    *,
    rows: int,
    length: int,
    seed: int,
    too_long: TooLong = "error",
    shuffle: bool = True,
    epochs: int | None = None,
    shard_index: int = 0,
    shard_count: int = 1,
    threads: int = 2,
) -> Batches[PackedRows]:
    """Iterates over batches of packed rows.

    Each sequence goes to the first row that has room for it, and whole; when none has, the batch
    is complete and the sequence opens the next. Every host packs the sequences of all hosts and
    keeps its rows. That costs tokenising them all, little beside a step of training, and buys that
    what is learnt at a step is the same on any number of hosts, as is the saved position.

    Args:
      sources: Where the sequences come from; see `RecordOrder` for how they are mixed. To make
        sequences out of other records when they are read, use `Mapped`.
      rows: Rows in a batch, over all hosts.
      length: S.
      seed: Of the shuffling.
      too_long: What becomes of a sequence longer than S.
      shuffle: Whether to shuffle each epoch.
      epochs: How often every sequence comes, or `None` for no end. The last batch is padded with
        empty rows.
      shard_index: Which host this is.
      shard_count: How many hosts there are.
      threads: Threads that read ahead; 0 reads when asked.

    Returns:
      The batches of this host, `B = rows / shard_count`. Its `consumed` counts sequences.

    Raises:
      UsageError: An argument is wrong; while iterating, a sequence is empty, too long, or has
        another number of mask values than of tokens.
    """
    check_shards("rows", rows, shard_index, shard_count)
    if length < 1:
        raise UsageError(f"length is {length}; it must be 1 or more")
    if too_long not in get_args(TooLong):
        raise UsageError(
            f"too_long is {too_long!r}; it must be one of {', '.join(get_args(TooLong))}"
        )
    order = RecordOrder(sources, seed=seed, shuffle=shuffle, epochs=epochs)
    own = slice(rows // shard_count * shard_index, rows // shard_count * (shard_index + 1))

    def read(index: int) -> dict[str, np.ndarray]:
        return _fit(order.read(index), length, too_long, name=order.name(index))

    def part(batch: Mapping[str, np.ndarray]) -> tuple[PackedRows, int]:
        packed = PackedRows(
            tokens=batch["tokens"],
            segment_ids=batch["tokens_segment_ids"],
            positions=batch["tokens_positions"],
            loss_mask=batch["loss_mask"],
        )
        sequences = int(packed.segment_ids.max(axis=1).sum())
        missing = [(0, rows - len(packed.tokens)), (0, 0)]
        return PackedRows(*(np.pad(array, missing)[own] for array in packed)), sequences

    def begin(consumed: int) -> grain.DatasetIterator[tuple[PackedRows, int]]:
        sequences = order.after(consumed).map(read)
        packed = grain.experimental.FirstFitPackIterDataset(
            sequences.to_iter_dataset(read_options(threads, ahead=4 * rows)),
            length_struct={"tokens": length, "loss_mask": length},
            num_packing_bins=rows,
            shuffle_bins=False,
        )
        return iter(packed.batch(rows).map(part))

    return Batches(order, begin)


def pad_prompts(
    prompts: Sequence[Sequence[int]],
    *,
    bucket: Callable[[int], int],
    longest: int | None = None,
) -> PaddedPrompts:
    """Pads prompts to one length, which is one of a short list so that few programs are compiled.

    Args:
      prompts: B sequences of tokens.
      bucket: The padded length of a prompt of so many tokens; a ValueError if there is none.
      longest: Tokens in the longest prompt of all hosts, whose arrays must have one shape; by
        default, in the longest of these.

    Returns:
      The prompts, `P = bucket(longest)`.

    Raises:
      UsageError: There are no prompts, or one fits no padded length; none is ever cut.
    """
    if not prompts:
        raise UsageError("there are no prompts to pad; give at least one")
    lengths = np.asarray([len(prompt) for prompt in prompts], np.int32)
    size = _bucketed(max(int(lengths.max()), longest or 0), bucket)
    tokens = np.zeros((len(prompts), size), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    return PaddedPrompts(tokens=tokens, lengths=lengths)


def _fit(
    sequence: TokenSequence, length: int, too_long: TooLong, *, name: str
) -> dict[str, np.ndarray]:
    tokens = np.asarray(sequence.tokens, np.int32)
    loss_mask = np.asarray(sequence.loss_mask, np.bool_)
    if tokens.ndim != 1 or tokens.shape != loss_mask.shape:
        raise UsageError(
            f"{name} has tokens of shape {tokens.shape} and a loss mask of shape "
            f"{loss_mask.shape}; both must be lists of one length"
        )
    if not len(tokens):
        raise UsageError(f"{name} has no tokens; leave it out")
    if len(tokens) > length:
        match too_long:
            case "error":
                raise UsageError(
                    f"{name} has {len(tokens)} tokens and a row has {length}; make rows longer, "
                    "leave it out, or cut it with `too_long`"
                )
            case "keep_start":
                tokens, loss_mask = tokens[:length], loss_mask[:length]
            case "keep_end":
                tokens, loss_mask = tokens[-length:], loss_mask[-length:]
            case other:
                assert_never(other)
    return {"tokens": tokens, "loss_mask": loss_mask}


def _bucketed(length: int, bucket: Callable[[int], int]) -> int:
    try:
        size = bucket(length)
    except ValueError as error:
        raise UsageError(
            f"a prompt of {length} tokens fits no padded length: {error}; shorten it, or "
            "leave it out"
        ) from error
    if size < length:
        raise UsageError(f"the padded length of {length} tokens is {size}; it must hold them")
    return size
