"""Learning rates at chosen steps, and what decays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grm_jax.errors import UsageError
from grm_jax.training.optimizer import make_optimizer, make_schedule
from tests.training import tiny


@pytest.mark.parametrize(
    ("name", "warmup", "rates"),
    [
        ("constant", 0, {0: 2, 5: 2, 9: 2, 20: 2}),
        ("constant", 4, {0: 0.5, 1: 1, 3: 2, 4: 2, 9: 2}),
        ("constant", 1, {0: 2, 1: 2}),
        ("warmup_linear", 0, {0: 2, 5: 1.1, 10: 0.2, 99: 0.2}),
        ("warmup_linear", 2, {0: 1, 1: 2, 2: 2, 6: 1.1, 10: 0.2}),
        ("warmup_cosine", 2, {0: 1, 1: 2, 2: 2, 6: 1.1, 10: 0.2}),
        ("warmup_cosine", 0, {0: 2, 2.5: 1.1 + 0.9 * 2**-0.5, 10: 0.2}),
    ],
)
def test_schedules(name: str, warmup: int, rates: dict[float, float]) -> None:
    schedule = make_schedule(name, peak=2.0, warmup=warmup, steps=10, final_share=0.1)
    assert {step: float(schedule(jnp.asarray(step))) for step in rates} == pytest.approx(rates)


def test_a_warm_up_that_leaves_nothing() -> None:
    with pytest.raises(UsageError, match=r"warmup_steps is 10, which leaves nothing of 10 steps"):
        make_schedule("warmup_linear", peak=1.0, warmup=10, steps=10, final_share=0.1)


def test_norms_and_biases_do_not_decay() -> None:
    changes = {"optimizer.weight_decay": 0.5, "optimizer.learning_rate": 0.1}
    transform, _ = make_optimizer(tiny.settings(**changes))
    params = {"mlp": {"kernel": jnp.ones(2), "bias": jnp.ones(2)}, "norm": {"scale": jnp.ones(2)}}
    nothing = jax.tree.map(jnp.zeros_like, params)
    updates, _ = transform.update(nothing, transform.init(params), params)
    np.testing.assert_allclose(updates["mlp"]["kernel"], -0.05)
    assert not updates["mlp"]["bias"].any()
    assert not updates["norm"]["scale"].any()


def test_long_gradients_are_cut() -> None:
    """With momentum alone the update is the sign; so the first moment is looked at."""
    params = {"kernel": jnp.zeros(2)}
    for longest, moment in ((1.0, (0.06, 0.08)), (0.0, (0.3, 0.4))):
        transform, _ = make_optimizer(tiny.settings(**{"optimizer.clip_norm": longest}))
        gradient = {"kernel": jnp.array([3.0, 4.0])}
        _, state = transform.update(gradient, transform.init(params), params)
        found = next(leaf for leaf in jax.tree.leaves(state) if leaf.shape == (2,))
        np.testing.assert_allclose(found, moment, rtol=1e-6)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("optimizer.learning_rate", 0.0),
        ("optimizer.eps", -1.0),
        ("optimizer.clip_norm", -1.0),
        ("optimizer.schedule", "cosine"),
    ],
)
def test_values_out_of_their_range(key: str, value: object) -> None:
    with pytest.raises(UsageError, match=f"{key} is "):
        make_optimizer(tiny.settings(**{key: value}))
