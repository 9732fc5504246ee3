"""Weights in and out, and where named models come from."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from grm_jax.checkpoints.gguf import GGUFFile, gguf_config, load_gguf, open_gguf
from grm_jax.checkpoints.sources import MODELS, resolve
from grm_jax.distributed import tree_shardings
from grm_jax.errors import UsageError
from grm_jax.models import DecoderConfig, Params, abstract_params, param_axes

__all__ = ["MODELS", "GGUFFile", "gguf_config", "load", "load_gguf", "open_checkpoint", "resolve"]


def open_checkpoint(name_or_path: str) -> GGUFFile:
    """Opens the checkpoint behind a built-in name or a path, fetching a built-in on first use.

    Raises:
      UsageError: If there is no such model or the file cannot be read.
    """
    path = resolve(name_or_path)
    if path.is_dir():
        found = sorted(path.glob("*.gguf"))
        if len(found) != 1:
            raise UsageError(
                f"{path} holds {len(found)} GGUF files; name the one to load instead of the folder"
            )
        path = found[0]
    return open_gguf(path)


def load(
    name_or_path: str | GGUFFile,
    dtype: DTypeLike = jnp.float32,
    mesh: jax.sharding.Mesh | None = None,
) -> tuple[DecoderConfig, Params]:
    """Loads a model of any supported family.

    Args:
      name_or_path: A built-in name, a GGUF file or a folder with one; or an opened checkpoint.
      dtype: Type of parameters and computation.
      mesh: Where to place the parameters, by the rules of `grm_jax.distributed`; the default
        device if None.

    Returns:
      The decoder's configuration and its parameters.

    Raises:
      UsageError: If the model does not exist or its file is unreadable or incomplete.
    """
    file = name_or_path if isinstance(name_or_path, GGUFFile) else open_checkpoint(name_or_path)
    shardings = None
    if mesh is not None:
        config = gguf_config(file)
        shardings = tree_shardings(param_axes(config), mesh, abstract_params(config))
    return load_gguf(file, dtype, shardings)
