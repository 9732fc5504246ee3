"""Rounds of samples: the first of those drawn at once, and none where the winner is clear."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from grm_jax import GRM, Judgement, rounds
from grm_jax.data import Comparison, from_record
from grm_jax.errors import UsageError
from grm_jax.prompts import load_template
from grm_jax.rewards import flip_chance, looks
from grm_jax.sampling.batching import PromptResult, SamplingSettings
from tests.sums import questions

SETTINGS: dict[str, Any] = {
    "samples": 12,
    "max_new_tokens": 60,
    "constrain": True,
    "orders": "balanced",
}


@pytest.fixture(scope="module")
def whole(tiny_grm: GRM) -> list[Judgement]:
    return list(tiny_grm.judge_batch(questions(6), **SETTINGS))


@pytest.fixture(scope="module")
def early(tiny_grm: GRM) -> list[Judgement]:
    return list(tiny_grm.judge_batch(questions(6), adaptive=0.2, **SETTINGS))


def test_what_is_drawn_are_the_first_samples(
    whole: list[Judgement], early: list[Judgement]
) -> None:
    for all_of_it, part in zip(whole, early, strict=True):
        drawn = len(part.samples)
        assert drawn in (*looks(12), 12)
        assert part.samples == all_of_it.samples[:drawn]
    assert min(len(judgement.samples) for judgement in early) < 12
    assert max(len(judgement.samples) for judgement in early) > 4


def test_samples_stop_where_the_rule_says(whole: list[Judgement], early: list[Judgement]) -> None:
    for all_of_it, part in zip(whole, early, strict=True):
        scores = np.array([sample.scores or (0, 0) for sample in all_of_it.samples], float)
        settled = [
            look
            for look in looks(12)
            if flip_chance(scores[:look], np.ones(look, bool), 2, 12 - look) <= 0.2
        ]
        assert len(part.samples) == (settled[0] if settled else 12)
        assert part.scores == tuple(scores[: len(part.samples)].sum(axis=0))


def test_what_was_spent_is_told(whole: list[Judgement], early: list[Judgement]) -> None:
    for all_of_it, part in zip(whole, early, strict=True):
        if len(part.samples) < 12:
            assert part.completion_tokens < all_of_it.completion_tokens
        assert part.valid_samples == len(part.samples)
        assert part.prompt_tokens == all_of_it.prompt_tokens


def test_a_record_alone_is_judged_as_among_others(tiny_grm: GRM, early: list[Judgement]) -> None:
    (alone,) = tiny_grm.judge_batch(questions(3)[2:], adaptive=0.2, **SETTINGS)
    assert dataclasses.replace(alone, seconds=0) == dataclasses.replace(early[2], seconds=0)


def result(scores: list[list[int]]) -> PromptResult:
    count = len(scores)
    return PromptResult(
        tokens=[np.zeros(0, np.int32)] * count,
        stopped=np.ones(count, bool),
        lengths=np.ones(count, np.int32),
        scores=np.asarray(scores, np.float32),
        valid=np.ones(count, bool),
        logprobs=np.zeros((count, 1), np.float32),
        sampled_logprobs=np.zeros((count, 1), np.float32),
        seconds=0.0,
    )


def test_rounds_of_a_plan(tiny_grm: GRM) -> None:
    """All samples are planned once; a tie goes on to the last round, a clear case stops."""
    sampler = tiny_grm.sampler(SamplingSettings(max_new_tokens=60))
    (question,) = questions(1)
    plan = rounds.plan_record(
        sampler,
        question,
        template=load_template("compact"),
        samples=10,
        orders="fixed",
        hinted=False,
        seed=0,
        adaptive=True,
    )
    drawn = [sample for places in plan.places for sample in places]
    assert sorted(drawn) == list(range(10))
    ends = [sum(map(len, plan.places[:end])) for end in plan.rounds]
    assert ends == [*looks(10), 10]
    settings: dict[str, Any] = {"samples": 10, "span": 9, "error": 0.02}
    done, level, clear = plan.rounds[0], [], []
    for places in plan.places[:done]:
        level.append(result([[5, 5]] * len(places)))
        clear.append(result([[10, 1]] * len(places)))
    assert rounds.next_round(plan, clear, **settings) == ()
    steps = 0
    while more := rounds.next_round(plan, level, **settings):
        assert more[0] is plan.jobs[len(level)]
        level += [result([[5, 5]] * len(job.keys)) for job in more]
        steps += 1
    assert len(level) == len(plan.jobs)
    assert steps == len(plan.rounds) - 1


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ({"adaptive": 1.0}, "adaptive is 1.0"),
        ({"adaptive": -0.1}, "adaptive is -0.1"),
        ({"adaptive": True, "meta_model": object()}, "leave out the meta model"),
    ],
)
def test_wrong_settings(tiny_grm: GRM, setting: dict[str, Any], reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        tiny_grm.judge_batch([], **setting)


def record(responses: list[str], label: dict[str, Any]) -> Comparison:
    asked = [{"role": "user", "content": "2+2?"}]
    found = {"id": "1", "messages": asked, "responses": responses, "label": label}
    return from_record(found)


@pytest.mark.parametrize("best", [0, 1])
def test_constrained_judgements_that_are_told_agree(tiny_grm: GRM, best: int) -> None:
    comparison = record(["4", "5"], {"kind": "best", "index": best})
    (found,) = tiny_grm.judge_batch([comparison], hinted=True, **SETTINGS)
    assert {sample.order for sample in found.samples} == {(0, 1), (1, 0)}
    for sample in found.samples:
        assert sample.scores is not None
        assert sample.scores[best] > sample.scores[1 - best]


@pytest.mark.parametrize("correct", [False, True])
def test_a_single_response_has_a_right_score_from_0_to_1_alone(
    tiny_grm: GRM, correct: bool
) -> None:
    comparison = record(["4"], {"kind": "pointwise", "correct": correct})
    settings = SETTINGS | {"hinted": True}
    (found,) = tiny_grm.judge_batch([comparison], template="single01", **settings)
    assert {sample.scores for sample in found.samples} == {(float(correct),)}
    (free,) = tiny_grm.judge_batch([comparison], template="compact", **settings)
    assert free.error is None
    assert len({sample.scores for sample in free.samples}) > 1
