"""Rollouts: what is sampled, read and rewarded."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grm_jax import grammar
from grm_jax.data import BestLabel, Comparison, PointwiseLabel
from grm_jax.distributed import make_mesh
from grm_jax.prompts import load_template
from grm_jax.prompts.nano import nano_tokenizer
from grm_jax.training.model import completion_logprobs
from grm_jax.training.rollouts import (
    Rolled,
    RolloutSettings,
    Task,
    TaskMaker,
    judge_rollouts,
    make_sampler,
)
from tests.training import tiny

TOKENIZER = nano_tokenizer()
SETTINGS = RolloutSettings(group=2, temperature=0.7, max_new_tokens=10, low=1, high=10)
MAKER = TaskMaker(
    tokenizer=TOKENIZER,
    template=load_template("compact"),
    single=load_template("single01"),
    max_tokens=4000,
    max_responses=3,
    seed=0,
)


def comparison(count: int = 2, label: object = BestLabel(1), text: str = "answer") -> Comparison:
    return Comparison(
        id="one",
        messages=({"role": "user", "content": "Why?"},),
        responses=tuple(f"{text} {number}" for number in range(count)),
        label=label,  # type: ignore[arg-type]
    )


def test_tasks_of_comparisons() -> None:
    task = MAKER(comparison(3, BestLabel(2)))
    assert task.answer == 2
    assert sorted(task.order) == [0, 1, 2]
    text = TOKENIZER.decode(task.tokens)
    places = [text.index(f"answer {index}") for index in task.order]
    assert places == sorted(places)
    assert MAKER(comparison(1, PointwiseLabel(True))).answer == 1
    assert MAKER(comparison(1, PointwiseLabel(False))).answer == 0


@pytest.mark.parametrize(
    "made",
    [
        comparison(2, None),
        comparison(4),
        comparison(2, text="long " * 1000),
        comparison(1, None),
    ],
    ids=["no label", "too many responses", "too long", "single without label"],
)
def test_comparisons_that_cannot_be_used_take_no_others_with_them(made: Comparison) -> None:
    tasks = MAKER.pad([MAKER(made), MAKER(comparison())], 3)
    # The third is missing.
    assert tasks.answers.tolist() == [-1, 1, -1]
    assert tasks.lengths[0] == 2
    no_singles = dataclasses.replace(MAKER, single=None)
    assert no_singles(comparison(1, PointwiseLabel(True))).answer == -1


def judged(cases: list[tuple[Task, list[str]]], **changes: bool) -> dict[str, np.ndarray]:
    """The verdicts on texts; every task has as many."""
    tasks = MAKER.pad([task for task, _ in cases], len(cases))
    texts = [[TOKENIZER.encode(text) for text in group] for _, group in cases]
    lengths = np.asarray([[len(ids) for ids in group] for group in texts], np.int32)
    tokens = np.zeros((*lengths.shape, lengths.max()), np.int32)
    for row, group in enumerate(texts):
        for column, ids in enumerate(group):
            tokens[row, column, : len(ids)] = ids
    table = grammar.token_table(TOKENIZER.token_bytes)
    settings = dataclasses.replace(SETTINGS, **changes)
    found = jax.jit(functools.partial(judge_rollouts, table=table, settings=settings))(
        tokens, lengths, tasks
    )
    return {name: np.asarray(value) for name, value in found._asdict().items()}


def test_scores_are_rewarded_in_input_order() -> None:
    shuffled = Task([5, 5], (2, 0, 1), 0)
    found = judged(
        [
            (shuffled, [r"\boxed{3, 9, 4}", r"\boxed{9, 3, 4}"]),
            (shuffled, [r"\boxed{3, 9, 9}", r"\boxed{3, 9}"]),
            (Task([5, 5], (0, 1), 1), [r"\boxed{2, 3}", r"\boxed{2, 11}"]),
            (Task([5, 5], (0, 1), -1), [r"\boxed{2, 3}", r"\boxed{3, 2}"]),
        ]
    )
    np.testing.assert_array_equal(found["outcomes"], [[1, -1], [-1, -1], [1, -1], [-1, -1]])
    np.testing.assert_array_equal(found["scores"][0], [[9, 4, 3], [3, 4, 9]])
    np.testing.assert_array_equal(
        found["valid"], [[True, True], [True, False], [True, False], [True, True]]
    )
    # The best response of the first two was shown second.
    np.testing.assert_array_equal(found["shown"], [1, 1, 1, -1])


def test_single_responses_are_right_or_wrong() -> None:
    right, wrong = Task([5, 5], (0,), 1), Task([5, 5], (0,), 0)
    texts = [r"\boxed{1}", r"\boxed{0}", r"\boxed{7}", "no box"]
    found = judged([(right, texts), (wrong, texts)])
    np.testing.assert_array_equal(found["outcomes"], [[1, -1, -1, -1], [-1, 1, -1, -1]])
    np.testing.assert_array_equal(found["valid"], [[True, True, False, False]] * 2)
    np.testing.assert_array_equal(found["shown"], [-1, -1])


def test_verdicts_name_a_place() -> None:
    task = Task([5, 5], (1, 0), 0)
    texts = [r"\boxed{2}", r"\boxed{1}", r"\boxed{3}", r"\boxed{2, 1}"]
    found = judged([(task, texts)], verdict=True)
    np.testing.assert_array_equal(found["outcomes"], [[1, -1, -1, -1]])
    # There is no third response.
    np.testing.assert_array_equal(found["valid"], [[True, True, False, False]])
    np.testing.assert_array_equal(found["scores"][0, 0], [1, 0, 0])


CONFIG = dataclasses.replace(tiny.CONFIG, vocab_size=TOKENIZER.vocab_size, max_context=256)


@pytest.fixture(scope="module")
def rolled() -> tuple[Rolled, list[list[int]]]:
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10], [11, 12]]
    tasks = dataclasses.replace(MAKER, max_tokens=8).pad(
        [Task(prompts[0], (0, 1), 1), Task(prompts[1], (1, 0), 0)], 3
    )
    mesh = make_mesh(devices=jax.devices()[:1])
    sampler = jax.jit(make_sampler(CONFIG, TOKENIZER, mesh, SETTINGS))
    return jax.device_get(sampler(tiny.random_params(CONFIG), tasks, jax.random.key(0))), prompts


def test_completions_end_once(rolled: tuple[Rolled, list[list[int]]]) -> None:
    found, prompts = rolled
    assert found.tokens.shape == (3, 2, 10)
    for row, prompt in enumerate(prompts[:2]):
        assert found.prompts[row, : found.prompt_lengths[row]].tolist() == prompt
        for column in range(2):
            size = int(found.lengths[row, column])
            assert 1 <= size <= 10
            ended = [token in TOKENIZER.eos_ids for token in found.tokens[row, column].tolist()]
            assert not any(ended[: size - 1])
            ends = ended[size - 1]
            assert ends == bool(found.stopped[row, column])
    assert found.usable.tolist() == [True, True, False]
    assert len({tuple(row) for row in found.tokens[0].tolist()}) == 2


def test_sampler_and_learner_agree(rolled: tuple[Rolled, list[list[int]]]) -> None:
    found, _ = rolled
    logprobs, entropy = completion_logprobs(
        jax.tree.map(jnp.asarray, tiny.random_params(CONFIG)),
        CONFIG,
        jnp.asarray(found.prompts),
        jnp.asarray(found.tokens),
        lengths=jnp.asarray(found.prompt_lengths),
        mesh=make_mesh(devices=jax.devices()[:1]),
        temperature=SETTINGS.temperature,
    )
    assert entropy is None
    written = (np.arange(10) < found.lengths[..., None]) & found.usable[:, None, None]
    np.testing.assert_allclose(found.sampler_logprobs[written], logprobs[written], atol=1e-4)
    assert not found.sampler_logprobs[~written].any()
