"""The sampler of judgements over a mesh of devices."""

import dataclasses
import gc
import weakref
from typing import Any

import jax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from grm_jax import GRM
from grm_jax.distributed import make_mesh, tree_shardings
from grm_jax.errors import UsageError
from grm_jax.models import abstract_params, param_axes
from grm_jax.sampling.batching import JudgeSampler, PromptJob, SamplingSettings, sample_keys
from tests.sums import questions

TURNS = [{"role": "user", "content": "2+2?"}]


@pytest.mark.parametrize(
    "shape", [pytest.param({"fsdp": 4, "tensor": 2}, marks=pytest.mark.slow), {"data": 8}]
)
def test_a_judge_on_a_mesh(tiny_grm: GRM, shape: dict[str, int]) -> None:
    """Sharded parameters write what those of one device write."""
    mesh = make_mesh(shape)
    config = tiny_grm.config
    shardings = tree_shardings(param_axes(config), mesh, abstract_params(config))
    spread = dataclasses.replace(
        tiny_grm, params=jax.device_put(tiny_grm.params, shardings), mesh=mesh
    )
    settings = {"samples": 2, "max_new_tokens": 24, "template": "compact"}
    wanted = tiny_grm.judge(TURNS, ["4", "5"], **settings)
    found = spread.judge(TURNS, ["4", "5"], **settings)
    assert [sample.text for sample in found.samples] == [sample.text for sample in wanted.samples]
    assert all(sample.text for sample in found.samples)


@pytest.mark.parametrize("constrain", [False, True])
def test_devices_share_out_the_records(tiny_grm: GRM, constrain: bool) -> None:
    """Each of two devices does with its rows what one device does with as many."""
    mesh = make_mesh({"data": 2}, jax.devices()[:2])
    everywhere = NamedSharding(mesh, PartitionSpec())
    spread = dataclasses.replace(
        tiny_grm, params=jax.device_put(tiny_grm.params, everywhere), mesh=mesh
    )
    records = [
        dataclasses.replace(one, responses=(one.responses[0] * (1 + 9 * number), "no"))
        for number, one in enumerate(questions(5))
    ]
    settings: dict[str, Any] = {"samples": 3, "max_new_tokens": 80, "constrain": constrain}
    wanted = list(tiny_grm.judge_batch(records, batch_rows=4, logprobs=True, **settings))
    found = list(spread.judge_batch(records, batch_rows=8, logprobs=True, **settings))
    for one, other in zip(found, wanted, strict=True):
        assert (one.id, one.scores) == (other.id, other.scores)
        for sample, usual in zip(one.samples, other.samples, strict=True):
            assert sample.text == usual.text
            assert sample.order == usual.order
            assert sample.logprob == pytest.approx(usual.logprob, abs=2e-4)
    assert len({sample.text for one in found for sample in one.samples}) == 15


def sampler(grm: GRM, *, max_context: int = 4096, batch_rows: int | None = None) -> JudgeSampler:
    config = dataclasses.replace(grm.config, max_context=max_context)
    return JudgeSampler(
        params=grm.params,
        config=config,
        loop=(config, grm.params),
        tokenizer=grm.tokenizer,
        table=grm.table,
        settings=SamplingSettings(batch_rows=batch_rows),
    )


def job(length: int) -> PromptJob:
    keys = sample_keys(jax.random.key(0), 2)
    return PromptJob(tokens=[1] * length, order=(0, 1), keys=keys, room=2)


@pytest.mark.parametrize(
    ("context", "length", "room"),
    [(4096, 10, 256), (4096, 300, 512), (4096, 600, 1024), (256, 200, 256), (64, 10, 64)],
)
def test_room_for_a_prompt(tiny_grm: GRM, context: int, length: int, room: int) -> None:
    """Little is wasted on a model that reads little."""
    assert sampler(tiny_grm, max_context=context).shape(job(length)).prompt == room


def test_rows_that_are_asked_for(tiny_grm: GRM) -> None:
    usual, more = sampler(tiny_grm), sampler(tiny_grm, batch_rows=200)
    shape = usual.shape(job(10))
    assert (usual.limit(shape), more.limit(shape)) == (16, 100)
    assert (usual.room(128, 1), more.room(128, 1)) == (32, 128)
    # Shuffled, an order gets more samples or fewer; balanced, it gets its share.
    assert (usual.room(8, 2), usual.room(8, 2, balanced=True)) == (2, 4)
    with pytest.raises(UsageError, match="batch_rows is 0"):
        SamplingSettings(batch_rows=0)


def test_layouts_are_made_once_and_go_with_their_sampler(tiny_grm: GRM) -> None:
    one = sampler(tiny_grm)
    assert one.layout(2) is one.layout(2)
    gone = weakref.ref(one)
    del one
    gc.collect()
    assert gone() is None
