"""A task that a policy of random weights learns in seconds: to write sevens, as the judge likes."""

import argparse
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from grm_jax import GRM
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


def main(train: Callable[..., tuple[list[float], float, float]], description: str) -> None:
    """Trains by a judge that the command line names, and prints the reward by step.

    Args:
      train: Of an example: a judge, steps, a seed and the judge's settings in; the mean reward by
        step and the held-out true score before and after out.
      description: Of the example.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", help="a judge; without one, a rule that likes sevens")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.model is None:
        found = train(LikesSevens(), steps=args.steps, seed=args.seed)
    else:
        judge = GRM.from_pretrained(args.model)
        found = train(judge, steps=args.steps, seed=args.seed, samples=2, constrain=True,
                      max_new_tokens=64)  # fmt: skip
    rewards, before, after = found
    print("reward by step:", " ".join(f"{reward:.2f}" for reward in rewards))
    print(f"share of sevens on held-out questions: {before:.2f} before, {after:.2f} after")
