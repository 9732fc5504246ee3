"""LoRA adapters in and out, in the layout of the PEFT library."""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import safetensors.numpy

from grm_jax.checkpoints.safetensors import (
    fetch,
    hub_names,
    open_tensors,
    read_json,
    read_tensor,
    write_json,
)
from grm_jax.checkpoints.weights import Piece, check_pieces, piece_of, pieces, read_params
from grm_jax.distributed import tree_shardings
from grm_jax.errors import UsageError
from grm_jax.models import DecoderConfig, Lora, Params, abstract_params, param_axes
from grm_jax.models.lora import FUSED, join_lora, lora_targets

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
# What of PEFT changes the arithmetic in ways that the decoder does not have.
_UNSUPPORTED = ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "lora_bias")


def adapter_pieces(config: DecoderConfig) -> Iterator[Piece]:
    """Every tensor of a decoder's adapters.

    Raises:
      UsageError: If experts have adapters, for which the layout has no names.
    """
    lora = config.lora
    if lora is None:
        return
    if "experts" in lora.targets:
        raise UsageError("adapters of experts have no place in a PEFT folder; merge them instead")
    for target, piece in _targets(config):
        if target not in lora.targets:
            continue
        node = piece.path[:-1]
        fused = FUSED.get(node[-1], (target,))
        place = tuple(name for name in fused if name in lora.targets).index(target)
        rows, columns = piece.shape
        stem = _PREFIX + piece.name.removesuffix(".weight")
        at = (piece.place[0], place)
        yield Piece(
            name=f"{stem}.lora_A.weight",
            shape=(lora.rank, columns),
            path=(*node, "lora_a"),
            place=at,
        )
        yield dataclasses.replace(
            piece,
            name=f"{stem}.lora_B.weight",
            shape=(rows, lora.rank),
            path=(*node, "lora_b"),
            place=at,
        )


def _targets(config: DecoderConfig) -> Iterator[tuple[str, Piece]]:
    """Every projection, by its name among LoRA's targets, with its kernel's piece."""
    for piece in pieces(config, hub_names(config)):
        if piece.path[-1] == "kernel":
            node = piece.path[-2]
            yield FUSED[node][int(piece.place[1])] if node in FUSED else node, piece  # type: ignore[arg-type]


def save_adapter(
    folder: Path, config: DecoderConfig, params: Params, *, base: str | None = None
) -> None:
    """Writes the adapters as a folder that PEFT loads.

    Args:
      folder: Where to; made if it does not exist.
      config: The decoder's, with adapters.
      params: Its parameters.
      base: Name or path of the base model, for whoever loads the adapters.

    Raises:
      UsageError: If there are no adapters, or they have no place in the layout.
    """
    lora = config.lora
    if lora is None:
        raise UsageError("the model has no adapters to write")
    plain = dataclasses.replace(config, quantization=None)
    wanted = list(adapter_pieces(plain))
    tensors = {piece.name: piece.to_file(fetch(piece_of(params, piece))) for piece in wanted}
    modules = {name.split(".lora_A")[0].rsplit(".", 1)[1] for name in tensors if ".lora_A." in name}
    if jax.process_index() != 0:
        return
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.numpy.save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    write_json(
        folder / CONFIG,
        {
            "peft_type": "LORA",
            "task_type": "SEQ_CLS" if config.num_labels else "CAUSAL_LM",
            "base_model_name_or_path": base,
            "r": lora.rank,
            "lora_alpha": lora.alpha,
            "lora_dropout": 0.0,
            "target_modules": sorted(modules),
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
        },
    )


def load_adapter(
    folder: Path,
    config: DecoderConfig,
    params: Params,
    mesh: jax.sharding.Mesh | None = None,
) -> tuple[DecoderConfig, Params]:
    """Reads a PEFT folder's adapters to stand beside a base model's kernels.

    Args:
      folder: With `adapter_config.json` and `adapter_model.safetensors`.
      config: The base model's.
      params: Its parameters; they are shared, not copied.
      mesh: Where to place the adapters; the default device if None.

    Returns:
      The configuration and parameters with adapters, which are float32.

    Raises:
      UsageError: If the folder is incomplete, does something that the decoder does not, or does
        not fit the base model.
    """
    found = read_json(folder / CONFIG)
    if found.get("peft_type") != "LORA":
        raise UsageError(f"{folder} holds {found.get('peft_type')!r}; only LoRA can be loaded")
    for field in _UNSUPPORTED:
        if found.get(field):
            raise UsageError(f"{folder / CONFIG} sets {field}, which the decoder does not have")
    if found.get("bias", "none") != "none":
        raise UsageError(f"{folder / CONFIG} trains biases, which the decoder does not adapt")
    tensors = open_tensors(folder / WEIGHTS)
    plain = dataclasses.replace(config, lora=None, quantization=None)
    modules = {name.split(".lora_A")[0] for name in tensors if ".lora_A." in name}
    targets = {
        target
        for target, piece in _targets(plain)
        if _PREFIX + piece.name.removesuffix(".weight") in modules
    }
    if not targets:
        raise UsageError(f"{folder} has no adapter for any of {', '.join(lora_targets(config))}")
    rank = int(found["r"])
    # Rank-stabilised LoRA divides by the root of the rank (arXiv:2312.03732).
    growth = math.sqrt(rank) if found.get("use_rslora") else 1.0
    lora = Lora(
        rank=rank,
        alpha=float(found["lora_alpha"]) * growth,
        targets=tuple(name for name in lora_targets(config) if name in targets),
    )
    adapted = dataclasses.replace(plain, lora=lora)
    wanted = list(adapter_pieces(adapted))
    check_pieces(
        wanted,
        {name: tensor.shape for name, tensor in tensors.items()},
        source=folder,
        family=config.family,
    )
    shardings = None
    if mesh is not None:
        shardings = tree_shardings(param_axes(adapted), mesh, abstract_params(adapted))
    adapters = read_params(
        adapted, wanted, lambda name: read_tensor(tensors, name), jnp.float32, shardings
    )
    return dataclasses.replace(config, lora=lora), join_lora(adapters, params)
