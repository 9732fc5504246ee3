"""GGUF files in: metadata, and weights dequantised into the decoder's layout.

The container and the quantised blocks are the `gguf` package's business. What is ours is the map
from a family's tensor names to the decoder's parameters. A new family is one `_Family` entry.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from grm_jax.errors import UsageError
from grm_jax.models import (
    DecoderConfig,
    Params,
    abstract_params,
    dtype_name,
    gemma3_config,
    llama_config,
)

Metadata = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class GGUFFile:
    """An opened GGUF file: `metadata` by name, and its tensors, still quantised on disk."""

    path: Path
    metadata: Metadata
    tensors: Mapping[str, gguf.ReaderTensor]


@dataclasses.dataclass(frozen=True)
class _Family:
    config: Callable[[Metadata, int, bool], DecoderConfig]
    # Llama files store rotary pairs interleaved; the decoder rotates halves.
    interleaved_rope: bool
    layer_norms: Mapping[str, str]


def open_gguf(path: Path) -> GGUFFile:
    """Opens a GGUF file.

    Raises:
      UsageError: If the file is no GGUF, is truncated, or its header cannot be read.
    """
    size = path.stat().st_size
    try:
        reader = gguf.GGUFReader(path)
        metadata = {
            name: field.contents()
            for name, field in reader.fields.items()
            if not name.startswith("GGUF.")
        }
        tensors = {tensor.name: tensor for tensor in reader.tensors}
    except (ValueError, IndexError, KeyError, UnicodeDecodeError, OverflowError) as error:
        raise UsageError(
            f"{path} is not a readable GGUF file ({size} bytes; {_one_line(error)}): it is "
            "corrupt or truncated, fetch it again"
        ) from error
    for tensor in tensors.values():
        if tensor.data_offset + tensor.n_bytes > size:
            raise UsageError(
                f"{path} is truncated: tensor {tensor.name} ends at byte "
                f"{tensor.data_offset + tensor.n_bytes} of {size}; fetch the file again"
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


def load_gguf(
    file: GGUFFile, dtype: DTypeLike = jnp.float32, shardings: Params | None = None
) -> tuple[DecoderConfig, Params]:
    """Reads a GGUF file's weights, dequantised, in the decoder's layout.

    Args:
      file: From `open_gguf`.
      dtype: Type of the parameters and of the computation.
      shardings: A tree like the parameters' with a `jax.sharding.Sharding` at each leaf, or None
        for the default device.

    Returns:
      The configuration and the parameters.

    Raises:
      UsageError: If a tensor is missing, unexpected or of another shape than the metadata implies.
    """
    config = dataclasses.replace(gguf_config(file), dtype=dtype_name(dtype))
    loaded: dict[tuple[str, ...], np.ndarray] = {}
    unexpected = file.tensors.keys() - {"rope_freqs.weight"}
    for path, names, shape, convert in _parameters(config, _family(file)):
        loaded[path] = convert([_dequantise(file, name, shape) for name in names])
        unexpected -= set(names)
    if unexpected:
        raise UsageError(
            f"{file.path} has {len(unexpected)} tensors that a {config.family} decoder has no "
            f"place for, the first is {min(unexpected)}"
        )
    expected = jax.tree_util.tree_flatten_with_path(abstract_params(config, dtype))[0]
    params: dict[str, Any] = {}
    for keys, shape in expected:
        path = tuple(key.key for key in keys)
        array = loaded.pop(path)
        node = params
        for key in path[:-1]:
            node = node.setdefault(key, {})
        sharding = None
        if shardings is not None:
            sharding = shardings
            for key in path:
                sharding = sharding[key]
        node[path[-1]] = jax.device_put(
            array.reshape(shape.shape).astype(jnp.dtype(dtype)), sharding
        )
    return config, params


_Convert = Callable[[list[np.ndarray]], np.ndarray]


def _parameters(
    config: DecoderConfig, family: _Family
) -> Iterator[tuple[tuple[str, ...], list[str], tuple[int, ...], _Convert]]:
    """For each parameter: its path, the tensors it is made of, the shape of each, and how."""

    def whole(parts: list[np.ndarray]) -> np.ndarray:
        return parts[0]

    def norm(parts: list[np.ndarray]) -> np.ndarray:
        # GGUF stores the factor itself, the decoder what remains after the family's offset.
        return np.stack(parts) - np.float32(config.norm_offset)

    def final_norm(parts: list[np.ndarray]) -> np.ndarray:
        return norm(parts)[0]

    def heads(count: int) -> Callable[[np.ndarray], np.ndarray]:
        def split(matrix: np.ndarray) -> np.ndarray:
            if family.interleaved_rope:
                pairs = matrix.reshape(count, config.head_dim // 2, 2, config.width)
                matrix = pairs.swapaxes(1, 2)
            return matrix.reshape(count, config.head_dim, config.width)

        return split

    def queries(parts: list[np.ndarray]) -> np.ndarray:
        return np.stack([heads(config.num_heads)(part) for part in parts])

    def keys_values(parts: list[np.ndarray]) -> np.ndarray:
        half = len(parts) // 2
        keys = np.stack([heads(config.num_kv_heads)(part) for part in parts[:half]])
        values = np.stack(parts[half:]).reshape(keys.shape)
        return np.stack([keys, values], axis=1)

    def paired(parts: list[np.ndarray]) -> np.ndarray:
        half = len(parts) // 2
        return np.stack([np.stack(parts[:half]), np.stack(parts[half:])], axis=1)

    def each(suffix: str) -> list[str]:
        return [f"blk.{layer}.{suffix}.weight" for layer in range(config.num_layers)]

    c = config
    vocab, width = (c.vocab_size, c.width), (c.width,)
    q_size, kv_size = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    attention, mlp = ("layers", "attention"), ("layers", "mlp")
    yield ("embedding",), ["token_embd.weight"], vocab, whole
    if not c.tie_embeddings:
        yield ("head",), ["output.weight"], vocab, whole
    yield ("final_norm", "scale"), ["output_norm.weight"], width, final_norm
    for ours, theirs in family.layer_norms.items():
        size = (c.head_dim,) if ours.startswith("attention/") else width
        yield ("layers", *ours.split("/"), "scale"), each(theirs), size, norm
    yield (*attention, "q", "kernel"), each("attn_q"), (q_size, c.width), queries
    keys_and_values = each("attn_k") + each("attn_v")
    yield (*attention, "kv", "kernel"), keys_and_values, (kv_size, c.width), keys_values
    yield (*attention, "out", "kernel"), each("attn_output"), (c.width, q_size), np.stack
    gates_and_ups = each("ffn_gate") + each("ffn_up")
    yield (*mlp, "gate_up", "kernel"), gates_and_ups, (c.mlp_dim, c.width), paired
    yield (*mlp, "down", "kernel"), each("ffn_down"), (c.width, c.mlp_dim), np.stack


def _dequantise(file: GGUFFile, name: str, shape: tuple[int, ...]) -> np.ndarray:
    if name not in file.tensors:
        raise UsageError(f"{file.path} lacks tensor {name}")
    tensor = file.tensors[name]
    # GGUF lists the fastest axis first.
    found = tuple(int(size) for size in reversed(tensor.shape))
    if found != shape:
        raise UsageError(
            f"{file.path}: tensor {name} has shape {found}, the metadata implies {shape}"
        )
    try:
        array = gguf.dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError as error:
        raise UsageError(
            f"{file.path}: tensor {name} has quantisation {tensor.tensor_type.name}, which "
            "cannot be read; convert the file to Q8_0 or F16"
        ) from error
    return np.asarray(array, np.float32).reshape(shape)


def _llama(metadata: Metadata, vocab_size: int, tied: bool) -> DecoderConfig:
    heads = metadata["llama.attention.head_count"]
    return llama_config(
        vocab_size=vocab_size,
        num_layers=metadata["llama.block_count"],
        width=metadata["llama.embedding_length"],
        num_heads=heads,
        num_kv_heads=metadata.get("llama.attention.head_count_kv", heads),
        head_dim=metadata.get("llama.attention.key_length"),
        mlp_dim=metadata["llama.feed_forward_length"],
        max_context=metadata["llama.context_length"],
        rope_theta=metadata.get("llama.rope.freq_base", 10_000.0),
        norm_eps=metadata["llama.attention.layer_norm_rms_epsilon"],
        tie_embeddings=tied,
    )


def _gemma3(metadata: Metadata, vocab_size: int, tied: bool) -> DecoderConfig:
    del tied  # Gemma 3 always ties; an output matrix is reported as an unexpected tensor.
    return gemma3_config(
        vocab_size=vocab_size,
        num_layers=metadata["gemma3.block_count"],
        width=metadata["gemma3.embedding_length"],
        num_heads=metadata["gemma3.attention.head_count"],
        num_kv_heads=metadata["gemma3.attention.head_count_kv"],
        head_dim=metadata["gemma3.attention.key_length"],
        mlp_dim=metadata["gemma3.feed_forward_length"],
        max_context=metadata["gemma3.context_length"],
        window=metadata["gemma3.attention.sliding_window"],
        rope_theta=metadata["gemma3.rope.freq_base"],
        norm_eps=metadata["gemma3.attention.layer_norm_rms_epsilon"],
    )


_FAMILIES: Mapping[str, _Family] = {
    "llama": _Family(
        _llama,
        interleaved_rope=True,
        layer_norms={"attention_norm": "attn_norm", "mlp_norm": "ffn_norm"},
    ),
    "gemma3": _Family(
        _gemma3,
        interleaved_rope=False,
        layer_norms={
            "attention_norm": "attn_norm",
            "attention_post_norm": "post_attention_norm",
            "mlp_norm": "ffn_norm",
            "mlp_post_norm": "post_ffw_norm",
            "attention/q_norm": "attn_q_norm",
            "attention/k_norm": "attn_k_norm",
        },
    ),
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
