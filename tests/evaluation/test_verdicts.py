"""LLM-as-a-judge: it names a response, with or without how sure it was."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from grm_jax import GRM
from grm_jax.data import Comparison, Judgement, from_record
from grm_jax.evaluation.verdicts import VerdictJudge, concluded
from grm_jax.prompts import load_template, parse_scores
from grm_jax.rewards import majority_vote
from grm_jax.sampling.batching import SamplingSettings

SETTINGS: dict[str, Any] = {"samples": 6, "orders": "shuffle", "seed": 0}


def question(*responses: str, name: str = "q") -> Comparison:
    messages = [{"role": "user", "content": "2+2?"}]
    return from_record({"id": name, "messages": messages, "responses": list(responses)})


RECORDS = [question("4", "5"), question("4", "5", "6", name="three"), question("4", name="one")]


@pytest.fixture(scope="module")
def judge(tiny_grm: GRM) -> VerdictJudge:
    return VerdictJudge(
        grm=tiny_grm,
        template=load_template("judge"),
        settings=SamplingSettings(temperature=1.0, max_new_tokens=60, constrain=True),
        probabilities=True,
    )


@pytest.fixture(scope="module")
def judged(judge: VerdictJudge) -> list[Judgement]:
    return list(judge.judge_batch(RECORDS, **SETTINGS))


def test_a_verdict_goes_to_the_response_that_was_shown_there(judged: list[Judgement]) -> None:
    assert [judgement.id for judgement in judged] == ["q", "three", "one"]
    for record, judgement in zip(RECORDS[:2], judged, strict=False):
        count = len(record.responses)
        assert len({sample.order for sample in judgement.samples}) > 1
        for sample in judgement.samples:
            box = parse_scores(sample.text, 1, 1, count)
            assert box is not None
            named = sample.order[box[0] - 1]
            assert sample.scores == tuple(int(index == named) for index in range(count))
            assert sample.expected is not None
            assert 0 < sample.expected[named] < 1
            assert sum(sample.expected) == sample.expected[named]


def test_a_single_response_cannot_be_chosen(judged: list[Judgement]) -> None:
    assert "two or more responses" in (judged[2].error or "")


def test_the_vote_is_the_majority_weighted_by_chances(judged: list[Judgement]) -> None:
    for record, judgement in zip(RECORDS[:2], judged, strict=False):
        count = len(record.responses)
        named = np.array([np.argmax(sample.scores or ()) for sample in judgement.samples])
        chances = np.array([max(sample.expected or ()) for sample in judgement.samples])
        wanted = majority_vote(named, np.ones(6, bool), count, chances)
        assert judgement.scores == pytest.approx(np.asarray(wanted).tolist(), abs=1e-5)
        assert judgement.completion_tokens > 0


def test_without_chances_each_verdict_counts_for_one(
    judge: VerdictJudge, judged: list[Judgement]
) -> None:
    plain = dataclasses.replace(judge, probabilities=False)
    (found,) = plain.judge_batch(RECORDS[:1], **SETTINGS)
    assert [sample.scores for sample in found.samples] == [
        sample.scores for sample in judged[0].samples
    ]
    assert sum(found.scores or ()) == 6
    assert all(sample.expected is None for sample in found.samples)


def test_what_cannot_be_read_has_an_error(judge: VerdictJudge) -> None:
    short = dataclasses.replace(
        judge, settings=SamplingSettings(max_new_tokens=4), probabilities=False
    )
    (found,) = short.judge_batch(RECORDS[:1], **SETTINGS)
    assert found.error == "none of the 6 samples is readable"
    assert found.scores is None


def test_ties_are_broken_by_the_seed(judged: list[Judgement]) -> None:
    level = [dataclasses.replace(judged[0].samples[0], scores=(1, 1), expected=None)]
    found = [
        concluded(RECORDS[0], level, seed=seed, prompt_tokens=1, completion_tokens=1, seconds=0.0)
        for seed in range(20)
    ]
    assert all(one.tied == (0, 1) for one in found)
    assert {one.best for one in found} == {0, 1}
