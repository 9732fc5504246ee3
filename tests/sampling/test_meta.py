"""The meta reward model, and the votes that it guides."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from grm_jax import GRM, UsageError
from grm_jax.distributed import make_mesh
from grm_jax.models import Params, abstract_params, reward
from grm_jax.prompts import load_template
from grm_jax.sampling import MetaModel, prefill
from grm_jax.sampling import meta as module

TURNS = [{"role": "user", "content": "2+2?"}]
RESPONSES = ["4", "5"]
SETTINGS: dict[str, Any] = {"samples": 4, "max_new_tokens": 120, "constrain": True}


@pytest.fixture(scope="module")
def meta(tiny_grm: GRM) -> MetaModel:
    config = dataclasses.replace(tiny_grm.config, num_labels=1)
    rng = np.random.default_rng(3)

    def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.asarray(0.3 * rng.standard_normal(leaf.shape), leaf.dtype)

    params: Params = jax.tree.map(draw, abstract_params(config))
    return MetaModel(
        name="tiny-meta",
        config=config,
        params=params,
        tokenizer=tiny_grm.tokenizer,
        template=load_template("meta"),
    )


def test_rewards_are_those_of_each_sequence_alone(meta: MetaModel) -> None:
    sequences = [meta.tokens(TURNS, RESPONSES, text) for text in ("a", "bc" * 9, "", "d" * 200)]
    found = meta.rewards(sequences)
    assert found.std() > 0.01
    for value, ids in zip(found, sequences, strict=True):
        alone = reward(meta.params, meta.config, np.asarray([ids]), np.asarray([len(ids)]))
        assert value == pytest.approx(float(alone[0]), abs=1e-4)


@pytest.mark.parametrize("devices", [1, 2])
def test_what_sequences_begin_with_is_read_once(
    meta: MetaModel, monkeypatch: pytest.MonkeyPatch, devices: int
) -> None:
    if devices > 1:
        mesh = make_mesh({"data": devices}, jax.devices()[:devices])
        params = jax.device_put(meta.params, NamedSharding(mesh, PartitionSpec()))
        meta = dataclasses.replace(meta, params=params, mesh=mesh)
    long = [{"role": "user", "content": "2+2? " * 120}]
    texts = ["the first is right", "no", "", "the second is " * 9, "the first", "1"]
    names = ["a", "b", "a", "a", "b", "c"]
    sequences = [
        meta.tokens(long, RESPONSES if name == "a" else RESPONSES[::-1], text)
        for name, text in zip(names, texts, strict=True)
    ]
    read: list[int] = []

    def watched(*arguments: Any) -> Any:
        read.append(int(arguments[-1][0]))
        return prefill(*arguments)

    monkeypatch.setattr(module, "prefill", watched)
    wanted = meta.rewards(sequences)
    assert not read
    found = meta.rewards(sequences, alike=names)
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    # Of two names there are several sequences; the third is read as it is.
    assert len(read) == 2
    assert all(len(sequences[0]) - 40 < length < len(sequences[0]) for length in read)
    # A short beginning is not worth it.
    short = [meta.tokens(TURNS, RESPONSES, text) for text in texts[:2]]
    np.testing.assert_array_equal(meta.rewards(short, alike=["a", "a"]), meta.rewards(short))
    assert len(read) == 2


def test_devices_share_out_the_sequences(meta: MetaModel) -> None:
    mesh = make_mesh({"data": 2, "fsdp": 4})
    params = jax.device_put(meta.params, NamedSharding(mesh, PartitionSpec()))
    spread = dataclasses.replace(meta, params=params, mesh=mesh)
    sequences = [meta.tokens(TURNS, RESPONSES, "abc" * number) for number in range(11)]
    np.testing.assert_allclose(spread.rewards(sequences), meta.rewards(sequences), atol=1e-4)


def test_only_the_trusted_samples_vote(tiny_grm: GRM, meta: MetaModel) -> None:
    plain = tiny_grm.judge(TURNS, RESPONSES, **SETTINGS)
    for k_meta in (1, 3, None):
        guided = tiny_grm.judge(TURNS, RESPONSES, meta_model=meta, k_meta=k_meta, **SETTINGS)
        assert [s.text for s in guided.samples] == [s.text for s in plain.samples]
        rewards = [sample.meta for sample in guided.samples]
        assert all(value is not None and math.isfinite(value) for value in rewards)
        # Each is the reward of the sample as it was written, responses in its own order.
        read = [
            meta.tokens(TURNS, [RESPONSES[i] for i in sample.order], sample.text)
            for sample in guided.samples
        ]
        np.testing.assert_allclose(np.asarray(rewards, float), meta.rewards(read), atol=1e-3)
        trusted = sorted(guided.samples, key=lambda sample: -(sample.meta or 0.0))[: k_meta or 2]
        wanted = tuple(
            sum((sample.scores or (0, 0))[index] for sample in trusted) for index in range(2)
        )
        assert guided.scores == wanted
    assert plain.scores != wanted
    assert all(sample.meta is None for sample in plain.samples)


@pytest.mark.parametrize(
    ("k_meta", "with_model", "words"),
    [(0, True, "k_meta is 0"), (5, True, "from 1 to samples, 4"), (2, False, "name the model")],
)
def test_wrong_numbers_of_voters(
    tiny_grm: GRM, meta: MetaModel, k_meta: int, with_model: bool, words: str
) -> None:
    model = meta if with_model else None
    with pytest.raises(UsageError, match=words):
        tiny_grm.judge(TURNS, RESPONSES, meta_model=model, k_meta=k_meta, **SETTINGS)


def test_a_language_model_is_no_meta_model(tiny_grm: GRM, meta: MetaModel) -> None:
    with pytest.raises(UsageError, match="tiny is no meta reward model"):
        dataclasses.replace(meta, name="tiny", config=tiny_grm.config)


def test_what_the_meta_model_cannot_read_is_an_error_of_the_record(
    tiny_grm: GRM, meta: MetaModel
) -> None:
    short = dataclasses.replace(meta, config=dataclasses.replace(meta.config, max_context=64))
    judgement = tiny_grm.judge(TURNS, RESPONSES, meta_model=short, **SETTINGS)
    assert judgement.scores is None
    assert judgement.error is not None
    assert "the meta reward model reads 64" in judgement.error
