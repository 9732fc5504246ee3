"""Group statistics against numbers worked by hand."""

import jax
import numpy as np
import pytest

from grm_jax.errors import UsageError
from grm_jax.training import informative, overlong_penalty


@pytest.mark.parametrize("jitted", [False, True])
def test_informative(jitted):
    function = jax.jit(informative) if jitted else informative
    rewards = np.array([[[1, 1, 1], [-1, -1, -1]], [[1, 1, -1], [0.1, 0.1, 0.1]]], np.float32)
    expected = np.array([[False, False], [True, False]])
    np.testing.assert_array_equal(function(rewards), np.repeat(expected[..., None], 3, axis=-1))
    assert not np.any(function(np.ones((2, 1))))


@pytest.mark.parametrize("jitted", [False, True])
def test_overlong_penalty(jitted):
    def function(lengths):
        return overlong_penalty(lengths, max_length=100, buffer=20, scale=0.5)

    lengths = np.array([[0, 1, 80], [81, 90, 99], [100, 101, 10**6]])
    expected = 0.5 * np.array([[0, 0, 0], [-0.05, -0.5, -0.95], [-1, -1, -1]])
    result = (jax.jit(function) if jitted else function)(lengths)
    np.testing.assert_allclose(result, expected, rtol=1e-6)


def test_overlong_penalty_over_the_whole_length():
    np.testing.assert_allclose(
        overlong_penalty(np.arange(5), max_length=4, buffer=4), -np.arange(5) / 4
    )


@pytest.mark.parametrize("buffer", [0, -3, 101])
def test_a_buffer_beyond_the_limit_is_refused(buffer):
    with pytest.raises(UsageError, match="buffer"):
        overlong_penalty(np.zeros(1), max_length=100, buffer=buffer)
