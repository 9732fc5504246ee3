"""A task that a policy of random weights learns in seconds: to write sevens, as the judge likes."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from grm_jax.data import Comparison, Judgement, Sample

DIGITS = "0123456789"


class LikesSevens:
    """Judges by a rule: a point for each 7, from 1 to 10."""

    def judge_batch(
        self, comparisons: Iterable[Comparison], /, *args: Any, **settings: Any
    ) -> Iterator[Judgement]:
        """One judgement for each comparison."""
        for comparison in comparisons:
            scores = tuple(min(10, 1 + text.count("7")) for text in comparison.responses)
            order = tuple(range(len(scores)))
            ranking = tuple(sorted(order, key=lambda index: -scores[index]))
            sample = Sample(order=order, scores=scores, meta=None, text="sevens", finish="stop")
            yield Judgement(
                id=comparison.id, scores=scores, ranking=ranking, best=ranking[0],
                tied=ranking[:1], valid_samples=1, samples=(sample,),
            )  # fmt: skip


def true_score(answers: Sequence[str]) -> float:
    """The share of sevens among all digits."""
    text = "".join(answers)
    return text.count("7") / max(1, sum(char in DIGITS for char in text))
