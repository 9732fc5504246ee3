"""Metrics against numbers worked out by hand, and against one another."""

import numpy as np
import pytest

from grm_jax.errors import UsageError
from grm_jax.evaluation.metrics import (
    auc,
    bootstrap,
    bootstrap_mean,
    choice_shares,
    correctness,
    length_bias,
    paired_difference,
    position_bias,
    tie_rate,
    unreadable_rate,
    weighted_mean,
)

# Won, lost, tied, a tie of two of three with the best in it, a tie of two without it, unreadable.
TOTALS = [[9, 3, 0], [3, 9, 0], [5, 5, 0], [7, 7, 2], [2, 7, 7], [0, 0, 0]]
COUNTS = [2, 2, 2, 3, 3, 3]
BEST = [0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("ties", "expected"),
    [
        ("strict", [1, 0, 0, 0, 0, 0]),
        ("half", [1, 0, 1 / 2, 1 / 2, 0, 1 / 3]),
    ],
)
def test_each_tie_policy_decides_as_named(ties: str, expected: list[float]) -> None:
    assert correctness(TOTALS, BEST, COUNTS, ties=ties) == pytest.approx(expected)


def test_ties_broken_at_random_follow_the_seed_and_average_to_shares() -> None:
    drawn = [correctness(TOTALS, BEST, COUNTS, ties="random", seed=seed) for seed in range(3000)]
    assert np.array_equal(drawn[0], correctness(TOTALS, BEST, COUNTS, ties="random", seed=0))
    assert set(np.unique(drawn)) == {0.0, 1.0}
    assert np.mean(drawn, axis=0) == pytest.approx([1, 0, 1 / 2, 1 / 2, 0, 1 / 3], abs=0.03)


def test_several_right_responses_share_the_credit() -> None:
    right = np.array([[True, True, False]] * 3)
    totals = [[4, 4, 1], [4, 1, 4], [4, 4, 4]]
    assert correctness(totals, right, [3, 3, 3]) == pytest.approx([1, 1 / 2, 2 / 3])
    assert correctness(totals, right, [3, 3, 3], ties="strict") == pytest.approx([1, 0, 0])


def test_places_beyond_the_responses_never_win() -> None:
    assert correctness([[-5, -7, 99]], [0], [2])[0] == 1.0
    assert choice_shares([[1, 1, 1, 1]], [3])[0] == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0])


def test_a_best_of_minus_one_is_never_right() -> None:
    assert correctness([[1, 2]], [-1], [2])[0] == 0.0


def test_an_unknown_tie_policy_is_refused() -> None:
    with pytest.raises(UsageError, match="no tie policy 'fair'"):
        correctness([[1, 2]], [0], [2], ties="fair")  # type: ignore[arg-type]


def test_rates_of_ties_and_unreadable_samples() -> None:
    assert tie_rate(TOTALS, COUNTS) == pytest.approx(4 / 6)
    assert np.isnan(tie_rate([[3]], [1]))
    assert unreadable_rate([[True, False], [True, True]]) == 0.25


# --- intervals ---


def test_weights_shift_the_mean() -> None:
    assert weighted_mean([1, 0, 0], [2, 1, 1]) == 0.5
    assert weighted_mean([1, 0, 0]) == pytest.approx(1 / 3)


def test_an_interval_is_as_wide_as_theory_says() -> None:
    values = np.r_[np.ones(240), np.zeros(160)]
    found = bootstrap_mean(values, resamples=4000)
    half = 1.96 * np.sqrt(0.6 * 0.4 / 400)
    assert found.value == pytest.approx(0.6)
    assert (found.low, found.high) == pytest.approx((0.6 - half, 0.6 + half), abs=0.005)


def test_strata_take_out_what_lies_between_them() -> None:
    values = np.r_[np.ones(50), np.zeros(50)]
    strata = np.r_[np.zeros(50, int), np.ones(50, int)]
    found = bootstrap_mean(values, strata=strata)
    assert found.low == found.high == 0.5
    assert bootstrap_mean(values).high > 0.55


def test_a_paired_difference_is_surer_than_two_intervals() -> None:
    rng = np.random.default_rng(0)
    first = (rng.random(300) < 0.5).astype(float)
    second = np.where(rng.random(300) < 0.1, 1.0, first)
    found = paired_difference(first, second)
    assert found.value == pytest.approx(second.mean() - first.mean())
    assert found.low > 0
    assert found.p_value < 0.01
    apart = bootstrap_mean(first)
    assert found.high - found.low < (apart.high - apart.low) / 2
    same = paired_difference(first, first)
    assert (same.value, same.low, same.high, same.p_value) == (0, 0, 0, 1)


def test_any_statistic_can_be_resampled() -> None:
    rng = np.random.default_rng(1)
    truth = rng.random(200) < 0.5
    scores = truth + rng.normal(size=200)
    found = bootstrap(lambda at: auc(scores[at], truth[at]), 200, resamples=300)
    assert found.value == pytest.approx(auc(scores, truth))
    assert found.low < found.value < found.high
    assert 0.05 < found.high - found.low < 0.2


# --- biases ---


def test_position_bias_of_a_judge_that_always_takes_the_first() -> None:
    # Two comparisons; the second sample of each sees them the other way round.
    orders = np.array([[[0, 1], [1, 0], [1, 0]], [[0, 1], [1, 0], [1, 0]]])
    scores = np.array([[[9, 1], [1, 9], [1, 9]]] * 2)
    valid = np.array([[True, True, True], [True, True, False]])
    found = position_bias(scores, valid, orders, [0, 0], [2, 2])
    assert found.accuracy.tolist() == [1.0, 0.0]
    assert found.cases.tolist() == [2, 3]
    assert found.chosen.tolist() == [1.0, 0.0]
    assert found.expected.tolist() == [0.5, 0.5]
    assert found.agreement_same == 1.0
    assert found.agreement_other == 0.0


def test_position_bias_shares_ties_and_leaves_out_single_responses() -> None:
    orders = np.array([[[2, 0, 1]], [[0, 0, 0]]])
    scores = np.array([[[5, 5, 1]], [[7, 0, 0]]])
    found = position_bias(scores, [[True], [True]], orders, [1, 0], [3, 1])
    assert found.chosen == pytest.approx([0, 0.5, 0.5])
    assert found.cases.tolist() == [0, 0, 1]
    assert found.accuracy[2] == 0.5
    assert np.isnan(found.accuracy[0])
    assert np.isnan(found.agreement_other)


def test_length_bias_by_hand() -> None:
    totals = [[9, 1], [9, 1], [1, 9], [5, 5], [9, 1]]
    lengths = [[30, 10], [10, 30], [10, 30], [10, 30], [20, 20]]
    found = length_bias(totals, [0, 0, 0, 0, 0], [2] * 5, lengths)
    # The last has no longest; of the others the longest is chosen in 1, 0, 1 and half of a time.
    assert found.chosen_longest == pytest.approx(2.5 / 4)
    assert found.best_longest == pytest.approx(1 / 4)
    assert found.accuracy_longest == 1.0
    assert found.accuracy_shorter == pytest.approx(1.5 / 3)
