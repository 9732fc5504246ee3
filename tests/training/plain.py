"""Experience as a learner would read it that computes each row by itself."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from grm_jax.distributed import make_mesh
from grm_jax.models import DecoderConfig, Params
from grm_jax.training.grpo import Experience, LossSettings
from grm_jax.training.losses import Metrics, grpo_loss, truncated_importance
from grm_jax.training.model import next_token_logprobs

LOSS = LossSettings(
    clip=0.2,
    clip_high=None,
    beta=0.08,
    aggregate="sequence",
    ratio="token",
    deviation=True,
    deviation_floor=1e-3,
    drop_uniform=False,
    importance_cap=0.0,
    max_length=4,
    temperature=1.0,
)


class Rows(NamedTuple):
    """Rows of one micro-batch, prompt and completion without a gap.

    Attributes:
      tokens: `i32[R, S]`.
      lengths: `i32[R]`.
      places: `i32[R, T]`, where each token of the completion is predicted.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    places: np.ndarray


def experience(
    vocab: int, *, parts: int = 1, prompts: int = 4, group: int = 3, size: int = 9, time: int = 7
) -> Experience:
    """Rollouts of ragged lengths, one of which teaches nothing; what fills up is random too."""
    rng = np.random.default_rng(0)
    shape = (parts, prompts, group)
    starts = rng.integers(2, size + 1, shape[:2]).astype(np.int32)
    starts[0, 0], starts[0, -1] = 1, size
    written = rng.integers(1, time + 1, shape)
    written[0, 1, 0] = time
    mask = np.arange(time) < written[..., None]
    mask[0, 0, 1] = False
    logprobs = (-rng.gamma(2, 1, (3, *shape, time))).astype(np.float32)
    return Experience(
        prompts=rng.integers(0, vocab, (*shape[:2], size)).astype(np.int32),
        prompt_lengths=starts,
        tokens=rng.integers(0, vocab, (*shape, time)).astype(np.int32),
        mask=mask,
        sampler_logprobs=logprobs[0],
        advantages=rng.normal(size=shape).astype(np.float32),
        old_logprobs=logprobs[1],
        ref_logprobs=logprobs[2],
    )  # type: ignore[arg-type]


def rows(batch: Experience) -> Rows:
    """The rows of a micro-batch."""
    prompts, starts, completions = (np.asarray(leaf) for leaf in batch[:3])
    _, each, time = completions.shape
    starts = np.repeat(starts, each)
    tokens = np.zeros((len(starts), prompts.shape[1] + time), np.int32)
    for row, (prompt, start, own) in enumerate(
        zip(np.repeat(prompts, each, axis=0), starts, completions.reshape(-1, time), strict=True)
    ):
        tokens[row, :start] = prompt[:start]
        tokens[row, start : start + time] = own
    return Rows(tokens, starts + time, starts[:, None] - 1 + np.arange(time))


def loss(
    params: Params, config: DecoderConfig, batch: Experience, settings: LossSettings
) -> tuple[jax.Array, Metrics]:
    """The loss of a micro-batch, each row of which is computed by itself."""
    tokens, lengths, places = rows(batch)

    def flat(array: Any) -> Any:
        return None if array is None else array.reshape(-1, array.shape[-1])

    def take(values: jax.Array) -> jax.Array:
        return jnp.take_along_axis(values, places, axis=1)

    logprobs, entropy = next_token_logprobs(
        params,
        config,
        jnp.asarray(tokens),
        lengths=jnp.asarray(lengths),
        mesh=make_mesh(devices=jax.devices()[:1]),
        temperature=settings.temperature,
        with_entropy=True,
    )
    logprobs, mask = take(logprobs), flat(batch.mask)
    weights, gaps = truncated_importance(
        logprobs=logprobs if batch.old_logprobs is None else flat(batch.old_logprobs),
        sampler_logprobs=flat(batch.sampler_logprobs),
        mask=mask,
        cap=settings.importance_cap,
    )
    value, metrics = grpo_loss(
        logprobs=logprobs,
        old_logprobs=flat(batch.old_logprobs),
        ref_logprobs=flat(batch.ref_logprobs),
        advantages=batch.advantages.ravel(),
        mask=mask,
        beta=settings.beta,
        importance_weights=weights,
    )
    assert entropy is not None
    metrics["entropy"] = jnp.mean(take(entropy), where=mask)
    return value, metrics | gaps
