"""Classifiers as judges: numbers of each response, as their stages have them."""

import dataclasses
import math
from typing import Any

import jax
import numpy as np
import pytest

from grm_jax import GRM
from grm_jax.data import Comparison, from_record
from grm_jax.evaluation.baselines import (
    ClassifierJudge,
    CriticJudge,
    pairwise_scores,
    scalar_scores,
)
from grm_jax.evaluation.judged import judged_from_records
from grm_jax.models import abstract_params
from grm_jax.prompts import load_template
from grm_jax.sampling import MetaModel
from grm_jax.training.bt import response_tokens
from grm_jax.training.pairwise import pair_tokens

TURNS = [{"role": "user", "content": "2+2?"}]


def question(*responses: str, name: str = "q") -> Comparison:
    return from_record({"id": name, "messages": TURNS, "responses": list(responses)})


@pytest.fixture(scope="module")
def model(tiny_grm: GRM) -> MetaModel:
    config = dataclasses.replace(tiny_grm.config, num_labels=1, max_context=512)
    rng = np.random.default_rng(3)

    def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        return jax.device_put((0.3 * rng.standard_normal(leaf.shape)).astype(leaf.dtype))

    return MetaModel(
        name="tiny",
        config=config,
        params=jax.tree.map(draw, abstract_params(config)),
        tokenizer=tiny_grm.tokenizer,
        template=load_template("meta"),
    )


def test_a_scalar_judge_rates_each_response(model: MetaModel) -> None:
    judge = ClassifierJudge(model=model, score=scalar_scores)
    good, long = judge.judge_batch([question("4", "5", "6"), question("4", "5" * 600)], seed=0)
    wanted = model.rewards([response_tokens(model.tokenizer, TURNS, text) for text in "456"])
    assert good.scores == pytest.approx(wanted.tolist(), abs=1e-5)
    assert good.best == int(np.argmax(wanted))
    assert list(good.ranking) == np.argsort(-wanted).tolist()
    assert good.tied == (good.best,)
    assert good.prompt_tokens > 3 * len("2+2?")
    assert good.completion_tokens == 0
    assert long.scores is None
    assert "the model reads 512" in (long.error or "")


def test_a_pairwise_judge_asks_in_both_orders(model: MetaModel) -> None:
    judge = ClassifierJudge(model=model, score=pairwise_scores)
    three, single = judge.judge_batch([question("4", "5", "6"), question("4")], seed=0)

    def chance(first: str, second: str) -> float:
        ids = pair_tokens(model.tokenizer, model.template, TURNS, first, second)
        return 1 / (1 + math.exp(-float(model.rewards([ids])[0])))

    def beats(first: str, second: str) -> float:
        return (chance(first, second) + 1 - chance(second, first)) / 2

    assert three.scores == pytest.approx(
        [
            (beats("4", "5") + beats("4", "6")) / 2,
            (beats("5", "4") + beats("5", "6")) / 2,
            (beats("6", "4") + beats("6", "5")) / 2,
        ],
        abs=1e-5,
    )
    # Every pair's chances add up to 1.
    assert sum(three.scores or ()) == pytest.approx(1.5, abs=1e-5)
    assert "only one response" in (single.error or "")


def test_a_critic_is_read_before_the_number(model: MetaModel, tiny_grm: GRM) -> None:
    judge = CriticJudge(model=model, critic=tiny_grm, temperature=1.0, max_new_tokens=12)
    settings: dict[str, Any] = {"samples": 3, "seed": 0}
    (found,) = judge.judge_batch([question("4", "5")], **settings)
    assert len(found.samples) == found.valid_samples == 3
    assert len({sample.text for sample in found.samples}) == 3
    columns = zip(*(sample.scores or () for sample in found.samples), strict=True)
    assert found.scores == pytest.approx([sum(column) for column in columns], abs=1e-5)
    first = found.samples[0].text
    critiques = first.removeprefix("[Response 1]\n").split("\n\n[Response 2]\n")
    wanted = model.rewards(
        [model.tokens(TURNS, [text], said) for text, said in zip("45", critiques, strict=True)]
    )
    if "\ufffd" not in first:
        assert found.samples[0].scores == pytest.approx(wanted.tolist(), abs=1e-5)
    assert 0 < found.completion_tokens <= 3 * 2 * 12
    (again,) = judge.judge_batch([question("4", "5")], **settings)
    assert again.samples == found.samples
    judged = judged_from_records([question("4", "5")], [found.to_record()], 3)
    assert judged.valid.all()
    assert np.all(judged.orders == -1)
