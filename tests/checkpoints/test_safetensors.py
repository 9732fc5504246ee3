"""Every family against `transformers`: loaded from its files, and written for it to load."""

import contextlib
import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers
from jax.sharding import NamedSharding, PartitionSpec

from grm_jax import checkpoints
from grm_jax.checkpoints.hub_config import config_from_hub, config_to_hub
from grm_jax.checkpoints.safetensors import hub_names
from grm_jax.checkpoints.weights import pieces
from grm_jax.distributed import make_mesh
from grm_jax.errors import UsageError
from grm_jax.models import (
    FAMILIES,
    DecoderConfig,
    Params,
    abstract_params,
    family_config,
    forward,
    forward_parallel,
    reward,
    unembed,
)
from tests.checkpoints import hub
from tests.models.caches import appended, empty_own

LENGTHS = (24, 19, 11, 1)
TIME = 24
PREFILL = 13  # longer than the windows of 8

# Compiling takes nearly all the time of these tests, and none of them measures speed.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
run = functools.partial(jax.jit, static_argnums=1, compiler_options=QUICK)


@run
def logprobs(
    params: Params, config: DecoderConfig, tokens: jax.Array, lengths: jax.Array
) -> jax.Array:
    hidden, _ = forward(params, config, tokens, length=lengths)
    return jax.nn.log_softmax(unembed(params, config, hidden))


@functools.cache
def tokens() -> np.ndarray:
    return np.random.default_rng(1).integers(3, hub.VOCAB, (len(LENGTHS), TIME), np.int32)


@pytest.fixture(scope="module", params=hub.FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp(request.param)
    model = hub.write(request.param, folder)
    return request.param, folder, model, wanted_logprobs(model)


def wanted_logprobs(model: torch.nn.Module) -> list[np.ndarray]:
    """Of each row alone, without padding."""
    out = []
    for row, length in zip(tokens(), LENGTHS, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor(row[None, :length])).logits[0].float()
        out.append(torch.log_softmax(logits, dim=-1).numpy())
    assert out[0].std() > 0.3, "the model must be far from uniform for this to say anything"
    return out


def assert_rows_close(found: jax.Array, wanted: list[np.ndarray], begin: int = 0) -> None:
    for row, expected in zip(np.asarray(found), wanted, strict=True):
        np.testing.assert_allclose(row[: len(expected)], expected[begin:], atol=1e-4)


def test_log_probabilities_of_ragged_batches(family: Any) -> None:
    _, folder, _, wanted = family
    config, params = checkpoints.load(str(folder))
    found = logprobs(params, config, tokens(), np.asarray(LENGTHS))
    assert_rows_close(found, wanted)


def test_cached_decoding(family: Any) -> None:
    """Two samples of each prompt write its own continuation, token by token."""
    _, folder, _, wanted = family
    config, params = checkpoints.load(str(folder))
    rows = 2
    prompts = np.asarray([PREFILL, PREFILL - 4], np.int32)
    steps = 8
    prefill, step_ = run(forward), run(forward_parallel)
    _, prefix = prefill(params, config, tokens()[:rows, :PREFILL], length=prompts)
    own = empty_own(config, jnp.asarray(prompts), 2, steps)
    for step in range(steps):
        at = prompts + step
        here = np.tile(tokens()[np.arange(rows), at][:, None], (1, 2))
        hidden, new = step_(params, config, here, past=(prefix,), own=own)
        own = appended(own, new, step)
        found = jax.nn.log_softmax(unembed(params, config, hidden))
        for row in range(rows):
            for sample in range(2):
                np.testing.assert_allclose(
                    found[row, sample], wanted[row][at[row]], atol=1e-4, err_msg=f"step {step}"
                )


def test_log_probabilities_on_eight_devices(family: Any) -> None:
    name, folder, _, wanted = family
    mesh = make_mesh({"fsdp": 2, "tensor": 2, "expert": 2})
    config, params = checkpoints.load(str(folder), mesh=mesh)
    rows = NamedSharding(mesh, PartitionSpec("fsdp"))
    batch = jax.device_put((tokens(), np.asarray(LENGTHS)), rows)
    # Where the mesh is set, experts divide their work by hand; one family is enough for that.
    for ambient in (False, True)[: 1 + (name == "deepseek_v3")]:
        with jax.set_mesh(mesh) if ambient else contextlib.nullcontext():
            found = logprobs(params, config, *batch)
        assert len(found.sharding.device_set) == 8
        assert_rows_close(found, wanted)


def test_what_is_written_loads_bit_for_bit(family: Any, tmp_path: Path) -> None:
    name, folder, model, wanted = family
    config, params = checkpoints.load(str(folder))
    checkpoints.save_folder(tmp_path, config, params, shard_bytes=60_000)
    again = type(model).from_pretrained(tmp_path, attn_implementation="eager").eval()
    theirs, ours = model.state_dict(), again.state_dict()
    assert theirs.keys() == ours.keys()
    for key, tensor in theirs.items():
        assert torch.equal(tensor, ours[key]), key
    # The configuration says the same as well.
    with torch.no_grad():
        logits = again(torch.tensor(tokens()[:1, : LENGTHS[0]])).logits[0].float()
    np.testing.assert_allclose(torch.log_softmax(logits, -1), wanted[0], atol=1e-6)
    listed = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(listed.values())) > 1, "the weights should be in several files"
    assert config_from_hub(config_to_hub(config), name) == config


@pytest.mark.parametrize("name", hub.CLASSIFIERS)
def test_classifiers(name: str, tmp_path: Path) -> None:
    model = hub.write(name, tmp_path / "theirs")
    config, params = checkpoints.load(str(tmp_path / "theirs"))
    wanted = []
    for row, length in zip(tokens(), LENGTHS, strict=True):
        with torch.no_grad():
            wanted.append(model(torch.tensor(row[None, :length])).logits[0, 0].item())
    assert np.std(wanted) > 0.1
    found = run(reward)(params, config, tokens(), np.asarray(LENGTHS))
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    _, spread = checkpoints.load(str(tmp_path / "theirs"), mesh=mesh)
    found = run(reward)(spread, config, tokens(), np.asarray(LENGTHS))
    assert len(found.sharding.device_set) == 8
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    checkpoints.save_folder(tmp_path / "ours", config, params)
    again = type(model).from_pretrained(tmp_path / "ours")
    ours = again.state_dict()
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, ours[key]), key
    assert config_from_hub(config_to_hub(config), name) == config


@pytest.mark.parametrize("name", hub.FAMILIES)
def test_bytes_of_cache_a_token(name: str) -> None:
    """Two vectors a key head or, of latent attention, the latent vector and the rotated key."""
    config = config_from_hub(hub.settings(name)[1].to_dict(), name)
    _, segment = jax.eval_shape(
        lambda params: forward(params, config, tokens(), length=np.asarray(LENGTHS)),
        abstract_params(config),
    )
    kept = sum(leaf.size for leaf in jax.tree.leaves((segment.keys, segment.values)))
    each = 24 + 8 if name.startswith("deepseek") else 2 * 2 * config.head_dim
    assert kept == 4 * each * len(LENGTHS) * TIME
    assert config.cache_width == 4 * each


def test_every_family_is_tested() -> None:
    kinds = {hub.settings(name)[1].model_type.removesuffix("_text") for name in hub.FAMILIES}
    assert kinds == set(FAMILIES)


# --- other types ---


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    hub.write("llama", folder)
    return folder


@pytest.fixture
def copied(llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "copy"))


def test_bfloat16_files_load_exactly(tmp_path: Path) -> None:
    kind, config = hub.settings("qwen2")
    model = kind(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    for dtype in (jnp.float32, jnp.bfloat16):
        _, params = checkpoints.load(str(tmp_path), dtype)
        found = params["layers"]["mlp"]["down"]["kernel"]
        assert found.dtype == dtype
        wanted = torch.stack([layer.mlp.down_proj.weight for layer in model.model.layers])
        np.testing.assert_array_equal(found.astype(jnp.float32), wanted.float().detach())


def test_eight_bit_floats_are_scaled_by_block(tmp_path: Path) -> None:
    """As DeepSeek-V3 is released: blocks of 128 by 128, the last ones cut off."""
    name = "model.layers.1.mlp.down_proj.weight"
    config = transformers.LlamaConfig(
        **{**hub.settings("llama")[1].to_dict(), "hidden_size": 192, "intermediate_size": 160}
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    rng = np.random.default_rng(0)
    codes = rng.normal(size=(192, 160)).astype(ml_dtypes.float8_e4m3fn)
    scales = np.asarray([[1.0, 2.0], [4.0, 8.0]], np.float32)
    tensors |= {name: codes, f"{name}_scale_inv": scales}
    safetensors.numpy.save_file(tensors, path)
    _, params = checkpoints.load(str(tmp_path))
    found = params["layers"]["mlp"]["down"]["kernel"][1]
    codes = codes.astype(np.float32)
    for rows, columns, factor in [(0, 0, 1), (0, 1, 2), (1, 0, 4), (1, 1, 8)]:
        block = np.s_[rows * 128 : rows * 128 + 128, columns * 128 : columns * 128 + 128]
        np.testing.assert_array_equal(found[block], codes[block] * factor)


# --- what can be wrong with a folder ---


def edit_json(path: Path, **values: Any) -> None:
    found = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in (found | values).items() if v is not None}))


def error_of(folder: Path) -> str:
    with pytest.raises(UsageError) as caught:
        checkpoints.load(str(folder))
    text = str(caught.value)
    assert "\n" not in text
    return text


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def test_truncated_shard(copied: Path) -> None:
    shard = shards(copied)[1]
    shard.write_bytes(shard.read_bytes()[:-10])
    text = error_of(copied)
    assert shard.name in text and "truncated" in text and "tensor model." in text


@pytest.mark.parametrize("content", [b"", b"\x05", b"\xff" * 64, b"\x02" + bytes(7) + b"[]"])
def test_no_header(copied: Path, content: bytes) -> None:
    shards(copied)[0].write_bytes(content)
    assert shards(copied)[0].name in error_of(copied)


def test_missing_shard(copied: Path) -> None:
    shard = shards(copied)[1]
    shard.unlink()
    assert f"lacks {shard.name}" in error_of(copied)


def test_index_that_names_a_missing_tensor(copied: Path) -> None:
    index = copied / "model.safetensors.index.json"
    listed = json.loads(index.read_text())["weight_map"]
    listed["model.layers.9.extra"] = next(iter(listed.values()))
    edit_json(index, weight_map=listed)
    assert "model.layers.9.extra" in error_of(copied)


def rewrite(folder: Path, change: Any) -> None:
    """Puts the checkpoint into one file, changed."""
    tensors: dict[str, np.ndarray] = {}
    for shard in shards(folder):
        tensors |= safetensors.numpy.load_file(shard)
        shard.unlink()
    (folder / "model.safetensors.index.json").unlink()
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")


NAME = "model.layers.2.self_attn.k_proj.weight"


def test_tensor_that_is_missing(copied: Path) -> None:
    rewrite(copied, lambda tensors: tensors.pop(NAME))
    assert error_of(copied) == f"{copied} lacks tensor {NAME}"


def test_tensor_that_is_unexpected(copied: Path) -> None:
    rewrite(copied, lambda tensors: tensors.update({"model.layers.2.x": np.zeros(3, np.float32)}))
    assert "model.layers.2.x" in error_of(copied)


def test_tensor_of_another_shape(copied: Path) -> None:
    rewrite(copied, lambda tensors: tensors.update({NAME: tensors[NAME][:-1]}))
    assert f"tensor {NAME} has shape (15, 32), the configuration implies (16, 32)" in error_of(
        copied
    )


def test_tensor_of_a_wrong_type(copied: Path) -> None:
    rewrite(copied, lambda tensors: tensors.update({NAME: tensors[NAME].astype(np.int32)}))
    assert f"tensor {NAME} has type I32" in error_of(copied)


def test_unknown_architecture_lists_the_known(copied: Path) -> None:
    edit_json(copied / "config.json", model_type="mamba")
    text = error_of(copied)
    assert "'mamba'" in text
    for name in ("llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "deepseek_v2", "deepseek_v3"):
        assert name in text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_size": None}, "no field 'hidden_size'"),
        ({"hidden_act": "relu"}, "activation 'relu'"),
        ({"num_key_value_heads": 3}, "not a multiple of num_kv_heads=3"),
        ({"attention_bias": True}, "attention_bias"),
        ({"rope_parameters": {"rope_type": "dynamic"}}, "'dynamic'"),
    ],
)
def test_configurations_that_cannot_be_done(copied: Path, change: Any, words: str) -> None:
    edit_json(copied / "config.json", **change)
    assert words in error_of(copied)


def test_pickled_weights_are_refused(copied: Path) -> None:
    for shard in shards(copied):
        shard.unlink()
    (copied / "model.safetensors.index.json").unlink()
    (copied / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    assert "pytorch_model.bin" in error_of(copied)


def test_no_weights(tmp_path: Path, llama: Path) -> None:
    shutil.copy(llama / "config.json", tmp_path)
    assert "has no safetensors files" in error_of(tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert "cannot be read" in error_of(tmp_path)


# --- memory ---

MEASURE = """
import resource, sys
from grm_jax import checkpoints
config, params = checkpoints.load(sys.argv[1])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@pytest.mark.slow
def test_a_large_checkpoint_is_loaded_without_a_second_copy(tmp_path: Path) -> None:
    """Peak resident memory of the whole process, Python and JAX included, over the files' size."""
    config = family_config(
        "llama",
        vocab_size=8192,
        num_layers=12,
        width=2048,
        num_heads=16,
        num_kv_heads=16,
        mlp_dim=6144,
        max_context=64,
    )
    wanted = list(pieces(config, hub_names(config)))
    rng = np.random.default_rng(0)
    total, listed = 0, {}
    for number in range(6):
        part = {
            piece.name: rng.standard_normal(piece.shape, np.float32) for piece in wanted[number::6]
        }
        name = f"model-{number}.safetensors"
        safetensors.numpy.save_file(part, tmp_path / name)
        listed |= dict.fromkeys(part, name)
        total += sum(array.nbytes for array in part.values())
    assert total > 2 << 30
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))
    (tmp_path / "config.json").write_text(json.dumps(config_to_hub(config)))
    env = os.environ | {"XLA_FLAGS": ""}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env=env,
    )
    assert int(done.stdout) <= 1.3 * total, f"{int(done.stdout) / total:.2f} times the size"
