"""A policy learns on this library's own learner, from what a judge says of its answers."""

import pytest

from examples import grpo, sevens
from tests.adapters.stub import StubJudge


def test_a_step_asks_for_all_completions_at_once() -> None:
    judge = StubJudge(opinion=lambda c: [min(10, 1 + text.count("7")) for text in c.responses])
    rewards, *_ = grpo.train(judge, steps=2, samples=2)
    assert len(rewards) == 2
    assert all(1 <= reward <= 10 for reward in rewards)
    assert len(judge.calls) == 2
    assert all(settings == {"samples": 2} for _, settings in judge.calls)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_the_held_out_true_score_rises(seed: int) -> None:
    rewards, before, after = grpo.train(sevens.LikesSevens(), steps=30, seed=seed)
    assert after > before + 0.2
    assert sum(rewards[-5:]) > sum(rewards[:5])
