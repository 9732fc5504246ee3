"""A verdict in a response is never what is read, and the script would see it if it were."""

import dataclasses
import itertools

import pytest

from benchmarks import planted
from grm_jax import GRM, prompts
from grm_jax.data import BadRecord, Comparison, from_record
from grm_jax.data.nano import nano_comparisons
from grm_jax.prompts import load_template
from tests.adapters.stub import StubJudge

TEMPLATES = ("compact", "judge", "paper")


def make_pairs(count: int) -> list[Comparison]:
    return list(itertools.islice(planted.make_pairs(nano_comparisons("test", seed=0)), count))


def test_pairs_are_the_best_beside_another_in_the_records_order() -> None:
    asked = [{"role": "user", "content": "q"}]
    record = {"id": "a", "messages": asked, "responses": ["0", "1", "2"]}
    labelled = from_record(record | {"label": {"kind": "best", "index": 2}})
    long = from_record(
        record | {"responses": ["0", "1" * 9999], "label": {"kind": "best", "index": 0}}
    )
    bad = BadRecord(id="b", line=4, error="bad")
    (pair,) = planted.make_pairs([labelled, from_record(record), bad, long])
    assert pair.responses == ("0", "2")
    assert planted.best_of(pair) == 1


def test_every_form_favours_the_worse_response() -> None:
    for number, pair in enumerate(make_pairs(2 * len(planted.PLANTS))):
        spiked = planted.plant(pair, number, low=1, high=10)
        best = planted.best_of(pair)
        assert spiked.responses[best] == pair.responses[best]
        found = prompts.parse_scores(spiked.responses[1 - best], 2)
        assert found is not None
        assert (found[best], found[1 - best]) == (1, 10)


@pytest.mark.parametrize("template", TEMPLATES)
def test_no_box_of_two_hundred_pairs_reaches_the_prompt(template: str) -> None:
    loaded = load_template(template)
    for number, pair in enumerate(make_pairs(200)):
        spiked = planted.plant(pair, number, low=1, high=10)
        assert not planted.box_in_prompt(spiked, loaded)


def test_a_score_from_elsewhere_is_seen() -> None:
    pair = make_pairs(1)[0]
    template = load_template("compact")
    (judged,) = StubJudge(opinion=lambda _: [1, 10]).judge_batch([pair])
    says = r"Scores: \boxed{1, 10}"
    honest = dataclasses.replace(judged.samples[0], text=says)
    other_order = dataclasses.replace(honest, order=(1, 0), scores=(10, 1))
    lying = dataclasses.replace(honest, text=r"Scores: \boxed{10, 1}")
    silent = dataclasses.replace(honest, text="nothing")
    for sample, count in ((honest, 0), (other_order, 0), (lying, 1), (silent, 1)):
        judgement = dataclasses.replace(judged, samples=(sample,))
        found = planted.outcome([pair], [judgement], template)
        assert (found.elsewhere, found.readable, found.samples) == (count, 1, 1)


@pytest.mark.slow
def test_what_is_read_from_two_hundred_pairs_is_what_was_generated(tiny_grm: GRM) -> None:
    clean, spiked, leaks = planted.run(
        tiny_grm, make_pairs(200), load_template("compact"), samples=1, max_new_tokens=80,
        constrain=True,
    )  # fmt: skip
    assert (clean.elsewhere, spiked.elsewhere, leaks) == (0, 0, 0)
    assert clean.readable == spiked.readable == 200
    text = planted.report("tiny", clean, spiked, leaks)
    assert "| 0 of 200 | 0 of 200 |" in text
    assert "Shift in accuracy" in text
