"""Chunked log-probabilities against dense ones: values, gradients, memory and devices."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.test_util import check_grads

from grm_jax.distributed import make_mesh
from grm_jax.errors import UsageError
from grm_jax.training import token_logprobs

B, T, D = 2, 3, 8


def dense(hidden, matrix, targets, *, temperature=1.0, softcap=None):
    """The definition, with all logits in memory: log-probabilities and entropies."""
    logits = hidden.astype(jnp.float32) @ matrix.astype(jnp.float32).T
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    logprobs = jax.nn.log_softmax(logits / temperature)
    picked = jnp.take_along_axis(logprobs, targets[..., None], axis=-1)[..., 0]
    return picked, -jnp.sum(jnp.exp(logprobs) * logprobs, axis=-1)


def random_inputs(seed, vocab, dtype=jnp.float32, shape=(B, T, D)):
    rng = np.random.default_rng(seed)
    hidden = jnp.asarray(rng.normal(size=shape), dtype)
    matrix = jnp.asarray(rng.normal(size=(vocab, shape[-1])), dtype)
    targets = rng.integers(0, vocab, shape[:2])
    targets.flat[:2] = 0, vocab - 1
    return hidden, matrix, jnp.asarray(targets)


@functools.partial(jax.jit, static_argnums=0)
def values_and_gradients(function, hidden, matrix, targets, temperature):
    """What `function` returns, and the gradients of a weighted sum of its log-probabilities."""
    weights = jnp.cos(jnp.arange(targets.size, dtype=jnp.float32)).reshape(targets.shape)

    def total(hidden, matrix):
        logprobs, entropy = function(hidden, matrix, targets, temperature=temperature)
        return jnp.sum(weights * logprobs), (logprobs, entropy)

    gradients, values = jax.grad(total, argnums=(0, 1), has_aux=True)(hidden, matrix)
    return (*values, *gradients)


@functools.cache  # the same function is compiled once
def capped(softcap):
    return functools.partial(dense, softcap=softcap)


def chunked(**settings):
    return functools.partial(token_logprobs, with_entropy=True, **settings)


@pytest.mark.parametrize(
    ("vocab", "chunk", "shards", "softcap"),
    [
        (96, 32, 1, 3.0),  # divides
        (96, 36, 1, None),  # a rest of 24
        (97, 8, 1, None),  # a rest of one token
        (97, 7, 1, None),  # odd everything
        (97, 1000, 1, None),  # more than there is
        (96, 32, 4, 3.0),
        (96, 50, 4, None),  # 12 of each part, twice
        (96, 44, 4, 3.0),  # 11 of each part, and a rest of 2
        (96, 1, 4, None),  # at least one of each part
    ],
)
def test_equals_dense(vocab, chunk, shards, softcap):
    inputs = random_inputs(0, vocab)
    function = chunked(chunk=chunk, vocab_shards=shards, softcap=softcap)
    for temperature in (1.0, 0.7):
        results = values_and_gradients(function, *inputs, temperature)
        expected = values_and_gradients(capped(softcap), *inputs, temperature)
        for result, value in zip(results, expected, strict=True):
            assert result.dtype == jnp.float32
            np.testing.assert_allclose(result, value, rtol=1e-5, atol=1e-5)


def test_finite_differences():
    hidden, matrix, targets = random_inputs(1, 11)

    @jax.jit
    def function(hidden, matrix):
        return token_logprobs(hidden, matrix, targets, softcap=2.0, temperature=1.3, chunk=4)

    check_grads(function, (hidden, matrix), order=1, modes=["rev"], eps=1e-2, rtol=2e-3, atol=2e-3)


def test_entropy_is_extra_and_has_no_gradient():
    hidden, matrix, targets = random_inputs(2, 50)

    @jax.jit
    def both(hidden, matrix):
        return chunked(chunk=16)(hidden, matrix, targets)

    alone = jax.jit(functools.partial(token_logprobs, chunk=16))(hidden, matrix, targets)
    np.testing.assert_array_equal(alone, both(hidden, matrix)[0])
    # Of an all-zero hidden state: every token is as likely as any other.
    flat = both(jnp.zeros_like(hidden), matrix)
    np.testing.assert_allclose(flat[0], -np.log(50), rtol=1e-6)
    np.testing.assert_allclose(flat[1], np.log(50), rtol=1e-6)
    total = jax.jit(jax.grad(lambda *inputs: jnp.sum(both(*inputs)[1]), argnums=(0, 1)))
    for gradient in total(hidden, matrix):
        assert not np.any(gradient)


def test_bfloat16():
    inputs = random_inputs(3, 256, jnp.bfloat16, (4, 16, 32))
    results = values_and_gradients(chunked(chunk=100), *inputs, 1.0)
    hidden, matrix, targets = inputs
    wide = hidden.astype(jnp.float32), matrix.astype(jnp.float32), targets
    expected = values_and_gradients(dense, *wide, 1.0)
    # The inputs are rounded, but nothing after them up to the log-probabilities.
    for result, value in zip(results[:2], expected[:2], strict=True):
        assert result.dtype == jnp.float32
        np.testing.assert_allclose(result, value, rtol=1e-5, atol=1e-5)
    for result, value in zip(results[2:], expected[2:], strict=True):
        assert result.dtype == jnp.bfloat16
        error = jnp.linalg.norm(result.astype(jnp.float32) - value) / jnp.linalg.norm(value)
        assert error < 2**-8  # half the spacing of numbers, for the operands and the result


def test_float32_parameters_with_bfloat16_activations():
    hidden, _, targets = random_inputs(4, 64, jnp.bfloat16)
    _, matrix, _ = random_inputs(4, 64)
    results = values_and_gradients(chunked(chunk=24), hidden, matrix, targets, 1.0)
    rounded = matrix.astype(jnp.bfloat16)
    expected = values_and_gradients(dense, hidden, rounded, targets, 1.0)
    np.testing.assert_allclose(results[0], expected[0], rtol=1e-5, atol=1e-5)
    assert results[2].dtype == jnp.bfloat16
    assert results[3].dtype == jnp.float32


def test_logits_of_any_size():
    hidden, matrix, targets = random_inputs(5, 40)
    inputs = 1e3 * hidden, 1e3 * matrix, targets
    results = values_and_gradients(chunked(chunk=16), *inputs, 1.0)
    expected = values_and_gradients(dense, *inputs, 1.0)
    for result, value in zip(results, expected, strict=True):
        assert np.all(np.isfinite(result))
        np.testing.assert_allclose(result, value, rtol=1e-5, atol=1e-3)


def test_no_gradient_for_temperature():
    hidden, matrix, targets = random_inputs(6, 20)

    def total(temperature):
        return jnp.sum(token_logprobs(hidden, matrix, targets, temperature=temperature))

    assert jax.grad(total)(0.5) == 0


def loop_bodies(program):
    """The text of every computation that is the body of a loop."""
    names = re.findall(r"body=%?([\w.\-]+)", program)
    return [re.search(rf"(?ms)^%?{re.escape(name)} .*?^}}", program)[0] for name in names]


COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")


@pytest.mark.parametrize(("data", "tensor"), [(1, 8), (2, 4)])
def test_spread_over_devices(data, tensor):
    mesh = jax.make_mesh((data, tensor), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    inputs = random_inputs(7, 8 * 20, shape=(8, 4, D))
    specs = jax.P("data"), jax.P("tensor"), jax.P("data")
    placed = jax.device_put(inputs, tuple(jax.NamedSharding(mesh, spec) for spec in specs))
    function = chunked(chunk=48, vocab_shards=tensor)
    compiled = values_and_gradients.lower(function, *placed, 0.9).compile()
    program = compiled.as_text()
    bodies = loop_bodies(program)
    assert len(bodies) == 2  # forwards and backwards
    assert "all-gather" not in program
    if data == 1:
        # Parts of the vocabulary meet after the last chunk, not in every step.
        assert not [name for name in COLLECTIVES for body in bodies if f" {name}" in body]
    results = compiled(*placed, 0.9)
    expected = values_and_gradients(dense, *inputs, 0.9)
    for result, value in zip(results, expected, strict=True):
        np.testing.assert_allclose(result, value, rtol=1e-5, atol=1e-5)
    # Gradients come out where the parameters and activations live.
    for result, argument in zip(results[2:], placed[:2], strict=True):
        assert result.sharding.is_equivalent_to(argument.sharding, argument.ndim)


@pytest.mark.parametrize("shards", [1, 2])
def test_the_layout_of_training(shards):
    # The matrix is split both ways, and `vocab_shards` is a hint: results do not depend on it.
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    inputs = random_inputs(8, 96, shape=(8, 4, D))
    specs = jax.P("fsdp"), jax.P("tensor", "fsdp"), jax.P("fsdp")
    placed = jax.device_put(inputs, tuple(jax.NamedSharding(mesh, spec) for spec in specs))
    function = chunked(chunk=36, vocab_shards=shards, softcap=4.0)
    results = values_and_gradients(function, *placed, 1.0)
    expected = values_and_gradients(capped(4.0), *inputs, 1.0)
    for result, value in zip(results, expected, strict=True):
        np.testing.assert_allclose(result, value, rtol=1e-5, atol=1e-5)


@functools.cache
def temporary_bytes(vocab, chunk, rows=2, length=16, width=16):
    hidden = jax.ShapeDtypeStruct((rows, length, width), jnp.float32)
    matrix = jax.ShapeDtypeStruct((vocab, width), jnp.float32)
    targets = jax.ShapeDtypeStruct((rows, length), jnp.int32)

    def total(hidden, matrix, targets):
        return jnp.sum(token_logprobs(hidden, matrix, targets, chunk=chunk))

    function = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))
    return function.lower(hidden, matrix, targets).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("chunk", [4096, 5000])
def test_memory_does_not_grow_with_the_vocabulary(chunk):
    small = temporary_bytes(2**15, chunk)
    large = temporary_bytes(2**18, chunk)
    assert large <= 1.2 * small
    # Far less than the matrix or all logits: neither is copied, nor is the gradient.
    assert large < 2**18 * 16 * 4 / 4
    assert large < 2 * 16 * 2**18 * 4 / 4


def test_memory_follows_the_chunk():
    assert temporary_bytes(2**15, 512) < temporary_bytes(2**15, 4096) / 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 0}, "temperature"),
        ({"temperature": -1.0}, "temperature"),
        ({"chunk": 0}, "chunk"),
        ({"vocab_shards": 3}, "vocab_shards"),
        ({"vocab_shards": 0}, "vocab_shards"),
        ({"targets": jnp.zeros((B, T + 1), jnp.int32)}, "targets"),
        ({"matrix": jnp.zeros((20, D + 1))}, "matrix"),
    ],
)
def test_what_does_not_go_together_is_said(changes, message):
    hidden, matrix, targets = random_inputs(9, 20)
    arguments = {"hidden": hidden, "matrix": matrix, "targets": targets} | changes
    with pytest.raises(UsageError, match=message):
        token_logprobs(**arguments)
