"""From the judgements of a benchmark to every number of its report."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from grm_jax.evaluation.adaptive import early_stopping
from grm_jax.evaluation.benchmarks import Benchmark
from grm_jax.evaluation.cost import ModelCost, cost_at
from grm_jax.evaluation.judged import Judged
from grm_jax.evaluation.measures import (
    Measure,
    benchmark_measures,
    measure_resamples,
    measure_value,
)
from grm_jax.evaluation.methods import PLAIN, Method, find_methods
from grm_jax.evaluation.metrics import (
    TIE_POLICIES,
    TiePolicy,
    auc,
    correctness,
    difference_of,
    interval_of,
    length_bias,
    position_bias,
    tied,
    unreadable_rate,
)
from grm_jax.evaluation.scaling import resampled_correctness, sample_subsets, subset_totals

_DRAWS = 200
_SLOW_DRAWS = 16
_BINS = 8


@dataclass(frozen=True, kw_only=True, eq=False)
class Point:
    """One method at one number of samples.

    Attributes:
      correct: `f64[C]`, mean correctness of each comparison.
      means: As `measures.measure_value` takes it; empty where no measure needs it.
      tie_rate: Share of votes that tie.
    """

    correct: np.ndarray
    means: Sequence[np.ndarray]
    tie_rate: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Evaluation:
    """A judge on a benchmark.

    Attributes:
      name: Of the judge.
      judged: What it said.
      measures: Of the benchmark, the total first.
      methods: Ways to vote, the plain vote first.
      ks: Numbers of samples.
      points: By the name of a method and k.
      results: All numbers, JSON-ready.
    """

    name: str
    judged: Judged
    measures: Sequence[Measure]
    methods: Sequence[Method]
    ks: Sequence[int]
    points: Mapping[tuple[str, int], Point]
    results: dict[str, Any]


def evaluate(
    benchmark: Benchmark,
    judged: Judged,
    *,
    name: str,
    ks: Sequence[int],
    model: ModelCost,
    k_metas: Sequence[int] = (),
    ties: TiePolicy | None = None,
    resamples: int = 1000,
    stated_error: float | None = None,
    seed: int = 0,
) -> Evaluation:
    """Computes every number of a judge's report.

    Args:
      benchmark: What was judged.
      judged: The judgements, K samples each.
      name: Of the judge.
      ks: Numbers of samples to report, at most K; where sampling stopped early, the largest alone
        is, as fewer than were drawn cannot be resampled.
      model: What the judge's tokens cost.
      k_metas: Numbers of voters for guided votes, besides half of k.
      ties: The tie policy; the benchmark's own if None.
      resamples: Of every bootstrap.
      stated_error: At which sampling stopped early, if it did.
      seed: Of subsets, resamples and ties.
    """
    if judged.stopped_early:
        ks = [max(ks)]
    ties = benchmark.ties if ties is None else ties
    measures = benchmark_measures(benchmark, judged)
    methods = find_methods(judged, k_metas)
    slow = any(_needs_means(measure) for measure in measures)
    points = {
        (method.name, k): _point(judged, method, k, ties=ties, slow=slow, seed=seed)
        for method in methods
        for k in ks
    }
    curves = {
        method.name: [
            _curve_point(
                judged, measures, points[method.name, k], method, k, model, resamples, seed
            )
            for k in ks
        ]
        for method in methods
    }
    results = {
        "name": name,
        "comparisons": len(judged.comparisons),
        "samples": judged.samples,
        "ties": ties,
        "measures": [_measure_record(measure) for measure in measures],
        "curves": curves,
        "tie_policies": _by_tie_policy(judged, measures[0], max(ks), seed),
        "unreadable": {
            "samples": unreadable_rate(judged.valid[judged.drawn]),
            "comparisons": float(np.mean(~judged.valid.any(axis=1))),
        },
        "errors": {
            comparison.id: error
            for comparison, error in zip(judged.comparisons, judged.errors, strict=True)
            if error is not None
        },
        "positions": _positions(judged),
        "lengths": _lengths(judged),
        "adaptive": _adaptive(
            judged, measures[0], points["vote", max(ks)], ties, resamples, seed, stated_error
        ),
        "meta": _reliability(judged, judged.meta),
        "confidence": _reliability(judged, judged.logprob),
    }
    return Evaluation(
        name=name,
        judged=judged,
        measures=measures,
        methods=methods,
        ks=list(ks),
        points=points,
        results=plain_json(results),
    )


def compare(
    first: tuple[Evaluation, str, int],
    second: tuple[Evaluation, str, int],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """How much better the second of two judges or votes is, by a paired bootstrap of the total.

    Args:
      first: An evaluation, the name of a method and k.
      second: The same, of the same comparisons.
      resamples: Of the bootstrap.
      seed: Of the resamples.

    Returns:
      A JSON-ready object.
    """
    values, drawn = [], []
    for evaluation, method, k in (first, second):
        point, total = evaluation.points[method, k], evaluation.measures[0]
        values.append(measure_value(total, evaluation.judged, point.correct, point.means))
        drawn.append(
            measure_resamples(
                total,
                evaluation.judged,
                point.correct,
                point.means,
                resamples=resamples,
                seed=seed,
            )
        )
    found = difference_of(values[1] - values[0], drawn[1] - drawn[0])
    sides = [
        {"judge": evaluation.name, "method": method, "k": k}
        for evaluation, method, k in (first, second)
    ]
    return plain_json(
        {
            "first": sides[0],
            "second": sides[1],
            "difference": found.value,
            "low": found.low,
            "high": found.high,
            "p_value": found.p_value,
        }
    )


def plain_json(value: Any) -> Any:
    """A JSON-ready copy: NumPy's numbers as Python's, what is not a number as null."""
    match value:
        case dict():
            return {key: plain_json(item) for key, item in value.items()}
        case list() | tuple() | np.ndarray():
            return [plain_json(item) for item in value]
        case bool() | np.bool_():
            return bool(value)
        case int() | np.integer():
            return int(value)
        case float() | np.floating():
            return float(value) if math.isfinite(value) else None
        case _:
            return value


def _needs_means(measure: Measure) -> bool:
    return measure.metric in ("auc", "ties") or any(map(_needs_means, measure.parts))


def _point(
    judged: Judged, method: Method, k: int, *, ties: TiePolicy, slow: bool, seed: int
) -> Point:
    voters = method.voters(k)
    meta, votes = method.trust(judged), method.votes(judged)
    correct, even = resampled_correctness(
        votes,
        judged.valid,
        judged.right,
        judged.counts,
        k=k,
        meta=meta,
        k_meta=voters,
        ties=ties,
        draws=_DRAWS,
        seed=seed,
    )
    means: list[np.ndarray] = []
    if slow:
        chosen = sample_subsets(judged.samples, k, draws=_SLOW_DRAWS, seed=seed)
        # A column besides the scores counts who votes.
        counted = np.concatenate([votes, method.weights(judged)[..., None]], axis=-1)
        totals = subset_totals(counted, judged.valid, chosen, meta=meta, k_meta=voters)
        with np.errstate(invalid="ignore"):
            found = totals[..., :-1] / totals[..., -1:]
        means = list(np.moveaxis(found, 1, 0))
    several = judged.counts > 1
    rate = float(even[several].mean()) if several.any() else math.nan
    return Point(correct=correct, means=means, tie_rate=rate)


def _curve_point(
    judged: Judged,
    measures: Sequence[Measure],
    point: Point,
    method: Method,
    k: int,
    model: ModelCost,
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    values = {}
    for measure in measures:
        drawn = measure_resamples(
            measure, judged, point.correct, point.means, resamples=resamples, seed=seed
        )
        value = measure_value(measure, judged, point.correct, point.means)
        found = interval_of(value, drawn)
        values[measure.name] = {"value": found.value, "low": found.low, "high": found.high}
    cost = cost_at(judged, model, k).to_record()
    return {
        "k": k,
        "k_meta": method.voters(k),
        "scores": values,
        "tie_rate": point.tie_rate,
        "cost": cost,
    }


def _measure_record(measure: Measure) -> dict[str, Any]:
    return {
        "name": measure.name,
        "metric": measure.metric,
        "level": measure.level,
        "comparisons": len(measure.members),
    }


def _by_tie_policy(judged: Judged, total: Measure, k: int, seed: int) -> dict[str, float]:
    """The total of the plain vote under each tie policy; nothing where ties decide nothing."""
    if total.metric == "auc":
        return {}
    return {
        policy: measure_value(total, judged, point.correct, point.means)
        for policy in TIE_POLICIES
        for point in [
            _point(judged, PLAIN, k, ties=policy, slow=_needs_means(total), seed=seed)  # type: ignore[arg-type]
        ]
    }


def _adaptive(
    judged: Judged,
    total: Measure,
    full: Point,
    ties: TiePolicy,
    resamples: int,
    seed: int,
    stated_error: float | None,
) -> list[dict[str, Any]]:
    """What stopping early would have saved and cost; where sampling did stop, what was drawn."""
    if judged.stopped_early:
        return [
            {
                "error": stated_error,
                "mean_samples": judged.drawn[total.members].sum(axis=1).mean(),
                "token_share": None,
                "changed": None,
                "value": measure_value(total, judged, full.correct, full.means),
                "difference": {"value": None, "low": None, "high": None},
            }
        ]
    if _needs_means(total) or judged.samples < 3:
        return []
    return early_stopping(judged, total, full.correct, ties=ties, resamples=resamples, seed=seed)


def _positions(judged: Judged) -> dict[str, Any] | None:
    rows = judged.decidable
    if not rows.any():
        return None
    found = position_bias(
        judged.scores[rows],
        judged.valid[rows],
        judged.orders[rows],
        judged.right[rows],
        judged.counts[rows],
    )
    return {
        "accuracy": found.accuracy,
        "cases": found.cases,
        "chosen": found.chosen,
        "expected": found.expected,
        "agreement_same_order": found.agreement_same,
        "agreement_other_order": found.agreement_other,
    }


def _lengths(judged: Judged) -> dict[str, Any] | None:
    rows = judged.decidable
    if not rows.any():
        return None
    totals = np.sum(judged.scores * judged.valid[..., None], axis=1)
    found = length_bias(totals[rows], judged.right[rows], judged.counts[rows], judged.lengths[rows])
    return {
        "chosen_longest": found.chosen_longest,
        "best_longest": found.best_longest,
        "accuracy_longest": found.accuracy_longest,
        "accuracy_shorter": found.accuracy_shorter,
    }


def _reliability(judged: Judged, trust: np.ndarray | None) -> dict[str, Any] | None:
    """How often samples are right, by what says whether to trust them: how reliable that is."""
    rows = judged.decidable
    if trust is None or not rows.any():
        return None
    use = judged.valid[rows] & ~np.isnan(trust[rows])
    flat = judged.scores[rows][use]
    counts = np.broadcast_to(judged.counts[rows][:, None], use.shape)[use]
    right = np.broadcast_to(judged.right[rows][:, None], judged.scores[rows].shape)[use]
    won = correctness(flat, right, counts, ties="strict")
    rewards = trust[rows][use]
    order = np.argsort(rewards, kind="stable")
    bins = [part for part in np.array_split(order, _BINS) if len(part)]
    chance = 0.5 * (1 + np.tanh(rewards / 2))
    return {
        "auc": auc(rewards, won == 1.0),
        "bins": [
            {
                "reward": float(rewards[part].mean()),
                "predicted": float(chance[part].mean()),
                "accuracy": float(won[part].mean()),
                "samples": len(part),
            }
            for part in bins
        ],
    }


def wrong_and_tied(judged: Judged) -> tuple[np.ndarray, np.ndarray]:
    """For a browser of judgements: which plain votes are wrong, and which are tied, `bool[C]`.

    A single response counts as wrong if its mean score is on the other side of the mean of all.
    """
    totals = np.sum(judged.scores * judged.valid[..., None], axis=1)
    wrong = judged.decidable & (correctness(totals, judged.right, judged.counts, ties="strict") < 1)
    if judged.pointwise.any():
        with np.errstate(invalid="ignore"):
            means = totals[:, 0] / judged.valid.sum(axis=1)
        middle = np.nanmean(means[judged.pointwise]) if judged.valid.any() else 0.0
        wrong |= judged.pointwise & ((means > middle) != judged.positive)
    return wrong, tied(totals, judged.counts) & (judged.counts > 1)
