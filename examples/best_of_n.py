"""Best of n: a judge picks the best of a policy's answers.

    python -m examples.best_of_n                        # a judge of known quality, to see the law
    python -m examples.best_of_n --model smollm2-135m   # a real one, on the answers below

The first form needs no model: answers have a true quality drawn from a normal distribution, and the
judge sees it through noise of a known size. If its view correlates with the truth by `r`, picking
the best of n raises the mean true quality by `r` times the expected greatest of n normal draws: for
n of 2, 4, 8, 16 that maximum is 0.56, 1.03, 1.42 and 1.77 standard deviations. The table shows what
was measured beside what that law predicts.

The second form lets a real judge pick among answers to a sum of which only some are right, and
counts how often the pick is right beside a blind pick.
"""

import argparse
from collections.abc import Sequence

import numpy as np

from grm_jax import GRM
from grm_jax.adapters import Scorer, Task

_STEPS = 20_001


def expected_maximum(count: int) -> float:
    """The mean of the greatest of `count` standard normal draws."""
    from statistics import NormalDist

    # E[max] is the integral of the quantile at u**(1/n) over u, by the midpoint rule.
    middle = (np.arange(_STEPS) + 0.5) / _STEPS
    quantile = NormalDist().inv_cdf
    return float(np.mean([quantile(u ** (1 / count)) for u in middle]))


def pick(rewards: Sequence[float | None], rng: np.random.Generator) -> int:
    """The index of the greatest reward; ties are broken at random, and None never wins."""
    values = np.array([-np.inf if reward is None else reward for reward in rewards])
    return int(rng.choice(np.flatnonzero(values == values.max())))


def simulate(
    count: int, quality: float, *, prompts: int, rng: np.random.Generator
) -> tuple[float, float]:
    """The gain in true quality of a pick by a judge that correlates with it by `quality`.

    Args:
      count: Answers to each prompt.
      quality: The correlation.
      prompts: How many picks.
      rng: Of the draws.

    Returns:
      The mean gain over a blind pick, in standard deviations, and its standard error.
    """
    true = rng.normal(size=(prompts, count))
    noise = rng.normal(size=(prompts, count))
    seen = quality * true + np.sqrt(1 - quality**2) * noise
    picked = np.array([true[row, pick(list(seen[row]), rng)] for row in range(prompts)])
    return float(picked.mean()), float(picked.std() / np.sqrt(prompts))


def judge_sums(scorer: Scorer, *, prompts: int, count: int, seed: int = 0) -> tuple[float, float]:
    """How often a judge's pick among answers to sums is right, and how often a blind one is."""
    rng = np.random.default_rng(seed)
    tasks, answers, right = [], [], []
    for _ in range(prompts):
        one, other = rng.integers(10, 90, size=2)
        question = {"role": "user", "content": f"What is {one} + {other}?"}
        task = Task(messages=({"role": "user", "content": question["content"]},))
        for _ in range(count):
            correct = bool(rng.random() < 0.4)
            value = one + other if correct else one + other + rng.choice([-10, -1, 1, 10])
            tasks.append(task)
            answers.append(f"{one} + {other} = {value}.")
            right.append(correct)
    rewards = scorer.rewards(tasks, answers)
    picked = [
        right[first + pick(rewards[first : first + count], rng)]
        for first in range(0, len(rewards), count)
    ]
    return float(np.mean(picked)), float(np.mean(right))


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table, or what a real judge picks."""
    parser = argparse.ArgumentParser(description="Best of n by a judge.")
    parser.add_argument("--model", help="a judge; without one, judges of known quality")
    parser.add_argument("--prompts", type=int, help="default 4000, or 16 with a model")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    if args.model is not None:
        settings = {"samples": args.samples, "constrain": True, "max_new_tokens": 96}
        scorer = Scorer(judge=GRM.from_pretrained(args.model), settings=settings)
        picked, blind = judge_sums(scorer, prompts=args.prompts or 16, count=4, seed=args.seed)
        print(f"right: {picked:.0%} of the judge's picks, {blind:.0%} of all answers")
        return
    rng = np.random.default_rng(args.seed)
    print(" n  quality  gain  +- 95 %  predicted")
    for quality in (0.3, 0.6, 0.9):
        for count in (2, 4, 8, 16):
            gain, error = simulate(count, quality, prompts=args.prompts or 4000, rng=rng)
            predicted = quality * expected_maximum(count)
            print(f"{count:2}  {quality:7.1f}  {gain:4.2f}  {1.96 * error:7.2f}  {predicted:9.2f}")


if __name__ == "__main__":
    main()
