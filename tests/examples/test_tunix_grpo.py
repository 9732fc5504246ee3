"""Tunix's own learner calls our reward, and its policy moves."""

from typing import Any

import pytest

pytest.importorskip("tunix", reason="pip install google-tunix, in an environment of its own")

import grain
import jax
import numpy as np
import optax
from flax import nnx
from tunix.rl import rl_cluster
from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner
from tunix.rl.rollout.base_rollout import RolloutConfig

from grm_jax.adapters import Columns, Scorer, tunix
from tests.adapters.stub import StubJudge
from tests.examples.tunix_policy import DigitPolicy, DigitTokenizer

STEPS, PROMPTS, GROUP, TOKENS = 3, 2, 4, 6


def make_cluster(policy: DigitPolicy) -> rl_cluster.RLCluster:
    """Everything on one device, sampled by Tunix itself."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
    roles = (rl_cluster.Role.ACTOR, rl_cluster.Role.REFERENCE, rl_cluster.Role.ROLLOUT)
    return rl_cluster.RLCluster(
        actor=policy,
        reference=DigitPolicy(nnx.Rngs(0)),
        tokenizer=DigitTokenizer(),
        cluster_config=rl_cluster.ClusterConfig(
            role_to_mesh=dict.fromkeys(roles, mesh),
            training_config=rl_cluster.RLTrainingConfig(
                actor_optimizer=optax.sgd(0.1), eval_every_n_steps=100, max_steps=STEPS
            ),
            rollout_config=RolloutConfig(
                max_tokens_to_generate=TOKENS, max_prompt_length=8, kv_cache_size=32,
                temperature=1.0,
            ),
        ),
    )  # fmt: skip


@pytest.mark.slow
def test_three_steps_of_tunixs_learner_with_our_reward() -> None:
    judge = StubJudge(opinion=lambda c: [min(10, 1 + text.count("7")) for text in c.responses])
    scorer = Scorer(judge=judge, settings={"samples": 2})
    policy = DigitPolicy(nnx.Rngs(0))
    before = jax.tree.map(np.array, nnx.state(policy, nnx.Param))
    given: list[list[float]] = []
    reward = tunix.reward_fn(scorer, columns=Columns(reference="answer"))

    def watched(prompts: Any, completions: Any, **columns: Any) -> list[float]:
        given.append(reward(prompts, completions, **columns))
        return given[-1]

    learner = GRPOLearner(
        rl_cluster=make_cluster(policy),
        algo_config=GRPOConfig(num_generations=GROUP, beta=0.04),
        reward_fns=watched,
    )
    rows = [{"prompts": f"{n:03}", "answer": f"{n:03} 777"} for n in range(STEPS * PROMPTS)]
    learner.train(grain.MapDataset.source(rows).batch(PROMPTS))

    assert learner.rl_cluster.global_steps == STEPS
    # One call a step, with each prompt's group in it, judged side by side and told the answer.
    assert len(given) == len(judge.calls) == STEPS
    assert all(len(rewards) == PROMPTS * GROUP for rewards in given)
    assert all(1 <= value <= 10 for rewards in given for value in rewards)
    for number, (comparisons, settings) in enumerate(judge.calls):
        assert settings == {"samples": 2}
        assert len(comparisons) == PROMPTS
        for place, comparison in enumerate(comparisons):
            asked = f"{number * PROMPTS + place:03}"
            note, question = comparison.messages
            assert question == {"role": "user", "content": asked}
            assert note["content"].endswith(f"{asked} 777")
            assert 1 <= len(comparison.responses) <= GROUP
            assert all(text.isdigit() or not text for text in comparison.responses)
    after = nnx.state(learner.rl_cluster.actor_trainer.model, nnx.Param)
    moved = jax.tree.map(lambda old, new: bool(np.any(old != np.asarray(new))), before, after)
    assert any(jax.tree.leaves(moved))
