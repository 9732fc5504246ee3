"""The step of reinforcement learning: advantages, and the loss with all its settings."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from grm_jax.checkpoints import save_folder
from grm_jax.distributed import make_mesh
from grm_jax.prompts import load_template
from grm_jax.prompts.nano import nano_tokenizer
from grm_jax.training import loss_denominator
from grm_jax.training.grpo import (
    Experience,
    Programs,
    choose,
    make_advance,
    make_loss,
    to_experience,
)
from grm_jax.training.learner import Learner, make_learner
from grm_jax.training.optimizer import make_optimizer
from grm_jax.training.rollouts import Rolled, Task, TaskMaker, Tasks
from tests.training import plain, tiny

LOSS = plain.LOSS

MAKER = TaskMaker(
    tokenizer=nano_tokenizer(),
    template=load_template("compact"),
    single=None,
    max_tokens=8,
    max_responses=2,
    seed=0,
)


def rolled(rewards: list[list[float]], usable: list[bool] | None = None) -> Rolled:
    """Groups whose prompts have 2 and 3 tokens in turn, and completions 1 and 2."""
    shape = np.shape(rewards)
    groups, each = shape
    starts = 2 + np.arange(groups, dtype=np.int32) % 2
    lengths = np.broadcast_to(1 + np.arange(each) % 2, shape).astype(np.int32)
    right = np.asarray(rewards) > 0
    return Rolled(
        prompts=jnp.arange(groups * 3).reshape(groups, 3),
        prompt_lengths=jnp.asarray(starts),
        tokens=jnp.arange(groups * each * 4).reshape(groups, each, 4),
        lengths=jnp.asarray(lengths),
        stopped=jnp.asarray(lengths < 2),
        sampler_logprobs=jnp.zeros((groups, each, 4)),
        scores=jnp.where(jnp.asarray(right)[..., None], jnp.array([3.0, 9]), jnp.array([5.0, 5])),
        valid=jnp.asarray(np.asarray(rewards) > -3),
        outcomes=jnp.where(jnp.asarray(right), 1.0, -1.0),
        rewards=jnp.asarray(rewards, jnp.float32),
        usable=jnp.asarray([True] * groups if usable is None else usable),
        shown=jnp.asarray(np.arange(groups, dtype=np.int32) % 2),
    )


def test_experience_by_hand() -> None:
    given = rolled([[1, -1, -1, -1], [1, 1, 1, 1], [-1, -1, -3, -1]], [True, True, False])
    batch, metrics = to_experience(given, LOSS, accumulate=2, together=2)
    # Three groups in two micro-batches: half of each group is behind a prompt of its own.
    assert batch.tokens.shape == (2, 3, 2, 4)
    np.testing.assert_array_equal(batch.tokens.reshape(3, 4, 4), given.tokens)
    np.testing.assert_array_equal(batch.prompts[:, :, 0], [[0, 0, 3], [3, 6, 6]])
    np.testing.assert_array_equal(batch.prompt_lengths, [[2, 2, 3], [3, 2, 2]])
    flat = batch.mask.reshape(12, 4)
    np.testing.assert_array_equal(np.flatnonzero(flat[1]), [0, 1])
    np.testing.assert_array_equal(np.flatnonzero(flat[4]), [0])
    assert not flat[8:].any()
    np.testing.assert_allclose(
        batch.advantages.reshape(3, 4)[:2],
        [[3**0.5, *[-(3**-0.5)] * 3], [0, 0, 0, 0]],
        rtol=1e-6,
    )
    found = {name: float(value) for name, value in metrics.items()}
    assert found == pytest.approx(
        {
            "reward": 0.25,
            "accuracy": 5 / 8,
            "unreadable": 0.0,
            "tied": 3 / 8,
            "uniform_groups": 0.5,
            "unusable_prompts": 1 / 3,
            "response_length": 1.5,
            "truncated": 0.5,
            "accuracy_best_at_1": 1 / 4,
            "accuracy_best_at_2": 1.0,
        }
    )


def test_uniform_groups_can_be_left_out() -> None:
    settings = dataclasses.replace(LOSS, drop_uniform=True)
    batch, _ = to_experience(rolled([[1, -1], [1, 1]]), settings, accumulate=1, together=2)
    assert batch.mask[0, 0].any(axis=-1).all()
    assert not batch.mask[0, 1].any()


def test_groups_that_teach_take_the_place_of_those_that_do_not() -> None:
    first = rolled([[1, 1], [1, -1], [-1, -1]])
    kept, useful = choose(first, None)
    assert int(useful) == 1
    np.testing.assert_array_equal(kept.rewards, [[1, -1], [1, 1], [-1, -1]])
    second = rolled([[-1, 1], [1, 1], [-1, 1]], [True, True, False])
    wide = second._replace(prompts=jnp.pad(second.prompts + 9, ((0, 0), (0, 2))))
    kept, useful = choose(wide, kept)
    assert int(useful) == 2
    np.testing.assert_array_equal(kept.rewards, [[1, -1], [-1, 1], [1, 1]])
    np.testing.assert_array_equal(
        kept.prompts, [[3, 4, 5, 0, 0], [9, 10, 11, 0, 0], [0, 1, 2, 0, 0]]
    )
    np.testing.assert_array_equal(kept.tokens[0], first.tokens[1])
    np.testing.assert_array_equal(kept.tokens[1], wide.tokens[0])


@pytest.mark.parametrize(
    ("rounds", "tasks", "answers"),
    [
        (1, 2, [[0, 1]]),
        (1, 1, [[0, -1]]),
        (2, 4, [[0, 1], [2, 3]]),
        (2, 3, [[0, 1], [2, -1]]),
        (2, 1, [[0, -1]]),
    ],
)
def test_a_short_batch_is_filled_up(rounds: int, tasks: int, answers: list[list[int]]) -> None:
    """The last one of all, which must neither be another program nor lose a comparison."""
    seen: list[Tasks] = []

    def roll(state: object, placed: Tasks, part: object) -> Rolled:
        assert part == len(seen)
        seen.append(placed)
        return rolled([[1, 1], [1, 1]], [answer >= 0 for answer in placed.answers.tolist()])

    def learn_from(
        state: object, found: Rolled, reference: object
    ) -> tuple[Experience, dict[str, jax.Array]]:
        return to_experience(found, LOSS, accumulate=1, together=2)

    mesh = make_mesh({}, jax.devices()[:1])
    learner = Learner(
        mesh=mesh,
        target=None,  # type: ignore[arg-type]
        accumulate=1,
        init=lambda *_: None,  # type: ignore[arg-type, return-value]
        step=lambda state, batch: (state, {}),
    )
    advance = make_advance(
        Programs(
            learner=learner,
            updates=1,
            sampling=mesh,
            lent=None,  # type: ignore[arg-type]
            lend=lambda state: None,  # type: ignore[arg-type, return-value]
            roll=roll,
            learn_from=learn_from,
            choose=choose,
        ),
        MAKER.pad,
        size=2,
        rounds=rounds,
        reference=None,
    )
    found = advance(None, [Task((5,) * 3, (0, 1), number) for number in range(tasks)])  # type: ignore[arg-type]
    assert [placed.answers.tolist() for placed in seen] == answers
    assert {placed.tokens.shape for placed in seen} == {(2, 8)}
    assert int(found.learnt.mask.any(axis=-1).sum()) == 2 * min(tasks, 2)
    assert rounds == 1 or float(found.metrics["rounds"]) == len(answers)


# Near the size of the gradients: Adam's first step is otherwise of their signs alone, and where one
# is nearly 0, rounding decides.
EPSILON = 1e-3


def torch_step(folder: Path, batch: Experience, beta: float, rate: float) -> dict[str, np.ndarray]:
    """One update by PyTorch: eq 15 written out, with the clip and the divergence, and AdamW."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rows = plain.rows(jax.tree.map(lambda leaf: leaf[0], batch))
    tokens, time = torch.from_numpy(rows.tokens).long(), batch.tokens.shape[-1]
    mask = torch.from_numpy(np.array(batch.mask).reshape(-1, time))
    advantages = torch.from_numpy(np.array(batch.advantages).ravel())
    place = torch.arange(tokens.shape[1])
    seen = place[None] < torch.from_numpy(rows.lengths)[:, None]
    logits = model(tokens, attention_mask=seen.long()).logits
    picked = torch.log_softmax(logits, -1)[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]
    picked = picked.gather(1, torch.from_numpy(rows.places).long())
    old, ref = picked.detach(), torch.from_numpy(np.array(batch.ref_logprobs).reshape(-1, time))
    ratio = torch.exp(picked - old)
    gain = torch.minimum(ratio * advantages[:, None], ratio.clamp(0.8, 1.2) * advantages[:, None])
    divergence = torch.exp(ref - picked) - (ref - picked) - 1
    per_token = torch.where(mask, -(gain - beta * divergence), torch.zeros(()))
    loss = ((per_token.sum(-1) / mask.sum(-1).clamp(min=1))[mask.any(-1)]).mean()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=rate, betas=(0.9, 0.95), eps=EPSILON, weight_decay=0.0
    )
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return {name: value.detach().numpy() for name, value in model.named_parameters()}


def test_a_whole_step_equals_that_of_pytorch(tmp_path: Path) -> None:
    """Of a decoder of two layers, whose reference is another model."""
    save_folder(tmp_path / "before", tiny.CONFIG, tiny.random_params())
    batch = plain.experience(tiny.CONFIG.vocab_size)._replace(old_logprobs=None)
    mesh = make_mesh(devices=jax.devices()[:1])
    settings = dataclasses.replace(LOSS, beta=0.1)
    learner = make_learner(
        make_loss(tiny.CONFIG, mesh, settings, chunk=16),
        lambda batch: loss_denominator(batch.mask.reshape(-1, 7), aggregate="sequence"),
        make_optimizer(tiny.settings(optimizer__learning_rate=1e-2, optimizer__eps=EPSILON)),
        params=tiny.placed(tiny.CONFIG, mesh),
        frozen={},
        mesh=mesh,
    )
    with learner.here():
        state, _ = learner.step(tiny.begin(learner), jax.tree.map(jnp.asarray, batch))
    save_folder(tmp_path / "after", tiny.CONFIG, jax.device_get(state.params))
    ours = dict(
        transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "after", dtype=torch.float32
        ).named_parameters()
    )
    theirs = torch_step(tmp_path / "before", batch, 0.1, 1e-2)
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name].detach().numpy(), value, atol=1e-5, err_msg=name)
