"""Which records are held out, and the area under the curve against plain loops."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grm_jax.training.heldout import auc, evenly, is_held_out


def test_the_share_is_kept() -> None:
    names = [f"record-{number}" for number in range(4000)]
    sides = {share: {n for n in names if is_held_out(n, share)} for share in (0.0, 0.02, 0.25, 1.0)}
    assert len(sides[0.0]) == 0
    assert len(sides[1.0]) == 4000
    assert 40 < len(sides[0.02]) < 130
    assert 900 < len(sides[0.25]) < 1100
    assert sides[0.02] < sides[0.25]
    # It must never change, or a run that goes on would learn what it is measured on.
    found = [name for name in names[:60] if is_held_out(name, 0.05)]
    assert found == ["record-1", "record-12", "record-20"]


def test_ids_that_are_no_text_have_a_side_too() -> None:
    assert isinstance(is_held_out("\udcff", 0.5), bool)


@pytest.mark.parametrize(
    ("limit", "wanted"), [(0, [0, 1, 2, 3, 4]), (9, [0, 1, 2, 3, 4]), (2, [0, 2]), (3, [0, 1, 3])]
)
def test_some_of_many(limit: int, wanted: list[int]) -> None:
    assert evenly(range(5), limit) == wanted


def test_auc_by_hand() -> None:
    # Of four pairs two are right, one is a tie and one is wrong.
    assert auc([0.9, 0.4, 0.4, 0.5], [True, True, False, False]) == 2.5 / 4
    # Pairs of a positive (3, 5) with a negative (1, 3): won, tied, won, won.
    assert auc([3, 5, 1, 3], [True, True, False, False]) == pytest.approx(3.5 / 4)
    assert auc([3, 2, 1], [1, 1, 0]) == 1
    assert auc([1, 2, 3], [1, 1, 0]) == 0
    assert auc([7, 7, 7], [0, 1, 0]) == 0.5
    assert auc([1, 1], [True, False]) == 0.5
    assert math.isnan(auc([1, 2], [1, 1]))
    assert math.isnan(auc([], []))


def test_an_item_without_a_score_ties_with_all() -> None:
    # Two pairs are known and won; the other two have the item without a score.
    assert auc([5, np.nan, 1, 2], [True, True, False, False]) == pytest.approx(3 / 4)
    assert auc([np.nan, np.nan], [True, False]) == 0.5


@given(
    st.lists(
        st.tuples(st.integers(1, 4) | st.just(float("nan")), st.booleans()), min_size=2, max_size=12
    )
)
def test_auc_is_the_share_of_pairs(items: list[tuple[float, bool]]) -> None:
    pairs = [
        0.5 if np.isnan(a) or np.isnan(b) or a == b else float(a > b)
        for a, first in items
        if first
        for b, second in items
        if not second
    ]
    found = auc([score for score, _ in items], [positive for _, positive in items])
    assert found == pytest.approx(np.mean(pairs)) if pairs else np.isnan(found)


def test_auc_of_many_ties() -> None:
    rng = np.random.default_rng(0)
    scores, labels = rng.integers(1, 6, 60), rng.random(60) < 0.3
    won = [
        (one > other) + 0.5 * (one == other)
        for one, other in itertools.product(scores[labels], scores[~labels])
    ]
    assert auc(scores, labels) == pytest.approx(np.mean(won))
