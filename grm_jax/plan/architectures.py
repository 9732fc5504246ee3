"""Shapes of published models, so that a run can be planned before its weights are fetched.

What each repository's `config.json` says, as far as the decoder reads it.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import huggingface_hub

from grm_jax import checkpoints
from grm_jax.checkpoints import orbax
from grm_jax.checkpoints.hub_config import config_from_hub
from grm_jax.checkpoints.safetensors import CONFIG
from grm_jax.checkpoints.sources import HUB
from grm_jax.errors import UsageError
from grm_jax.models import DecoderConfig

Json = Mapping[str, Any]


def _gemma2(layers: int, width: int, mlp: int, heads: int, kv_heads: int, **more: Any) -> Json:
    return {
        "model_type": "gemma2",
        "vocab_size": 256_000,
        "num_hidden_layers": layers,
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "max_position_embeddings": 8192,
        "sliding_window": 4096,
        "rms_norm_eps": 1e-6,
        **more,
    }


def _deepseek(kind: str, stretch: float, **sizes: Any) -> Json:
    return {
        "model_type": kind,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "moe_layer_freq": 1,
        "max_position_embeddings": 163_840,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0,
        "rope_scaling": {
            "type": "yarn",
            "factor": 40,
            "original_max_position_embeddings": 4096,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": stretch,
            "mscale_all_dim": stretch,
        },
        **sizes,
    }


_GEMMA2_2B = _gemma2(26, 2304, 9216, 8, 4)
_GEMMA2_9B = _gemma2(42, 3584, 14_336, 16, 8)
_GEMMA2_27B = _gemma2(46, 4608, 36_864, 32, 16, head_dim=128, query_pre_attn_scalar=144)
_DEEPSEEK_V2_LITE = _deepseek(
    "deepseek_v2",
    0.707,
    vocab_size=102_400,
    num_hidden_layers=27,
    hidden_size=2048,
    intermediate_size=10_944,
    moe_intermediate_size=1408,
    num_attention_heads=16,
    num_key_value_heads=16,
    n_routed_experts=64,
    n_shared_experts=2,
    num_experts_per_tok=6,
    first_k_dense_replace=1,
)
_DEEPSEEK_V3 = _deepseek(
    "deepseek_v3",
    1.0,
    vocab_size=129_280,
    num_hidden_layers=61,
    hidden_size=7168,
    intermediate_size=18_432,
    moe_intermediate_size=2048,
    num_attention_heads=128,
    num_key_value_heads=128,
    q_lora_rank=1536,
    n_routed_experts=256,
    n_shared_experts=1,
    num_experts_per_tok=8,
    first_k_dense_replace=3,
    n_group=8,
    topk_group=4,
    scoring_func="sigmoid",
    norm_topk_prob=True,
    routed_scaling_factor=2.5,
)
_SMOLLM2_135M: Json = {
    "model_type": "llama",
    "vocab_size": 49_152,
    "num_hidden_layers": 30,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100_000.0,
    "tie_word_embeddings": True,
}
_GEMMA3_270M: Json = {
    "model_type": "gemma3_text",
    "vocab_size": 262_144,
    "num_hidden_layers": 18,
    "hidden_size": 640,
    "intermediate_size": 2048,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "max_position_embeddings": 32_768,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "rms_norm_eps": 1e-6,
}

KNOWN: Mapping[str, Json] = MappingProxyType(
    {
        "smollm2-135m": _SMOLLM2_135M,
        "gemma3-270m": _GEMMA3_270M,
        "hf:google/gemma-2-2b": _GEMMA2_2B,
        "hf:google/gemma-2-2b-it": _GEMMA2_2B,
        "hf:google/gemma-2-9b": _GEMMA2_9B,
        "hf:google/gemma-2-9b-it": _GEMMA2_9B,
        "hf:google/gemma-2-27b": _GEMMA2_27B,
        "hf:google/gemma-2-27b-it": _GEMMA2_27B,
        "hf:deepseek-ai/DeepSeek-V2-Lite": _DEEPSEEK_V2_LITE,
        "hf:deepseek-ai/DeepSeek-V2-Lite-Chat": _DEEPSEEK_V2_LITE,
        "hf:deepseek-ai/DeepSeek-V3": _DEEPSEEK_V3,
        "hf:deepseek-ai/DeepSeek-R1": _DEEPSEEK_V3,
    }
)
"""By the name in `model.name`, without a revision."""


def decoder_of(name: str) -> DecoderConfig:
    """The decoder of a model, of which nothing is fetched.

    Args:
      name: As in `model.name`: a built-in name, a repository of the hub, a folder or a file.

    Raises:
      UsageError: Its shape is not known here.
    """
    plain = name.partition("@")[0] if name.startswith(HUB) else name
    if plain in KNOWN:
        return config_from_hub(KNOWN[plain], name)
    if name.startswith(HUB):
        repository, _, revision = name.removeprefix(HUB).partition("@")
        kept = huggingface_hub.try_to_load_from_cache(repository, CONFIG, revision=revision or None)
        if isinstance(kept, str):
            return config_from_hub(json.loads(Path(kept).read_text()), name)
        raise UsageError(
            f"the shape of {name} is not known without its config.json; give a folder that holds "
            "it: --config.model.name=FOLDER"
        )
    folder = Path(name).expanduser()
    file = folder / CONFIG
    if file.is_file() and not (folder / orbax.CONFIG).exists():
        try:
            return config_from_hub(json.loads(file.read_text()), file)
        except ValueError as error:
            raise UsageError(f"{file} cannot be read: {error}") from error
    return checkpoints.open_checkpoint(name).config
