"""Ways to vote: expected scores, the judge's own confidence, and what stopped early."""

from dataclasses import replace

import numpy as np
import pytest

from grm_jax.data import Comparison, Judgement, Sample, from_record
from grm_jax.evaluation.benchmarks import find_benchmark
from grm_jax.evaluation.evaluate import Evaluation, compare, evaluate
from grm_jax.evaluation.judged import Judged, judged_from_records
from grm_jax.evaluation.methods import find_methods
from tests.evaluation.fixtures import COST, fake_judgement, right_mask

SAMPLES = 8


def comparisons(count: int) -> list[Comparison]:
    return [
        from_record(
            {
                "id": str(number),
                "messages": [{"role": "user", "content": "Name a colour."}],
                "responses": ["red", "mud"],
                "label": {"kind": "best", "index": number % 2},
            }
        )
        for number in range(count)
    ]


def noisy(comparison: Comparison, rng: np.random.Generator) -> list[int]:
    """Integers around means that differ by less than a point."""
    return np.round(rng.normal(5 + 0.5 * right_mask(comparison), 1.0)).astype(int).tolist()


def refined(judgement: Judgement, comparison: Comparison, rng: np.random.Generator) -> Judgement:
    """With expected scores that know the means, and log-probabilities of what is right."""
    means = 5 + 0.5 * right_mask(comparison)

    def refine(sample: Sample) -> Sample:
        won = sample.scores is not None and right_mask(comparison)[int(np.argmax(sample.scores))]
        expected = tuple(np.round(rng.normal(means, 0.3), 6).tolist())
        return replace(sample, expected=expected, logprob=float(won + rng.normal(-3, 0.7)))

    return replace(judgement, samples=tuple(map(refine, judgement.samples)))


def judge(count: int = 400) -> Judged:
    rng = np.random.default_rng(0)
    records = [
        refined(fake_judgement(one, noisy, samples=SAMPLES, rng=rng), one, rng).to_record()
        for one in comparisons(count)
    ]
    return judged_from_records(comparisons(count), records, SAMPLES)


@pytest.fixture(scope="module")
def found() -> Evaluation:
    benchmark = find_benchmark("comparisons")
    return evaluate(benchmark, judge(), name="a", ks=[1, 8], k_metas=[2], model=COST, resamples=200)


def accuracy(found: Evaluation, method: str, k: int) -> float:
    (point,) = (point for point in found.results["curves"][method] if point["k"] == k)
    return point["scores"]["accuracy"]["value"]


def test_every_way_has_a_curve(found: Evaluation) -> None:
    assert list(found.results["curves"]) == ["vote", "expected", "confident, half", "confident, 2"]
    assert [point["k_meta"] for point in found.results["curves"]["confident, half"]] == [1, 4]
    assert [point["k_meta"] for point in found.results["curves"]["confident, 2"]] == [1, 2]


def test_expected_scores_do_not_tie(found: Evaluation) -> None:
    sampled, expected = (found.results["curves"][name][0] for name in ("vote", "expected"))
    assert sampled["tie_rate"] > 0.15
    assert expected["tie_rate"] < 0.01
    difference = compare((found, "vote", 1), (found, "expected", 1))
    assert difference["low"] > 0


def test_confidence_chooses_who_votes(found: Evaluation) -> None:
    assert accuracy(found, "confident, half", 8) > accuracy(found, "vote", 8)
    # Of one sample there is nothing to choose.
    assert accuracy(found, "confident, half", 1) == accuracy(found, "vote", 1)
    assert 0.7 < found.results["confidence"]["auc"] < 0.95
    assert found.results["meta"] is None


def test_samples_vote_as_much_as_they_are_trusted() -> None:
    judged = replace(judge(), expected=None, logprob=None)
    # What a meta model would say that is sure of half of what is right, and of nothing else.
    first = judged.scores.argmax(axis=-1) == judged.right.argmax(axis=-1)[:, None]
    sure = first & (np.arange(SAMPLES) % 2 == 0)
    meta = np.where(sure, 4.0, -1.0)
    meta[:, -1] = np.nan
    judged = replace(judged, meta=meta)
    weighted = next(way for way in find_methods(judged) if way.name == "weighted")
    np.testing.assert_allclose(weighted.weights(judged)[sure], 1 / (1 + np.exp(-4)))
    assert not weighted.weights(judged)[:, -1].any()
    found = evaluate(
        find_benchmark("comparisons"), judged, name="a", ks=[1, 8], model=COST, resamples=50
    )
    assert accuracy(found, "weighted", 8) > accuracy(found, "vote", 8) + 0.05


def test_without_records_of_it_there_is_the_vote_alone() -> None:
    judged = judge(4)
    assert [way.name for way in find_methods(replace(judged, expected=None, logprob=None))] == [
        "vote"
    ]
    assert [way.name for way in find_methods(judged, [3])] == [
        "vote", "expected", "confident, half", "confident, 3",
    ]  # fmt: skip


def test_samples_that_stopped_early_have_one_point() -> None:
    records = [
        fake_judgement(one, noisy, samples=4 + 4 * (number % 2), rng=np.random.default_rng(number))
        for number, one in enumerate(comparisons(20))
    ]
    judged = judged_from_records(
        comparisons(20), [record.to_record() for record in records], SAMPLES
    )
    assert judged.stopped_early
    assert judged.drawn.sum() == 20 * 6
    evaluation = evaluate(
        find_benchmark("comparisons"),
        judged,
        name="a",
        ks=[1, 2, 8],
        model=COST,
        resamples=50,
        stated_error=0.05,
    )
    results = evaluation.results
    assert evaluation.ks == [8]
    assert [point["k"] for point in results["curves"]["vote"]] == [8]
    (early,) = results["adaptive"]
    assert early["mean_samples"] == 6
    assert early["error"] == 0.05
    assert results["unreadable"]["samples"] == 0
    # What was not drawn costs nothing: ten tokens for each of six samples.
    assert results["curves"]["vote"][0]["cost"]["completion_tokens"] == 60
    totals = [record.scores or () for record in records]
    right = [
        0.5 if one[0] == one[1] else float(np.argmax(one) == number % 2)
        for number, one in enumerate(totals)
    ]
    assert results["curves"]["vote"][0]["scores"]["accuracy"]["value"] == np.mean(right)


def test_responses_that_were_seen_alone_have_no_places() -> None:
    sample = Sample(order=(), scores=(0.25, 1.5), meta=None, text="", finish="stop")
    record = Judgement(id="0", scores=(0.25, 1.5), valid_samples=1, samples=(sample,)).to_record()
    judged = judged_from_records(comparisons(1), [record], 1)
    assert judged.orders.tolist() == [[[-1, -1]]]
    assert judged.scores.tolist() == [[[0.25, 1.5]]]
    assert not judged.stopped_early
