import itertools
import math
from collections import Counter

import pytest

from grm_jax.errors import UsageError
from grm_jax.sampling import ORDER_POLICIES, response_orders


def orders(
    policy: str = "shuffle",
    *,
    record_id: str = "x",
    num_responses: int = 4,
    samples: int = 24,
    seed: int = 0,
) -> list[tuple[int, ...]]:
    return response_orders(
        policy, record_id=record_id, num_responses=num_responses, samples=samples, seed=seed
    )


@pytest.mark.parametrize("policy", ORDER_POLICIES)
@pytest.mark.parametrize("count", [1, 2, 5, 13])
def test_every_order_is_a_permutation(policy: str, count: int) -> None:
    drawn = orders(policy, num_responses=count, samples=30)
    assert len(drawn) == 30
    assert all(sorted(order) == list(range(count)) for order in drawn)


@pytest.mark.parametrize("policy", ["shuffle", "balanced"])
def test_orders_follow_from_seed_and_id(policy: str) -> None:
    drawn = orders(policy, num_responses=6)
    assert drawn == orders(policy, num_responses=6)
    assert drawn != orders(policy, num_responses=6, seed=1)
    assert drawn != orders(policy, num_responses=6, record_id="y")


@pytest.mark.parametrize("policy", ORDER_POLICIES)
def test_the_first_samples_do_not_depend_on_how_many_follow(policy: str) -> None:
    assert orders(policy, samples=40)[:7] == orders(policy, samples=7)


@pytest.mark.parametrize("policy", ORDER_POLICIES)
def test_an_id_may_hold_half_a_surrogate_pair(policy: str) -> None:
    assert len(orders(policy, record_id="\ud83d")) == 24


def test_shuffled_samples_of_a_record_differ() -> None:
    assert len(set(orders(num_responses=8, samples=20))) == 20


def test_shuffled_orders_are_equally_likely() -> None:
    draws = 6000
    # One order of each of many records, and many orders of one record.
    across = [orders(record_id=str(i), num_responses=3, samples=1)[0] for i in range(draws)]
    within = orders(num_responses=3, samples=draws)
    for drawn in (across, within):
        counts = Counter(drawn)
        assert len(counts) == 6
        expected = draws / 6
        chi_square = sum((count - expected) ** 2 / expected for count in counts.values())
        assert chi_square < 20.5  # the 99.9th percentile at 5 degrees of freedom


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_balanced_puts_every_response_at_every_place(count: int) -> None:
    drawn = orders("balanced", num_responses=count, samples=6 * count)
    for first in range(0, len(drawn), count):
        for place in range(count):
            assert sorted(order[place] for order in drawn[first : first + count]) == list(
                range(count)
            )


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_balanced_uses_every_order_once_and_then_again(count: int) -> None:
    every = set(itertools.permutations(range(count)))
    size = math.factorial(count)
    drawn = orders("balanced", num_responses=count, samples=2 * size)
    assert set(drawn[:size]) == every
    assert drawn[size:] == drawn[:size]


def test_balanced_begins_elsewhere_in_each_record() -> None:
    firsts = Counter(
        orders("balanced", record_id=str(i), num_responses=2, samples=1)[0] for i in range(400)
    )
    assert 150 < firsts[0, 1] < 250


def test_fixed_is_the_input_order() -> None:
    assert orders("fixed", num_responses=3, samples=4) == [(0, 1, 2)] * 4


def test_an_unknown_policy_is_refused_with_the_choices() -> None:
    with pytest.raises(UsageError, match=r"'random'.*shuffle, balanced, fixed"):
        orders("random")
