"""Checkpoints of our own, in Orbax: any decoder, quantised or with adapters, on any mesh."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.typing import DTypeLike

from grm_jax.checkpoints.safetensors import read_json, write_json
from grm_jax.checkpoints.weights import Checkpoint
from grm_jax.distributed import with_shardings
from grm_jax.errors import UsageError
from grm_jax.models import DecoderConfig, Experts, Latent, Lora, Params, Rope, abstract_params

CONFIG, PARAMS = "decoder.json", "params"
_NESTED: Mapping[str, Any] = {
    "rope": Rope,
    "rope_local": Rope,
    "latent": Latent,
    "experts": Experts,
    "lora": Lora,
}


def save_orbax(folder: Path, config: DecoderConfig, params: Params) -> None:
    """Writes a decoder's configuration and parameters; what was there is replaced.

    Every process of a group must call this.
    """
    folder = folder.absolute()
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / PARAMS, params, force=True)
    if jax.process_index() == 0:
        write_json(folder / CONFIG, config_to_json(config))


def open_orbax(folder: Path) -> Checkpoint:
    """Opens a checkpoint written by `save_orbax`; it can be loaded on any mesh.

    Raises:
      UsageError: If the configuration cannot be read.
    """
    folder = folder.absolute()
    config = config_from_json(read_json(folder / CONFIG), folder / CONFIG)

    def load(dtype: DTypeLike, shardings: Params | None) -> Params:
        if shardings is None:
            here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
            shardings = jax.tree.map(lambda _: here, abstract_params(config))
        wanted = with_shardings(abstract_params(config, dtype), shardings)
        try:
            with ocp.StandardCheckpointer() as checkpointer:
                params: Params = checkpointer.restore(folder / PARAMS, wanted)
        except (ValueError, KeyError, OSError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UsageError(f"{folder} cannot be restored: {reason}") from error
        return params

    return Checkpoint(path=folder, config=config, load=load, dtype=config.dtype, metadata=None)


def config_to_json(config: DecoderConfig) -> dict[str, Any]:
    """A decoder's configuration as plain values."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return plain


def config_from_json(found: Mapping[str, Any], source: object) -> DecoderConfig:
    """The inverse of `config_to_json`.

    Raises:
      UsageError: If the values do not make a configuration.
    """
    values = dict(found)
    try:
        for name, kind in _NESTED.items():
            if values.get(name) is not None:
                inner = dict(values[name])
                if "targets" in inner:
                    inner["targets"] = tuple(inner["targets"])
                values[name] = kind(**inner)
        values["windows"] = tuple(values["windows"])
        return DecoderConfig(**values)
    except (TypeError, ValueError, KeyError) as error:
        raise UsageError(f"{source} is not a decoder's configuration: {error}") from error
