"""From the scores of many samples to one vote and a ranking."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike


def restore_order(scores: ArrayLike, order: ArrayLike) -> jax.Array:
    """Puts scores of shuffled responses back in input order.

    Responses are shuffled before each sample so that no place in the prompt is favoured, and their
    scores are added up by the response they belong to (arXiv:2504.02495, section 4).

    Args:
      scores: `f32[..., N]`, in the order in which the responses were shown.
      order: `i32[..., N]`, where `order[j]` is the input index of the response shown at place `j`.
        Places beyond the responses hold their own index, or -1 to be left out.

    Returns:
      `f32[..., N]`, in input order; 0 for an index that no place holds.
    """
    scores, order = jnp.asarray(scores, jnp.float32), jnp.asarray(order)
    # N is small: comparing all pairs costs less than a sort or a scatter and keeps any sharding.
    shown_there = order[..., :, None] == jnp.arange(scores.shape[-1])
    return jnp.sum(scores[..., :, None], axis=-2, where=shown_there)


def vote(scores: ArrayLike, valid: ArrayLike) -> jax.Array:
    """Sums each response's scores over the samples that could be read.

    The vote of eq 14 (arXiv:2504.02495). A sum of k scores from 1 to 10 tells responses apart on a
    scale of `9 k + 1` values, so a vote is finer than any of its samples.

    Args:
      scores: `f32[..., K, N]`, the scores of each sample, in input order.
      valid: `bool[..., K]`, which samples vote; the scores of the others may be anything.

    Returns:
      `f32[..., N]`, the totals; 0 where no sample is valid.
    """
    scores = jnp.asarray(scores, jnp.float32)
    return jnp.sum(scores, axis=-2, where=jnp.asarray(valid)[..., None])


def guided_vote(
    scores: ArrayLike, valid: ArrayLike, meta: ArrayLike, k_meta: ArrayLike
) -> jax.Array:
    """Sums each response's scores over the samples that a meta reward model trusts most.

    Of the samples that could be read, the `k_meta` of highest meta reward vote (arXiv:2504.02495,
    section 4, where `k_meta = K/2` unless said otherwise). Of equal meta rewards the earlier
    sample's counts as higher. With fewer valid samples than `k_meta`, all of them vote.

    Args:
      scores: `f32[..., K, N]`, the scores of each sample, in input order.
      valid: `bool[..., K]`, which samples may vote; the scores and meta rewards of the others may
        be anything.
      meta: `f32[..., K]`, the meta reward of each sample. NaN counts as the lowest, equal to
        `-inf`.
      k_meta: `i32[...]` or a scalar, traced or not, how many samples vote.

    Returns:
      `f32[..., N]`, the totals; 0 where no sample votes.
    """
    meta, valid = jnp.asarray(meta, jnp.float32), jnp.asarray(valid)
    meta = jnp.where(jnp.isnan(meta), -jnp.inf, meta)
    sample = jnp.arange(meta.shape[-1])
    # Ranks by counting: to select the top k, a program must know k when it is compiled.
    mine, other = meta[..., :, None], meta[..., None, :]
    earlier = sample < sample[:, None]
    ahead = valid[..., None, :] & ((other > mine) | ((other == mine) & earlier))
    trusted = jnp.sum(ahead, axis=-1) < jnp.asarray(k_meta)[..., None]
    return vote(scores, valid & trusted)


def weighted_vote(scores: ArrayLike, valid: ArrayLike, meta: ArrayLike) -> jax.Array:
    """Sums each response's scores, each sample's by how likely a meta reward model finds it right.

    Where `guided_vote` leaves out whole samples, here all vote, with the weight `sigmoid(meta)`:
    the totals are those that right samples are expected to give. It is not of the paper.

    Args:
      scores: `f32[..., K, N]`, the scores of each sample, in input order.
      valid: `bool[..., K]`, which samples may vote; the scores and meta rewards of the others may
        be anything.
      meta: `f32[..., K]`, the meta reward of each sample, a logit. NaN counts as `-inf`.

    Returns:
      `f32[..., N]`, the totals; 0 where no sample votes.
    """
    meta = jnp.asarray(meta, jnp.float32)
    weights = jax.nn.sigmoid(jnp.where(jnp.isnan(meta), -jnp.inf, meta))
    return vote(jnp.asarray(scores, jnp.float32) * weights[..., None], valid)


def tied_for_best(totals: ArrayLike, num_responses: ArrayLike) -> jax.Array:
    """Marks the responses that share the highest total.

    Args:
      totals: `f32[..., N]`, one total a response; places from `num_responses` on are ignored.
      num_responses: `i32[...]` or a scalar, how many responses there are.

    Returns:
      `bool[..., N]`, true for the best response, and for each of them where several are.
    """
    totals = jnp.asarray(totals, jnp.float32)
    present = jnp.arange(totals.shape[-1]) < jnp.asarray(num_responses)[..., None]
    highest = jnp.max(totals, axis=-1, keepdims=True, where=present, initial=-jnp.inf)
    return present & (totals == highest)


def rank(totals: ArrayLike, num_responses: ArrayLike, key: jax.Array) -> jax.Array:
    """Ranks responses from best to worst, with ties broken at random.

    Among responses of equal total every order is equally likely, as where the paper shuffles the
    responses before it takes the best (arXiv:2504.02495, appendix D).

    Args:
      totals: `f32[..., N]`, one total a response; places from `num_responses` on are ignored.
      num_responses: `i32[...]` or a scalar, how many responses there are.
      key: the random key that breaks ties; one for the whole array.

    Returns:
      `i32[..., N]`, indices of the responses, best first, then the unused places in order.
    """
    totals = jnp.asarray(totals, jnp.float32)
    lots = jax.random.bits(key, totals.shape, jnp.uint32)
    place = jnp.arange(totals.shape[-1], dtype=jnp.int32)
    # One value for every response and a growing one for the unused places after them.
    group = jnp.maximum(place, jnp.asarray(num_responses, jnp.int32)[..., None] - 1)
    # Under explicit sharding a sort wants all its operands sharded alike.
    alike = jnp.zeros_like(totals, jnp.int32)
    keys = (alike + group, -totals, alike.astype(jnp.uint32) + lots)
    return lax.sort((*keys, alike + place), num_keys=len(keys))[-1]
