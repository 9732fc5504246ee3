"""The comparisons that stages train on, from wherever a configuration says they are."""

import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from ml_collections import ConfigDict

from grm_jax.data import Comparison
from grm_jax.data.builders import open_comparisons, prepare_comparisons
from grm_jax.data.nano import Split, nano_comparisons
from grm_jax.data.pipeline import RandomAccess, Source, Subset
from grm_jax.errors import UsageError
from grm_jax.training.config import Settings

_NANO = re.compile(r"nano:(?P<split>\w+):(?P<count>\d+)(?::(?P<seed>\d+))?")

_PART = re.compile(r"(?P<name>.+)#(?P<first>\d+):(?P<end>\d+)")


def comparison_data() -> ConfigDict:
    """The keys of the group `data` that say where comparisons come from."""
    return ConfigDict(
        {
            # JSON Lines files, prepared datasets as FOLDER or FOLDER:SPLIT, or generated ones as
            # nano:SPLIT:COUNT[:SEED]; with #FIRST:END behind it, only those of them. And the share
            # of each; without shares each comparison comes as often as any other.
            "comparisons": (),
            "weights": (),
            # How often every comparison comes; 0 for as long as there are steps.
            "epochs": 0,
            "threads": 2,
        }
    )


def comparison_sources(settings: Settings, workdir: Path) -> list[Source[Comparison]]:
    """Opens what `data.comparisons` names.

    Files of JSON Lines are turned into datasets with random access, which are kept in the working
    directory; lines that are no comparisons are left out and counted in the log.

    Args:
      settings: The run's; the keys of `comparison_data` that are about sources are read.
      workdir: The run's working directory.

    Raises:
      UsageError: There is nothing of that name, or shares and names do not go together.
    """
    names = [str(name) for name in settings["data.comparisons"]]
    if not names:
        raise UsageError("data.comparisons is empty; name at least one file of comparisons")
    weights = settings["data.weights"] or [None] * len(names)
    if len(weights) != len(names):
        raise UsageError(
            f"data.weights has {len(weights)} shares for {len(names)} data.comparisons"
        )
    return [
        Source(name=name, records=open_records(name, workdir), weight=weight)
        for name, weight in zip(names, weights, strict=True)
    ]


def all_comparisons(sources: Sequence[Source[Comparison]]) -> list[Comparison]:
    """Every comparison of all sources once, in their order.

    Raises:
      UsageError: Two have the same id, so that what is kept by id would be mixed up.
    """
    found: dict[str, Comparison] = {}
    for source in sources:
        for index in range(len(source.records)):
            comparison = source.records[index]
            if comparison.id in found:
                raise UsageError(
                    f"{source.name}: two comparisons have the id {comparison.id!r}; ids must differ"
                )
            found[comparison.id] = comparison
    return list(found.values())


def open_records(name: str, workdir: Path) -> RandomAccess[Comparison]:
    """Opens one of the names of `data.comparisons`; see `comparison_data`.

    Raises:
      UsageError: There is nothing of that name, or nothing in it.
    """
    part = _PART.fullmatch(name)
    if part is None:
        return _open_all(name, workdir)
    whole = _open_all(part["name"], workdir)
    first, end = int(part["first"]), min(int(part["end"]), len(whole))
    if first >= end:
        raise UsageError(f"{name} has nothing in it: there are {len(whole)} comparisons")
    return Subset(whole, range(first, end))


def _open_all(name: str, workdir: Path) -> RandomAccess[Comparison]:
    generated = _NANO.fullmatch(name)
    if generated is not None:
        return _generated(generated["split"], int(generated["count"]), int(generated["seed"] or 0))
    path, split = name, ""
    if not Path(name).exists() and ":" in name:
        path, _, split = name.rpartition(":")
    if Path(path).is_dir():
        splits = open_comparisons(path).splits
        if not split and len(splits) == 1:
            split = next(iter(splits))
        if split not in splits:
            known = ", ".join(splits)
            raise UsageError(f"{path} has the splits {known}; name one as {path}:SPLIT")
        return splits[split]
    return prepare_comparisons({"train": path}, workdir / "data").splits["train"]


def _generated(split: str, count: int, seed: int) -> list[Comparison]:
    for known in get_args(Split):
        if split == known:
            return list(itertools.islice(nano_comparisons(known, seed=seed), count))
    raise UsageError(f"nano has the splits {', '.join(get_args(Split))}, not {split!r}")
