"""Resampling: without bias, equal to direct votes, and with intervals that cover the truth."""

from itertools import combinations
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grm_jax.errors import UsageError
from grm_jax.evaluation.metrics import bootstrap_mean, correctness
from grm_jax.evaluation.scaling import (
    CurvePoint,
    plot_curve,
    resampled_correctness,
    sample_subsets,
    scaling_curve,
    subset_totals,
)
from grm_jax.rewards import guided_vote, vote


def simulated(
    rng: np.random.Generator, comparisons: int, samples: int, width: int = 2
) -> tuple[np.ndarray, ...]:
    """A judge that scores the best response higher more often than not, harder cases less."""
    edge = rng.normal(0.7, 1.0, comparisons)
    raw = rng.normal(5.5, 2.0, (comparisons, samples, width))
    raw[..., 0] += edge[:, None]
    scores = np.clip(np.round(raw), 1, 10)
    valid = rng.random((comparisons, samples)) < 0.95
    meta = (scores[..., 0] > scores[..., 1]) + rng.normal(0, 0.8, (comparisons, samples))
    best, counts = np.zeros(comparisons, int), np.full(comparisons, width)
    return scores, valid, meta, best, counts


# --- subsets ---


def test_few_subsets_are_all_of_them() -> None:
    chosen = sample_subsets(5, 3, draws=10)
    members = {tuple(np.flatnonzero(row)) for row in chosen}
    assert members == set(combinations(range(5), 3))
    assert sample_subsets(32, 32).tolist() == [[True] * 32]
    assert np.array_equal(sample_subsets(32, 1), np.eye(32, dtype=bool))


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 60))
def test_every_subset_has_k_members(samples: int, k: int, draws: int) -> None:
    if k > samples:
        with pytest.raises(UsageError, match="must be from 1 to"):
            sample_subsets(samples, k, draws=draws)
        return
    chosen = sample_subsets(samples, k, draws=draws)
    assert 1 <= len(chosen) <= draws
    assert (chosen.sum(axis=1) == k).all()


def test_every_sample_is_drawn_alike() -> None:
    chosen = sample_subsets(32, 8, draws=2000)
    assert chosen.mean(axis=0) == pytest.approx(np.full(32, 0.25), abs=1e-9)
    assert np.array_equal(chosen, sample_subsets(32, 8, draws=2000))
    assert not np.array_equal(chosen, sample_subsets(32, 8, draws=2000, seed=1))


@pytest.mark.parametrize("k_meta", [None, 1, 3, 6])
def test_a_subset_votes_as_it_would_alone(k_meta: int | None) -> None:
    rng = np.random.default_rng(3)
    scores, valid, meta, _, _ = simulated(rng, 6, 9, width=3)
    meta = np.round(meta)  # with ties
    meta[0, :3] = np.nan
    chosen = sample_subsets(9, 6, draws=20)
    found = subset_totals(scores, valid, chosen, meta=meta, k_meta=k_meta)
    for row, members in enumerate(chosen):
        part = scores[:, members], valid[:, members]
        alone = (
            vote(*part)
            if k_meta is None
            else guided_vote(*part, jnp.asarray(meta[:, members]), k_meta)
        )
        assert np.array_equal(found[:, row], np.asarray(alone))


# --- curves ---


def test_all_samples_give_the_direct_vote() -> None:
    rng = np.random.default_rng(4)
    scores, valid, _, best, counts = simulated(rng, 40, 8)
    right, _ = resampled_correctness(scores, valid, best, counts, k=8)
    totals = np.asarray(vote(scores, valid))
    assert np.array_equal(right, correctness(totals, best, counts))


def test_by_hand() -> None:
    # One comparison, three samples: of the votes of two, one wins, one loses and one ties.
    scores = np.array([[[6, 4], [5, 6], [4, 6]]])
    valid = np.ones((1, 3), bool)
    points = scaling_curve(scores, valid, [0], [2], ks=[1, 2, 3])
    assert [point.accuracy for point in points] == pytest.approx([1 / 3, 1 / 2, 0])
    assert [point.tie_rate for point in points] == pytest.approx([0, 1 / 3, 0])
    strict = scaling_curve(scores, valid, [0], [2], ks=[2], ties="strict")
    assert strict[0].accuracy == pytest.approx(1 / 3)
    meta = np.array([[2.0, 1.0, 0.0]])
    guided = scaling_curve(scores, valid, [0], [2], ks=[2, 3], meta=meta)
    assert [point.k_meta for point in guided] == [1, 1]
    assert [point.accuracy for point in guided] == pytest.approx([2 / 3, 1])
    both = scaling_curve(scores, valid, [0], [2], ks=[1, 3], meta=meta, k_meta=2)
    assert [point.k_meta for point in both] == [1, 2]


def test_resampling_equals_fresh_samples_at_each_k() -> None:
    rng = np.random.default_rng(5)
    scores, valid, meta, best, counts = simulated(rng, 1500, 64)
    for guide in (None, meta):
        first = None if guide is None else guide[:, :32]
        points = scaling_curve(
            scores[:, :32], valid[:, :32], best, counts, ks=[1, 4, 8, 32], meta=first
        )
        assert [point.accuracy for point in points] == sorted(point.accuracy for point in points)
        for point in points:
            part = slice(32, 32 + point.k)
            totals = subset_totals(
                scores[:, part],
                valid[:, part],
                np.ones((1, point.k), bool),
                meta=None if guide is None else guide[:, part],
                k_meta=point.k_meta,
            )[:, 0]
            fresh = bootstrap_mean(correctness(totals, best, counts))
            assert fresh.low < point.accuracy < fresh.high
            if point.k < 32:  # resampling makes better use of the samples than one vote of k
                assert point.high - point.low < fresh.high - fresh.low


def test_intervals_cover_the_truth() -> None:
    runs, size, k = 1000, 150, 4
    rng = np.random.default_rng(6)
    scores, valid, _, best, counts = simulated(rng, runs * size, 8)
    right, _ = resampled_correctness(scores, valid, best, counts, k=k, draws=8)
    # All runs together are a thousand times as large as one, and so near enough to the truth.
    truth = right.mean()
    found = [
        bootstrap_mean(part, resamples=1000, seed=run)
        for run, part in enumerate(right.reshape(runs, size))
    ]
    covered = sum(one.low <= truth <= one.high for one in found)
    assert 930 <= covered <= 970


def test_curves_can_be_drawn(tmp_path: Path) -> None:
    rng = np.random.default_rng(7)
    scores, valid, meta, best, counts = simulated(rng, 30, 8)
    curves = {
        "vote": scaling_curve(scores, valid, best, counts, ks=[1, 2, 8]),
        "guided": scaling_curve(scores, valid, best, counts, ks=[1, 2, 8], meta=meta),
    }
    plot_curve(curves, tmp_path / "samples.png")
    costs = {name: [100.0, 200.0, 800.0] for name in curves}
    plot_curve(curves, tmp_path / "tokens.svg", costs=costs, cost_label="tokens")
    assert (tmp_path / "samples.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "tokens.svg").read_text()


def test_curves_without_a_number_can_be_drawn(tmp_path: Path) -> None:
    """As of the AUC of responses that are all right."""
    nothing = float("nan")
    points = [
        CurvePoint(k=k, k_meta=None, accuracy=nothing, low=nothing, high=nothing, tie_rate=nothing)
        for k in (1, 8)
    ]
    for costs in (None, {"vote": [2e9, 3e9]}):
        for kind in ("png", "svg"):
            plot_curve({"vote": points}, tmp_path / f"curve.{kind}", costs=costs)
            assert (tmp_path / f"curve.{kind}").stat().st_size > 1000
