"""Adaptive voting: what stopping early would have saved, from samples that were all drawn.

The rule is that of `grm_jax.rewards.stopping`, by which `GRM.judge_batch` stops.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from grm_jax.evaluation.metrics import choice_shares
from grm_jax.rewards import STATED_ERROR, flip_chance, looks


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
