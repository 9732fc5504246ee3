"""The model that a run trains: which parameters learn, where they live, and what is left of them.

All parameters learn, as float32, or adapters do beside a base model in the compute type, of which
neither gradients nor optimiser state exist.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import final

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from grm_jax import checkpoints
from grm_jax.distributed import tree_shardings
from grm_jax.errors import UsageError
from grm_jax.models import (
    DecoderConfig,
    Lora,
    Params,
    abstract_params,
    add_lora,
    dtype_name,
    init_params,
    param_axes,
    split_lora,
)
from grm_jax.prompts import Tokenizer, save_tokenizer, tokenizer_from_folder, tokenizer_from_gguf
from grm_jax.training.config import Settings
from grm_jax.training.state import TrainState, shardings_of


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """A model to be trained, whose parameters are not loaded yet.

    Attributes:
      name: What it was called in the configuration.
      config: The decoder's, with adapters if these are what learns.
      tokenizer: Its tokenizer.
      params: Shapes and shardings of what learns.
      frozen: Those of the base model under adapters; empty without.
      load: Loads both.
    """

    name: str
    config: DecoderConfig
    tokenizer: Tokenizer
    params: Params
    frozen: Params
    load: Callable[[], tuple[Params, Params]]


def open_model(settings: Settings, mesh: Mesh) -> Model:
    """Opens what `model.*` describes; `seed` decides what is random about it.

    Args:
      settings: The run's.
      mesh: Where its parameters will live.

    Raises:
      UsageError: There is no such model, or a setting does not fit it.
    """
    name = str(settings["model.name"])
    opened = checkpoints.open_checkpoint(name)
    if opened.metadata is not None:
        tokenizer = tokenizer_from_gguf(opened.metadata)
    else:
        tokenizer = tokenizer_from_folder(opened.path, vocab_size=opened.config.vocab_size)
    named = settings.choice("model.dtype", ("auto", "float32", "bfloat16"))
    if named == "auto":
        named = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    dtype = dtype_name(named)
    config = dataclasses.replace(opened.config, dtype=dtype, remat=bool(settings["model.remat"]))
    lora = _lora(settings)
    key = jax.random.key(settings.at_least("seed", 0))
    random = bool(settings["model.random"])
    frozen: Params = {}
    if lora is None:
        params = _placed(config, abstract_params(config), mesh)

        def load() -> tuple[Params, Params]:
            shardings = shardings_of(params)
            if not random:
                return opened.load(jnp.float32, shardings), {}
            make = functools.partial(init_params, config)
            return jax.jit(make, out_shardings=shardings)(key), {}
    else:
        if random:
            raise UsageError("model.random has nothing to adapt; set model.lora_rank to 0")
        # Only to have what does not fit said in one place.
        jax.eval_shape(lambda key: add_lora(config, abstract_params(config), lora, key)[1], key)
        adapted = dataclasses.replace(config, lora=lora)
        params, _ = split_lora(_placed(adapted, abstract_params(adapted), mesh))
        frozen = _placed(config, abstract_params(config, dtype), mesh)

        def load() -> tuple[Params, Params]:
            # Of all parameters, the compiler makes those that are asked for.
            fresh = jax.jit(
                lambda key: split_lora(init_params(adapted, key))[0],
                out_shardings=shardings_of(params),
            )(key)
            return fresh, opened.load(jnp.dtype(dtype), shardings_of(frozen))

        config = adapted
    return Model(
        name=name, config=config, tokenizer=tokenizer, params=params, frozen=frozen, load=load
    )


def save_model(model: Model, state: TrainState, folder: Path) -> None:
    """Writes what was trained so that it can be judged with, or trained on.

    A whole model becomes an Orbax checkpoint with its tokenizer, adapters become a PEFT folder.
    Every process of a group must call this.

    Args:
      model: The model.
      state: Its state after training.
      folder: Where to; what was there is replaced.
    """
    if model.config.lora is not None:
        checkpoints.save_adapter(folder, model.config, state.params, base=model.name)
        return
    config = dataclasses.replace(model.config, remat=False)
    checkpoints.save_orbax(folder, config, state.params)
    if jax.process_index() == 0:
        save_tokenizer(model.tokenizer, folder)


def output_matrix(params: Params, config: DecoderConfig) -> jax.Array:
    """The matrix `[V, D]` that logits are made with."""
    matrix: jax.Array = params["embedding" if config.tie_embeddings else "head"]
    return matrix


def _lora(settings: Settings) -> Lora | None:
    rank = settings.at_least("model.lora_rank", 0)
    alpha, targets = float(settings["model.lora_alpha"]), tuple(settings["model.lora_targets"])
    return Lora(rank=rank, alpha=alpha, targets=targets) if rank else None


def _placed(config: DecoderConfig, shapes: Params, mesh: Mesh) -> Params:
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        tree_shardings(param_axes(config), mesh, shapes),
    )
