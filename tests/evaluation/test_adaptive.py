"""Adaptive voting: certain where it must be, within its stated error, and cheaper."""

import numpy as np
import pytest

from grm_jax.evaluation.adaptive import adaptive_votes
from grm_jax.evaluation.metrics import bootstrap_mean, correctness


def simulated(
    rng: np.random.Generator, comparisons: int, width: int = 2, *, edge: tuple[float, float]
) -> np.ndarray:
    """Scores of 32 samples by a judge that finds some comparisons easy and some hard."""
    raw = rng.normal(5.5, 2.0, (comparisons, 32, width))
    raw[..., 0] += rng.normal(*edge, (comparisons, 1))
    return np.clip(np.round(raw), 1, 10)


SPREAD = (1.0, 1.5)


def test_without_error_no_winner_ever_changes() -> None:
    scores = simulated(np.random.default_rng(0), 400, width=3, edge=SPREAD)
    valid = np.ones(scores.shape[:2], bool)
    votes = adaptive_votes(scores, valid, np.full(400, 3), error=0.0)
    assert votes.changed.max() == 0
    assert votes.used.min() < 32


@pytest.mark.parametrize(
    ("error", "width", "edge"),
    [(0.05, 2, SPREAD), (0.02, 2, SPREAD), (0.05, 4, SPREAD), (0.02, 2, (1.0, 0.0))],
)
def test_the_stated_error_holds(error: float, width: int, edge: tuple[float, float]) -> None:
    scores = simulated(np.random.default_rng(1), 10_000, width, edge=edge)
    valid = np.random.default_rng(2).random(scores.shape[:2]) < 0.95
    votes = adaptive_votes(scores, valid, np.full(10_000, width), error=error)
    assert 0 < votes.changed.mean() <= error


def test_a_judge_without_preference_changes_twice_as_many_at_most() -> None:
    """As the rule says of itself."""
    scores = simulated(np.random.default_rng(4), 10_000, edge=(0.0, 0.0))
    votes = adaptive_votes(scores, np.ones((10_000, 32), bool), np.full(10_000, 2), error=0.05)
    assert 0.05 < votes.changed.mean() <= 0.1


def test_half_the_samples_reach_the_accuracy_of_all() -> None:
    scores = simulated(np.random.default_rng(3), 2000, edge=SPREAD)
    valid = np.ones(scores.shape[:2], bool)
    best, counts = np.zeros(2000, int), np.full(2000, 2)
    votes = adaptive_votes(scores, valid, counts)
    assert votes.used.mean() <= 16
    full = bootstrap_mean(correctness(scores.sum(axis=1), best, counts), resamples=500)
    found = correctness(votes.totals, best, counts).mean()
    assert full.low <= found <= full.high
