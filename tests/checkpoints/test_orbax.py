"""Our own checkpoints: any decoder, written on one mesh and restored onto another."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grm_jax import checkpoints
from grm_jax.checkpoints.orbax import config_from_json, config_to_json
from grm_jax.distributed import make_mesh, tree_shardings
from grm_jax.errors import UsageError
from grm_jax.models import Lora, abstract_params, add_lora, param_axes, quantise_params
from tests.models.test_lora import CONFIGS, random_params


@pytest.mark.parametrize("name", CONFIGS)
def test_configurations_survive_json(name: str) -> None:
    lora = Lora(rank=2, alpha=3.0, targets=("out", "up"))
    config = dataclasses.replace(CONFIGS[name], lora=lora, quantization="int4")
    assert config_from_json(json.loads(json.dumps(config_to_json(config))), name) == config


@pytest.mark.slow
def test_restored_onto_another_mesh(tmp_path: Path) -> None:
    config = CONFIGS["deepseek_v3"]
    params = random_params(config)
    first = make_mesh({"fsdp": 4, "tensor": 2})
    placed = jax.device_put(
        params, tree_shardings(param_axes(config), first, abstract_params(config))
    )
    checkpoints.save_orbax(tmp_path / "a", config, placed)
    second = make_mesh({"data": 2, "tensor": 2, "expert": 2})
    for mesh in (second, None):
        found_config, found = checkpoints.load(str(tmp_path / "a"), mesh=mesh)
        assert found_config == config
        jax.tree.map(np.testing.assert_array_equal, found, params)
        if mesh is not None:
            wanted = tree_shardings(param_axes(config), mesh, abstract_params(config))
            assert jax.tree.map(lambda leaf: leaf.sharding, found) == wanted
        else:
            assert {len(leaf.devices()) for leaf in jax.tree.leaves(found)} == {1}


def test_quantised_with_adapters(tmp_path: Path) -> None:
    config, params = quantise_params(*(c := CONFIGS["qwen2"], random_params(c)), "int4")
    lora = Lora(rank=2, alpha=3.0, targets=("q", "up"))
    config, params = add_lora(config, params, lora, jax.random.key(0))
    checkpoints.save_orbax(tmp_path, config, params)
    checkpoints.save_orbax(tmp_path, config, params)  # over itself
    found_config, found = checkpoints.load(str(tmp_path))
    assert found_config == config
    jax.tree.map(np.testing.assert_array_equal, found, params)
    assert jax.tree.map(lambda leaf: leaf.dtype, found) == jax.tree.map(
        lambda leaf: leaf.dtype, params
    )


def test_restored_in_another_type(tmp_path: Path) -> None:
    config = CONFIGS["qwen2"]
    params = random_params(config)
    checkpoints.save_orbax(tmp_path, config, params)
    found_config, found = checkpoints.load(str(tmp_path), jnp.bfloat16)
    assert found_config.dtype == "bfloat16"
    jax.tree.map(
        lambda one, other: np.testing.assert_array_equal(one, other.astype(jnp.bfloat16)),
        found,
        params,
    )


def test_damaged(tmp_path: Path) -> None:
    config = CONFIGS["qwen2"]
    checkpoints.save_orbax(tmp_path, config, random_params(config))
    settings = tmp_path / "decoder.json"
    good = settings.read_text()
    settings.write_text(good.replace('"width": 32', '"width": 64'))
    with pytest.raises(UsageError, match="cannot be restored"):
        checkpoints.load(str(tmp_path))
    settings.write_text("{}")
    with pytest.raises(UsageError, match="is not a decoder's configuration"):
        checkpoints.load(str(tmp_path))
    settings.write_text(good)
    for path in (tmp_path / "params").rglob("*"):
        if path.is_file():
            path.unlink()
    with pytest.raises(UsageError, match="cannot be restored"):
        checkpoints.load(str(tmp_path))
