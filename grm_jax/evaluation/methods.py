"""The ways in which samples become a vote, at the same cost: what a report compares.

Beside the plain vote (eq 14, arXiv:2504.02495) and the one that a meta model guides (section 4
there) stands one in which all samples vote, each as much as the meta model trusts it, and two that
need no second model: expected scores vote in place of sampled ones, or those
samples vote that the judge itself was likeliest to write, which is the baseline that a meta model
has to beat.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from grm_jax.evaluation.judged import Judged


@dataclass(frozen=True, kw_only=True)
class Method:
    """How samples become a vote.

    Attributes:
      name: What reports call it.
      guide: What chooses who votes: meta rewards, or the judge's own log-probabilities of what it
        wrote; all vote if None.
      k_meta: How many of k are chosen; half of k if None.
      expected: Whether expected scores vote, and not those that were sampled.
      weighted: Whether samples vote with the meta model's chance that they are right.
    """

    name: str
    guide: Literal["meta", "logprob"] | None = None
    k_meta: int | None = None
    expected: bool = False
    weighted: bool = False

    def voters(self, k: int) -> int | None:
        """How many of k samples vote; None if all do."""
        if self.guide is None:
            return None
        return max(1, k // 2) if self.k_meta is None else min(self.k_meta, k)

    def votes(self, judged: Judged) -> np.ndarray:
        """`f64[C, K, N]`, what each sample gives each response."""
        scores = judged.scores
        if self.expected and judged.expected is not None:
            scores = judged.expected
        return scores * self.weights(judged)[..., None]

    def weights(self, judged: Judged) -> np.ndarray:
        """`f64[C, K]`, how much each sample's vote counts."""
        if not self.weighted or judged.meta is None:
            return np.ones(judged.valid.shape)
        meta = np.where(judged.valid & ~np.isnan(judged.meta), judged.meta, -np.inf)
        return 1 / (1 + np.exp(-meta))

    def trust(self, judged: Judged) -> np.ndarray | None:
        """`f64[C, K]`, by what the voters are chosen."""
        if self.guide is None:
            return None
        return judged.meta if self.guide == "meta" else judged.logprob


PLAIN = Method(name="vote")
WEIGHTED = Method(name="weighted", weighted=True)


def find_methods(judged: Judged, k_metas: Sequence[int] = ()) -> list[Method]:
    """The ways to vote that the judgements allow, the plain vote first.

    Args:
      judged: The judgements.
      k_metas: Numbers of voters for guided votes, besides half of k.
    """
    methods = [PLAIN]
    if judged.expected is not None:
        methods.append(Method(name="expected", expected=True))
    if judged.stopped_early:
        # Half of what is no fixed number has no meaning.
        return methods
    if judged.meta is not None:
        methods.append(Method(name="guided, half", guide="meta"))
        methods += [Method(name=f"guided, {k}", guide="meta", k_meta=k) for k in k_metas]
        methods.append(WEIGHTED)
    if judged.logprob is not None and judged.samples > 1:
        methods.append(Method(name="confident, half", guide="logprob"))
        methods += [Method(name=f"confident, {k}", guide="logprob", k_meta=k) for k in k_metas]
    return methods
