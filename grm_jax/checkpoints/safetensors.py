"""Folders of safetensors in and out, in the names of published checkpoints.

Files are read with plain reads and not mapped into memory, so that what has been read does not
stay there; pickled weights are refused.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import safetensors.numpy
from jax.experimental import multihost_utils

from grm_jax.checkpoints.hub_config import config_from_hub, config_to_hub
from grm_jax.checkpoints.weights import (
    Checkpoint,
    Names,
    check_pieces,
    piece_of,
    pieces,
    read_params,
)
from grm_jax.errors import UsageError
from grm_jax.models import DecoderConfig, Params

CONFIG = "config.json"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_TYPES: Mapping[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
}
_SCALE = "_scale_inv"  # beside a tensor in 8-bit floats: a factor for each block of it
_SCALE_BLOCK = 128

_LAYER_NAMES = {
    "attention_norm": "input_layernorm.weight",
    "mlp_norm": "post_attention_layernorm.weight",
    "q": "self_attn.q_proj.weight",
    "k": "self_attn.k_proj.weight",
    "v": "self_attn.v_proj.weight",
    "out": "self_attn.o_proj.weight",
    "q_bias": "self_attn.q_proj.bias",
    "k_bias": "self_attn.k_proj.bias",
    "v_bias": "self_attn.v_proj.bias",
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
    "q_a": "self_attn.q_a_proj.weight",
    "q_a_norm": "self_attn.q_a_layernorm.weight",
    "q_b": "self_attn.q_b_proj.weight",
    "kv_a": "self_attn.kv_a_proj_with_mqa.weight",
    "kv_a_norm": "self_attn.kv_a_layernorm.weight",
    "kv_b": "self_attn.kv_b_proj.weight",
    "gate": "mlp.gate_proj.weight",
    "up": "mlp.up_proj.weight",
    "down": "mlp.down_proj.weight",
    "router": "mlp.gate.weight",
    "router_bias": "mlp.gate.e_score_correction_bias",
    "expert_gate": "mlp.experts.{expert}.gate_proj.weight",
    "expert_up": "mlp.experts.{expert}.up_proj.weight",
    "expert_down": "mlp.experts.{expert}.down_proj.weight",
    "shared_gate": "mlp.shared_experts.gate_proj.weight",
    "shared_up": "mlp.shared_experts.up_proj.weight",
    "shared_down": "mlp.shared_experts.down_proj.weight",
}
_POST_NORMS = {
    "attention_post_norm": "post_attention_layernorm.weight",
    "mlp_norm": "pre_feedforward_layernorm.weight",
    "mlp_post_norm": "post_feedforward_layernorm.weight",
}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor in a file: its type as the format calls it, its shape, and its first byte."""

    path: Path
    kind: str
    shape: tuple[int, ...]
    offset: int


def hub_names(config: DecoderConfig, interleaved: bool = True) -> Names:
    """What a decoder's tensors are called in published checkpoints.

    Args:
      config: The decoder's.
      interleaved: Whether DeepSeek's rotated elements lie in pairs, as they do in its releases.
    """
    layer = _LAYER_NAMES | (_POST_NORMS if config.post_norms else {})
    return Names(
        templates={
            "embedding": "model.embed_tokens.weight",
            "head": "lm_head.weight",
            "score": "score.weight",
            "final_norm": "model.norm.weight",
            **{kind: f"model.layers.{{layer}}.{name}" for kind, name in layer.items()},
        },
        interleaved=config.latent is not None and interleaved,
    )


def open_folder(folder: Path) -> Checkpoint:
    """Opens a folder of safetensors and checks that it is complete.

    Raises:
      UsageError: If its configuration is missing or unknown, a file is missing or truncated, or a
        tensor is missing, unexpected, of a wrong shape or of a type that weights do not have.
    """
    found = read_json(folder / CONFIG)
    config = config_from_hub(found, folder / CONFIG)
    tensors = _tensors(folder)
    names = hub_names(config, interleaved=bool(found.get("rope_interleave", True)))
    wanted = tuple(pieces(config, names))
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    check_pieces(
        wanted,
        shapes,
        source=folder,
        family=config.family,
        ignored=lambda name: _ignored(name, config, shapes),
    )
    for piece in wanted:
        kind = tensors[piece.name].kind
        if kind not in _TYPES:
            raise UsageError(
                f"{folder}: tensor {piece.name} has type {kind}; weights are one of "
                f"{', '.join(_TYPES)}"
            )
    return Checkpoint(
        path=folder,
        config=config,
        load=functools.partial(
            read_params, config, wanted, lambda name: read_tensor(tensors, name)
        ),
        dtype="bfloat16" if tensors[wanted[0].name].kind in ("BF16", "F8_E4M3") else "float32",
        metadata=None,
    )


def _ignored(name: str, config: DecoderConfig, shapes: Mapping[str, Any]) -> bool:
    """Tensors that a checkpoint may have beside the decoder's."""
    if name.endswith("rotary_emb.inv_freq"):
        return True  # older files list the frequencies
    if name.endswith(_SCALE):
        return name.removesuffix(_SCALE) in shapes
    if name == "lm_head.weight":
        return config.tie_embeddings or config.num_labels > 0
    # DeepSeek-V3 has one more layer, for predicting several tokens in training.
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    extra = config.family == "deepseek_v3"
    return extra and layer is not None and int(layer[1]) >= config.num_layers


def _tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor in the folder's files."""
    if (folder / INDEX).exists():
        listed: dict[str, str] = read_json(folder / INDEX).get("weight_map", {})
        files = sorted(set(listed.values()))
        for file in files:
            if not (folder / file).is_file():
                raise UsageError(f"{folder} lacks {file}, which {INDEX} names; fetch it again")
        found = {
            name: tensor for file in files for name, tensor in open_tensors(folder / file).items()
        }
        for name, file in listed.items():
            if name not in found or found[name].path.name != file:
                raise UsageError(f"{folder / INDEX} names tensor {name}, which {file} lacks")
        return found
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    if files == [SINGLE] or len(files) == 1:
        return open_tensors(folder / files[0])
    if files:
        raise UsageError(f"{folder} has {len(files)} safetensors files and no {INDEX}")
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        raise UsageError(
            f"{folder} has only {pickles[0]}, which may run code when it is opened; "
            "get or convert it to safetensors"
        )
    raise UsageError(f"{folder} has no safetensors files")


def open_tensors(path: Path) -> dict[str, Tensor]:
    """What a safetensors file lists, checked against its size.

    Raises:
      UsageError: If the file is missing, truncated or of another kind.
    """
    if not path.is_file():
        raise UsageError(f"{path.parent} has no {path.name}")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise UsageError(f"{path} is truncated or no safetensors file; fetch it again")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            tensors = {
                name: (entry["dtype"], tuple(entry["shape"]), entry["data_offsets"])
                for name, entry in header.items()
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"{path} has no readable header; fetch it again") from error
    begin = 8 + length
    for name, (_, _, (_, end)) in tensors.items():
        if begin + end > size:
            raise UsageError(
                f"{path} is truncated: tensor {name} ends at byte {begin + end} of {size}; "
                "fetch the file again"
            )
    return {
        name: Tensor(path, kind, shape, begin + start)
        for name, (kind, shape, (start, _)) in tensors.items()
    }


def read_tensor(tensors: Mapping[str, Tensor], name: str) -> np.ndarray:
    """Reads a tensor; one in 8-bit floats is multiplied by the scales that lie beside it."""
    tensor = tensors[name]
    dtype = np.dtype(_TYPES[tensor.kind])
    count = int(np.prod(tensor.shape, dtype=np.int64))
    array = np.fromfile(tensor.path, dtype, count, offset=tensor.offset).reshape(tensor.shape)
    if tensor.kind != "F8_E4M3":
        return array
    array = array.astype(np.float32)
    if name + _SCALE not in tensors:
        return array
    scales = read_tensor(tensors, name + _SCALE).astype(np.float32)
    for axis, size in enumerate(array.shape):
        scales = np.repeat(scales, _SCALE_BLOCK, axis=axis).take(np.arange(size), axis=axis)
    array *= scales
    return array


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object in a file.

    Raises:
      UsageError: If the file is missing or holds no object.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UsageError(f"{path.parent} has no {path.name}") from error
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise UsageError(f"{path} holds no JSON object")
    return found


def save_folder(
    folder: Path,
    config: DecoderConfig,
    params: Params,
    *,
    extra: Mapping[str, Any] | None = None,
    shard_bytes: int = 5 << 30,
) -> None:
    """Writes weights and configuration as `transformers` and vLLM load them.

    On several hosts every process must call this; the first one writes.

    Args:
      folder: Where to; made if it does not exist.
      config: The decoder's, without adapters and not quantised.
      params: Its parameters.
      extra: More fields for `config.json`, such as the ids of special tokens.
      shard_bytes: Size at which a file ends.

    Raises:
      UsageError: If kernels are quantised or have adapters, which the format has no names for.
    """
    if config.lora is not None or config.quantization is not None:
        raise UsageError("merge adapters and undo the quantisation before writing safetensors")
    wanted = list(pieces(config, hub_names(config)))
    sizes = [_bytes(params, piece) for piece in wanted]
    shards: list[list[int]] = [[]]
    filled = 0
    for index, size in enumerate(sizes):
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(index)
        filled += size
    if jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = SINGLE
        if len(shards) > 1:
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {
            wanted[index].name: wanted[index].to_file(fetch(piece_of(params, wanted[index])))
            for index in shard
        }
        weight_map |= dict.fromkeys(tensors, name)
        if jax.process_index() == 0:
            safetensors.numpy.save_file(tensors, folder / name, metadata={"format": "pt"})
    if jax.process_index() == 0:
        if len(shards) > 1:
            index_file = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
            write_json(folder / INDEX, index_file)
        write_json(folder / CONFIG, config_to_hub(config) | dict(extra or {}))


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON object, indented."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _bytes(params: Params, piece: Any) -> int:
    node = params
    for key in piece.path:
        node = node[key]
    return int(np.prod(piece.shape, dtype=np.int64)) * node.dtype.itemsize


def fetch(array: Any) -> np.ndarray:
    """The whole of an array that may be spread over hosts."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        array = multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)
