"""Losses against numbers worked by hand, under masks, in pieces, and spread over devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grm_jax.errors import UsageError
from grm_jax.training import (
    binary_reward_loss,
    bradley_terry_loss,
    grpo_loss,
    loss_denominator,
    sft_loss,
    truncated_importance,
)

NAN, INF = np.nan, np.inf
LOG2 = np.log(2)

# Two rows, of three tokens and of two; probability ratios and advantages that clip on both sides.
RATIOS = np.array([[1.5, 0.5, 1.0], [1.5, 0.5, 9.0]])
MASK = np.array([[1, 1, 1], [1, 1, 0]], bool)
ADVANTAGES = np.array([1.0, -2.0])
OLD = np.array([[-1.0, -2.0, -0.5], [-3.0, -0.1, -7.0]])
HAND = {
    "logprobs": OLD + np.log(RATIOS),
    "old_logprobs": OLD,
    "ref_logprobs": None,
    "advantages": ADVANTAGES,
    "mask": MASK,
    "beta": 0.0,
    "max_length": 4,
}

AGGREGATES = ["sequence", "token", "sum"]


def random_batch(seed, rows=6, length=3):
    """Arguments of `grpo_loss` with rows of many lengths, some ratios beyond the clip.

    Shapes are few in these tests, since every operation is compiled once for each.
    """
    rng = np.random.default_rng(seed)
    old = -rng.gamma(1.0, 1.0, (rows, length)).astype(np.float32)
    lengths = rng.integers(1, length + 1, rows)
    return {
        "logprobs": old + 0.3 * rng.normal(size=old.shape).astype(np.float32),
        "old_logprobs": old,
        "ref_logprobs": old + 0.5 * rng.normal(size=old.shape).astype(np.float32),
        "advantages": rng.normal(size=rows).astype(np.float32),
        "mask": np.arange(length) < lengths[:, None],
        "importance_weights": rng.gamma(2.0, 0.5, old.shape).astype(np.float32),
        "max_length": length,
    }


def loss_and_gradient(batch, **settings):
    def loss(logprobs):
        return grpo_loss(**(batch | {"logprobs": logprobs}), **settings)[0]

    return jax.value_and_grad(loss)(jnp.asarray(batch["logprobs"], jnp.float32))


@pytest.mark.parametrize(
    ("changes", "loss"),
    [
        # Gains of the first row: 1.2, 0.5, 1; of the second: -3, -1.6.
        ({"aggregate": "sequence"}, -(2.7 / 3 - 4.6 / 2) / 2),
        ({"aggregate": "token"}, -(2.7 - 4.6) / 5),
        ({"aggregate": "sum"}, -(2.7 - 4.6) / 4 / 2),
        ({"aggregate": "sum", "max_length": 10}, -(2.7 - 4.6) / 10 / 2),
        ({"aggregate": "token", "clip_high": 0.4}, -(2.9 - 4.6) / 5),
        ({"aggregate": "token", "clip": 0.5}, -(3.0 - 4.0) / 5),
        ({"aggregate": "token", "clip": 0.5, "clip_high": 0.2}, -(2.7 - 4.0) / 5),
        ({"aggregate": "token", "denominator": 20.0}, -(2.7 - 4.6) / 20),
        ({"aggregate": "sequence", "denominator": 8.0}, -(2.7 / 3 - 4.6 / 2) / 8),
        ({"aggregate": "sum", "denominator": 8.0}, -(2.7 - 4.6) / 4 / 8),
        # One advantage a token: gains 1.2, 1, -1; 1.2, 0.
        (
            {"aggregate": "token", "advantages": np.array([[1.0, 2, -1], [1, 0, NAN]])},
            -(1.2 + 1 - 1 + 1.2 + 0) / 5,
        ),
        # Weights on the gains.
        (
            {"aggregate": "token", "importance_weights": np.array([[2.0, 1, 0], [1, 0.5, NAN]])},
            -(2.4 + 0.5 + 0 - 3 - 0.8) / 5,
        ),
        # Ratios of rows: 0.75 ** (1/3) = 0.9086 and 0.75 ** (1/2) = 0.8660.
        (
            {"aggregate": "token", "ratio": "sequence"},
            -(3 * 0.75 ** (1 / 3) - 2 * 2 * 0.75**0.5) / 5,
        ),
        (
            {"aggregate": "sequence", "ratio": "sequence", "clip": 0.1},
            -(0.75 ** (1 / 3) - 2 * 0.9) / 2,
        ),
    ],
)
def test_grpo_by_hand(changes, loss):
    result, metrics = grpo_loss(**(HAND | changes))
    np.testing.assert_allclose(result, loss, rtol=1e-6)
    for value in (result, *metrics.values()):
        assert value.shape == ()
        assert value.dtype == jnp.float32


@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_grpo_jitted(aggregate, ratio):
    arrays = random_batch(9)
    settings = {"max_length": arrays.pop("max_length"), "aggregate": aggregate, "ratio": ratio}
    results = jax.jit(lambda arrays: grpo_loss(**arrays, **settings))(arrays)
    expected = grpo_loss(**arrays, **settings)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), results, expected)


@pytest.mark.parametrize("weights", [None, np.full((2, 3), 7.0)])
def test_divergence_by_hand(weights):
    # Of one sign each, because the estimator is not symmetric.
    gap = LOG2 * np.array([[1, -1, 0], [1, 1, 5]])
    twice, half = 2 - LOG2 - 1, 0.5 + LOG2 - 1
    arguments = HAND | {
        "ref_logprobs": HAND["logprobs"] + gap,
        "advantages": np.zeros(2),
        "importance_weights": weights,
    }
    loss, metrics = grpo_loss(**(arguments | {"beta": 0.1, "aggregate": "sequence"}))
    np.testing.assert_allclose(loss, 0.1 * ((twice + half) / 3 + twice) / 2, rtol=1e-5)
    np.testing.assert_allclose(metrics["kl"], (3 * twice + half) / 5, rtol=1e-5)
    loss, metrics = grpo_loss(**arguments)
    assert loss == 0
    np.testing.assert_allclose(metrics["kl"], (3 * twice + half) / 5, rtol=1e-5)


def test_small_divergence_is_not_rounding_error():
    loss, _ = grpo_loss(
        logprobs=np.full((1, 1), -8.0, np.float32),
        old_logprobs=None,
        ref_logprobs=np.full((1, 1), -8.0 + 2**-12, np.float32),
        advantages=np.zeros(1),
        mask=np.ones((1, 1), bool),
        beta=1.0,
    )
    np.testing.assert_allclose(loss, 2**-25, rtol=1e-3)


def test_grpo_metrics_by_hand():
    _, metrics = grpo_loss(**HAND)
    expected = {
        "clip_high": 1 / 5,  # 1.5 where the advantage is positive
        "clip_low": 1 / 5,  # 0.5 where it is negative
        "ratio_mean": 5 / 5,
        "ratio_max": 1.5,
        "tokens": 5,
        "rows": 2,
    }
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-6)
    _, metrics = grpo_loss(**HAND, clip_high=0.6)
    assert metrics["clip_high"] == 0
    _, metrics = grpo_loss(**HAND, ratio="sequence")
    np.testing.assert_allclose(metrics["ratio_max"], 0.75 ** (1 / 3), rtol=1e-6)
    np.testing.assert_allclose(
        metrics["ratio_mean"], (3 * 0.75 ** (1 / 3) + 2 * 0.75**0.5) / 5, rtol=1e-6
    )


@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_on_policy_gradient(aggregate):
    batch = HAND | {"old_logprobs": None, "aggregate": aggregate}
    loss, gradient = loss_and_gradient(batch)
    weight = {"sequence": [[1 / 3 / 2], [1 / 2 / 2]], "token": 1 / 5, "sum": 1 / 4 / 2}[aggregate]
    expected = -ADVANTAGES[:, None] * MASK * weight
    np.testing.assert_allclose(gradient, expected, rtol=1e-6)
    np.testing.assert_allclose(loss, np.sum(expected), rtol=1e-6)
    _, metrics = grpo_loss(**batch)
    assert metrics["ratio_mean"] == metrics["ratio_max"] == 1
    assert metrics["clip_low"] == metrics["clip_high"] == 0


def test_clipped_tokens_have_no_gradient():
    _, gradient = loss_and_gradient(HAND | {"aggregate": "token"})
    # The derivative of a ratio by its log-probability is the ratio.
    expected = -np.array([[0, 0.5 * 1, 1.0 * 1], [1.5 * -2, 0, 0]]) / 5
    np.testing.assert_allclose(gradient, expected, rtol=1e-6)


@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_gradient_against_differences(aggregate, ratio):
    batch = random_batch(0, rows=2)
    settings = {"aggregate": aggregate, "ratio": ratio, "clip": 10.0}  # smooth everywhere
    logprobs = np.asarray(batch["logprobs"], np.float64)
    _, gradient = loss_and_gradient(batch, **settings)
    step = 0.01
    for place in np.ndindex(logprobs.shape):
        around = []
        for sign in (-1, 1):
            moved = logprobs.copy()
            moved[place] += sign * step
            around.append(float(grpo_loss(**(batch | {"logprobs": moved}), **settings)[0]))
        slope = (around[1] - around[0]) / (2 * step)
        np.testing.assert_allclose(gradient[place], slope, rtol=1e-3, atol=1e-4)


def test_only_the_policy_has_a_gradient():
    batch = random_batch(1)
    others = ["old_logprobs", "ref_logprobs", "advantages", "importance_weights"]

    def loss(values):
        return grpo_loss(**(batch | values))[0]

    for name, gradient in jax.grad(loss)({name: batch[name] for name in others}).items():
        assert not np.any(gradient), name


@pytest.mark.parametrize("filler", [NAN, INF, -INF])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_masked_values_do_not_leak(aggregate, ratio, filler):
    batch = random_batch(2)
    batch["mask"][3] = False
    batch["advantages"] = np.repeat(batch["advantages"][:, None], 3, axis=1)
    spoilt = dict(batch)
    for name, value in batch.items():
        if name not in ("mask", "max_length"):
            spoilt[name] = np.where(batch["mask"], value, filler)
    clean_loss, clean_gradient = loss_and_gradient(batch, aggregate=aggregate, ratio=ratio)
    loss, gradient = loss_and_gradient(spoilt, aggregate=aggregate, ratio=ratio)
    assert loss == clean_loss
    np.testing.assert_array_equal(gradient, clean_gradient)
    assert np.all(np.isfinite(gradient))
    assert not np.any(gradient[~batch["mask"]])
    assert np.any(gradient)
    metrics = grpo_loss(**spoilt, aggregate=aggregate, ratio=ratio)[1]
    assert np.all(np.isfinite(list(metrics.values())))
    # On-policy there is one array less to be clean.
    loss, gradient = loss_and_gradient(spoilt | {"old_logprobs": None}, aggregate=aggregate)
    assert np.isfinite(loss)
    assert np.all(np.isfinite(gradient))


def take_rows(batch, rows):
    return {
        name: value[rows] if isinstance(value, np.ndarray) else value
        for name, value in batch.items()
    }


@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_an_empty_row_is_as_good_as_absent(aggregate):
    batch = random_batch(3)
    full = [1, 4]
    batch["mask"][np.delete(np.arange(6), full)] = False
    loss, gradient = loss_and_gradient(batch, aggregate=aggregate)
    shorter = take_rows(batch, full)
    expected_loss, expected_gradient = loss_and_gradient(shorter, aggregate=aggregate)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    np.testing.assert_allclose(gradient[np.array(full)], expected_gradient, rtol=1e-6)
    _, metrics = grpo_loss(**batch, aggregate=aggregate)
    _, expected_metrics = grpo_loss(**shorter, aggregate=aggregate)
    for name, value in expected_metrics.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5)


@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_an_empty_batch_gives_nothing(aggregate):
    batch = random_batch(4)
    batch["mask"][:] = False
    for denominator in (None, 0.0):
        loss, gradient = loss_and_gradient(batch, aggregate=aggregate, denominator=denominator)
        assert loss == 0
        assert not np.any(gradient)
    _, metrics = grpo_loss(**batch)
    assert not any(metrics.values())


@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_pieces_add_up_to_the_whole(aggregate, ratio):
    batch = random_batch(5)
    batch["mask"][4:] = False  # the last piece is empty
    settings = {"aggregate": aggregate, "ratio": ratio}
    whole, whole_gradient = loss_and_gradient(batch, **settings)
    denominator = loss_denominator(batch["mask"], aggregate=aggregate)
    losses, gradients = [], []
    for first in (0, 2, 4):
        piece = take_rows(batch, slice(first, first + 2))
        loss, gradient = loss_and_gradient(piece, **settings, denominator=denominator)
        losses.append(loss)
        gradients.append(gradient)
    np.testing.assert_allclose(sum(losses), whole, rtol=1e-6)
    np.testing.assert_allclose(np.concatenate(gradients), whole_gradient, rtol=1e-6)


@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_rows_spread_over_devices(aggregate):
    batch = random_batch(6, rows=16)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.NamedSharding(mesh, jax.P("data"))
    arrays = {name: value for name, value in batch.items() if isinstance(value, np.ndarray)}

    @jax.jit
    def loss(logprobs, arrays):
        return grpo_loss(**(arrays | {"logprobs": logprobs}), aggregate=aggregate, max_length=3)

    placed = jax.device_put(arrays, split)
    (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(placed["logprobs"], placed)
    expected, expected_gradient = loss_and_gradient(batch, aggregate=aggregate)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-5, atol=1e-8)
    for name, value in grpo_loss(**batch, aggregate=aggregate)[1].items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5)


def test_low_precision_is_widened():
    batch = random_batch(7)
    narrow = {
        name: value.astype(jnp.bfloat16) if value.dtype == np.float32 else value
        for name, value in batch.items()
        if isinstance(value, np.ndarray)
    }
    wide = {
        name: value.astype(np.float32) if value.dtype == jnp.bfloat16 else value
        for name, value in narrow.items()
    }
    loss, _ = grpo_loss(**narrow)
    assert loss.dtype == jnp.float32
    assert loss == grpo_loss(**wide)[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beta": 0.1}, "ref_logprobs"),
        ({"aggregate": "mean"}, "sequence, token, sum"),
        ({"ratio": "row"}, "token, sequence"),
        ({"aggregate": "sum", "max_length": None}, "max_length"),
        ({"mask": MASK[0]}, "mask"),
        ({"advantages": np.ones(3)}, "advantages"),
        ({"old_logprobs": OLD[:1]}, "old_logprobs"),
        ({"ref_logprobs": OLD[:, :1]}, "ref_logprobs"),
        ({"importance_weights": np.ones(2)}, "importance_weights"),
    ],
)
def test_what_does_not_go_together_is_said(changes, message):
    with pytest.raises(UsageError, match=message):
        grpo_loss(**(HAND | changes))


def test_loss_denominator():
    mask = np.array([[1, 1, 0], [0, 0, 0], [0, 1, 0]], bool)
    assert loss_denominator(mask) == 2
    assert loss_denominator(mask, aggregate="sum") == 2
    assert loss_denominator(mask, aggregate="token") == 3
    with pytest.raises(UsageError, match="aggregate"):
        loss_denominator(mask, aggregate="mean")


def test_truncated_importance_by_hand():
    logprobs = np.log([[0.5, 0.9, 0.1], [0.2, NAN, 0.3]])
    sampler_logprobs = np.log([[0.25, 0.1, 0.2], [0.2, 0.3, NAN]])
    mask = np.array([[1, 1, 1], [1, 0, 0]], bool)
    weights, metrics = truncated_importance(
        logprobs=logprobs, sampler_logprobs=sampler_logprobs, mask=mask, cap=3.0
    )
    np.testing.assert_allclose(weights, [[2, 3, 0.5], [1, 1, 1]], rtol=1e-6)
    expected = {
        "importance_mean": 6.5 / 4,
        "importance_capped": 1 / 4,
        "sampler_gap_mean": (2 * LOG2 + np.log(9)) / 4,
        "sampler_gap_max": np.log(9),
    }
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-6)


def test_importance_has_no_gradient():
    def total(logprobs):
        weights, metrics = truncated_importance(logprobs=logprobs, sampler_logprobs=OLD, mask=MASK)
        return jnp.sum(weights) + sum(metrics.values())

    assert not np.any(jax.grad(total)(jnp.asarray(HAND["logprobs"])))


@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize(
    ("settings", "loss"),
    [
        ({}, (1 + 2 + 3 + 4) / 4),
        ({"aggregate": "sequence"}, ((1 + 2 + 3) / 3 + 4) / 2),
        ({"aggregate": "sum", "max_length": 5}, 10 / 5 / 2),
        ({"denominator": 100.0}, 10 / 100),
    ],
)
def test_sft_by_hand(settings, loss, jitted):
    def function(logprobs, mask):
        return sft_loss(logprobs=logprobs, mask=mask, **settings)

    logprobs = np.array([[-1, -2, -3], [-4, NAN, -INF], [NAN, NAN, NAN]], np.float32)
    mask = np.array([[1, 1, 1], [1, 0, 0], [0, 0, 0]], bool)
    result, metrics = (jax.jit(function) if jitted else function)(logprobs, mask)
    np.testing.assert_allclose(result, loss, rtol=1e-6)
    expected = {"nll": 2.5, "perplexity": np.exp(2.5), "tokens": 4, "rows": 2}
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-6)
    gradient = jax.grad(lambda logprobs: function(logprobs, mask)[0])(logprobs)
    np.testing.assert_allclose(np.sum(gradient * np.nan_to_num(logprobs)), loss, rtol=1e-6)
    assert not np.any(gradient[~mask])


@pytest.mark.parametrize("jitted", [False, True])
def test_binary_reward_by_hand(jitted):
    function = jax.jit(binary_reward_loss) if jitted else binary_reward_loss
    # sigmoid(log 3) = 3/4.
    logits = np.log(np.array([3, 3, 1 / 3, 1]))
    labels = np.array([1, 0, 0, 1])
    loss, metrics = function(logits=logits, labels=labels)
    expected = -(np.log(3 / 4) + np.log(1 / 4) + np.log(3 / 4) + np.log(1 / 2)) / 4
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    expected_metrics = {"accuracy": 2 / 4, "positives": 2 / 4, "rows": 4}
    assert {name: float(value) for name, value in metrics.items()} == expected_metrics


def test_binary_reward_of_extreme_logits():
    logits = jnp.array([100.0, -100.0, 100.0, -100.0])
    labels = jnp.array([True, False, False, True])

    def losses(logits):
        return binary_reward_loss(logits=logits, labels=labels)[0]

    assert losses(logits) == 50
    np.testing.assert_allclose(jax.grad(losses)(logits), [0, 0, 0.25, -0.25], atol=1e-30)


def test_bradley_terry_by_hand():
    # sigmoid(log 3) = 3/4 and sigmoid(-log 3) = 1/4; equal rewards are even, and not a win.
    chosen, rejected = np.log([6.0, 1.0, 5.0, 9.0]), np.log([2.0, 3.0, 5.0, 3.0])
    loss, metrics = bradley_terry_loss(chosen=chosen, rejected=rejected)
    np.testing.assert_allclose(loss, -np.log(3 / 4 * 1 / 4 * 1 / 2 * 3 / 4) / 4, rtol=1e-6)
    np.testing.assert_allclose(metrics["accuracy"], 2 / 4, rtol=1e-6)
    np.testing.assert_allclose(metrics["gap"], np.log(3) / 4, rtol=1e-6)
    assert metrics["rows"] == 4
    loss, _ = bradley_terry_loss(chosen=chosen, rejected=rejected, margin=chosen - rejected)
    np.testing.assert_allclose(loss, LOG2, rtol=1e-6)
    even, _ = bradley_terry_loss(chosen=np.full(4, 3.0), rejected=np.full(4, 3.0), centre=0.01)
    np.testing.assert_allclose(even, LOG2 + 0.36, rtol=1e-6)


@pytest.mark.parametrize("filler", [NAN, INF, -INF])
def test_reward_losses_under_a_mask(filler):
    mask = np.array([True, False, True, False])
    first, second = np.array([0.3, filler, -1.2, filler]), np.array([1.0, filler, 0.0, filler])

    def binary(first, second, mask):
        return binary_reward_loss(logits=first, labels=second, mask=mask)

    def pairs(first, second, mask):
        return bradley_terry_loss(
            chosen=first, rejected=second, margin=second, centre=0.1, mask=mask
        )

    for function in (binary, pairs):
        loss, metrics = function(first, second, mask)
        expected, expected_metrics = function(first[mask], second[mask], None)
        np.testing.assert_allclose(loss, expected, rtol=1e-6)
        for name, value in expected_metrics.items():
            np.testing.assert_allclose(metrics[name], value, rtol=1e-6)
        gradient = jax.grad(lambda first: function(first, second, mask)[0])(jnp.asarray(first))  # noqa: B023
        assert np.all(np.isfinite(gradient))
        np.testing.assert_array_equal(gradient != 0, mask)
        nothing, _ = function(first, second, np.zeros(4, bool))
        assert nothing == 0


def test_reward_losses_in_pieces():
    rng = np.random.default_rng(8)
    first, second = rng.normal(size=(2, 4))
    labels = rng.random(4) < 0.5
    count = loss_denominator(np.ones(4, bool), aggregate="token")
    pieces = [slice(0, 2), slice(2, 4)]
    whole, _ = bradley_terry_loss(chosen=first, rejected=second)
    parts = [
        bradley_terry_loss(chosen=first[p], rejected=second[p], denominator=count)[0]
        for p in pieces
    ]
    np.testing.assert_allclose(sum(parts), whole, rtol=1e-6)
    whole, _ = binary_reward_loss(logits=first, labels=labels)
    parts = [
        binary_reward_loss(logits=first[p], labels=labels[p], denominator=count)[0] for p in pieces
    ]
    np.testing.assert_allclose(sum(parts), whole, rtol=1e-6)
