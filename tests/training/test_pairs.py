"""Pairs of comparisons: which there are, which side they are on, and what is left out."""

from pathlib import Path

import numpy as np
import pytest

from grm_jax.data import BestLabel, Comparison, PointwiseLabel, ScoresLabel
from grm_jax.data.pipeline import Source
from grm_jax.errors import UsageError
from grm_jax.training import bt
from grm_jax.training.classifiers import Group
from grm_jax.training.config import Settings
from grm_jax.training.heldout import is_held_out
from grm_jax.training.pairs import Pair, pair_groups, split_pairs
from tests.training.changes import changed


def comparison(name: str, count: int, label: object) -> Comparison:
    return Comparison(
        id=name,
        messages=({"role": "user", "content": "?"},),
        responses=tuple(f"{name}{index}" for index in range(count)),
        label=label,  # type: ignore[arg-type]
    )


RECORDS = [
    comparison("a", 3, BestLabel(1)),
    comparison("b", 2, ScoresLabel((1.0, 4.0))),
    comparison("c", 3, ScoresLabel((4.0, 1.0, 4.0))),
    comparison("d", 2, None),
    comparison("e", 1, PointwiseLabel(True)),
    comparison("f", 1, BestLabel(0)),
]


def test_the_best_against_every_other() -> None:
    found = split_pairs([Source(name="s", records=RECORDS, weight=2.0)], share=0)
    (source,) = found.train
    pairs = [source.records[index] for index in range(len(source.records))]
    assert [(pair.comparison.id, pair.best, pair.other) for pair in pairs] == [
        ("a", 1, 0),
        ("a", 1, 2),
        ("b", 1, 0),
    ]
    assert (source.name, source.weight) == ("s", 2.0)
    assert found.left_out == {"no_single_best": 2, "single_response": 2}
    assert len(found.heldout[0].records) == 0


def test_what_a_stage_refuses() -> None:
    found = split_pairs(
        [Source(name="s", records=RECORDS)],
        share=0,
        refuse=lambda record: "no_critiques" if record.id == "a" else None,
    )
    assert len(found.train[0].records) == 1
    assert found.left_out["no_critiques"] == 1


def test_no_comparison_is_on_both_sides() -> None:
    records = [comparison(f"r{number}", 4, BestLabel(0)) for number in range(60)]
    found = split_pairs([Source(name="s", records=records)], share=0.3)
    sides = [
        {source.records[index].comparison.id for index in range(len(source.records))}
        for source in (found.train[0], found.heldout[0])
    ]
    assert sides[1] == {record.id for record in records if is_held_out(record.id, 0.3)}
    assert 5 < len(sides[1]) < 35
    assert sides[0] == {record.id for record in records} - sides[1]
    assert len(found.train[0].records) == 3 * len(sides[0])


def settings(**changes: object) -> Settings:
    config = bt.default_config()
    config.data.comparisons = ("nano:train:40",)
    return Settings(changed(config, {}, changes))


def encode(pair: Pair) -> Group:
    best, other = (
        np.frombuffer(pair.comparison.responses[index].encode(), np.uint8)
        for index in (pair.best, pair.other)
    )
    return Group((best, other), (1.0, 0.0))


def test_groups_of_comparisons_by_name(tmp_path: Path) -> None:
    data = pair_groups(settings(heldout__share=0.3, heldout__limit=5), tmp_path, encode)
    (source,) = data.train
    first = source.records[0]
    assert first.labels == (1.0, 0.0)
    assert bytes(first.sequences[0]) != bytes(first.sequences[1])
    assert len(data.heldout) == 5
    assert data.counts["heldout_pairs"] > 5
    assert data.counts["train_pairs"] == len(source.records)
    assert data.counts["comparisons_left_out"] == {}


def test_nothing_to_learn_from(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no pair .*left out of the data: useless: 40"):
        pair_groups(settings(), tmp_path, encode, refuse=lambda record: "useless")
    for share in (1.0, -0.1):
        with pytest.raises(UsageError, match=r"heldout\.share is"):
            pair_groups(settings(heldout__share=share), tmp_path, encode)
