"""A small configuration to plan, for the eight simulated devices of the tests."""

from typing import Any

from ml_collections import ConfigDict

from grm_jax.training import meta, rft, rl

SHAPE = {
    "family": "llama",
    "num_layers": 2,
    "width": 64,
    "num_heads": 4,
    "num_kv_heads": 4,
    "mlp_dim": 128,
    "max_context": 512,
    "tie_embeddings": True,
}
DEFAULTS = {"rft": rft.default_config, "rl": rl.default_config, "meta": meta.default_config}


def small(stage: str, **changes: Any) -> ConfigDict:
    """A stage of a decoder of two layers; changes by dotted key, with `__` for each dot."""
    config: ConfigDict = DEFAULTS[stage]()
    config.model.name = "small"
    config.model.tokenizer = "nano"
    config.model.shape = SHAPE
    config.prompt.template = "nano"
    config.batch.rows = 16
    config.batch.accumulate = 2
    config.mesh.fsdp = 4
    config.mesh.tensor = 2
    if stage == "rl":
        config.data.max_prompt = 32
        config.rollout.max_new_tokens = 16
    else:
        config.data.length = 64
    flat = {key.replace("__", "."): value for key, value in changes.items()}
    config.update_from_flattened_dict(flat)
    return config
