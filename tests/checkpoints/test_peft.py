"""Adapters in PEFT's layout: what is written loads there, and what it writes loads here."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import peft
import pytest
import torch

from grm_jax import checkpoints
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


@pytest.mark.parametrize(
    ("change", "words"),
    [
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
