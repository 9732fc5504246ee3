"""What a run begins with: which parameters learn, and what is read to have them."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from grm_jax import checkpoints
from grm_jax.distributed import make_mesh
from grm_jax.errors import UsageError
from grm_jax.models import Params, join_lora, split_lora
from grm_jax.models.lora import is_adapter
from grm_jax.training.model import HEAD, Model, open_model
from tests.checkpoints import shipping
from tests.training import folder, tiny


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder.write_model(tmp_path_factory.mktemp("model") / "base")


def opened(name: Path, *, num_labels: int = 0, **changes: Any) -> Model:
    mesh = make_mesh({}, jax.devices()[:1])
    return open_model(tiny.settings(model__name=str(name), **changes), mesh, num_labels=num_labels)


def check(found: Params, wanted: Params) -> None:
    """That parameters have the shapes and types that were announced."""
    announced = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), wanted)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), found) == announced


def test_all_parameters_learn_without_adapters(base: Path) -> None:
    model = opened(base)
    params = model.load_params()
    check(params, model.params)
    stored = checkpoints.load(str(base))[1]
    jax.tree.map(np.testing.assert_array_equal, params, stored)
    assert model.load_frozen() == model.frozen == {}


@pytest.mark.parametrize("num_labels", [0, 1])
def test_what_learns_beside_a_base_model_is_had_without_it(
    num_labels: int, base: Path, tmp_path: Path
) -> None:
    """So that a run has one copy of the base, whatever it holds on to of its beginning."""
    copy = folder.write_model(tmp_path / "copy")
    model = opened(copy, num_labels=num_labels, model__lora_rank=2)
    frozen = model.load_frozen()
    check(frozen, model.frozen)
    assert HEAD not in frozen
    (copy / "model.safetensors").unlink()
    learning = dict(model.load_params())
    check(learning, model.params)
    if num_labels:
        assert not np.any(learning.pop(HEAD))
    assert all(map(is_adapter, flatten_dict(learning)))
    stored = checkpoints.load(str(base))[1]
    for path, leaf in flatten_dict(frozen).items():
        np.testing.assert_array_equal(leaf, flatten_dict(stored)[path])


def test_adapters_are_trained_further(base: Path, tmp_path: Path) -> None:
    fresh = opened(base, model__lora_rank=2)
    adapters = jax.tree.map(lambda leaf: leaf + 1, fresh.load_params())
    checkpoints.save_adapter(tmp_path, fresh.config, join_lora(adapters, fresh.load_frozen()))
    found = opened(base, model__lora_rank=2, model__adapter=str(tmp_path))
    assert found.config == fresh.config
    jax.tree.map(np.testing.assert_array_equal, found.load_params(), adapters)


def test_adapters_that_come_with_the_package_are_trained_further(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = shipping.ship(tmp_path, monkeypatch)
    how = {"model__lora_rank": 2, "model__lora_alpha": 4.0, "model__adapter": "tiny-spct"}
    model = opened(base, model__lora_targets=shipping.LORA.targets, **how)
    found = model.load_params()
    check(found, model.params)
    wanted, _ = split_lora(checkpoints.load("tiny-spct")[1])
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
    with pytest.raises(UsageError, match=r"tiny-spct has Lora.* but the configuration asks for"):
        opened(base, **how).load_params()


def test_what_adapters_with_a_head_can_begin(base: Path, tmp_path: Path) -> None:
    fresh = opened(base, num_labels=1, model__lora_rank=2)
    learnt = jax.tree.map(lambda leaf: leaf + 1, fresh.load_params())
    whole = join_lora(learnt, fresh.load_frozen())
    checkpoints.save_adapter(tmp_path / "head", fresh.config, whole)
    how: dict[str, Any] = {"model__lora_rank": 2, "model__adapter": str(tmp_path / "head")}
    found = opened(base, num_labels=1, **how).load_params()
    check(found, fresh.params)
    jax.tree.map(np.testing.assert_array_equal, found, learnt)
    with pytest.raises(UsageError, match="is a classifier of 1 outputs; this stage cannot begin"):
        opened(base, **how).load_params()
    # Without a head, as a judge's, they get a new one.
    plain = dataclasses.replace(fresh.config, num_labels=0)
    checkpoints.save_adapter(tmp_path / "plain", plain, whole)
    how["model__adapter"] = str(tmp_path / "plain")
    begun = dict(opened(base, num_labels=1, **how).load_params())
    assert not np.any(begun.pop(HEAD))
    jax.tree.map(np.testing.assert_array_equal, {**begun, HEAD: learnt[HEAD]}, learnt)
