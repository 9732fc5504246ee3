"""The sampler of judgements over a mesh of devices."""

import dataclasses

import jax
import pytest

from grm_jax import GRM
from grm_jax.distributed import make_mesh, tree_shardings
from grm_jax.models import abstract_params, param_axes

TURNS = [{"role": "user", "content": "2+2?"}]


@pytest.mark.parametrize("shape", [{"fsdp": 4, "tensor": 2}, {"data": 8}])
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
