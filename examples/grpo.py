"""GRPO on this library's own learner and sampler, with a judge as the only reward.

    python -m examples.grpo                            # a rule judges: seconds
    python -m examples.grpo --model smollm2-135m --steps 3    # a real judge: minutes

The loop to start from for a policy of your own: completions are sampled on the devices, the judge
turns them into rewards on the host, and the learner takes a step. The policy is a decoder of random
weights over digits, so it learns from the reward or not at all. Without a model, the judge is a
rule in the place of one, which gives an answer a point for each 7 in it. The reward by step is
printed; the true score is the share of 7 among all digits.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from examples.sevens import DIGITS, main, true_score
from grm_jax.adapters import Scorer, Task
from grm_jax.adapters.scoring import Judge
from grm_jax.distributed import make_mesh, tree_shardings, with_shardings
from grm_jax.models import abstract_params, family_config, init_params, param_axes
from grm_jax.rewards import group_advantages
from grm_jax.training.learner import make_learner
from grm_jax.training.losses import grpo_loss, loss_denominator
from grm_jax.training.model import completion_logprobs
from grm_jax.training.optimizer import Optimizer
from grm_jax.training.rollouts import make_completer

GROUP, PROMPTS, NEW_TOKENS = 8, 4, 8
END = len(DIGITS)
POLICY = family_config(
    "llama", vocab_size=END + 1, num_layers=1, width=32, num_heads=2, num_kv_heads=2, mlp_dim=64,
    max_context=16, tie_embeddings=True,
)  # fmt: skip


class Batch(NamedTuple):
    """What the learner takes: `B` prompts of `P` tokens with `G` completions of `T` each.

    Attributes:
      prompts: `i32[B, P]`.
      lengths: `i32[B]`, of the prompts.
      tokens: `i32[B, G, T]`, the completions.
      mask: `bool[B, G, T]`, the tokens to learn from.
      advantages: `f32[B, G]`.
    """

    prompts: np.ndarray
    lengths: np.ndarray
    tokens: np.ndarray
    mask: np.ndarray
    advantages: np.ndarray


def questions(numbers: Sequence[int]) -> np.ndarray:
    """Numbers of three digits as prompts, `i32[B, 3]`."""
    return np.array([[int(digit) for digit in f"{number:03}"] for number in numbers], np.int32)


def answers(tokens: np.ndarray, lengths: np.ndarray) -> list[str]:
    """Completions `i32[..., T]` as text, in order."""
    rows = zip(tokens.reshape(-1, tokens.shape[-1]), lengths.ravel(), strict=True)
    return ["".join(DIGITS[token] for token in row[:length] if token < END) for row, length in rows]


def train(
    judge: Judge, *, steps: int, seed: int = 0, **settings: Any
) -> tuple[list[float], float, float]:
    """Trains a policy by a judge.

    Args:
      judge: What is asked for rewards.
      steps: Updates.
      seed: Of weights, prompts and samples.
      **settings: Of the judge.

    Returns:
      The mean reward by step, and the held-out true score before and after.
    """
    mesh = make_mesh(devices=jax.devices()[:1])
    scorer = Scorer(judge=judge, settings=settings)
    rate = 1e-2
    shapes = abstract_params(POLICY)
    shardings = tree_shardings(param_axes(POLICY), mesh, shapes)

    def loss(params: Any, batch: Batch, denominator: jax.Array, _: jax.Array) -> Any:
        logprobs, _ = completion_logprobs(
            params,
            POLICY,
            batch.prompts,
            batch.tokens,
            lengths=batch.lengths,
            mesh=mesh,
            temperature=1.0,
            chunk=16,
        )
        return grpo_loss(
            logprobs=logprobs.reshape(-1, NEW_TOKENS),
            old_logprobs=None,
            ref_logprobs=None,
            advantages=batch.advantages.ravel(),
            mask=batch.mask.reshape(-1, NEW_TOKENS),
            beta=0.0,
            denominator=denominator,
        )

    learner = make_learner(
        loss,
        lambda batch: loss_denominator(batch.mask.reshape(-1, NEW_TOKENS)),
        Optimizer(optax.adam(rate), optax.constant_schedule(rate)),
        params=with_shardings(shapes, shardings),
        frozen={},
        mesh=mesh,
    )
    params = jax.device_put(init_params(POLICY, jax.random.key(seed)), shardings)
    state = learner.begin(params, {}, seed=seed)
    sample = jax.jit(
        make_completer(
            POLICY, mesh, eos_ids=(END,), group=GROUP, temperature=1.0, max_new_tokens=NEW_TOKENS
        )
    )

    def complete(numbers: Sequence[int], key: jax.Array) -> Any:
        prompts = questions(numbers)
        count, size = prompts.shape
        everywhere = np.full(count, size, np.int32), np.ones(count, bool)
        with learner.here():
            return jax.device_get(sample(state.model, prompts, *everywhere, key))

    def held_out(key: jax.Array) -> float:
        found = complete(range(900, 932), key)
        return true_score(answers(found.tokens, found.lengths))

    rng = np.random.default_rng(seed)
    first, last, *keys = jax.random.split(jax.random.key(seed), steps + 2)
    before, history = held_out(first), []
    for key in keys:
        numbers = rng.integers(0, 256, PROMPTS)
        found = complete(numbers, key)
        asked = [
            Task(messages=({"role": "user", "content": f"{number:03}"},))
            for number in np.repeat(numbers, GROUP)
        ]
        rewards = np.array(scorer.rewards(asked, answers(found.tokens, found.lengths)), np.float32)
        history.append(float(rewards.mean()))
        batch = Batch(
            prompts=questions(numbers),
            lengths=np.full(PROMPTS, 3, np.int32),
            tokens=found.tokens,
            mask=np.arange(NEW_TOKENS) < found.lengths[..., None],
            advantages=np.asarray(group_advantages(rewards.reshape(PROMPTS, GROUP))),
        )
        state, _ = learner(state, batch)
    return history, before, held_out(last)


if __name__ == "__main__":
    main(train, "GRPO by this library with a judge as the reward.")
