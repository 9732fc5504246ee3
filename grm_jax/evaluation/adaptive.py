"""Adaptive voting: what stopping early would have saved, from samples that were all drawn.

The rule is that of `grm_jax.rewards.stopping`, by which `GRM.judge_batch` stops.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from grm_jax.evaluation.judged import Judged
from grm_jax.evaluation.measures import Measure, measure_resamples, measure_value
from grm_jax.evaluation.metrics import TiePolicy, choice_shares, correctness, difference_of
from grm_jax.rewards import STATED_ERROR, flip_chance, looks

REPORTED_ERRORS = (0.01, STATED_ERROR, 0.05, 0.1)
"""The stated errors of which reports say what they would have saved and cost."""


@dataclass(frozen=True, kw_only=True, eq=False)
class AdaptiveVotes:
    """Votes that stopped early.

    Attributes:
      totals: `f64[C, N]`, of the samples that were drawn.
      used: `i64[C]`, how many those are.
      changed: `f64[C]`, how far the choice differs from that of all samples: 0 if it is the same.
    """

    totals: np.ndarray
    used: np.ndarray
    changed: np.ndarray


def adaptive_votes(
    scores: ArrayLike,
    valid: ArrayLike,
    counts: ArrayLike,
    *,
    error: float = STATED_ERROR,
    span: float = 9.0,
) -> AdaptiveVotes:
    """Stops each comparison's samples, in the order in which they were drawn, once it is settled.

    Args:
      scores: `f[C, K, N]`, of all samples, in input order.
      valid: `bool[C, K]`.
      counts: `i32[C]`.
      error: The chance of another winner at which a comparison is settled. 0 stops only where no
        samples could change the winner.
      span: The widest difference of two scores.
    """
    scores, valid, counts = np.asarray(scores), np.asarray(valid, bool), np.asarray(counts)
    size, samples = valid.shape
    used = np.full(size, samples)
    # Of one shape at every look, so that one program serves all.
    for drawn in looks(samples):
        seen = valid & (np.arange(samples) < drawn)
        chance = np.asarray(flip_chance(scores, seen, counts, samples - drawn, span=span))
        used = np.where((used == samples) & (chance <= error), drawn, used)
    taken = valid & (np.arange(samples) < used[:, None])
    totals = np.sum(scores * taken[..., None], axis=1)
    full = choice_shares(np.sum(scores * valid[..., None], axis=1), counts)
    changed = 1 - np.minimum(choice_shares(totals, counts), full).sum(axis=1)
    return AdaptiveVotes(totals=totals, used=used, changed=np.maximum(changed, 0.0))


def early_stopping(
    judged: Judged,
    total: Measure,
    correct: np.ndarray,
    *,
    ties: TiePolicy,
    resamples: int = 1000,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """What stopping early would have saved and cost at each of `REPORTED_ERRORS`.

    Args:
      judged: Judgements of which all samples were drawn.
      total: What is measured: a mean of correctness.
      correct: `f64[C]`, correctness of the votes of all samples.
      ties: The tie policy of both.
      resamples: Of the bootstrap of the difference, paired by comparison.
      seed: Of ties and resamples.

    Returns:
      For each stated error an object, ready for JSON, with the mean number of samples and the
      share of all tokens that it draws, the share of winners that change, the value, and its
      difference from the vote of all samples. Samples and winners are those of the measure's
      members.
    """
    members, found = total.members, []
    tokens = judged.completion_tokens[members]
    for error in REPORTED_ERRORS:
        votes = adaptive_votes(judged.scores, judged.valid, judged.counts, error=error)
        fewer = correctness(votes.totals, judged.right, judged.counts, ties=ties, seed=seed)
        drawn = measure_resamples(
            total, judged, fewer - correct, [], resamples=resamples, seed=seed
        )
        used = votes.used[members]
        found.append(
            {
                "error": error,
                "mean_samples": float(used.mean()),
                "token_share": float(tokens @ used / (tokens.sum() * judged.samples)),
                "changed": float(votes.changed[members].mean()),
                "value": measure_value(total, judged, fewer, []),
                "difference": asdict(
                    difference_of(measure_value(total, judged, fewer - correct, []), drawn)
                ),
            }
        )
    return found
