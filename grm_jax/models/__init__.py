"""One config-driven decoder and its families; see `decoder` for the layout of parameters."""

from grm_jax.models.attention import Segment
from grm_jax.models.config import DecoderConfig, dtype_name, gemma3_config, llama_config
from grm_jax.models.decoder import (
    Params,
    abstract_params,
    cpu_decoder,
    forward,
    forward_parallel,
    init_params,
    logits,
    param_axes,
    unembed,
)

__all__ = [
    "DecoderConfig",
    "Params",
    "Segment",
    "abstract_params",
    "cpu_decoder",
    "dtype_name",
    "forward",
    "forward_parallel",
    "gemma3_config",
    "init_params",
    "llama_config",
    "logits",
    "param_axes",
    "unembed",
]
