"""Adapters in PEFT's layout: what is written loads there, and what it writes loads here."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers

from grm_jax import checkpoints
from grm_jax.distributed import make_mesh
from grm_jax.errors import UsageError
from grm_jax.models import (
    DecoderConfig,
    Lora,
    Params,
    add_lora,
    join_lora,
    logits,
    merge_lora,
    quantise_params,
    reward,
    split_lora,
)
from tests.checkpoints import hub

TOKENS = np.random.default_rng(0).integers(3, hub.VOCAB, (2, 12), np.int32)
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
# In the order of `LORA_TARGETS`, in which they are read.
CASES = {
    "qwen2": ("q", "v", "down"),
    "gemma2": ("q", "k", "v", "out", "gate", "up", "down"),
    # Rows of these are permuted on their way, since released rotary pairs are interleaved.
    "deepseek_v2": ("out", "q_a", "q_b", "kv_a", "kv_b"),
}


def logprobs(config: DecoderConfig, params: Params) -> np.ndarray:
    run = jax.jit(logits, static_argnums=1, compiler_options=QUICK)
    return np.asarray(jax.nn.log_softmax(run(params, config, TOKENS)))


def their_logprobs(model: Any) -> np.ndarray:
    with torch.no_grad():
        out = torch.log_softmax(model(torch.tensor(TOKENS)).logits.float(), -1)
    found: np.ndarray = out.numpy()
    return found


def adapted(folder: Path, targets: tuple[str, ...]) -> tuple[DecoderConfig, Params]:
    config, params = checkpoints.load(str(folder))
    lora = Lora(rank=3, alpha=5.0, targets=targets)
    config, params = add_lora(config, params, lora, jax.random.key(0))
    adapters, base = split_lora(params)
    rng = np.random.default_rng(1)
    adapters = jax.tree.map(
        lambda leaf: np.asarray(0.2 * rng.standard_normal(leaf.shape), np.float32), adapters
    )
    return config, join_lora(adapters, base)


@pytest.mark.parametrize(
    "name",
    ["qwen2", *(pytest.param(name, marks=pytest.mark.slow) for name in CASES if name != "qwen2")],
)
def test_adapters_that_are_written_load_in_peft(name: str, tmp_path: Path) -> None:
    model = hub.write(name, tmp_path / "base")
    config, params = adapted(tmp_path / "base", CASES[name])
    checkpoints.save_adapter(tmp_path / "adapter", config, params, base=str(tmp_path / "base"))
    plain = their_logprobs(model)
    wrapped = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
    wanted = their_logprobs(wrapped)
    assert np.abs(wanted - plain).max() > 0.1, "the adapters should matter"
    np.testing.assert_allclose(logprobs(config, params), wanted, atol=1e-4)
    # And they come back as they were, over a quantised base too.
    base = checkpoints.load(str(tmp_path / "base"))
    for config_, params_ in (base, quantise_params(*base, "int8")):
        again_config, again = checkpoints.load_adapter(tmp_path / "adapter", config_, params_)
        assert again_config.lora == config.lora
        jax.tree.map(np.testing.assert_array_equal, split_lora(again)[0], split_lora(params)[0])


def test_merged_export_equals_the_adapter_applied(tmp_path: Path) -> None:
    model = hub.write("qwen2", tmp_path / "base")
    config, params = adapted(tmp_path / "base", CASES["qwen2"])
    checkpoints.save_folder(tmp_path / "merged", *merge_lora(config, params))
    merged = checkpoints.load(str(tmp_path / "merged"))
    np.testing.assert_allclose(logprobs(*merged), logprobs(config, params), atol=1e-5)
    again = type(model).from_pretrained(tmp_path / "merged").eval()
    np.testing.assert_allclose(their_logprobs(again), logprobs(config, params), atol=1e-4)
    with pytest.raises(UsageError, match="merge adapters"):
        checkpoints.save_folder(tmp_path / "apart", config, params)


@pytest.mark.parametrize("rslora", [False, True])
def test_adapters_that_peft_writes(rslora: bool, tmp_path: Path) -> None:
    model = hub.write("qwen2", tmp_path / "base")
    settings = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["v_proj", "up_proj"], use_rslora=rslora
    )
    wrapped = peft.get_peft_model(model, settings).eval()
    with torch.no_grad():
        for key, value in wrapped.named_parameters():
            if "lora_B" in key:
                value.copy_(0.2 * torch.randn_like(value))
    wrapped.save_pretrained(tmp_path / "adapter")
    base = checkpoints.load(str(tmp_path / "base"))
    config, params = checkpoints.load_adapter(tmp_path / "adapter", *base)
    assert config.lora is not None and config.lora.targets == ("v", "up")
    np.testing.assert_allclose(logprobs(config, params), their_logprobs(wrapped), atol=1e-4)


# --- adapters with a classifier's head, the meta reward model's ---


def rewards(config: DecoderConfig, params: Params) -> np.ndarray:
    run = jax.jit(reward, static_argnums=1, compiler_options=QUICK)
    return np.asarray(run(params, config, TOKENS, jnp.asarray([12, 12])))


def their_rewards(model: Any) -> np.ndarray:
    with torch.no_grad():
        found: np.ndarray = model(torch.tensor(TOKENS)).logits[:, 0].float().numpy()
    return found


def classifier(base: Path) -> Any:
    """PEFT's own way from a language model to a classifier, whose head is fresh."""
    kind = transformers.AutoModelForSequenceClassification
    return kind.from_pretrained(base, num_labels=1).eval()


def with_head(base: Path) -> tuple[DecoderConfig, Params]:
    """A language model turned into a classifier, with adapters."""
    config, params = adapted(base, ("q", "v", "down"))
    head = np.random.default_rng(2).standard_normal((1, config.width)).astype(np.float32)
    rest = {name: leaf for name, leaf in params.items() if name != "head"}
    return dataclasses.replace(config, num_labels=1), {**rest, "score": head}


@pytest.mark.parametrize("name", ["llama", "gemma2"])  # with a matrix for logits, and without
def test_adapters_with_a_head_load_in_peft_and_name_their_base(name: str, tmp_path: Path) -> None:
    base, folder = tmp_path / "base", tmp_path / "adapter"
    hub.write(name, base)
    config, params = with_head(base)
    checkpoints.save_adapter(folder, config, params, base=str(base))
    written = json.loads((folder / "adapter_config.json").read_text())
    assert (written["task_type"], written["modules_to_save"]) == ("SEQ_CLS", ["score"])
    wanted = rewards(config, params)
    theirs = peft.PeftModel.from_pretrained(classifier(base), folder).eval()
    np.testing.assert_allclose(wanted, their_rewards(theirs), atol=1e-4)
    # The folder alone is enough, on one device and on several.
    for mesh in (None, make_mesh({"fsdp": 4, "tensor": 2})):
        found_config, found = checkpoints.load(str(folder), mesh=mesh)
        assert (found_config.num_labels, found_config.lora) == (1, config.lora)
        jax.tree.map(np.testing.assert_array_equal, found, params)
    # So is the name of the base, and what has a head of its own gets the new one.
    for num_labels in (0, 1):
        plain_config, plain = checkpoints.load(str(base))
        if num_labels:
            plain_config = dataclasses.replace(plain_config, num_labels=1)
            plain = {**plain, "score": np.zeros_like(params["score"])}
        loaded = checkpoints.load_adapter(folder, plain_config, plain)
        np.testing.assert_array_equal(rewards(*loaded), wanted)
        np.testing.assert_allclose(rewards(*merge_lora(*loaded)), wanted, atol=1e-5)


def test_a_head_that_peft_writes(tmp_path: Path) -> None:
    hub.write("llama", tmp_path / "base")
    settings = peft.LoraConfig(
        task_type="SEQ_CLS", r=4, lora_alpha=6, target_modules=["v_proj", "up_proj"]
    )
    wrapped = peft.get_peft_model(classifier(tmp_path / "base"), settings).eval()
    with torch.no_grad():
        for key, value in wrapped.named_parameters():
            if "lora_B" in key or "score.modules_to_save" in key:
                value.copy_(0.2 * torch.randn_like(value))
    wrapped.save_pretrained(tmp_path / "adapter")
    found = checkpoints.load(str(tmp_path / "adapter"))
    np.testing.assert_allclose(rewards(*found), their_rewards(wrapped), atol=1e-4)


def test_adapters_are_written_in_half_the_bytes(tmp_path: Path) -> None:
    base, file = tmp_path / "base", "adapter_model.safetensors"
    hub.write("llama", base)
    config, params = with_head(base)
    for name, dtype in (("whole", None), ("half", "bfloat16")):
        checkpoints.save_adapter(tmp_path / name, config, params, base=str(base), dtype=dtype)
    sizes = [(tmp_path / name / file).stat().st_size for name in ("whole", "half")]
    assert sizes[1] < 0.65 * sizes[0]
    _, found = checkpoints.load(str(tmp_path / "half"))
    adapters, kept = split_lora(found)
    wanted, _ = split_lora(params)

    def check(found: Any, wanted: Any) -> None:
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, np.asarray(wanted, jnp.bfloat16).astype(np.float32))

    jax.tree.map(check, adapters, wanted)
    check(kept["score"], params["score"])
    theirs = peft.PeftModel.from_pretrained(classifier(base), tmp_path / "half").eval()
    np.testing.assert_allclose(
        rewards(*checkpoints.load(str(tmp_path / "half"))), their_rewards(theirs), atol=1e-4
    )


def test_folders_whose_base_cannot_be_opened(tmp_path: Path) -> None:
    base, folder = tmp_path / "base", tmp_path / "adapter"
    hub.write("llama", base)
    config, params = with_head(base)
    for name, words in (
        (None, "names no base model in base_model_name_or_path"),
        (str(tmp_path / "nowhere"), f"{folder} holds adapters of another model: no model"),
        (str(folder), "holds no model"),
    ):
        checkpoints.save_adapter(folder, config, params, base=name)
        with pytest.raises(UsageError, match=words):
            checkpoints.open_checkpoint(str(folder))
    two = dataclasses.replace(config, num_labels=2)
    wide = {**params, "score": np.concatenate([params["score"]] * 2)}
    checkpoints.save_adapter(folder, two, wide, base=str(base))
    with pytest.raises(UsageError, match="a head of 2 outputs, but its base model has 1"):
        checkpoints.load_adapter(folder, dataclasses.replace(config, lora=None), params)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"modules_to_save": ["score", "lm_head"]}, "modules_to_save 'lm_head'"),
        ({"peft_type": "IA3"}, "'IA3'"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "trains biases"),
        ({"r": 5}, "has shape"),
    ],
)
def test_adapters_that_cannot_be_loaded(change: Any, words: str, tmp_path: Path) -> None:
    hub.write("qwen2", tmp_path / "base")
    config, params = adapted(tmp_path / "base", ("q",))
    checkpoints.save_adapter(tmp_path / "adapter", config, params)
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    base = checkpoints.load(str(tmp_path / "base"))
    with pytest.raises(UsageError, match=words):
        checkpoints.load_adapter(tmp_path / "adapter", *base)
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    path.write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(UsageError, match=r"has no adapter_model\.safetensors"):
        checkpoints.load_adapter(tmp_path / "adapter", *base)


def test_what_has_no_place_in_the_layout(tmp_path: Path) -> None:
    hub.write("deepseek_v2_lite", tmp_path / "base")
    base = checkpoints.load(str(tmp_path / "base"))
    with pytest.raises(UsageError, match="no adapters to write"):
        checkpoints.save_adapter(tmp_path / "adapter", *base)
    config, params = adapted(tmp_path / "base", ("experts",))
    with pytest.raises(UsageError, match="adapters of experts"):
        checkpoints.save_adapter(tmp_path / "adapter", config, params)
