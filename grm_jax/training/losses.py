"""Losses of all training stages, on arrays of log-probabilities, logits and rewards.

Each is a pure function with keyword arguments only that returns the loss, `f32[]`, and a dict of
metrics, each `f32[]`. Metrics carry no gradient and describe the arrays that were given: of a
micro-batch they are that micro-batch's, and the counts among them say what to weight them with.

What is masked out may hold anything, NaN and infinities included: it changes neither a loss nor a
gradient. A row whose mask is all false is as good as absent.

A mean over a batch that arrives in pieces needs the count of the whole batch, which no piece knows.
Give it as `denominator`, from `loss_denominator` of the whole batch's mask, and the losses of the
pieces add up to the loss of the whole; so do their gradients. Arrays split over devices under
`jit` are whole arrays here and need no such care.

Letters for shapes: `B` rows, each the rollout of one prompt, `T` generated tokens.
"""

from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from grm_jax.errors import UsageError

Metrics = dict[str, jax.Array]

Aggregate = Literal["sequence", "token", "sum"]
"""How losses of tokens become one number.

- `"sequence"`: the mean over each row's tokens, then over rows (eq 15 of arXiv:2504.02495), so a
  token of a long row counts for less;
- `"token"`: the mean over all tokens (DAPO, arXiv:2503.14476), so a long row counts for more;
- `"sum"`: the sum of each row over a constant length, then the mean over rows (Dr. GRPO,
  arXiv:2503.20783), so a token's weight depends on no length at all.
"""

Ratio = Literal["token", "sequence"]
"""What a probability ratio is taken of: each token, or the whole row (GSPO)."""


def grpo_loss(
    *,
    logprobs: ArrayLike,
    old_logprobs: ArrayLike | None,
    ref_logprobs: ArrayLike | None,
    advantages: ArrayLike,
    mask: ArrayLike,
    clip: float = 0.2,
    clip_high: float | None = None,
    beta: float = 0.08,
    aggregate: Aggregate = "sequence",
    ratio: Ratio = "token",
    max_length: int | None = None,
    importance_weights: ArrayLike | None = None,
    denominator: ArrayLike | None = None,
) -> tuple[jax.Array, Metrics]:
    """The clipped policy-gradient loss of GRPO with a divergence from a reference policy.

    The negative of eq 15 (arXiv:2504.02495): for each token
    `min(r A, clip(r, 1 - clip, 1 + clip_high) A) - beta KL`, where `r` is the ratio of the token's
    probability to that under the policy which sampled it. The divergence is a term of the loss and
    not of the reward; its estimator is `exp(d) - d - 1` with `d = ref_logprobs - logprobs` (k3),
    never negative and without bias on tokens of the current policy.

    Only `logprobs` has a gradient. With one update for each rollout leave `old_logprobs` out: the
    ratio is then exactly 1 and its gradient that of the log-probability, at no extra pass.

    With `ratio="sequence"` the ratio of each token of a row is the geometric mean over the row
    (GSPO, arXiv:2507.18071), so a row is clipped as a whole; `clip` is then smaller by orders of
    magnitude.

    Args:
      logprobs: `f32[B, T]`, log-probabilities of the sampled tokens under the policy that learns.
      old_logprobs: `f32[B, T]`, those under the policy that sampled; None for `logprobs` without
        its gradient.
      ref_logprobs: `f32[B, T]`, those under the reference policy; None only where `beta` is 0.
        Given with a `beta` of 0, the divergence is measured and stays out of the loss.
      advantages: `f32[B]` for one advantage a row, or `f32[B, T]`.
      mask: `bool[B, T]`, the tokens to learn from: without prompt, padding, and the rows that ran
        out of length if these are not to count.
      clip: How far below 1 a ratio still earns a gradient, and above if `clip_high` is None.
      clip_high: How far above 1 (clip-higher, arXiv:2503.14476).
      beta: Weight of the divergence.
      aggregate: How tokens become one number, see `Aggregate`.
      ratio: What the ratio is taken of, see `Ratio`.
      max_length: The constant length that `aggregate="sum"` divides by; read there only.
      importance_weights: `f32[B, T]`, factors on the policy term but not on the divergence, such
        as from `truncated_importance`.
      denominator: `f32[]`, the rows of the whole batch, or its tokens with `aggregate="token"`;
        None to count those of `mask`. See `loss_denominator`.

    Returns:
      The loss, and the metrics `clip_low` and `clip_high` (shares of tokens whose gradient was
      clipped away below and above), `ratio_mean`, `ratio_max`, `tokens`, `rows`, and `kl` (mean
      over tokens) if there is a reference.

    Raises:
      UsageError: Arguments do not go together; the message names them.
    """
    constant, keep = lax.stop_gradient, jnp.asarray(mask, bool)
    logprobs = _kept("logprobs", logprobs, keep)
    old = constant(logprobs if old_logprobs is None else _kept("old_logprobs", old_logprobs, keep))
    advantages = jnp.asarray(advantages, jnp.float32)
    if advantages.shape == keep.shape[:1]:
        advantages = jnp.broadcast_to(advantages[:, None], keep.shape)
    advantages = constant(_kept("advantages", advantages, keep))

    log_ratios = logprobs - old
    if ratio == "sequence":
        log_ratios = jnp.broadcast_to(_row_means(log_ratios, keep)[:, None], keep.shape)
    elif ratio != "token":
        raise _unknown("ratio", ratio, get_args(Ratio))
    ratios = jnp.exp(log_ratios)
    low, high = 1 - clip, 1 + (clip if clip_high is None else clip_high)
    gains = jnp.minimum(ratios * advantages, jnp.clip(ratios, low, high) * advantages)
    if importance_weights is not None:
        gains = gains * constant(_kept("importance_weights", importance_weights, keep))
    losses = -gains

    metrics = {
        "clip_low": _mean((ratios < low) & (advantages < 0), keep),
        "clip_high": _mean((ratios > high) & (advantages > 0), keep),
        "ratio_mean": _mean(ratios, keep),
        "ratio_max": jnp.max(ratios, where=keep, initial=0.0),
        "tokens": loss_denominator(keep, aggregate="token"),
        "rows": loss_denominator(keep, aggregate="sequence"),
    }
    if ref_logprobs is not None:
        gap = constant(_kept("ref_logprobs", ref_logprobs, keep)) - logprobs
        # Near 0, where it starts, exp(gap) - 1 - gap would be rounding error.
        divergences = jnp.expm1(gap) - gap
        metrics["kl"] = _mean(divergences, keep)
        if beta:
            losses = losses + beta * divergences
    elif beta:
        raise UsageError(f"beta={beta} needs ref_logprobs; give them, or beta=0")
    return _aggregate(losses, keep, aggregate, max_length, denominator), _constants(metrics)


def truncated_importance(
    *, logprobs: ArrayLike, sampler_logprobs: ArrayLike, mask: ArrayLike, cap: float = 2.0
) -> tuple[jax.Array, Metrics]:
    """Weights that make up for a sampler whose probabilities are not quite the learner's.

    The two compute the same model in different programs, or the sampler draws from a truncated
    distribution. A token then counts by the ratio of its probabilities, but never more than `cap`
    times, which bounds the variance. The metrics are the alarm for a sampler with old or wrong
    weights.

    Args:
      logprobs: `f32[B, T]`, log-probabilities that the learner computes with the parameters that
        sampled.
      sampler_logprobs: `f32[B, T]`, those of the distribution that was drawn from.
      mask: `bool[B, T]`, the sampled tokens.
      cap: The largest weight.

    Returns:
      `f32[B, T]`, the weights, without gradient and 1 where masked out, for `grpo_loss`; and the
      metrics `importance_mean`, `importance_capped` (share of tokens), `sampler_gap_mean` and
      `sampler_gap_max` (absolute differences of the log-probabilities).
    """
    keep = jnp.asarray(mask, bool)
    sampled = _kept("sampler_logprobs", sampler_logprobs, keep)
    gap = lax.stop_gradient(_kept("logprobs", logprobs, keep) - sampled)
    ratios = jnp.exp(gap)
    weights = jnp.minimum(ratios, cap)
    metrics = {
        "importance_mean": _mean(weights, keep),
        "importance_capped": _mean(ratios > cap, keep),
        "sampler_gap_mean": _mean(jnp.abs(gap), keep),
        "sampler_gap_max": jnp.max(jnp.abs(gap), where=keep, initial=0.0),
    }
    return weights, metrics


def sft_loss(
    *,
    logprobs: ArrayLike,
    mask: ArrayLike,
    aggregate: Aggregate = "token",
    max_length: int | None = None,
    denominator: ArrayLike | None = None,
) -> tuple[jax.Array, Metrics]:
    """The negative log-likelihood of tokens to be imitated.

    Args:
      logprobs: `f32[B, T]`, log-probabilities of the tokens, as from `token_logprobs`.
      mask: `bool[B, T]`, the tokens to learn from.
      aggregate: How tokens become one number, see `Aggregate`.
      max_length: The constant length that `aggregate="sum"` divides by; read there only.
      denominator: As in `grpo_loss`.

    Returns:
      The loss, and the metrics `nll` (mean over tokens), `perplexity` (its exponential), `tokens`
      and `rows`.
    """
    keep = jnp.asarray(mask, bool)
    losses = -_kept("logprobs", logprobs, keep)
    nll = _mean(losses, keep)
    metrics = {
        "nll": nll,
        "perplexity": jnp.exp(nll),
        "tokens": loss_denominator(keep, aggregate="token"),
        "rows": loss_denominator(keep, aggregate="sequence"),
    }
    return _aggregate(losses, keep, aggregate, max_length, denominator), _constants(metrics)


def binary_reward_loss(
    *,
    logits: ArrayLike,
    labels: ArrayLike,
    mask: ArrayLike | None = None,
    denominator: ArrayLike | None = None,
) -> tuple[jax.Array, Metrics]:
    """The cross-entropy of a scalar reward model against right or wrong.

    This trains the meta reward model (arXiv:2504.02495, section 4): its logit for a judgement is
    pushed up if the judgement is correct by eq 10 and down if not.

    Args:
      logits: `f32[B]`, outputs of the scalar head.
      labels: `bool[B]` or `f32[B]`, 1 for a correct judgement and 0 for a wrong one.
      mask: `bool[B]`, the rows that count; None for all.
      denominator: `f32[]`, the rows of the whole batch; None to count those of `mask`.

    Returns:
      The loss, and the metrics `accuracy` (a logit above 0 says correct), `positives` (share of
      correct ones) and `rows`.
    """
    logits = jnp.asarray(logits, jnp.float32)
    keep = jnp.ones(logits.shape, bool) if mask is None else jnp.asarray(mask, bool)
    logits, labels = _kept("logits", logits, keep), _kept("labels", labels, keep)
    wrong, right = jax.nn.log_sigmoid(-logits), jax.nn.log_sigmoid(logits)
    losses = -(labels * right + (1 - labels) * wrong)
    metrics = {
        "accuracy": _mean((logits > 0) == (labels > 0.5), keep),
        "positives": _mean(labels, keep),
        "rows": loss_denominator(keep, aggregate="token"),
    }
    return _aggregate(losses, keep, "token", None, denominator), _constants(metrics)


def bradley_terry_loss(
    *,
    chosen: ArrayLike,
    rejected: ArrayLike,
    margin: ArrayLike | None = None,
    centre: float = 0.0,
    mask: ArrayLike | None = None,
    denominator: ArrayLike | None = None,
) -> tuple[jax.Array, Metrics]:
    """The negative log-probability that a pair is ordered as labelled.

    In the model of Bradley and Terry that probability is `sigmoid(chosen - rejected)`.

    Args:
      chosen: `f32[B]`, rewards of the better responses.
      rejected: `f32[B]`, rewards of the worse.
      margin: `f32[B]`, by how much the better should win (arXiv:2307.09288, eq 2); None for 0.
      centre: Weight of `(chosen + rejected)**2`, which keeps rewards around 0, where the loss
        alone leaves them free (arXiv:2312.09244).
      mask: `bool[B]`, the pairs that count; None for all.
      denominator: `f32[]`, the pairs of the whole batch; None to count those of `mask`.

    Returns:
      The loss, and the metrics `accuracy` (the better is strictly above), `gap` (mean of
      `chosen - rejected`) and `rows`.
    """
    chosen = jnp.asarray(chosen, jnp.float32)
    keep = jnp.ones(chosen.shape, bool) if mask is None else jnp.asarray(mask, bool)
    chosen, rejected = _kept("chosen", chosen, keep), _kept("rejected", rejected, keep)
    gap = chosen - rejected
    wanted = gap if margin is None else gap - lax.stop_gradient(_kept("margin", margin, keep))
    losses = -jax.nn.log_sigmoid(wanted)
    if centre:
        losses = losses + centre * jnp.square(chosen + rejected)
    metrics = {
        "accuracy": _mean(gap > 0, keep),
        "gap": _mean(gap, keep),
        "rows": loss_denominator(keep, aggregate="token"),
    }
    return _aggregate(losses, keep, "token", None, denominator), _constants(metrics)


def loss_denominator(mask: ArrayLike, *, aggregate: Aggregate = "sequence") -> jax.Array:
    """What a loss divides its sum by: tokens with `"token"`, else rows that have a token.

    Args:
      mask: `bool[B, T]`, of the whole batch; `bool[B]` for losses of one number a row, with
        `aggregate="token"`.
      aggregate: That of the loss.

    Returns:
      `f32[]`, the count; 0 of an empty batch, whose loss is 0.
    """
    if aggregate not in get_args(Aggregate):
        raise _unknown("aggregate", aggregate, get_args(Aggregate))
    keep = jnp.asarray(mask, bool)
    counted = keep if aggregate == "token" else jnp.any(keep, axis=-1)
    return jnp.sum(counted, dtype=jnp.float32)


def _aggregate(
    losses: jax.Array,
    keep: jax.Array,
    aggregate: Aggregate,
    max_length: int | None,
    denominator: ArrayLike | None,
) -> jax.Array:
    if denominator is None:
        denominator = loss_denominator(keep, aggregate=aggregate)
    if aggregate == "sequence":
        total = jnp.sum(_row_means(losses, keep))
    else:
        total = jnp.sum(losses, where=keep)
    if aggregate == "sum":
        if max_length is None:
            raise UsageError('aggregate="sum" needs max_length, the constant length to divide by')
        total = total / max_length
    return total / jnp.where(jnp.asarray(denominator) > 0, denominator, 1.0)


def _row_means(values: jax.Array, keep: jax.Array) -> jax.Array:
    count = jnp.sum(keep, axis=-1, dtype=jnp.float32)
    return jnp.sum(values, axis=-1, where=keep) / jnp.maximum(count, 1.0)


def _mean(values: jax.Array, keep: jax.Array) -> jax.Array:
    count = jnp.sum(keep, dtype=jnp.float32)
    return jnp.sum(values.astype(jnp.float32), where=keep) / jnp.maximum(count, 1.0)


def _kept(name: str, values: ArrayLike, keep: jax.Array) -> jax.Array:
    """The values as float32, and 0 where masked out, before any function can make NaN of them."""
    values = jnp.asarray(values, jnp.float32)
    if values.shape != keep.shape:
        raise UsageError(f"{name} has shape {values.shape}, but the mask has {keep.shape}")
    return jnp.where(keep, values, 0.0)


def _constants(metrics: Metrics) -> Metrics:
    return {name: lax.stop_gradient(value) for name, value in metrics.items()}


def _unknown(name: str, value: str, known: tuple[str, ...]) -> UsageError:
    return UsageError(f"{name} is {value!r}; choose one of {', '.join(known)}")
