"""Votes and rankings against numbers worked by hand and against plain loops."""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grm_jax.rewards import (
    guided_vote,
    rank,
    restore_order,
    tied_for_best,
    vote,
    weighted_vote,
)

NAN, INF = np.nan, np.inf
BATCH, SAMPLES, RESPONSES = 48, 6, 4


def restore_by_loop(scores, order):
    restored = np.zeros_like(scores)
    for at in np.ndindex(scores.shape):
        restored[*at[:-1], order[at]] = scores[at]
    return restored


def guided_vote_by_loop(scores, valid, meta, k_meta):
    totals = np.zeros((scores.shape[0], scores.shape[2]), np.float32)
    for item, limit in enumerate(k_meta):
        trust = [-INF if np.isnan(reward) else reward for reward in meta[item]]
        voters = [sample for sample in range(len(trust)) if valid[item, sample]]
        voters.sort(key=lambda sample: -trust[sample])  # stable: of equals, the earlier first
        for sample in voters[: max(limit, 0)]:
            totals[item] += scores[item, sample]
    return totals


def random_votes(seed):
    rng = np.random.default_rng(seed)
    scores = rng.integers(1, 11, (BATCH, SAMPLES, RESPONSES)).astype(np.float32)
    valid = rng.random((BATCH, SAMPLES)) < 0.7
    scores[~valid] = rng.choice([NAN, INF, -INF], (np.sum(~valid), RESPONSES))
    # Few distinct meta rewards, so that ties are common.
    meta = rng.choice([-2.5, 0, 0, 1, 3, INF, -INF, NAN], (BATCH, SAMPLES)).astype(np.float32)
    return scores, valid, meta, rng.integers(-1, SAMPLES + 2, BATCH)


def test_restore_order_by_hand():
    # Response 2 was shown first, then 0, then 1.
    np.testing.assert_array_equal(restore_order([9.0, 5.0, 7.0], [2, 0, 1]), [5, 7, 9])


def test_restore_order_leaves_out_unused_places():
    np.testing.assert_array_equal(restore_order([8.0, 3.0, 0.0, 0.0], [1, 0, 2, 3]), [3, 8, 0, 0])
    np.testing.assert_array_equal(restore_order([8.0, 3.0, NAN, 1], [1, 0, -1, -1]), [3, 8, 0, 0])


def test_restore_order_of_many(transform):
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(BATCH, SAMPLES, RESPONSES)).astype(np.float32)
    scores[0, 0] = [NAN, INF, 1, 2]
    order = rng.permuted(np.broadcast_to(np.arange(RESPONSES), scores.shape), axis=-1)
    result = transform(restore_order)(scores, order)
    np.testing.assert_array_equal(result, restore_by_loop(scores, order))


def test_restore_order_undoes_a_shuffle():
    scores = np.random.default_rng(1).normal(size=(5, 7)).astype(np.float32)
    order = np.random.default_rng(2).permutation(7)
    np.testing.assert_array_equal(restore_order(scores[:, order], order), scores)


def test_vote_by_hand():
    scores = np.array([[8, 3], [NAN, INF], [6, 9]], np.float32)
    np.testing.assert_array_equal(vote(scores, np.array([True, False, True])), [14, 12])
    np.testing.assert_array_equal(vote(scores, np.zeros(3, bool)), [0, 0])


def test_vote_of_many(transform):
    scores, valid, _, _ = random_votes(0)
    everyone = np.full(BATCH, SAMPLES)
    expected = guided_vote_by_loop(scores, valid, np.zeros(valid.shape), everyone)
    result = transform(vote)(scores, valid)
    assert result.dtype == jnp.float32
    np.testing.assert_array_equal(result, expected)


def test_published_example():
    """Three samples of two responses, the last two of them reversed (arXiv:2504.02495, tab 17)."""
    written = np.array([[8, 8], [9, 5], [10, 7]], np.float32)
    order = np.array([[0, 1], [1, 0], [1, 0]])
    valid, meta = np.ones(3, bool), np.array([-15.7781, 1.3126, 1.6739], np.float32)
    scores = restore_order(written, order)
    np.testing.assert_array_equal(scores, [[8, 8], [5, 9], [7, 10]])
    np.testing.assert_array_equal(vote(scores, valid), [20, 27])
    np.testing.assert_array_equal(guided_vote(scores, valid, meta, 2), [12, 19])
    np.testing.assert_array_equal(guided_vote(scores, valid, meta, 1), [7, 10])


@pytest.mark.parametrize(
    ("valid", "meta", "k_meta", "voters"),
    [
        ([1, 1, 1, 1], [0.1, 0.4, 0.3, 0.2], 2, [1, 2]),
        ([1, 0, 1, 1], [0.1, 0.4, 0.3, 0.2], 2, [2, 3]),  # an unreadable sample takes no seat
        ([1, 1, 1, 1], [5, 5, 5, 5], 3, [0, 1, 2]),  # of equals, the earlier
        ([0, 1, 0, 0], [9, 1, 9, 9], 2, [1]),  # fewer than k_meta
        ([0, 0, 0, 0], [1, 2, 3, 4], 2, []),
        ([1, 1, 1, 1], [1, 2, 3, 4], 0, []),
        ([1, 1, 1, 1], [1, 2, 3, 4], 9, [0, 1, 2, 3]),
        ([1, 1, 1, 1], [NAN, -100, NAN, -200], 2, [1, 3]),  # NaN is trusted least
        ([1, 1, 1, 1], [NAN, -INF, NAN, 0], 2, [0, 3]),  # and equal to -inf
        ([1, 0, 1, 1], [1, NAN, INF, 2], 2, [2, 3]),
    ],
)
@pytest.mark.parametrize("jitted", [False, True])
def test_guided_vote_by_hand(valid, meta, k_meta, voters, jitted):
    function = jax.jit(guided_vote) if jitted else guided_vote
    # Each sample scores a power of 10, so the total spells who voted.
    scores = np.array([[1], [10], [100], [1000]], np.float32)
    result = function(scores, np.array(valid, bool), np.array(meta, np.float32), k_meta)
    np.testing.assert_array_equal(result, [sum(10**voter for voter in voters)])


def test_guided_vote_of_many(transform):
    arguments = random_votes(3)
    result = transform(guided_vote)(*arguments)
    assert np.all(np.isfinite(result))
    np.testing.assert_array_equal(result, guided_vote_by_loop(*arguments))


def test_guided_vote_over_all_samples_is_a_vote():
    scores, valid, meta, _ = random_votes(4)
    np.testing.assert_array_equal(guided_vote(scores, valid, meta, SAMPLES), vote(scores, valid))


@pytest.mark.parametrize(
    ("totals", "num_responses", "tied"),
    [
        ([20, 27], 2, [0, 1]),
        ([27, 27, 3], 3, [1, 1, 0]),
        ([5, 5, 9], 2, [1, 1, 0]),
        ([0, 0, 0], 2, [1, 1, 0]),
        ([-3, -4, 0], 2, [1, 0, 0]),
        ([1, 2, NAN], 2, [0, 1, 0]),
        ([1, 2], 0, [0, 0]),
    ],
)
def test_tied_for_best_by_hand(totals, num_responses, tied):
    result = tied_for_best(np.array(totals, np.float32), num_responses)
    np.testing.assert_array_equal(result, np.array(tied, bool))


def test_tied_for_best_of_many(transform):
    rng = np.random.default_rng(5)
    totals, counts = rng.integers(0, 3, (BATCH, RESPONSES)), rng.integers(1, RESPONSES + 1, BATCH)
    expected = [
        [place < n and total == max(row[:n]) for place, total in enumerate(row)]
        for row, n in zip(totals, counts, strict=True)
    ]
    result = transform(tied_for_best)(totals.astype(np.float32), counts)
    np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize(
    ("totals", "num_responses", "ranking"),
    [
        ([20, 27, 9], 3, [1, 0, 2]),
        ([20, 27, 99, 99], 2, [1, 0, 2, 3]),  # unused places come last, in order
        ([-5, -4, 0], 2, [1, 0, 2]),
        ([-INF, 3, 0], 2, [1, 0, 2]),
        ([NAN, 3, 4, INF], 3, [2, 1, 0, 3]),
        ([7], 1, [0]),
        ([3, 2, 1], 0, [0, 1, 2]),
    ],
)
@pytest.mark.parametrize("jitted", [False, True])
def test_rank_by_hand(totals, num_responses, ranking, jitted):
    function = jax.jit(rank) if jitted else rank
    result = function(np.array(totals, np.float32), num_responses, jax.random.key(0))
    assert result.dtype == jnp.int32
    np.testing.assert_array_equal(result, ranking)


def check_rankings(rankings, totals, num_responses):
    for ranking, row, count in zip(np.asarray(rankings), totals, num_responses, strict=True):
        assert sorted(ranking) == list(range(RESPONSES))
        assert list(ranking[count:]) == list(range(count, RESPONSES))
        assert np.all(np.diff(row[ranking[:count]]) <= 0)


def random_totals(seed):
    rng = np.random.default_rng(seed)
    totals = rng.integers(0, 4, (BATCH, RESPONSES)).astype(np.float32)
    return totals, rng.integers(1, RESPONSES + 1, BATCH)


@pytest.mark.parametrize("jitted", [False, True])
def test_rank_of_many(jitted):
    arguments = random_totals(6)
    rankings = (jax.jit(rank) if jitted else rank)(*arguments, jax.random.key(1))
    check_rankings(rankings, *arguments)


def test_rank_with_a_key_for_each():
    arguments = random_totals(7)
    keys = jax.random.split(jax.random.key(2), BATCH)
    rankings = jax.jit(jax.vmap(rank))(*arguments, keys)
    check_rankings(rankings, *arguments)
    for index in range(3):
        alone = rank(arguments[0][index], arguments[1][index], keys[index])
        np.testing.assert_array_equal(rankings[index], alone)


def test_every_order_of_a_tie_is_equally_likely():
    draws = 6000
    totals = np.broadcast_to(np.array([5, 9, 5, 5, 7], np.float32), (draws, 5))
    rankings = np.asarray(rank(totals, 4, jax.random.key(3)))
    assert np.all(rankings[:, 0] == 1)
    assert np.all(rankings[:, 4] == 4)
    seen = Counter(map(tuple, rankings[:, 1:4].tolist()))
    assert len(seen) == 6
    # Each count is binomial with a deviation of 29.
    assert all(abs(count - draws / 6) < 150 for count in seen.values())


def test_same_key_breaks_ties_the_same_way():
    totals = np.zeros((20, 6), np.float32)
    first, again, other = (rank(totals, 6, jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.any(first != other)


def test_votes_and_rankings_stay_sharded(run_sharded):
    scores, valid, meta, k_meta = random_votes(8)
    totals, counts = random_totals(9)
    orders = np.random.default_rng(10).permuted(
        np.broadcast_to(np.arange(RESPONSES), scores.shape), axis=-1
    )

    (restored,) = run_sharded(restore_order, scores, orders)
    np.testing.assert_array_equal(restored, restore_by_loop(scores, orders))
    (summed,) = run_sharded(vote, scores, valid)
    np.testing.assert_array_equal(summed, vote(scores, valid))
    (guided,) = run_sharded(guided_vote, scores, valid, meta, k_meta)
    np.testing.assert_array_equal(guided, guided_vote_by_loop(scores, valid, meta, k_meta))
    (tied,) = run_sharded(tied_for_best, totals, counts)
    np.testing.assert_array_equal(tied, tied_for_best(totals, counts))

    def rank_with_fixed_key(totals, counts):
        return rank(totals, counts, jax.random.key(11))

    (rankings,) = run_sharded(rank_with_fixed_key, totals, counts)
    np.testing.assert_array_equal(rankings, rank_with_fixed_key(totals, counts))


@pytest.mark.parametrize("jitted", [False, True])
def test_weighted_vote_by_hand(jitted):
    function = jax.jit(weighted_vote) if jitted else weighted_vote
    scores = np.array([[8, 2], [1, 9], [5, 6], [np.nan, np.nan]])
    # Right with a chance of 3/4, of 1/2, of nothing known, and unreadable.
    meta = np.array([np.log(3), 0.0, np.nan, np.inf])
    totals = function(scores, np.array([True, True, True, False]), meta)
    np.testing.assert_allclose(totals, [8 * 0.75 + 1 * 0.5, 2 * 0.75 + 9 * 0.5], rtol=1e-6)
    np.testing.assert_array_equal(function(scores, np.zeros(4, bool), meta), [0, 0])
