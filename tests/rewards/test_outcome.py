"""Rewards by rule against numbers worked by hand and against plain loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grm_jax.rewards import group_advantages, outcome_reward, pointwise_outcome_reward

NAN, INF = np.nan, np.inf


def outcome_by_loop(scores, valid, best, num_responses):
    rewards = []
    for row, readable, index, count in zip(scores, valid, best, num_responses, strict=True):
        won = bool(readable) and count >= 2 and 0 <= index < count
        for other in range(count):
            if won and other != index and not row[index] > row[other]:
                won = False
        rewards.append(1.0 if won else -1.0)
    return np.array(rewards, np.float32)


def random_outcomes(seed, batch):
    rng = np.random.default_rng(seed)
    # A narrow range of scores, so that ties of every kind are common.
    scores = rng.integers(1, 5, (batch, 4)).astype(np.float32)
    num_responses = rng.integers(1, 5, batch)
    scores[np.arange(4) >= num_responses[:, None]] = INF
    best = rng.integers(-1, num_responses + 1)
    return scores, rng.random(batch) < 0.8, best, num_responses


@pytest.mark.parametrize(
    ("scores", "valid", "best", "num_responses", "reward"),
    [
        ([9, 4], True, 0, 2, 1),
        ([9, 4], True, 1, 2, -1),
        ([4, 9, 8], True, 1, 3, 1),
        ([9, 9], True, 0, 2, -1),  # a tie with the best, whichever is listed first
        ([9, 9], True, 1, 2, -1),
        ([3, 9, 3, 3], True, 1, 4, 1),  # ties among the others do not matter
        ([9, 4], False, 0, 2, -1),
        ([0, 0], False, 0, 2, -1),
        ([7, 5, 10], True, 0, 2, 1),  # what lies beyond the responses is not a rival
        ([7, 5, NAN], True, 0, 2, 1),
        ([7, 5, INF], True, 0, 2, 1),
        ([7, 5, 10], True, 2, 2, -1),  # nor can it be the best
        ([9, 4], True, -1, 2, -1),
        ([NAN, 4], True, 0, 2, -1),
        ([9, NAN], True, 0, 2, -1),
        ([10], True, 0, 1, -1),  # nothing to beat
        ([10, 0], True, 0, 1, -1),
    ],
)
@pytest.mark.parametrize("jitted", [False, True])
def test_outcome_reward_of_one(scores, valid, best, num_responses, reward, jitted):
    function = jax.jit(outcome_reward) if jitted else outcome_reward
    result = function(jnp.array(scores, jnp.float32), valid, best, num_responses)
    assert result.shape == ()
    assert result.dtype == jnp.float32
    assert result == reward


def test_outcome_reward_of_many(transform):
    arguments = random_outcomes(0, 500)
    expected = outcome_by_loop(*arguments)
    assert np.sum(expected == 1) > 30
    np.testing.assert_array_equal(transform(outcome_reward)(*arguments), expected)


def test_outcome_reward_broadcasts_over_leading_dimensions():
    scores = np.array([[[9, 4], [4, 9], [5, 5]], [[1, 2], [2, 1], [10, 9]]], np.float32)
    result = outcome_reward(scores, np.ones((2, 3), bool), np.array([[0], [1]]), 2)
    np.testing.assert_array_equal(result, [[1, -1, -1], [1, -1, -1]])


def test_outcome_reward_stays_sharded(run_sharded):
    arguments = random_outcomes(1, 64)
    (result,) = run_sharded(outcome_reward, *arguments)
    np.testing.assert_array_equal(result, outcome_by_loop(*arguments))


def test_pointwise_outcome_reward(transform):
    score = np.array([1, 0, 1, 0, 1, NAN, 7], np.float32)
    valid = np.array([1, 1, 1, 1, 0, 1, 1], bool)
    truth = np.array([1, 0, 0, 1, 1, 1, 7])
    result = transform(pointwise_outcome_reward)(score, valid, truth)
    assert result.dtype == jnp.float32
    np.testing.assert_array_equal(result, [1, 1, -1, -1, -1, -1, 1])


def test_pointwise_outcome_reward_of_one():
    assert pointwise_outcome_reward(1.0, True, 1) == 1
    assert pointwise_outcome_reward(1.0, False, 1) == -1


def test_pointwise_outcome_reward_stays_sharded(run_sharded):
    score = np.arange(16, dtype=np.float32) % 2
    (result,) = run_sharded(pointwise_outcome_reward, score, np.ones(16, bool), np.ones(16))
    np.testing.assert_array_equal(result, 2 * score - 1)


@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize(
    ("rewards", "advantages"),
    [
        ([1, -1], [1, -1]),
        ([1, 1, -1, -1], [1, 1, -1, -1]),
        ([1, -1, -1, -1], [3**0.5, -(3**-0.5), -(3**-0.5), -(3**-0.5)]),
        ([1, 2, 3], [-(1.5**0.5), 0, 1.5**0.5]),
        ([1, 1, 1, 1], [0, 0, 0, 0]),
        ([5], [0]),
    ],
)
def test_group_advantages_of_one(rewards, advantages, jitted):
    function = jax.jit(group_advantages) if jitted else group_advantages
    np.testing.assert_allclose(function(jnp.array(rewards)), advantages, rtol=1e-6, atol=1e-7)


def test_group_advantages_of_many(transform):
    rewards = np.random.default_rng(0).normal(3, 2, (40, 7)).astype(np.float32)
    expected = [
        [(reward - np.mean(group)) / np.std(group) for reward in group]
        for group in rewards.astype(np.float64)
    ]
    np.testing.assert_allclose(transform(group_advantages)(rewards), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize(
    ("rewards", "advantages"),
    [
        ([1, -1], [1, -1]),
        ([1, -1, -1, -1], [1.5, -0.5, -0.5, -0.5]),
        ([1, 2, 3], [-1, 0, 1]),
    ],
)
def test_group_advantages_without_deviation(rewards, advantages, jitted):
    function = functools.partial(group_advantages, deviation=False)
    result = (jax.jit(function) if jitted else function)(jnp.array(rewards))
    np.testing.assert_allclose(result, advantages, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("deviation", [False, True])
@pytest.mark.parametrize("value", [0.1, -1.0, 1 / 3, 1e6, 0.0])
@pytest.mark.parametrize("size", [3, 4, 7, 64])
def test_equal_rewards_give_exactly_nothing(value, size, deviation):
    rewards = np.full((2, size), value, np.float32)
    assert not np.any(group_advantages(rewards, deviation=deviation))


def test_deviation_is_floored():
    nearly_equal = np.array([0.0, 0.0, 0.0, 1e-6], np.float32)
    assert np.max(np.abs(group_advantages(nearly_equal))) < 1e-3
    np.testing.assert_allclose(
        group_advantages([1.0, -1.0], floor=4.0), [0.25, -0.25], rtol=1e-6
    )  # a floor above the deviation of 1


def test_gradient_is_finite_where_rewards_are_equal():
    gradient = jax.grad(lambda rewards: group_advantages(rewards)[0])(jnp.ones(4))
    assert np.all(np.isfinite(gradient))


def test_group_advantages_stay_sharded(run_sharded):
    rewards = np.random.default_rng(1).choice([-1.0, 1.0], (16, 4)).astype(np.float32)
    (result,) = run_sharded(group_advantages, rewards)
    np.testing.assert_allclose(result, group_advantages(rewards), rtol=1e-6)
