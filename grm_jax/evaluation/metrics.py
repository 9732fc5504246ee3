"""What a judge's totals are worth: accuracy, ties, ranking, biases, and how sure one can be.

Pure functions of NumPy arrays. Letters for shapes: `C` comparisons, `K` samples, `N` responses
(padded; `counts` says how many are real), `P` places in the prompt, `R` bootstrap resamples.

What counts as right is `best`: `i32[C]`, the index of the one best response, or `bool[C, N]`, a
mark on each response that is as good as any.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike

from grm_jax.errors import UsageError
from grm_jax.training.heldout import auc as auc

TiePolicy = Literal["strict", "half", "random"]
TIE_POLICIES: tuple[str, ...] = get_args(TiePolicy)


@dataclass(frozen=True, kw_only=True)
class Interval:
    """An estimate and the bootstrap interval around it."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How much the second of two judges is better on the same comparisons.

    Attributes:
      value: Second less first.
      low: Lower end of the interval.
      high: Upper end of the interval.
      p_value: Two-sided: twice the smaller share of resamples on either side of 0.
    """

    value: float
    low: float
    high: float
    p_value: float


@dataclass(frozen=True, kw_only=True)
class PositionBias:
    """How far the place of a response in the prompt decides.

    Attributes:
      accuracy: `f64[P]`, accuracy of single samples by the place of the best response; NaN where
        it never stood.
      cases: `i64[P]`, how many readable samples that is of.
      chosen: `f64[P]`, share of readable samples whose choice is at each place, ties shared.
      expected: `f64[P]`, the same for a judge that chooses blindly.
      agreement_same: Chance that two samples of a comparison in one order choose alike; NaN without
        such pairs.
      agreement_other: The same for two samples in different orders.
    """

    accuracy: np.ndarray
    cases: np.ndarray
    chosen: np.ndarray
    expected: np.ndarray
    agreement_same: float
    agreement_other: float


@dataclass(frozen=True, kw_only=True)
class LengthBias:
    """How far the length of a response decides; lengths are in characters.

    Attributes:
      chosen_longest: Share of comparisons in which the longest response is chosen, ties shared.
      best_longest: Share in which the longest is a right one.
      accuracy_longest: Accuracy where the longest is a right one; NaN if it never is.
      accuracy_shorter: Accuracy where it is not; NaN if it always is.
    """

    chosen_longest: float
    best_longest: float
    accuracy_longest: float
    accuracy_shorter: float


def right_responses(best: ArrayLike, width: int) -> np.ndarray:
    """`best` as a mask `bool[C, N]`, from indices `i32[C]` or such a mask; -1 marks nothing."""
    best = np.asarray(best)
    if best.dtype == bool:
        return best
    return best[:, None] == np.arange(width)


def choice_shares(totals: ArrayLike, counts: ArrayLike) -> np.ndarray:
    """The choice that totals make: 1 at the highest, or equal shares where several are highest.

    Args:
      totals: `f[..., N]`; places from `counts` on are ignored.
      counts: `i32[...]`, responses of each.

    Returns:
      `f64[..., N]`, each row with sum 1.
    """
    totals = np.asarray(totals, np.float64)
    present = np.arange(totals.shape[-1]) < np.asarray(counts)[..., None]
    shown = np.where(present, totals, -np.inf)
    top = present & (shown == shown.max(axis=-1, keepdims=True))
    return top / top.sum(axis=-1, keepdims=True)


def correctness(
    totals: ArrayLike,
    best: ArrayLike,
    counts: ArrayLike,
    *,
    ties: TiePolicy = "half",
    seed: int = 0,
) -> np.ndarray:
    """Whether each comparison is decided rightly, from 0 to 1; its mean is the accuracy.

    With one right response of several this is best-of-N as well as the accuracy on pairs. The
    policies differ only where the highest total is shared:

    - `"strict"`: right only if all that share it are right (how scalar reward models are scored).
    - `"half"`: the share of right ones among them: a half for a pair. The expectation of `random`.
    - `"random"`: right if the one drawn among them is (the rule of arXiv:2504.02495, appendix D).

    A comparison that no sample could be read of has totals of 0 throughout, and so is a tie of all.

    Args:
      totals: `f[C, N]`, one total a response.
      best: `i32[C]` or `bool[C, N]`, what is right.
      counts: `i32[C]`, responses of each comparison.
      ties: Which policy.
      seed: Of the draws of `"random"`.

    Returns:
      `f64[C]`.

    Raises:
      UsageError: If there is no such policy.
    """
    shares = choice_shares(totals, counts)
    credit = np.sum(shares * right_responses(best, shares.shape[-1]), axis=-1)
    # A share of tied responses is a sum of fractions, which need not be exactly 1.
    credit = np.where(np.isclose(credit, 1.0), 1.0, credit)
    if ties == "half":
        return credit
    if ties == "strict":
        return np.where(credit == 1.0, 1.0, 0.0)
    if ties == "random":
        return (np.random.default_rng(seed).random(credit.shape) < credit).astype(np.float64)
    raise UsageError(f"there is no tie policy {ties!r}; choose one of {', '.join(TIE_POLICIES)}")


def tied(totals: ArrayLike, counts: ArrayLike) -> np.ndarray:
    """Which comparisons have no single highest total: `f[..., N]`, `i32[...]` to `bool[...]`."""
    return choice_shares(totals, counts).max(axis=-1) < 1.0


def tie_rate(totals: ArrayLike, counts: ArrayLike) -> float:
    """The share of comparisons of two or more responses that are `tied`; NaN without any."""
    several = np.asarray(counts) > 1
    return _mean(tied(totals, counts)[several])


def unreadable_rate(valid: ArrayLike) -> float:
    """The share of samples that could not be read, from `bool[C, K]`."""
    return _mean(~np.asarray(valid, bool))


def weighted_mean(values: ArrayLike, weights: ArrayLike | None = None) -> float:
    """The mean of `f[C]` under weights `f[C]`, all equal if None; NaN for nothing."""
    values = np.asarray(values, np.float64)
    if weights is None:
        return _mean(values)
    weights = np.asarray(weights, np.float64)
    return float(values @ weights / weights.sum())


def bootstrap_mean(
    values: ArrayLike,
    *,
    weights: ArrayLike | None = None,
    strata: ArrayLike | None = None,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """A weighted mean and its percentile bootstrap interval over comparisons.

    Args:
      values: `f[C]`, such as `correctness`. Means over samples of a comparison may stand here:
        comparisons are what is drawn again, so the noise of samples is in the interval as well.
      weights: `f[C]`, all equal if None.
      strata: `i[C]`, groups (subsets) whose sizes stay as they are.
      confidence: Share of resamples inside the interval.
      resamples: R.
      seed: Of the resamples.
    """
    values = np.asarray(values, np.float64)
    means = resampled_means(values, weights=weights, strata=strata, resamples=resamples, seed=seed)
    low, high = _percentiles(means, confidence)
    return Interval(value=weighted_mean(values, weights), low=low, high=high)


def paired_difference(
    first: ArrayLike,
    second: ArrayLike,
    *,
    weights: ArrayLike | None = None,
    strata: ArrayLike | None = None,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Difference:
    """How much better the second of two judges is, by a paired bootstrap.

    Both are resampled together, so what makes a comparison hard for both cancels out.

    Args:
      first: `f[C]`, correctness of one judge.
      second: `f[C]`, that of the other on the same comparisons, in the same order.
      weights: As in `bootstrap_mean`.
      strata: As in `bootstrap_mean`.
      confidence: As in `bootstrap_mean`.
      resamples: As in `bootstrap_mean`.
      seed: As in `bootstrap_mean`.
    """
    change = np.asarray(second, np.float64) - np.asarray(first, np.float64)
    means = resampled_means(change, weights=weights, strata=strata, resamples=resamples, seed=seed)
    return difference_of(weighted_mean(change, weights), means, confidence=confidence)


def bootstrap(
    statistic: Callable[[np.ndarray], float],
    count: int,
    *,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> Interval:
    """Any statistic of a set and its percentile bootstrap interval.

    Args:
      statistic: Of the items with these indices `i64[C]`, some of them more than once.
      count: C.
      confidence: As in `bootstrap_mean`.
      resamples: As in `bootstrap_mean`; where the statistic is NaN, a resample is left out.
      seed: As in `bootstrap_mean`.
    """
    rng = np.random.default_rng(seed)
    found = np.array([statistic(rng.integers(0, count, count)) for _ in range(resamples)])
    return interval_of(statistic(np.arange(count)), found, confidence=confidence)


def resampled_means(
    values: np.ndarray,
    *,
    weights: ArrayLike | None = None,
    strata: ArrayLike | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> np.ndarray:
    """Bootstrap values `f64[R]` of a weighted mean; arguments as in `bootstrap_mean`.

    What is drawn depends on the seed and the strata alone, never on the values.
    """
    count = len(values)
    mass = np.ones(count) if weights is None else np.asarray(weights, np.float64)
    groups = np.zeros(count, np.int64) if strata is None else np.asarray(strata)
    product = values * mass
    rng = np.random.default_rng(seed)
    top, bottom = np.zeros(resamples), np.zeros(resamples)
    for group in np.unique(groups):
        members = np.flatnonzero(groups == group)
        size = len(members)
        # In blocks, so that memory does not grow with the number of comparisons times resamples.
        block = max(1, 1_000_000 // size)
        for first in range(0, resamples, block):
            part = slice(first, min(first + block, resamples))
            drawn = members[rng.integers(0, size, (part.stop - part.start, size))]
            top[part] += product[drawn].sum(axis=1)
            bottom[part] += size if weights is None else mass[drawn].sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return top / bottom


def interval_of(value: float, resamples: np.ndarray, *, confidence: float = 0.95) -> Interval:
    """An estimate with the percentile interval of its bootstrap values `f64[R]`, but for NaN."""
    low, high = _percentiles(resamples[~np.isnan(resamples)], confidence)
    return Interval(value=value, low=low, high=high)


def difference_of(value: float, resamples: np.ndarray, *, confidence: float = 0.95) -> Difference:
    """A difference with the interval of its bootstrap values `f64[R]`, and its p-value."""
    known = resamples[~np.isnan(resamples)]
    low, high = _percentiles(known, confidence)
    # The estimate itself counts as a resample, so no value of p is 0.
    below, above = np.sum(known <= 0) + 1, np.sum(known >= 0) + 1
    p_value = min(1.0, 2 * float(min(below, above)) / (len(known) + 1))
    return Difference(value=value, low=low, high=high, p_value=p_value)


def position_bias(
    scores: ArrayLike, valid: ArrayLike, orders: ArrayLike, best: ArrayLike, counts: ArrayLike
) -> PositionBias:
    """Measures how far the place of a response in the prompt decides single samples.

    Args:
      scores: `f[C, K, N]`, in input order.
      valid: `bool[C, K]`, which samples could be read.
      orders: `i32[C, K, N]`, input index of the response shown at each place; unused places hold
        anything.
      best: `i32[C]` or `bool[C, N]`, what is right.
      counts: `i32[C]`.
    """
    scores, orders, counts = np.asarray(scores), np.asarray(orders), np.asarray(counts)
    width = scores.shape[-1]
    several = counts > 1
    readable = np.asarray(valid, bool) & several[:, None]
    shares = choice_shares(scores, np.broadcast_to(counts[:, None], scores.shape[:2]))
    right = right_responses(best, width)
    credit = np.sum(shares * right[:, None], axis=-1)

    present = np.arange(width) < counts[:, None]
    at = np.where(present[:, None], orders, 0)
    shown_share = np.take_along_axis(shares, at, axis=-1) * present[:, None]
    shown_right = np.take_along_axis(np.broadcast_to(right[:, None], shares.shape), at, axis=-1)
    here = shown_right & present[:, None] & readable[..., None]
    cases = here.sum(axis=(0, 1))
    gained = np.sum(here * credit[..., None], axis=(0, 1))
    total = max(1, int(readable.sum()))
    blind = np.where(present, 1 / np.maximum(counts, 1)[:, None], 0.0)
    same, other = _agreement(shares, readable, np.where(present[:, None], orders, -1))
    return PositionBias(
        accuracy=np.where(cases > 0, gained / np.maximum(cases, 1), np.nan),
        cases=cases,
        chosen=np.sum(shown_share * readable[..., None], axis=(0, 1)) / total,
        expected=np.sum(blind * readable.sum(axis=1)[:, None], axis=0) / total,
        agreement_same=same,
        agreement_other=other,
    )


def length_bias(
    totals: ArrayLike, best: ArrayLike, counts: ArrayLike, lengths: ArrayLike
) -> LengthBias:
    """Measures how far the length of responses decides.

    Comparisons whose responses are all equally long, or that have one response, are left out.

    Args:
      totals: `f[C, N]`.
      best: `i32[C]` or `bool[C, N]`, what is right.
      counts: `i32[C]`.
      lengths: `i32[C, N]`, of the responses.
    """
    lengths, counts = np.asarray(lengths), np.asarray(counts)
    present = np.arange(lengths.shape[-1]) < counts[:, None]
    longest = choice_shares(lengths, counts) > 0
    used = np.any(present & ~longest, axis=1)
    shares = choice_shares(totals, counts)
    right = right_responses(best, lengths.shape[-1]) & present
    is_longest = np.any(right & longest, axis=1)
    credit = np.sum(shares * right, axis=1)
    return LengthBias(
        chosen_longest=_mean(np.sum(shares * longest, axis=1)[used]),
        best_longest=_mean(is_longest[used]),
        accuracy_longest=_mean(credit[used & is_longest]),
        accuracy_shorter=_mean(credit[used & ~is_longest]),
    )


def _agreement(shares: np.ndarray, readable: np.ndarray, orders: np.ndarray) -> tuple[float, float]:
    """Mean chance that two samples choose alike: in the same order, and in different ones."""
    met = np.zeros(2)
    pairs = np.zeros(2)
    for share, read, order in zip(shares, readable, orders, strict=True):
        both = np.triu(read[:, None] & read[None], 1)
        alike = share @ share.T
        same = np.all(order[:, None] == order[None], axis=-1)
        for which, mask in enumerate((both & same, both & ~same)):
            met[which] += alike[mask].sum()
            pairs[which] += mask.sum()
    found = np.where(pairs > 0, met / np.maximum(pairs, 1), np.nan)
    return float(found[0]), float(found[1])


def _percentiles(values: np.ndarray, confidence: float) -> tuple[float, float]:
    if len(values) == 0:
        return float("nan"), float("nan")
    outside = (1 - confidence) / 2
    low, high = np.quantile(values, [outside, 1 - outside])
    return float(low), float(high)


def _mean(values: np.ndarray) -> float:
    return float(np.mean(values)) if len(values) else float("nan")
