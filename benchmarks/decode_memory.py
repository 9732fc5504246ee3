"""Bytes of cache a token for published models of every family, ours and the least possible.

Ours is read off the shapes that `prefill` returns; no weights are needed and nothing is run. The
least is arithmetic: keys and values of each head (for latent attention, the latent vector and the
rotated key), and in sliding-window layers only of the tokens within the window.

    python benchmarks/decode_memory.py [--context 8192]
"""

import argparse
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from grm_jax.checkpoints.hub_config import config_from_hub
from grm_jax.models import DecoderConfig, abstract_params
from grm_jax.sampling import prefill

RESULTS = Path(__file__).with_suffix(".md")
BYTES = 2  # bfloat16


def _model(kind: str, name: str, **values: Any) -> dict[str, Any]:
    return {"name": name, "model_type": kind, "torch_dtype": "bfloat16", **values}


def _sizes(vocab: int, width: int, mlp: int, layers: int, heads: int, kv: int) -> dict[str, Any]:
    return {
        "vocab_size": vocab,
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "max_position_embeddings": 32768,
    }


def _latent(query_rank: int | None, experts: int, per_token: int, mlp: int) -> dict[str, Any]:
    return {
        "q_lora_rank": query_rank,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "n_routed_experts": experts,
        "num_experts_per_tok": per_token,
        "moe_intermediate_size": mlp,
    }


MODELS = (
    _model("llama", "Llama-3.1-8B", **_sizes(128_256, 4096, 14_336, 32, 32, 8)),
    _model("qwen2", "Qwen2.5-7B", **_sizes(152_064, 3584, 18_944, 28, 28, 4)),
    _model("qwen3", "Qwen3-8B", head_dim=128, **_sizes(151_936, 4096, 12_288, 36, 32, 8)),
    _model(
        *("gemma2", "Gemma-2-27B (DeepSeek-GRM-27B)"),
        head_dim=128,
        sliding_window=4096,
        **_sizes(256_000, 4608, 36_864, 46, 32, 16),
    ),
    _model(
        *("gemma3_text", "Gemma-3-1B"),
        head_dim=256,
        sliding_window=512,
        **_sizes(262_144, 1152, 6912, 26, 4, 1),
    ),
    _model(
        *("deepseek_v2", "DeepSeek-V2-Lite (DeepSeek-GRM-16B)"),
        first_k_dense_replace=1,
        n_shared_experts=2,
        **_sizes(102_400, 2048, 10_944, 27, 16, 16),
        **_latent(None, 64, 6, 1408),
    ),
    _model(
        *("deepseek_v3", "DeepSeek-V3, R1"),
        first_k_dense_replace=3,
        n_shared_experts=1,
        **_sizes(129_280, 7168, 18_432, 61, 128, 128),
        **_latent(1536, 256, 8, 2048),
    ),
)


def ours(config: DecoderConfig, context: int) -> float:
    """Bytes a token that `prefill` keeps of a prompt."""
    tokens = jax.ShapeDtypeStruct((1, context), jnp.int32)
    length = jax.ShapeDtypeStruct((1,), jnp.int32)
    segment = jax.eval_shape(
        lambda *args: prefill(args[0], config, *args[1:]),
        abstract_params(config, jnp.bfloat16),
        tokens,
        length,
    )
    arrays = jax.tree.leaves((segment.keys, segment.values))
    return sum(math.prod(array.shape) * array.dtype.itemsize for array in arrays) / context


def least(config: DecoderConfig, context: int) -> float:
    """Bytes a token that a decoder must keep to go on."""
    if config.latent is not None:
        width = config.latent.rank + config.latent.rope_dim
    else:
        width = 2 * config.num_kv_heads * config.head_dim
    return sum(min(window, context) for window in config.windows) * width * BYTES / context


def per_head(config: DecoderConfig) -> float:
    """Bytes a token if keys and values of every query head were kept."""
    value = config.latent.value_dim if config.latent is not None else config.head_dim
    return config.num_layers * config.num_heads * (config.head_dim + value) * BYTES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--context", type=int, default=8192, metavar="TOKENS")
    context = parser.parse_args().context
    lines = [
        "# Cache of a token",
        "",
        f"Bytes in bfloat16, in a context of {context:,} tokens. Printed by "
        "`python benchmarks/decode_memory.py`; the last column is the cache of a decoder that "
        "keeps keys and values of every query head.",
        "",
        "| model | ours | least | ours / least | every head |",
        "| --- | --- | --- | --- | --- |",
    ]
    for fields in MODELS:
        config = replace(config_from_hub(fields, fields["name"]), dtype="bfloat16")
        found, best = ours(config, context), least(config, context)
        lines.append(
            f"| {fields['name']} | {found:,.0f} | {best:,.0f} | {found / best:.2f} | "
            f"{per_head(config):,.0f} |"
        )
    text = "\n".join(lines) + "\n"
    print(text)
    RESULTS.write_text(text)


if __name__ == "__main__":
    main()
