"""The chance that more samples change the winner, against SciPy and against draws."""

import jax
import numpy as np
import pytest
from scipy.stats import t as student

from grm_jax.rewards import flip_chance, looks


def test_a_lead_that_cannot_be_made_up_is_certain() -> None:
    scores = np.array([[10, 1], [10, 1], [10, 1]], float)
    valid = np.ones(3, bool)
    assert flip_chance(scores, valid, 2, 2) == 0.0
    assert flip_chance(scores, valid, 2, 3) > 0.0
    assert flip_chance(scores[:, ::-1], valid, 2, 2) == 0.0
    # On a narrower scale it takes more to make up for it.
    assert flip_chance(scores / 10, valid, 2, 2, span=0.9) == 0.0
    assert flip_chance(scores / 10, valid, 2, 2, span=9.0) > 0.0


def test_a_tie_and_an_unreadable_text_settle_nothing() -> None:
    even = np.array([[5, 5], [6, 6]], float)
    assert flip_chance(even, np.ones(2, bool), 2, 1) == 1.0
    assert flip_chance(even, np.ones(2, bool), 2, 0) == 1.0
    assert flip_chance(even, np.zeros(2, bool), 2, 1) == 1.0


def test_one_response_has_no_rival() -> None:
    assert flip_chance(np.full((3, 2), 5.0), np.ones(3, bool), 1, 9) == 0.0


def test_places_beyond_the_responses_are_no_rivals() -> None:
    scores = np.array([[9, 2, 9, 9], [8, 1, 9, 9], [9, 2, 9, 9]], float)
    valid = np.ones(3, bool)
    two = flip_chance(scores, valid, 2, 8)
    assert two == flip_chance(scores[:, :2], valid, 2, 8)
    assert two < 0.1 < flip_chance(scores, valid, 4, 8)


def test_the_chance_is_a_tail_of_student() -> None:
    """Worked out again from the text: two imagined samples of mean 0 and deviation 2."""
    ahead = np.array([3.0, -1.0, 4.0, 2.0, 0.0])
    scores = np.stack([5 + ahead, np.full(5, 5.0)], axis=-1)
    n, left = len(ahead) + 2, 11
    mean = ahead.sum() / n
    squares = np.sum((ahead - mean) ** 2) + 2 * (2.0**2 + mean**2)
    noise = np.sqrt(squares / (n - 1) * (left + left**2 / n))
    wanted = student.cdf(-(ahead.sum() + left * mean) / noise, n - 1)
    assert flip_chance(scores, np.ones(5, bool), 2, left) == pytest.approx(wanted, rel=1e-4)


def test_what_was_not_drawn_does_not_matter() -> None:
    rng = np.random.default_rng(0)
    scores = rng.integers(1, 11, (4, 8, 3)).astype(float)
    valid = rng.random((4, 8)) < 0.7
    counts = np.array([2, 3, 3, 1])
    noise = np.where(valid[..., None], scores, np.nan)
    found = flip_chance(noise, valid, counts, np.array([1, 2, 3, 4]))
    assert np.all((np.asarray(found) >= 0) & (np.asarray(found) <= 1))
    for row in range(4):
        kept = scores[row][valid[row]]
        alone = flip_chance(kept, np.ones(len(kept), bool), counts[row], row + 1)
        assert found[row] == pytest.approx(float(alone), abs=1e-6)
    mapped = jax.vmap(flip_chance)(noise, valid, counts, np.array([1, 2, 3, 4]))
    assert np.allclose(mapped, found)


def test_looks_are_few_and_even() -> None:
    assert looks(4) == ()
    assert looks(5) == (4,)
    assert looks(32) == (4, 6, 8, 10, 12, 14, 16, 20, 24, 30)
    assert all(look % 2 == 0 for look in looks(1000))
    assert len(looks(1000)) < 32
