"""A tiny decoder, rows to train it on, and a learner: what the tests of training share."""

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from grm_jax.data.packing import PackedRows
from grm_jax.distributed import tree_shardings
from grm_jax.models import (
    DecoderConfig,
    Lora,
    Params,
    abstract_params,
    family_config,
    param_axes,
    split_lora,
)
from grm_jax.training import sft
from grm_jax.training.config import Settings
from grm_jax.training.learner import Learner, make_learner
from grm_jax.training.losses import loss_denominator
from grm_jax.training.optimizer import make_optimizer
from tests.training.changes import changed

CONFIG = family_config(
    "llama",
    vocab_size=64,
    num_layers=2,
    width=32,
    num_heads=4,
    num_kv_heads=2,
    mlp_dim=64,
    max_context=64,
    tie_embeddings=True,
)
LORA = dataclasses.replace(CONFIG, lora=Lora(rank=2, alpha=4.0, targets=("q", "v", "up")))


def settings(**changes: Any) -> Settings:
    """The defaults of fine-tuning with a learning rate that shows, and changes by dotted key."""
    values = {"optimizer.learning_rate": 1e-2, "optimizer.schedule": "constant"}
    return Settings(changed(sft.default_config(), values, changes))


def random_params(config: DecoderConfig = CONFIG, seed: int = 0) -> Params:
    """Parameters from NumPy, as compiling `init_params` takes longer than most tests."""
    rng = np.random.default_rng(seed)

    def draw(path: jax.tree_util.KeyPath, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        if path[-1].key == "scale":
            return np.ones(leaf.shape, leaf.dtype)
        return (0.2 * rng.standard_normal(leaf.shape)).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, abstract_params(config))


def placed(config: DecoderConfig, mesh: Mesh) -> Params:
    """Shapes and shardings of a decoder's parameters."""
    shapes = abstract_params(config)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        tree_shardings(param_axes(config), mesh, shapes),
    )


def rows(step: int, *, count: int = 8, length: int = 12) -> PackedRows:
    """Rows of two sequences and some padding, of which the later half of each is learnt."""
    rng = np.random.default_rng([step, 1])
    start = rng.integers(0, CONFIG.vocab_size, (count, 1))
    tokens = (start + 3 * np.arange(length)) % CONFIG.vocab_size
    first, end = length // 2 - 1, length - rng.integers(0, 3, (count, 1))
    place = np.arange(length)[None]
    segments = np.where(place >= end, 0, np.where(place < first, 1, 2)).astype(np.int32)
    positions = np.where(segments == 2, place - first, place) * (segments > 0)
    return PackedRows(
        tokens=tokens.astype(np.int32) * (segments > 0),
        segment_ids=segments,
        positions=positions.astype(np.int32),
        loss_mask=(positions >= 2) & (segments > 0),
    )


def learner(
    mesh: Mesh, *, config: DecoderConfig = CONFIG, accumulate: int = 1, **changes: Any
) -> Learner:
    """Fine-tuning of the tiny decoder."""
    params, frozen = placed(config, mesh), {}
    if config.lora is not None:
        params, frozen = split_lora(params)
    return make_learner(
        sft.make_loss(config, mesh, chunk=32),
        lambda batch: loss_denominator(sft.learnt_targets(batch), aggregate="token"),
        make_optimizer(settings(**changes)),
        params=params,
        frozen=frozen,
        mesh=mesh,
        accumulate=accumulate,
    )


def begin(one: Learner, config: DecoderConfig = CONFIG) -> Any:
    """Its first state, from the same parameters on any mesh."""
    params, frozen = random_params(config), {}
    if config.lora is not None:
        params, frozen = split_lora(params)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, (one.target.params, one.target.frozen))
    return one.begin(*jax.device_put((params, frozen), shardings), seed=0)
