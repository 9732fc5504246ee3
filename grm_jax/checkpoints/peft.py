"""LoRA adapters, and a classifier's head beside them, in and out, in the layout of PEFT."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.typing import DTypeLike

from grm_jax.checkpoints.safetensors import (
    fetch,
    hub_names,
    open_tensors,
    read_json,
    read_tensor,
    write_json,
)
from grm_jax.checkpoints.shipped import FILE, shipped_folder
from grm_jax.checkpoints.weights import (
    Checkpoint,
    Piece,
    check_pieces,
    piece_of,
    pieces,
    read_params,
)
from grm_jax.distributed import tree_shardings
from grm_jax.errors import UsageError
from grm_jax.models import DecoderConfig, Lora, Params, abstract_params, param_axes
from grm_jax.models.lora import FUSED, join_lora, lora_targets

CONFIG, WEIGHTS = "adapter_config.json", FILE
_PREFIX = "base_model.model."
# What of PEFT changes the arithmetic in ways that the decoder does not have.
_UNSUPPORTED = ("use_dora", "rank_pattern", "alpha_pattern", "lora_bias")
# A classifier's head, and what PEFT may call it: it lists both for models of any kind.
_HEAD = f"{_PREFIX}score.weight"
_HEADS = {"score", "classifier"}


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


def head_pieces(config: DecoderConfig) -> Iterator[Piece]:
    """A classifier's head, which PEFT saves whole beside the adapters."""
    if config.num_labels:
        shape = (config.num_labels, config.width)
        yield Piece(name=_HEAD, shape=shape, path=("score",), place=())


def save_adapter(
    folder: Path,
    config: DecoderConfig,
    params: Params,
    *,
    base: str | None = None,
    dtype: DTypeLike | None = None,
) -> None:
    """Writes the adapters, and a classifier's head, as a folder that PEFT loads.

    Args:
      folder: Where to; made if it does not exist.
      config: The decoder's, with adapters.
      params: Its parameters.
      base: Name or path of the base model, for whoever loads the adapters.
      dtype: Type in the file; that of the parameters if None.

    Raises:
      UsageError: If there are no adapters, or they have no place in the layout.
    """
    lora = config.lora
    if lora is None:
        raise UsageError("the model has no adapters to write")
    plain = dataclasses.replace(config, quantization=None)
    wanted = [*adapter_pieces(plain), *head_pieces(plain)]
    tensors = {piece.name: piece.to_file(fetch(piece_of(params, piece))) for piece in wanted}
    if dtype is not None:
        tensors = {name: tensor.astype(dtype) for name, tensor in tensors.items()}
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
            "modules_to_save": ["score"] if config.num_labels else None,
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
        },
    )


def load_adapter(
    name_or_path: str | Path,
    config: DecoderConfig,
    params: Params,
    mesh: jax.sharding.Mesh | None = None,
) -> tuple[DecoderConfig, Params]:
    """Reads a PEFT folder's adapters to stand beside a base model's kernels.

    Args:
      name_or_path: A folder with `adapter_config.json` and `adapter_model.safetensors`, or the name
        of adapters that come with the package.
      config: The base model's.
      params: Its parameters; they are shared, not copied.
      mesh: Where to place the adapters; the default device if None.

    Returns:
      The configuration and parameters with adapters, which are float32. With a classifier's head in
      the folder, those of a classifier.

    Raises:
      UsageError: If the folder is incomplete, does something that the decoder does not, or does
        not fit the base model.
    """
    folder = shipped_folder(name_or_path) or Path(name_or_path).expanduser()
    found = _open(folder, config)
    shardings = None
    if mesh is not None:
        plain = dataclasses.replace(found.config, quantization=None)
        shardings = tree_shardings(param_axes(plain), mesh, abstract_params(plain))
    return found.config, _joined(found, found.read(shardings), params)


def base_name(folder: Path) -> str:
    """The model that a PEFT folder's adapters belong to.

    Raises:
      UsageError: If its configuration cannot be read or names none.
    """
    base = read_json(folder / CONFIG).get("base_model_name_or_path")
    if not base:
        raise UsageError(f"{folder / CONFIG} names no base model in base_model_name_or_path")
    return str(base)


def open_adapted(folder: Path, base: Checkpoint) -> Checkpoint:
    """Opens a PEFT folder together with its base model, as one checkpoint with adapters.

    Raises:
      UsageError: As `load_adapter`.
    """
    if base.config.lora is not None:
        raise UsageError(f"{folder} adapts {base.path}, which has adapters; merge those first")
    found = _open(folder, base.config)

    def load(dtype: DTypeLike, shardings: Params | None) -> Params:
        below = None
        if shardings is not None:
            flat = flatten_dict(shardings)
            # All that a language model has and a classifier has not is the matrix that makes
            # logits, which is like an embedding and is left out again.
            below = unflatten_dict(
                {
                    path: flat.get(path, shardings["embedding"])
                    for path in flatten_dict(abstract_params(base.config))
                }
            )
        return _joined(found, found.read(shardings), base.load(dtype, below))

    return dataclasses.replace(base, config=found.config, load=load, base=base_name(folder))


class _Opened(NamedTuple):
    """A PEFT folder that fits its base model.

    Attributes:
      config: The decoder's, with adapters.
      read: Reads the adapters and the head, as float32, to where a tree of shardings says.
    """

    config: DecoderConfig
    read: Callable[[Params | None], Params]


def _open(folder: Path, config: DecoderConfig) -> _Opened:
    """Opens a PEFT folder for a base model of a configuration."""
    found = read_json(folder / CONFIG)
    if found.get("peft_type") != "LORA":
        raise UsageError(f"{folder} holds {found.get('peft_type')!r}; only LoRA can be loaded")
    for field in _UNSUPPORTED:
        if found.get(field):
            raise UsageError(f"{folder / CONFIG} sets {field}, which the decoder does not have")
    if found.get("bias", "none") != "none":
        raise UsageError(f"{folder / CONFIG} trains biases, which the decoder does not adapt")
    whole = sorted({*(found.get("modules_to_save") or ())} - _HEADS)
    if whole:
        raise UsageError(
            f"{folder / CONFIG} has modules_to_save {whole[0]!r}, but beside adapters the decoder "
            "reads only a classifier's head"
        )
    tensors = open_tensors(folder / WEIGHTS)
    labels = tensors[_HEAD].shape[0] if _HEAD in tensors else config.num_labels
    if config.num_labels not in (0, labels):
        raise UsageError(
            f"{folder} has a head of {labels} outputs, but its base model has {config.num_labels}"
        )
    plain = dataclasses.replace(config, lora=None, quantization=None, num_labels=labels)
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
    if _HEAD in tensors:
        wanted += head_pieces(adapted)
    check_pieces(
        wanted,
        {name: tensor.shape for name, tensor in tensors.items()},
        source=folder,
        family=config.family,
    )
    return _Opened(
        config=dataclasses.replace(adapted, quantization=config.quantization),
        read=lambda shardings: read_params(
            adapted, wanted, lambda name: read_tensor(tensors, name), jnp.float32, shardings
        ),
    )


def _joined(found: _Opened, learnt: Params, base: Params) -> Params:
    """Adapters, and a head, with the parameters of their base."""
    params = dict(join_lora(learnt, base))
    if found.config.num_labels:
        # A classifier has no matrix to make logits with.
        params.pop("head", None)
    return params
