"""Pure functions from sampled tokens to scores, votes, rewards and advantages.

Each takes and returns arrays, and can be jitted, vmapped and sharded: leading dimensions are
independent of one another, so an array split over them stays split. Letters for shapes: `B`
comparisons, `N` responses, `K` samples, `G` group, `T` generated tokens, `V` vocabulary. Equations
are those of arXiv:2504.02495.
"""

from grm_jax.rewards.extraction import extract_scores
from grm_jax.rewards.outcome import group_advantages, outcome_reward, pointwise_outcome_reward
from grm_jax.rewards.stopping import STATED_ERROR, flip_chance, looks
from grm_jax.rewards.verdicts import (
    extract_verdicts,
    majority_vote,
    restore_verdicts,
    verdict_reward,
)
from grm_jax.rewards.voting import (
    guided_vote,
    rank,
    restore_order,
    tied_for_best,
    vote,
    weighted_vote,
)

__all__ = [
    "STATED_ERROR",
    "extract_scores",
    "extract_verdicts",
    "flip_chance",
    "group_advantages",
    "guided_vote",
    "looks",
    "majority_vote",
    "outcome_reward",
    "pointwise_outcome_reward",
    "rank",
    "restore_order",
    "restore_verdicts",
    "tied_for_best",
    "verdict_reward",
    "vote",
    "weighted_vote",
]
