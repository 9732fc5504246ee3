"""TRL's own trainer calls our reward, and a policy learns from it."""

from typing import Any

import pytest

from examples import sevens, trl_grpo
from tests.adapters.stub import StubJudge


@pytest.mark.slow
def test_three_steps_of_trls_trainer_with_our_reward() -> None:
    judge = StubJudge(opinion=lambda c: [min(10, 1 + text.count("7")) for text in c.responses])
    rewards, *_ = trl_grpo.train(judge, steps=3, samples=2)
    assert len(rewards) == 3
    assert all(1 <= reward <= 10 for reward in rewards)
    shown: list[tuple[Any, ...]] = [c.responses for call, _ in judge.calls for c in call]
    assert all(len(responses) <= 4 for responses in shown)
    assert all(settings == {"samples": 2} for _, settings in judge.calls)
    # Each step's 32 completions came in one call; those of one prompt stand side by side.
    assert len(judge.calls) == 3


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_the_held_out_true_score_rises(seed: int) -> None:
    _, before, after = trl_grpo.train(sevens.LikesSevens(), steps=20, seed=seed)
    assert after > before + 0.2
