"""GGUF files that are written here, whole and damaged, and pieces of a real one."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grm_jax import checkpoints
from grm_jax.checkpoints.gguf import open_gguf
from grm_jax.checkpoints.gguf_header import read_header
from grm_jax.distributed import make_mesh, tree_shardings
from grm_jax.errors import UsageError
from grm_jax.models import (
    DecoderConfig,
    Params,
    Rope,
    abstract_params,
    family_config,
    logits,
    param_axes,
    sliding_windows,
)

VOCAB, WIDTH, MLP = 48, 32, 40
LLAMA = family_config(
    "llama",
    vocab_size=VOCAB,
    num_layers=2,
    width=WIDTH,
    num_heads=4,
    num_kv_heads=2,
    mlp_dim=MLP,
    max_context=256,
    rope=Rope(theta=5_000.0),
    norm_eps=2e-5,
    tie_embeddings=True,
)
UNTIED = family_config(
    "llama",
    vocab_size=VOCAB,
    num_layers=2,
    width=WIDTH,
    num_heads=4,
    num_kv_heads=2,
    mlp_dim=MLP,
    max_context=256,
    tie_embeddings=False,
)
GEMMA3 = family_config(
    "gemma3",
    vocab_size=VOCAB,
    num_layers=7,
    width=WIDTH,
    num_heads=4,
    num_kv_heads=2,
    head_dim=12,
    mlp_dim=MLP,
    max_context=256,
    windows=sliding_windows(7, 8, 6),
    rope=Rope(theta=20_000.0),
    rope_local=Rope(theta=10_000.0),
)
CONFIGS = {"llama": LLAMA, "untied": UNTIED, "gemma3": GEMMA3}

Tensors = dict[str, np.ndarray]
Fields = dict[str, Any]


class Written(NamedTuple):
    config: DecoderConfig
    params: Params
    fields: Fields
    tensors: Tensors


def fields_of(config: DecoderConfig) -> Fields:
    a = config.family
    fields = {
        f"{a}.block_count": config.num_layers,
        f"{a}.embedding_length": config.width,
        f"{a}.attention.head_count": config.num_heads,
        f"{a}.attention.head_count_kv": config.num_kv_heads,
        f"{a}.feed_forward_length": config.mlp_dim,
        f"{a}.context_length": config.max_context,
        f"{a}.attention.layer_norm_rms_epsilon": config.norm_eps,
        f"{a}.rope.freq_base": config.rope.theta,
        "tokenizer.ggml.tokens": [f"t{index}" for index in range(config.vocab_size)],
    }
    if a == "gemma3":
        fields |= {"gemma3.attention.key_length": config.head_dim}
        fields |= {"gemma3.attention.sliding_window": config.windows[0]}
    return fields


def tensors_of(config: DecoderConfig, params: Params) -> Tensors:
    """Tensors as llama.cpp's converter writes them: scales whole, Llama's q and k interleaved."""
    params = jax.tree.map(np.asarray, params)

    def rows(kernel: np.ndarray) -> np.ndarray:  # [heads, head_dim, D]
        if config.family == "llama":
            # Row 2i of a head is element i of its first half, row 2i + 1 that of its second.
            first, second = np.split(kernel, 2, axis=1)
            kernel = np.stack([first, second], axis=2)
        return kernel.reshape(-1, config.width)

    norms = {"attn_norm": "attention_norm", "ffn_norm": "mlp_norm"}
    if config.family == "gemma3":
        norms |= {"post_attention_norm": "attention_post_norm", "post_ffw_norm": "mlp_post_norm"}
    out = {
        "token_embd.weight": params["embedding"],
        "output_norm.weight": params["final_norm"]["scale"] + config.norm_offset,
    }
    if not config.tie_embeddings:
        out["output.weight"] = params["head"]
    for i in range(config.num_layers):
        layer = jax.tree.map(lambda leaf: leaf[i], params["layers"])  # noqa: B023
        at, mlp = layer["attention"], layer["mlp"]
        here = {theirs: layer[ours]["scale"] + config.norm_offset for theirs, ours in norms.items()}
        if config.family == "gemma3":
            here |= {f"attn_{n}": at[n]["scale"] + config.norm_offset for n in ("q_norm", "k_norm")}
        here |= {
            "attn_q": rows(at["q"]["kernel"]),
            "attn_k": rows(at["kv"]["kernel"][0]),
            "attn_v": at["kv"]["kernel"][1].reshape(-1, config.width),
            "attn_output": at["out"]["kernel"].reshape(config.width, -1),
            "ffn_gate": mlp["gate_up"]["kernel"][0],
            "ffn_up": mlp["gate_up"]["kernel"][1],
            "ffn_down": mlp["down"]["kernel"],
        }
        out |= {f"blk.{i}.{name}.weight": array for name, array in here.items()}
    return {name: np.ascontiguousarray(array, np.float32) for name, array in out.items()}


def model_of(config: DecoderConfig) -> Written:
    generator = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(0.3 * generator.standard_normal(leaf.shape), leaf.dtype),
        abstract_params(config),
    )
    return Written(config, params, fields_of(config), tensors_of(config, params))


@pytest.fixture(scope="module")
def models() -> dict[str, Written]:
    return {name: model_of(config) for name, config in CONFIGS.items()}


def write(path: Path, architecture: str, fields: Fields, tensors: Tensors) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    for name, value in fields.items():
        if isinstance(value, list):
            writer.add_array(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        else:
            writer.add_uint32(name, value)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def save(written: Written, path: Path) -> Path:
    return write(path, written.config.family, written.fields, written.tensors)


def without(mapping: Mapping[str, Any], key: str) -> dict[str, Any]:
    assert key in mapping
    return {name: value for name, value in mapping.items() if name != key}


def refusal(path: Path, **settings: Any) -> str:
    """The one line with which a file is refused."""
    with pytest.raises(UsageError) as caught:
        checkpoints.load(str(path), **settings)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


# --- whole files ---


@pytest.mark.parametrize("name", CONFIGS)
def test_loads_what_was_written(models: dict[str, Written], name: str, tmp_path: Path) -> None:
    written = models[name]
    config, params = checkpoints.load(str(save(written, tmp_path / "model.gguf")))
    same = {"norm_eps", "rope_theta"}  # stored as float32
    for field in config.__dataclass_fields__:
        found, wanted = getattr(config, field), getattr(written.config, field)
        assert found == (pytest.approx(wanted, rel=1e-6) if field in same else wanted) or (
            field == "rope_theta_local" and found == pytest.approx(wanted)
        ), field
    tokens = jax.random.randint(jax.random.key(1), (2, 20), 0, VOCAB)
    run = jax.jit(logits, static_argnums=1)
    found = run(params, config, tokens)
    wanted = run(written.params, written.config, tokens)
    assert np.asarray(wanted).std() > 0.3
    np.testing.assert_allclose(found, wanted, atol=2e-5)
    jax.tree.map(
        lambda one, two: np.testing.assert_allclose(one, two, atol=1e-6), params, written.params
    )


def test_other_types_are_read_too(models: dict[str, Written], tmp_path: Path) -> None:
    written = models["llama"]
    halves = {
        name: tensor.astype(np.float16) if tensor.ndim > 1 else tensor
        for name, tensor in written.tensors.items()
    }
    path = write(tmp_path / "half.gguf", "llama", written.fields, halves)
    config, params = checkpoints.load(str(path), jnp.bfloat16)
    assert config.dtype == "bfloat16"
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    np.testing.assert_allclose(
        params["embedding"].astype(jnp.float32), written.params["embedding"], rtol=1e-2
    )
    message = None
    with pytest.raises(UsageError, match="choose float32 or bfloat16") as caught:
        checkpoints.load(str(path), jnp.float16)
    message = str(caught.value)
    assert "\n" not in message


def test_a_mesh_receives_parts(models: dict[str, Written], tmp_path: Path) -> None:
    path = save(models["llama"], tmp_path / "model.gguf")
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    config, placed = checkpoints.load(str(path), mesh=mesh)
    wanted = tree_shardings(param_axes(config), mesh, abstract_params(config))
    jax.tree.map(lambda leaf, sharding: _check_sharding(leaf, sharding), placed, wanted)
    kernel = placed["layers"]["mlp"]["gate_up"]["kernel"]
    assert {shard.data.shape for shard in kernel.addressable_shards} == {
        (2, 2, MLP // 2, WIDTH // 2)
    }
    _, whole = checkpoints.load(str(path))
    jax.tree.map(np.testing.assert_array_equal, placed, whole)
    assert all(len(leaf.sharding.device_set) == 1 for leaf in jax.tree.leaves(whole))


def _check_sharding(leaf: jax.Array, sharding: jax.sharding.Sharding) -> None:
    assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)


def test_a_folder_holds_one_file(models: dict[str, Written], tmp_path: Path) -> None:
    assert "holds no model: neither config.json" in refusal(tmp_path)
    save(models["llama"], tmp_path / "one.gguf")
    config, _ = checkpoints.load(str(tmp_path))
    assert config.family == "llama"
    save(models["llama"], tmp_path / "two.gguf")
    assert "holds 2 GGUF files; name the one" in refusal(tmp_path)


# --- files that do not fit the decoder ---


@pytest.mark.parametrize("architecture", ["mamba", "gemma2"])
def test_an_unknown_architecture_is_named(
    models: dict[str, Written], architecture: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "x.gguf", architecture, {}, models["llama"].tensors)
    message = refusal(path)
    assert f"{architecture!r}" in message
    assert "gemma3, llama" in message


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("llama", "token_embd.weight"),
        ("llama", "output_norm.weight"),
        ("llama", "blk.1.attn_k.weight"),
        ("llama", "blk.0.ffn_norm.weight"),
        ("gemma3", "blk.6.post_ffw_norm.weight"),
        ("gemma3", "blk.3.attn_q_norm.weight"),
    ],
)
def test_a_missing_tensor_is_named(
    models: dict[str, Written], name: str, tensor: str, tmp_path: Path
) -> None:
    written = models[name]._replace(tensors=without(models[name].tensors, tensor))
    assert f"lacks tensor {tensor}" in refusal(save(written, tmp_path / "x.gguf"))


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("llama", "blk.0.attn_q.bias"),
        ("llama", "blk.2.attn_q.weight"),
        ("gemma3", "output.weight"),
    ],
)
def test_a_tensor_without_a_place_is_named(
    models: dict[str, Written], name: str, tensor: str, tmp_path: Path
) -> None:
    tensors = models[name].tensors | {tensor: np.zeros((VOCAB, WIDTH), np.float32)}
    message = refusal(save(models[name]._replace(tensors=tensors), tmp_path / "x.gguf"))
    assert tensor in message
    assert "1 tensors" in message


def test_rope_factors_of_one_are_no_obstacle(models: dict[str, Written], tmp_path: Path) -> None:
    tensors = models["llama"].tensors | {"rope_freqs.weight": np.ones(4, np.float32)}
    path = save(models["llama"]._replace(tensors=tensors), tmp_path / "x.gguf")
    assert checkpoints.load(str(path))[0].family == "llama"


@pytest.mark.parametrize(
    ("tensor", "shape"),
    [
        ("token_embd.weight", (VOCAB + 1, WIDTH)),
        ("output_norm.weight", (WIDTH - 1,)),
        ("blk.0.attn_norm.weight", (WIDTH + 2,)),
        ("blk.1.attn_q.weight", (WIDTH, WIDTH + 1)),
        ("blk.1.attn_k.weight", (WIDTH, WIDTH)),
        ("blk.0.attn_v.weight", (WIDTH, WIDTH)),
        ("blk.0.ffn_down.weight", (WIDTH, MLP + 1)),
        ("blk.1.ffn_up.weight", (MLP + 1, WIDTH)),
    ],
)
def test_a_wrong_shape_is_named(
    models: dict[str, Written], tensor: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    tensors = models["llama"].tensors | {tensor: np.zeros(shape, np.float32)}
    message = refusal(save(models["llama"]._replace(tensors=tensors), tmp_path / "x.gguf"))
    assert "shape" in message


@pytest.mark.parametrize("layers", [(0, 1), (0,)])
def test_a_transposed_tensor_is_refused(
    models: dict[str, Written], layers: tuple[int, ...], tmp_path: Path
) -> None:
    """It has as many numbers as it should, but not where they should be."""
    tensors = dict(models["llama"].tensors)
    for layer in layers:
        name = f"blk.{layer}.ffn_down.weight"
        tensors[name] = np.ascontiguousarray(tensors[name].T)
    message = refusal(save(models["llama"]._replace(tensors=tensors), tmp_path / "x.gguf"))
    assert "shape" in message


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("llama", "llama.block_count"),
        ("llama", "llama.attention.head_count"),
        ("llama", "llama.attention.layer_norm_rms_epsilon"),
        ("llama", "llama.context_length"),
        ("llama", "tokenizer.ggml.tokens"),
        ("gemma3", "gemma3.attention.sliding_window"),
        ("gemma3", "gemma3.attention.key_length"),
        ("gemma3", "gemma3.rope.freq_base"),
    ],
)
def test_a_missing_field_is_named(
    models: dict[str, Written], name: str, field: str, tmp_path: Path
) -> None:
    written = models[name]._replace(fields=without(models[name].fields, field))
    message = refusal(save(written, tmp_path / "x.gguf"))
    assert f"has no metadata field {field!r}" in message


def test_heads_that_cannot_be_shared_are_refused(
    models: dict[str, Written], tmp_path: Path
) -> None:
    fields = models["llama"].fields | {"llama.attention.head_count_kv": 3}
    message = refusal(save(models["llama"]._replace(fields=fields), tmp_path / "x.gguf"))
    assert "num_kv_heads=3" in message


@pytest.mark.parametrize("count", [1, 3])
def test_another_number_of_layers_is_noticed(
    models: dict[str, Written], count: int, tmp_path: Path
) -> None:
    fields = models["llama"].fields | {"llama.block_count": count}
    message = refusal(save(models["llama"]._replace(fields=fields), tmp_path / "x.gguf"))
    assert re.search(r"blk\.[12]\.", message)


# --- damaged files ---


@pytest.mark.parametrize("content", [b"", b"GG", b"GGUF", b"GGUF\x03\0\0\0", b"\0" * 64])
def test_what_is_no_gguf_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with pytest.raises(UsageError) as caught:
        open_gguf(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04" + b"\0" * 60, b"<html>no</html>"])
def test_other_files_are_called_that(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    assert "not a GGUF file" in refusal(path)


@pytest.mark.parametrize("cut", [8, 23, 24, 30, 60, 100, 1000, 4096, 5001, 500_000, 45_000_000])
def test_a_truncated_real_file_is_refused(smollm2_gguf: Path, cut: int, tmp_path: Path) -> None:
    """In the header, in metadata, in the vocabulary and in the tensors."""
    size = cut if cut > 0 else smollm2_gguf.stat().st_size + cut
    path = tmp_path / "cut.gguf"
    with smollm2_gguf.open("rb") as file:
        path.write_bytes(file.read(size))
    message = refusal(path)
    assert "truncated" in message
    assert "fetch" in message


def test_a_real_header_is_read_as_by_its_makers(smollm2_gguf: Path) -> None:
    metadata, tensors = read_header(smollm2_gguf)
    reader = gguf.GGUFReader(smollm2_gguf)
    assert metadata == {
        name: field.contents()
        for name, field in reader.fields.items()
        if not name.startswith("GGUF.")
    }
    assert len(tensors) == len(reader.tensors) > 200
    for tensor in reader.tensors:
        shape, kind, offset, size = tensors[tensor.name]
        assert shape == tuple(reversed(tensor.shape.tolist()))
        assert (kind, offset, size) == (tensor.tensor_type, tensor.data_offset, tensor.n_bytes)


def test_every_cut_of_a_small_file_is_refused(models: dict[str, Written], tmp_path: Path) -> None:
    whole = save(models["llama"], tmp_path / "whole.gguf").read_bytes()
    path = tmp_path / "cut.gguf"
    # The last tensor may be followed by padding, which nobody needs.
    for size in [*range(4, 400, 13), *range(400, len(whole) - 64, 1501)]:
        path.write_bytes(whole[:size])
        assert "truncated" in refusal(path), size


@pytest.mark.parametrize(
    ("offset", "value"),
    [(4, 99), (8, 2**62), (16, 2**62), (24, 2**63)],
    ids=["version", "tensors", "fields", "name"],
)
def test_a_corrupt_header_is_refused(
    models: dict[str, Written], offset: int, value: int, tmp_path: Path
) -> None:
    path = save(models["llama"], tmp_path / "x.gguf")
    content = bytearray(path.read_bytes())
    width = 4 if offset == 4 else 8
    content[offset : offset + width] = value.to_bytes(width, "little")
    path.write_bytes(content)
    assert "not a readable GGUF file" in refusal(path)
