"""How accuracy grows with the number of samples, from one set of samples judged once.

With K samples of each comparison, a vote of any k of them is a vote at k: averaged over random
subsets it is an unbiased estimate of what k fresh samples would have given, for every k up to K,
and it costs no further sampling. Letters for shapes: `C` comparisons, `K` samples, `N` responses,
`D` subsets drawn.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import ArrayLike

from grm_jax.errors import UsageError
from grm_jax.evaluation.metrics import TiePolicy, bootstrap_mean, correctness, tied

_BLOCK_ELEMENTS = 4_000_000


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """Accuracy at one number of samples.

    Attributes:
      k: Samples that are drawn.
      k_meta: How many of them vote, those of highest meta reward; None where all vote.
      accuracy: Its estimate.
      low: Lower end of its interval.
      high: Upper end of its interval.
      tie_rate: Share of votes whose highest total is shared.
    """

    k: int
    k_meta: int | None
    accuracy: float
    low: float
    high: float
    tie_rate: float


def sample_subsets(samples: int, k: int, *, draws: int = 200, seed: int = 0) -> np.ndarray:
    """Subsets of k of K samples, in each of which every sample is equally likely.

    All subsets if there are at most `draws`. Otherwise random permutations are cut into pieces of
    k, as subsets without samples in common tell more than ones that overlap.

    Args:
      samples: K.
      k: Size of a subset.
      draws: Most subsets.
      seed: Of the permutations.

    Returns:
      `bool[D, K]`, the members of each subset.

    Raises:
      UsageError: If k is not from 1 to K.
    """
    if not 1 <= k <= samples:
        raise UsageError(f"k is {k}; with {samples} samples it must be from 1 to {samples}")
    if math.comb(samples, k) <= draws:
        members = np.array(list(combinations(range(samples), k)))
    else:
        rng = np.random.default_rng([seed, samples, k])
        pieces = samples // k
        turns = -(-draws // pieces)
        order = rng.permuted(np.tile(np.arange(samples), (turns, 1)), axis=1)
        members = order[:, : pieces * k].reshape(-1, k)[:draws]
    chosen = np.zeros((len(members), samples), bool)
    np.put_along_axis(chosen, members, True, axis=1)
    return chosen


def subset_totals(
    scores: ArrayLike,
    valid: ArrayLike,
    chosen: ArrayLike,
    *,
    meta: ArrayLike | None = None,
    k_meta: int | None = None,
) -> np.ndarray:
    """The vote, or guided vote, of each subset of samples.

    As `grm_jax.rewards.vote` and `guided_vote` (eq 14 and section 4 of arXiv:2504.02495), for many
    subsets at once: of equal meta rewards the earlier sample's counts as higher, and NaN as lowest.

    Args:
      scores: `f[C, K, N]`, in input order.
      valid: `bool[C, K]`, which samples could be read.
      chosen: `bool[D, K]`, from `sample_subsets`.
      meta: `f[C, K]`, meta rewards, for a guided vote.
      k_meta: How many samples of a subset vote; all if None.

    Returns:
      `f64[C, D, N]`.
    """
    valid, chosen = np.asarray(valid, bool), np.asarray(chosen, bool)
    counted = np.where(valid[..., None], np.asarray(scores, np.float64), 0.0)
    if meta is None or k_meta is None:
        return np.einsum("dk,ckn->cdn", chosen.astype(np.float64), counted, optimize=True)
    meta = np.where(np.isnan(np.asarray(meta, np.float64)), -np.inf, meta)
    # Unreadable samples come last, so that they do not use up a vote.
    order = np.lexsort((-meta, ~valid), axis=-1)
    counted = np.take_along_axis(counted, order[..., None], axis=1)
    drawn = chosen.T[order].swapaxes(1, 2)
    voting = drawn & (np.cumsum(drawn, axis=-1) <= k_meta)
    return np.matmul(voting.astype(np.float64), counted)


def resampled_correctness(
    scores: ArrayLike,
    valid: ArrayLike,
    best: ArrayLike,
    counts: ArrayLike,
    *,
    k: int,
    meta: ArrayLike | None = None,
    k_meta: int | None = None,
    ties: TiePolicy = "half",
    draws: int = 200,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """How often k samples decide each comparison rightly, without bias.

    Args:
      scores: `f[C, K, N]`, in input order.
      valid: `bool[C, K]`.
      best: `i32[C]` or `bool[C, N]`, as in `grm_jax.evaluation.metrics`.
      counts: `i32[C]`, responses of each comparison.
      k: Samples to vote with.
      meta: `f[C, K]`, for a guided vote.
      k_meta: As in `subset_totals`.
      ties: A tie policy of `metrics.correctness`.
      draws: Most subsets.
      seed: Of the subsets, and of ties broken at random.

    Returns:
      `f64[C]`, mean correctness over subsets, and `f64[C]`, the share of subsets that tie.
    """
    scores, valid, counts = np.asarray(scores), np.asarray(valid), np.asarray(counts)
    best = np.asarray(best)
    chosen = sample_subsets(scores.shape[1], k, draws=draws, seed=seed)
    size = max(1, _BLOCK_ELEMENTS // (len(chosen) * max(scores.shape[1:])))
    right, even = [], []
    for first in range(0, len(scores), size):
        part = slice(first, first + size)
        totals = subset_totals(
            scores[part],
            valid[part],
            chosen,
            meta=None if meta is None else np.asarray(meta)[part],
            k_meta=k_meta,
        )
        shape = totals.shape[:2]
        flat = totals.reshape(-1, totals.shape[-1])
        responses = np.repeat(counts[part], shape[1])
        truth = np.repeat(best[part], shape[1], axis=0)
        credit = correctness(flat, truth, responses, ties=ties, seed=seed + first)
        right.append(credit.reshape(shape).mean(axis=1))
        even.append(tied(flat, responses).reshape(shape).mean(axis=1))
    return np.concatenate(right), np.concatenate(even)


def scaling_curve(
    scores: ArrayLike,
    valid: ArrayLike,
    best: ArrayLike,
    counts: ArrayLike,
    *,
    ks: Sequence[int],
    meta: ArrayLike | None = None,
    k_meta: int | None = None,
    weights: ArrayLike | None = None,
    strata: ArrayLike | None = None,
    ties: TiePolicy = "half",
    draws: int = 200,
    resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> list[CurvePoint]:
    """Accuracy and its interval at each number of samples.

    The interval is a bootstrap over comparisons of their mean correctness. Comparisons are
    independent and so are their samples, so it holds both sources of noise.

    Args:
      scores: `f[C, K, N]`, in input order.
      valid: `bool[C, K]`.
      best: `i32[C]` or `bool[C, N]`, as in `grm_jax.evaluation.metrics`.
      counts: `i32[C]`, responses of each comparison.
      ks: Numbers of samples, each at most K.
      meta: `f[C, K]`, meta rewards: the vote is guided. A plain vote if None.
      k_meta: How many of k vote if guided, at most k; half of k, rounded down, but at least 1, if
        None (the paper's choice).
      weights: `f[C]`, of the comparisons; equal if None.
      strata: `i[C]`, subsets whose sizes the bootstrap keeps.
      ties: A tie policy of `metrics.correctness`.
      draws: Most subsets of a size.
      resamples: Of the bootstrap.
      confidence: Of the interval.
      seed: Of subsets, resamples and ties.

    Returns:
      A point for each of `ks`, in their order.
    """
    points = []
    for k in ks:
        voters = None
        if meta is not None:
            voters = max(1, k // 2) if k_meta is None else min(k_meta, k)
        right, even = resampled_correctness(
            scores,
            valid,
            best,
            counts,
            k=k,
            meta=meta,
            k_meta=voters,
            ties=ties,
            draws=draws,
            seed=seed,
        )
        found = bootstrap_mean(
            right,
            weights=weights,
            strata=strata,
            resamples=resamples,
            confidence=confidence,
            seed=seed,
        )
        points.append(
            CurvePoint(
                k=k,
                k_meta=voters,
                accuracy=found.value,
                low=found.low,
                high=found.high,
                tie_rate=float(even.mean()) if len(even) else float("nan"),
            )
        )
    return points


def plot_curve(
    curves: Mapping[str, Sequence[CurvePoint]],
    path: str | Path | BinaryIO,
    *,
    costs: Mapping[str, Sequence[float]] | None = None,
    cost_label: str = "samples",
    value_label: str = "accuracy, %",
    title: str = "",
) -> None:
    """Draws scaling curves with their intervals into a PNG, SVG or PDF.

    Args:
      curves: Points to join, by the name to show.
      path: The file, whose ending says what kind; or an open one, which gets SVG.
      costs: For each curve the place of its points on the horizontal axis, such as tokens, so that
        judges are compared at equal cost; the number of samples if None.
      cost_label: What that axis shows.
      value_label: What the vertical axis shows.
      title: Above the plot.
    """
    # Imported here, as it is slow and everything else does without.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    places: list[float] = []
    for name, points in curves.items():
        at = [point.k for point in points] if costs is None else list(costs[name])
        places += at
        (line,) = axes.plot(at, [100 * p.accuracy for p in points], marker="o", label=name)
        low, high = [100 * p.low for p in points], [100 * p.high for p in points]
        axes.fill_between(at, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    if places and not any(math.isfinite(p.accuracy) for one in curves.values() for p in one):
        # Of a few responses that are all right or all wrong there is no AUC, and an axis finds no
        # limits where nothing is drawn.
        axes.set_xlim(0.9 * min(places), 1.1 * max(places))
    axes.set_xscale("log", base=2 if costs is None else 10)
    if costs is None:
        ticks = sorted({point.k for points in curves.values() for point in points})
        axes.set_xticks(ticks, [str(k) for k in ticks])
        axes.set_xticks([], minor=True)
    axes.set_xlabel(cost_label)
    axes.set_ylabel(value_label)
    axes.set_title(title)
    axes.grid(alpha=0.3)
    if curves:
        axes.legend()
    kind = Path(path).suffix[1:] if isinstance(path, str | Path) else "svg"
    figure.savefig(path, dpi=150, format=kind, metadata={"Date": None} if kind == "svg" else {})
