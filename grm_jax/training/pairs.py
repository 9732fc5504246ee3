"""Pairs of responses made of comparisons: the best one of each against every other.

For stages that learn which of two responses is better.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, final

import numpy as np
from ml_collections import ConfigDict

from grm_jax.data import Comparison, best_index
from grm_jax.data.pipeline import Mapped, RandomAccess, Source
from grm_jax.distributed import make_mesh
from grm_jax.errors import UsageError
from grm_jax.prompts import Tokenizer
from grm_jax.training.classifiers import (
    Group,
    GroupData,
    Objective,
    heldout_config,
    heldout_share,
    make_group,
    row_length,
    train_classifier,
)
from grm_jax.training.comparisons import comparison_data, comparison_sources
from grm_jax.training.config import Settings, base_config
from grm_jax.training.heldout import evenly, is_held_out
from grm_jax.training.model import open_model


class Pair(NamedTuple):
    """Two responses of a comparison.

    Attributes:
      comparison: The comparison.
      best: Index of its best response.
      other: Index of another.
    """

    comparison: Comparison
    best: int
    other: int


@final
class Pairs:
    """All pairs of some comparisons, each read when it is asked for."""

    def __init__(self, records: RandomAccess[Comparison], places: np.ndarray) -> None:
        """Takes the comparisons and, `i64[n, 3]`, for each pair its record, best and other."""
        self._records = records
        self._places = places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int, /) -> Pair:
        record, best, other = map(int, self._places[index])
        return Pair(self._records[record], best, other)


class PairSplit(NamedTuple):
    """The pairs of all sources.

    Attributes:
      train: Those to learn from, by source.
      heldout: Those of the comparisons that are held out.
      left_out: How many comparisons make no pair, by the reason.
    """

    train: Sequence[Source[Pair]]
    heldout: Sequence[Source[Pair]]
    left_out: Counter[str]


def pair_config(stage: str) -> ConfigDict:
    """The keys that stages on pairs share, with their defaults.

    Args:
      stage: Its name.
    """
    config = base_config(stage)
    config.data = comparison_data()
    # Tokens of the longest row that is learnt from; pairs with a longer one are left out.
    config.data.length = 2048
    config.heldout = heldout_config()
    return config


def train_on_pairs(
    settings: Settings,
    workdir: Path,
    write: Callable[[Tokenizer, Pair], Iterable[Sequence[int]]],
    objective: Objective,
    *,
    refuse: Callable[[Comparison], str | None] = lambda comparison: None,
) -> bool:
    """Trains a classifier on the pairs of the comparisons of `data.comparisons`.

    Args:
      settings: Of `pair_config`.
      workdir: Where everything goes; see `train_classifier`.
      write: The two token sequences of a pair, of which the first is a positive; a UsageError if a
        template refuses them.
      objective: What is learnt.
      refuse: As in `split_pairs`.

    Returns:
      Whether all steps are done.

    Raises:
      UsageError: A setting or the data is wrong.
    """
    mesh = make_mesh(settings.group("mesh"))
    model = open_model(settings, mesh, num_labels=1)
    length = row_length(settings, model.config)

    def encode(pair: Pair) -> Group:
        return make_group(lambda: write(model.tokenizer, pair), (1.0, 0.0), length=length)

    data = pair_groups(settings, workdir, encode, refuse=refuse)
    return train_classifier(settings, workdir, mesh, model, data, objective)


def split_pairs(
    sources: Sequence[Source[Comparison]],
    *,
    share: float,
    refuse: Callable[[Comparison], str | None] = lambda comparison: None,
) -> PairSplit:
    """Finds the pairs of comparisons, which reads all of them once.

    Args:
      sources: The comparisons.
      share: How many of them are held out; see `is_held_out`.
      refuse: Why a comparison cannot be used, if so.
    """
    train: list[Source[Pair]] = []
    heldout: list[Source[Pair]] = []
    left_out = Counter[str]()
    for source in sources:
        places: dict[bool, list[tuple[int, int, int]]] = {False: [], True: []}
        for record in range(len(source.records)):
            comparison = source.records[record]
            best, reason = best_index(comparison), refuse(comparison)
            if len(comparison.responses) < 2:
                left_out["single_response"] += 1
            elif best is None:
                left_out["no_single_best"] += 1
            elif reason is not None:
                left_out[reason] += 1
            else:
                others = (i for i in range(len(comparison.responses)) if i != best)
                places[is_held_out(comparison.id, share)] += [(record, best, i) for i in others]
        for kept, out in ((train, places[False]), (heldout, places[True])):
            records = Pairs(source.records, np.asarray(out, np.int64).reshape(-1, 3))
            kept.append(Source(name=source.name, records=records, weight=source.weight))
    return PairSplit(train, heldout, left_out)


def pair_groups(
    settings: Settings,
    workdir: Path,
    encode: Callable[[Pair], Group],
    *,
    refuse: Callable[[Comparison], str | None] = lambda comparison: None,
) -> GroupData:
    """Opens the comparisons of `data.*` as groups for `train_classifier`.

    Args:
      settings: The run's.
      workdir: Where everything goes.
      encode: Makes a group of a pair.
      refuse: As in `split_pairs`.

    Raises:
      UsageError: The data is wrong, or a source has no pair to learn from.
    """
    share, limit = heldout_share(settings), settings.at_least("heldout.limit", 0)
    found = split_pairs(comparison_sources(settings, workdir), share=share, refuse=refuse)
    for source in found.train:
        if not len(source.records):
            reasons = ", ".join(f"{reason}: {n}" for reason, n in found.left_out.items())
            raise UsageError(
                f"{source.name} has no pair of responses to learn from; what is left out of the "
                f"data: {reasons or 'nothing'}"
            )
    heldout = [
        (source.records, index) for source in found.heldout for index in range(len(source.records))
    ]
    return GroupData(
        train=[
            Source(name=source.name, records=Mapped(source.records, encode), weight=source.weight)
            for source in found.train
        ],
        heldout=[encode(records[index]) for records, index in evenly(heldout, limit)],
        counts={
            "train_pairs": sum(len(source.records) for source in found.train),
            "heldout_pairs": len(heldout),
            "comparisons_left_out": dict(found.left_out),
        },
    )
