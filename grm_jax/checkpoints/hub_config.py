"""`config.json` of published checkpoints, to the decoder's configuration and back."""

import math
from collections.abc import Mapping
from typing import Any

from grm_jax.errors import UsageError
from grm_jax.models import (
    GLOBAL_WINDOW,
    DecoderConfig,
    Experts,
    Latent,
    Rope,
    family_config,
    sliding_windows,
)
from grm_jax.models.rope import yarn_growth

Json = Mapping[str, Any]

# What each family's files call it, and its classes.
_MODEL_TYPES = {
    "llama": ("llama", "Llama"),
    "qwen2": ("qwen2", "Qwen2"),
    "qwen3": ("qwen3", "Qwen3"),
    "gemma2": ("gemma2", "Gemma2"),
    "gemma3_text": ("gemma3", "Gemma3"),
    "deepseek_v2": ("deepseek_v2", "DeepseekV2"),
    "deepseek_v3": ("deepseek_v3", "DeepseekV3"),
}
_CLASSIFIER = "ForSequenceClassification"
_ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
_EPS = 1e-6


def config_from_hub(found: Json, source: object) -> DecoderConfig:
    """The decoder that a `config.json` describes.

    Args:
      found: The file's content.
      source: What to call it in errors.

    Raises:
      UsageError: If the architecture is unknown, a value is missing, or something is asked for
        that the decoder does not do.
    """
    kind = found.get("model_type")
    if kind not in _MODEL_TYPES:
        raise UsageError(
            f"{source} describes a {kind!r} model; these can be loaded: {', '.join(_MODEL_TYPES)}"
        )
    family, _ = _MODEL_TYPES[kind]
    try:
        values = _common(found, family)
        if family in ("gemma2", "gemma3"):
            values |= _gemma(found, family)
        elif family.startswith("deepseek"):
            values |= _deepseek(found, family, values["num_layers"])
        _refuse(found, source)
        return family_config(family, **values)
    except KeyError as error:
        raise UsageError(f"{source} has no field {error.args[0]!r}") from error
    except (TypeError, ValueError) as error:
        raise UsageError(f"{source} contradicts itself: {error}") from error


def _common(found: Json, family: str) -> dict[str, Any]:
    heads, width = found["num_attention_heads"], found["hidden_size"]
    activation = found.get("hidden_activation") or found.get("hidden_act") or "silu"
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is not one of {', '.join(_ACTIVATIONS)}")
    gemma = family.startswith("gemma")
    values = {
        "vocab_size": found["vocab_size"],
        "num_layers": found["num_hidden_layers"],
        "width": width,
        "num_heads": heads,
        "num_kv_heads": found.get("num_key_value_heads") or heads,
        "head_dim": found.get("head_dim") or (256 if gemma else width // heads),
        "mlp_dim": found["intermediate_size"],
        "max_context": found["max_position_embeddings"],
        "norm_eps": found.get("rms_norm_eps", _EPS),
        "activation": _ACTIVATIONS[activation],
        "tie_embeddings": bool(found.get("tie_word_embeddings", gemma)),
        "rope": _rope(found, "full_attention"),
        "rope_local": _rope(found, "sliding_attention"),
        "num_labels": _labels(found),
    }
    if family in ("qwen2", "qwen3") and found.get("use_sliding_window"):
        kinds = found.get("layer_types")
        full = found.get("max_window_layers", 0)
        values["windows"] = tuple(
            found["sliding_window"]
            if (kinds[layer] == "sliding_attention" if kinds else layer >= full)
            else GLOBAL_WINDOW
            for layer in range(values["num_layers"])
        )
    return values


def _gemma(found: Json, family: str) -> dict[str, Any]:
    layers = found["num_hidden_layers"]
    window = found.get("sliding_window", 4096)
    kinds = found.get("layer_types")
    if kinds:
        windows = tuple(window if kind == "sliding_attention" else GLOBAL_WINDOW for kind in kinds)
    else:
        every = 2 if family == "gemma2" else found.get("sliding_window_pattern", 6)
        windows = sliding_windows(layers, window, every)
    return {
        "query_scale": found.get("query_pre_attn_scalar", 256) ** -0.5,
        "windows": windows,
        "attention_softcap": found.get(
            "attn_logit_softcapping", 50.0 if family == "gemma2" else None
        ),
        "logit_softcap": found.get("final_logit_softcapping", 30.0 if family == "gemma2" else None),
    }


def _deepseek(found: Json, family: str, layers: int) -> dict[str, Any]:
    latent = Latent(
        query_rank=found.get("q_lora_rank"),
        rank=found["kv_lora_rank"],
        nope_dim=found["qk_nope_head_dim"],
        rope_dim=found["qk_rope_head_dim"],
        value_dim=found["v_head_dim"],
    )
    third = family == "deepseek_v3"
    scoring = found.get("scoring_func", "sigmoid" if third else "softmax")
    if scoring != ("sigmoid" if third else "softmax"):
        raise ValueError(f"scoring_func {scoring!r} is not that of {family}")
    limited = third or found.get("topk_method", "greedy") == "group_limited_greedy"
    per_token = found["num_experts_per_tok"]
    experts = Experts(
        count=found["n_routed_experts"],
        per_token=per_token,
        mlp_dim=found["moe_intermediate_size"],
        shared_dim=found["moe_intermediate_size"] * (found.get("n_shared_experts") or 0),
        dense_layers=found.get("first_k_dense_replace", 0),
        gating="sigmoid" if third else "softmax",
        groups=(found.get("n_group") or 1) if limited else 1,
        top_groups=(found.get("topk_group") or 1) if limited else 1,
        # DeepSeek-V2's own code does not scale weights that it has normalised; no release does.
        normalise=third and bool(found.get("norm_topk_prob", True)),
        scale=found.get("routed_scaling_factor", 1.0),
    )
    if found.get("moe_layer_freq", 1) != 1:
        raise ValueError("moe_layer_freq is not 1: every layer after the dense ones has experts")
    if not third and found.get("norm_topk_prob"):
        raise ValueError("norm_topk_prob is set; released DeepSeek-V2 models leave it off")
    rope = _rope(found, "full_attention")
    growth = yarn_growth(rope.factor, rope.mscale_all_dim) if rope.kind == "yarn" else 1.0
    scale = (latent.nope_dim + latent.rope_dim) ** -0.5 * growth**2
    dense = experts.dense_layers >= layers
    return {
        "latent": latent,
        "experts": None if dense else experts,
        "query_scale": scale,
        "num_kv_heads": found["num_attention_heads"],
    }


def _rope(found: Json, layer_type: str) -> Rope:
    """The rotations of a type of layer, from the older fields or the newer `rope_parameters`."""
    gemma3 = found["model_type"] == "gemma3_text"
    local = gemma3 and layer_type == "sliding_attention"
    default = 10_000.0 if local or not gemma3 else 1_000_000.0
    theta = found.get("rope_local_base_freq" if local else "rope_theta", default)
    given: dict[str, Any] = dict((not local and found.get("rope_scaling")) or {})
    newer = found.get("rope_parameters") or {}
    given |= newer.get(layer_type, {}) if gemma3 else newer
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in ("default", "linear", "llama3", "yarn"):
        raise ValueError(f"rope scaling of type {kind!r} is not supported")
    if given.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError("partial_rotary_factor is not supported")
    longest = found["max_position_embeddings"]
    context: int = given.get("original_max_position_embeddings") or longest
    stretched = kind in ("llama3", "yarn")
    return Rope(
        theta=float(given.get("rope_theta") or theta),
        kind=kind,
        factor=float(given.get("factor") or longest / context),
        original_context=context if stretched else 0,
        low_freq_factor=float(given.get("low_freq_factor", 1.0)),
        high_freq_factor=float(given.get("high_freq_factor", 4.0)),
        beta_fast=float(given.get("beta_fast") or 32.0),
        beta_slow=float(given.get("beta_slow") or 1.0),
        truncate=bool(given.get("truncate", True)),
        mscale=float(given.get("mscale") or 0.0),
        mscale_all_dim=float(given.get("mscale_all_dim") or 0.0),
        attention_factor=given.get("attention_factor"),
    )


def _labels(found: Json) -> int:
    """Outputs of a classifier's head; 0 for a language model."""
    classes = found.get("architectures") or []
    if not any(name.endswith(_CLASSIFIER) for name in classes):
        return 0
    if "id2label" in found:
        return len(found["id2label"])
    return int(found.get("num_labels", 2))


def _refuse(found: Json, source: object) -> None:
    """Names the first thing asked for that the decoder does not do."""
    for field in ("attention_bias", "mlp_bias", "use_bidirectional_attention"):
        if found.get(field):
            raise UsageError(f"{source} sets {field}, which the decoder does not have")


def config_to_hub(config: DecoderConfig) -> dict[str, Any]:
    """The `config.json` of a decoder, as `transformers` and vLLM read it."""
    c = config
    kind = next(name for name, (family, _) in _MODEL_TYPES.items() if family == c.family)
    stem = _MODEL_TYPES[kind][1]
    activation = next(name for name, ours in _ACTIVATIONS.items() if ours == c.activation)
    out: dict[str, Any] = {
        "architectures": [stem + (_CLASSIFIER if c.num_labels else "ForCausalLM")],
        "model_type": kind,
        "vocab_size": c.vocab_size,
        "hidden_size": c.width,
        "intermediate_size": c.mlp_dim,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.rope_dim,
        "hidden_act": activation,
        "max_position_embeddings": c.max_context,
        "rms_norm_eps": c.norm_eps,
        "tie_word_embeddings": c.tie_embeddings,
        "rope_theta": c.rope.theta,
        "torch_dtype": c.dtype,
    }
    if c.rope.kind != "default":
        out["rope_scaling"] = _rope_scaling(c.rope)
    if c.num_labels:
        out["id2label"] = {str(index): f"LABEL_{index}" for index in range(c.num_labels)}
        out["label2id"] = {label: int(index) for index, label in out["id2label"].items()}
    sliding = [window < GLOBAL_WINDOW for window in c.windows]
    if any(sliding):
        out["sliding_window"] = min(c.windows)
        out["layer_types"] = ["sliding_attention" if one else "full_attention" for one in sliding]
        out["use_sliding_window"] = True
    if c.family in ("gemma2", "gemma3"):
        scalar = c.query_scale**-2
        out |= {
            "hidden_activation": activation,
            "query_pre_attn_scalar": round(scalar)
            if math.isclose(scalar, round(scalar), rel_tol=1e-6)
            else scalar,
            "attn_logit_softcapping": c.attention_softcap,
            "final_logit_softcapping": c.logit_softcap,
        }
        out.pop("use_sliding_window", None)
    if c.family == "gemma3":
        out["rope_local_base_freq"] = c.rope_local.theta
    if c.latent is not None:
        out |= {
            "q_lora_rank": c.latent.query_rank,
            "kv_lora_rank": c.latent.rank,
            "qk_nope_head_dim": c.latent.nope_dim,
            "qk_rope_head_dim": c.latent.rope_dim,
            "v_head_dim": c.latent.value_dim,
        }
        out |= _experts_to_hub(c)
    return out


def _experts_to_hub(config: DecoderConfig) -> dict[str, Any]:
    e = config.experts
    if e is None:
        return {"first_k_dense_replace": config.num_layers}
    third = e.gating == "sigmoid"
    limited = "group_limited_greedy" if e.groups > 1 else "greedy"
    return {
        "n_routed_experts": e.count,
        "num_experts_per_tok": e.per_token,
        "moe_intermediate_size": e.mlp_dim,
        "n_shared_experts": e.shared_dim // e.mlp_dim,
        "first_k_dense_replace": e.dense_layers,
        "moe_layer_freq": 1,
        "n_group": e.groups,
        "topk_group": e.top_groups,
        "topk_method": "noaux_tc" if third else limited,
        "scoring_func": e.gating,
        "norm_topk_prob": e.normalise,
        "routed_scaling_factor": e.scale,
    }


def _rope_scaling(rope: Rope) -> dict[str, Any]:
    out: dict[str, Any] = {"rope_type": rope.kind, "type": rope.kind, "factor": rope.factor}
    if rope.kind == "linear":
        return out
    out["original_max_position_embeddings"] = rope.original_context
    if rope.kind == "llama3":
        return out | {
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
        }
    out |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow, "truncate": rope.truncate}
    if rope.mscale or rope.mscale_all_dim:
        out |= {"mscale": rope.mscale, "mscale_all_dim": rope.mscale_all_dim}
    if rope.attention_factor is not None:
        out["attention_factor"] = rope.attention_factor
    return out
