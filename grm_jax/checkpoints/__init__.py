"""Weights in and out, and where named models come from."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from grm_jax.checkpoints import orbax, peft, safetensors
from grm_jax.checkpoints.gguf import GGUFFile, gguf_checkpoint, gguf_config, open_gguf
from grm_jax.checkpoints.orbax import open_orbax, save_orbax
from grm_jax.checkpoints.peft import load_adapter, save_adapter
from grm_jax.checkpoints.safetensors import open_folder, save_folder
from grm_jax.checkpoints.shipped import default_adapter
from grm_jax.checkpoints.sources import MODELS, resolve
from grm_jax.checkpoints.weights import Checkpoint
from grm_jax.distributed import tree_shardings
from grm_jax.errors import UsageError
from grm_jax.models import DecoderConfig, Params, abstract_params, dtype_name, param_axes

__all__ = [
    "MODELS",
    "Checkpoint",
    "GGUFFile",
    "default_adapter",
    "gguf_config",
    "load",
    "load_adapter",
    "open_checkpoint",
    "open_gguf",
    "resolve",
    "save_adapter",
    "save_folder",
    "save_orbax",
]


def open_checkpoint(name_or_path: str) -> Checkpoint:
    """Opens the checkpoint behind a name or a path, fetching it if need be.

    Its configuration is read and its tensors are checked to be complete; no weight is read yet. A
    PEFT folder is opened together with the base model that it names.

    Raises:
      UsageError: If there is no such model or its files cannot be read or are incomplete.
    """
    path = resolve(name_or_path)
    if not (path / peft.CONFIG).exists() or _is_whole(path):
        return _open_whole(path)
    try:
        base = _open_whole(resolve(peft.base_name(path)))
    except UsageError as error:
        raise UsageError(f"{path} holds adapters of another model: {error}") from error
    return peft.open_adapted(path, base)


def _is_whole(path: Path) -> bool:
    return any((path / name).exists() for name in (orbax.CONFIG, safetensors.CONFIG))


def _open_whole(path: Path) -> Checkpoint:
    """Opens a checkpoint that needs no other."""
    if path.is_dir():
        if (path / orbax.CONFIG).exists():
            return open_orbax(path)
        if (path / safetensors.CONFIG).exists():
            return open_folder(path)
        found = sorted(path.glob("*.gguf"))
        if not found:
            raise UsageError(
                f"{path} holds no model: neither {safetensors.CONFIG} with safetensors, nor a GGUF "
                f"file, nor {orbax.CONFIG}"
            )
        if len(found) != 1:
            raise UsageError(
                f"{path} holds {len(found)} GGUF files; name the one to load instead of the folder"
            )
        path = found[0]
    return gguf_checkpoint(open_gguf(path))


def load(
    name_or_path: str | Checkpoint,
    dtype: DTypeLike = jnp.float32,
    mesh: jax.sharding.Mesh | None = None,
) -> tuple[DecoderConfig, Params]:
    """Loads a model of any supported family.

    Args:
      name_or_path: A built-in name, a folder of safetensors or of adapters, a GGUF file or a folder
        with one; or an opened checkpoint.
      dtype: Type of parameters and computation.
      mesh: Where to place the parameters, by the rules of `grm_jax.distributed`; the default
        device if None.

    Returns:
      The decoder's configuration and its parameters.

    Raises:
      UsageError: If the model does not exist or its files are unreadable or incomplete.
    """
    opened = name_or_path
    if not isinstance(opened, Checkpoint):
        opened = open_checkpoint(opened)
    config = dataclasses.replace(opened.config, dtype=dtype_name(dtype))
    shardings = None
    if mesh is not None:
        shardings = tree_shardings(param_axes(config), mesh, abstract_params(config))
    return config, opened.load(dtype, shardings)
