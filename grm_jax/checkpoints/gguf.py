"""GGUF files in: metadata, and weights dequantised into the decoder's layout.

The quantised blocks are the `gguf` package's business. A new family is one `_Family` entry.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from grm_jax.checkpoints.gguf_header import Tensor, read_header
from grm_jax.checkpoints.weights import Checkpoint, Names, check_pieces, pieces, read_params
from grm_jax.errors import UsageError
from grm_jax.models import DecoderConfig, Rope, family_config, sliding_windows

Metadata = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class GGUFFile:
    """An opened GGUF file: `metadata` by name, and its tensors, still quantised on disk."""

    path: Path
    metadata: Metadata
    tensors: Mapping[str, Tensor]


@dataclasses.dataclass(frozen=True)
class _Family:
    config: Callable[[Metadata, int, bool], DecoderConfig]
    names: Names


def open_gguf(path: Path) -> GGUFFile:
    """Opens a GGUF file.

    Raises:
      UsageError: If the file is no GGUF, is truncated, or its header cannot be read.
    """
    size = path.stat().st_size
    try:
        metadata, tensors = read_header(path)
    except ValueError as error:
        raise UsageError(
            f"{path} is not a readable GGUF file ({size} bytes; {_one_line(error)}): it is "
            "corrupt or truncated, fetch it again"
        ) from error
    for name, tensor in tensors.items():
        if tensor.offset + tensor.size > size:
            raise UsageError(
                f"{path} is truncated: tensor {name} ends at byte {tensor.offset + tensor.size} of "
                f"{size}; fetch the file again"
            )
    return GGUFFile(path=path, metadata=metadata, tensors=tensors)


def gguf_config(file: GGUFFile) -> DecoderConfig:
    """The decoder configuration that a GGUF file describes.

    Raises:
      UsageError: If the architecture is unknown or a needed field is missing.
    """
    family = _family(file)
    try:
        tokens = file.metadata["tokenizer.ggml.tokens"]
        return family.config(file.metadata, len(tokens), "output.weight" not in file.tensors)
    except KeyError as error:
        raise UsageError(f"{file.path} has no metadata field {error.args[0]!r}") from error
    except ValueError as error:
        raise UsageError(f"{file.path} contradicts itself: {_one_line(error)}") from error


def gguf_checkpoint(file: GGUFFile) -> Checkpoint:
    """The decoder in an opened GGUF file: its configuration, and its tensors to be dequantised.

    Raises:
      UsageError: If a tensor is missing, unexpected or of another shape than the metadata implies.
    """
    config = gguf_config(file)
    wanted = tuple(pieces(config, _family(file).names))
    shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
    check_pieces(
        wanted,
        shapes,
        source=file.path,
        family=config.family,
        ignored=lambda name: name == "rope_freqs.weight",
    )
    return Checkpoint(
        path=file.path,
        config=config,
        load=functools.partial(read_params, config, wanted, functools.partial(_dequantise, file)),
        dtype="float32",
        metadata=file.metadata,
    )


def _dequantise(file: GGUFFile, name: str) -> np.ndarray:
    tensor = file.tensors[name]
    rows = gguf.quant_shape_to_byte_shape(tensor.shape, tensor.kind)
    data = np.memmap(file.path, mode="r", offset=tensor.offset, shape=rows)
    try:
        array = gguf.dequantize(data, tensor.kind)
    except NotImplementedError as error:
        raise UsageError(
            f"{file.path}: tensor {name} has quantisation {tensor.kind.name}, which cannot be "
            "read; convert the file to Q8_0 or F16"
        ) from error
    return np.asarray(array, np.float32).reshape(tensor.shape)


def _sizes(arch: str, metadata: Metadata) -> dict[str, Any]:
    """What all families state in the same way."""
    heads = metadata[f"{arch}.attention.head_count"]
    width = metadata[f"{arch}.embedding_length"]
    return {
        "num_layers": metadata[f"{arch}.block_count"],
        "width": width,
        "num_heads": heads,
        "num_kv_heads": metadata.get(f"{arch}.attention.head_count_kv", heads),
        "head_dim": metadata.get(f"{arch}.attention.key_length", width // heads),
        "mlp_dim": metadata[f"{arch}.feed_forward_length"],
        "max_context": metadata[f"{arch}.context_length"],
        "norm_eps": metadata[f"{arch}.attention.layer_norm_rms_epsilon"],
        "rope": Rope(theta=metadata.get(f"{arch}.rope.freq_base", 10_000.0)),
    }


def _llama(metadata: Metadata, vocab_size: int, tied: bool) -> DecoderConfig:
    sizes = _sizes("llama", metadata)
    return family_config("llama", vocab_size=vocab_size, tie_embeddings=tied, **sizes)


def _gemma3(metadata: Metadata, vocab_size: int, tied: bool) -> DecoderConfig:
    del tied  # Gemma 3 always ties; an output matrix is reported as an unexpected tensor.
    sizes = _sizes("gemma3", metadata) | {
        "head_dim": metadata["gemma3.attention.key_length"],
        "rope": Rope(theta=metadata["gemma3.rope.freq_base"]),
    }
    windows = sliding_windows(sizes["num_layers"], metadata["gemma3.attention.sliding_window"], 6)
    return family_config(
        "gemma3", vocab_size=vocab_size, windows=windows, rope_local=Rope(theta=10_000.0), **sizes
    )


_LAYER_NAMES = {
    "attention_norm": "attn_norm",
    "mlp_norm": "ffn_norm",
    "attention_post_norm": "post_attention_norm",
    "mlp_post_norm": "post_ffw_norm",
    "q": "attn_q",
    "k": "attn_k",
    "v": "attn_v",
    "out": "attn_output",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
}
_TEMPLATES = {
    "embedding": "token_embd.weight",
    "head": "output.weight",
    "final_norm": "output_norm.weight",
    **{kind: f"blk.{{layer}}.{name}.weight" for kind, name in _LAYER_NAMES.items()},
}

_FAMILIES: Mapping[str, _Family] = {
    # Llama files store rotary pairs interleaved; Gemma's store norms' scales whole.
    "llama": _Family(_llama, Names(templates=_TEMPLATES, interleaved=True)),
    "gemma3": _Family(_gemma3, Names(templates=_TEMPLATES, offset=1.0)),
}


def _family(file: GGUFFile) -> _Family:
    architecture = str(file.metadata.get("general.architecture"))
    if architecture not in _FAMILIES:
        raise UsageError(
            f"{file.path} holds a {architecture!r} model; GGUF files of these architectures can "
            f"be read: {', '.join(sorted(_FAMILIES))}"
        )
    return _FAMILIES[architecture]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:120]
