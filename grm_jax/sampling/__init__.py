"""Sampling judgements: orders, streams of jobs, the layout constraint and the decoding loop."""

from grm_jax.sampling.drawing import Controls, truncate
from grm_jax.sampling.expected import SCORE_POLICIES, ScoreReader
from grm_jax.sampling.layout import Layout, judgement_layout
from grm_jax.sampling.meta import MetaModel, judged_tokens
from grm_jax.sampling.orders import ORDER_POLICIES, response_orders
from grm_jax.sampling.prefix import empty_prefix, place_prefix, prefill
from grm_jax.sampling.sampler import Rollouts, decode
from grm_jax.sampling.scheduling import (
    LENGTHS,
    Scheduler,
    Stream,
    bucket,
    power_of_two,
    run_in_order,
)

__all__ = [
    "LENGTHS",
    "ORDER_POLICIES",
    "SCORE_POLICIES",
    "Controls",
    "Layout",
    "MetaModel",
    "Rollouts",
    "Scheduler",
    "ScoreReader",
    "Stream",
    "bucket",
    "decode",
    "empty_prefix",
    "judged_tokens",
    "judgement_layout",
    "place_prefix",
    "power_of_two",
    "prefill",
    "response_orders",
    "run_in_order",
    "truncate",
]
