"""Small random checkpoints of every family, written by `transformers`."""

from pathlib import Path
from typing import Any

import torch
import transformers as hf

VOCAB = 96
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 20,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.8,
    "mscale_all_dim": 0.6,
}


def _rope(theta: float, **rest: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta, **rest}


def _build(config: type, model: type, **values: Any) -> tuple[type, Any]:
    return model, config(**(_COMMON | values))


def settings(name: str) -> tuple[type, Any]:
    """The model class of a case, and its configuration with every feature of the family on."""
    llama3 = _rope(5000.0, rope_type="llama3", factor=4.0, low_freq_factor=1.0)
    llama3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 16}
    gemma3 = {
        "sliding_attention": _rope(300.0),
        "full_attention": _rope(5000.0, rope_type="linear", factor=8.0),
    }
    gemma: dict[str, Any] = {"head_dim": 16, "query_pre_attn_scalar": 20, "sliding_window": 8}
    gemma2 = gemma | {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0}
    gemma2["rope_parameters"] = _rope(5000.0)
    grouped = {"n_group": 4, "topk_group": 2}
    match name:
        case "llama":
            return _build(hf.LlamaConfig, hf.LlamaForCausalLM, rope_parameters=llama3)
        case "qwen2":
            return _build(hf.Qwen2Config, hf.Qwen2ForCausalLM, rope_parameters=_rope(5000.0))
        case "qwen3":
            return _build(
                *(hf.Qwen3Config, hf.Qwen3ForCausalLM),
                head_dim=16,
                rope_parameters=_rope(5000.0, **(_YARN | {"mscale": None, "mscale_all_dim": None})),
                tie_word_embeddings=True,
            )
        case "gemma2":
            return _build(hf.Gemma2Config, hf.Gemma2ForCausalLM, **gemma2)
        case "gemma3":
            types = ["sliding_attention", "sliding_attention", "full_attention"]
            return _build(
                *(hf.Gemma3TextConfig, hf.Gemma3ForCausalLM),
                **gemma,
                rope_parameters=gemma3,
                layer_types=[*types, "sliding_attention"],
            )
        case "deepseek_v2":
            return _build(
                *(hf.DeepseekV2Config, hf.DeepseekV2ForCausalLM),
                **_LATENT,
                **grouped,
                q_lora_rank=16,
                topk_method="group_limited_greedy",
                routed_scaling_factor=1.5,
                rope_parameters=_YARN,
            )
        case "deepseek_v2_lite":
            return _build(
                *(hf.DeepseekV2Config, hf.DeepseekV2ForCausalLM),
                **_LATENT,
                q_lora_rank=None,
                topk_method="greedy",
                rope_parameters=_YARN,
            )
        case "deepseek_v3":
            return _build(
                *(hf.DeepseekV3Config, hf.DeepseekV3ForCausalLM),
                **_LATENT,
                **grouped,
                q_lora_rank=16,
                rope_parameters=_YARN,
            )
        case "gemma2_classifier":
            return _build(
                hf.Gemma2Config, hf.Gemma2ForSequenceClassification, num_labels=1, **gemma2
            )
        case "llama_classifier":
            return _build(
                *(hf.LlamaConfig, hf.LlamaForSequenceClassification),
                num_labels=1,
                rope_parameters=_rope(5000.0),
            )
    raise KeyError(name)


FAMILIES = (
    *("llama", "qwen2", "qwen3", "gemma2", "gemma3"),
    *("deepseek_v2", "deepseek_v2_lite", "deepseek_v3"),
)
CLASSIFIERS = ("gemma2_classifier", "llama_classifier")


def write(name: str, folder: Path, shard: str = "60KB") -> torch.nn.Module:
    """Writes the checkpoint of a case, in several files, and returns its model."""
    kind, config = settings(name)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model: Any = kind(config).eval()
    with torch.no_grad():
        for key, value in model.state_dict().items():
            # Far from the defaults, so that every tensor matters and logits are not uniform.
            centre = 1.0 if "norm" in key and "gemma" not in name else 0.0
            value.copy_(centre + 0.25 * torch.randn_like(value))
    model.save_pretrained(folder, max_shard_size=shard)
    found: torch.nn.Module = model
    return found
