"""The step: the same on any mesh and in any number of parts, and unharmed by what is not finite."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from grm_jax.data.packing import PackedRows
from grm_jax.distributed import make_mesh
from grm_jax.errors import UsageError
from grm_jax.models import logits
from grm_jax.training.learner import Learner, Loss, check_rows, make_learner, merge_metrics
from grm_jax.training.optimizer import make_optimizer
from grm_jax.training.sft import learnt_targets
from grm_jax.training.state import TrainState
from tests.training import tiny


def one_device() -> jax.sharding.Mesh:
    return make_mesh({}, jax.devices()[:1])


@functools.cache
def course(devices: int, accumulate: int, steps: int) -> tuple[dict[str, float], ...]:
    """The metrics of a run's steps; asserts that it compiles one program."""
    mesh = one_device() if devices == 1 else make_mesh({"fsdp": 4, "tensor": 2})
    learner = tiny.learner(mesh, accumulate=accumulate)
    state, found = tiny.begin(learner), []
    for step in range(steps):
        state, metrics = learner(state, tiny.rows(step))
        found.append({name: float(value) for name, value in jax.device_get(metrics).items()})
    assert learner.step._cache_size() == 1
    assert learner.init._cache_size() == 1
    assert int(state.step) == steps
    return tuple(found)


def test_it_learns() -> None:
    losses = [metrics["loss"] for metrics in course(1, 1, 20)]
    assert losses[0] > 4
    assert losses[-1] < 0.7 * losses[0]


def test_eight_devices_learn_what_one_does() -> None:
    one, eight = course(1, 1, 20), course(8, 1, 20)
    for name in ("loss", "grad_norm", "nll", "tokens"):
        np.testing.assert_allclose(
            [metrics[name] for metrics in eight],
            [metrics[name] for metrics in one],
            rtol=2e-4,
            err_msg=name,
        )


def test_parts_of_a_batch_add_up_to_it() -> None:
    for whole, parts in zip(course(1, 1, 20), course(1, 4, 4), strict=False):
        assert parts == pytest.approx(whole, rel=2e-4), "a count or a mean is not of the whole"


def test_the_loss_of_packed_rows_by_hand() -> None:
    """Each sequence of a row alone, unpacked, through the plain logits."""
    learner = tiny.learner(one_device())
    params, batch = tiny.random_params(), tiny.rows(0)
    total, count = 0.0, 0
    run = jax.jit(logits, static_argnums=1)
    for row in range(len(batch.tokens)):
        for segment in (1, 2):
            chosen = batch.segment_ids[row] == segment
            tokens, learnt = batch.tokens[row][chosen], batch.loss_mask[row][chosen]
            padded = np.pad(tokens, (0, 8 - len(tokens)))[None]
            logprobs = jax.nn.log_softmax(run(params, tiny.CONFIG, padded)[0])
            for place in np.flatnonzero(learnt):
                total -= float(logprobs[place - 1, tokens[place]])
                count += 1
    _, metrics = learner(tiny.begin(learner), batch)
    assert float(metrics["tokens"]) == count
    assert float(metrics["loss"]) == pytest.approx(total / count, rel=1e-5)


def test_first_tokens_have_nothing_to_be_predicted_from() -> None:
    batch = PackedRows(
        tokens=np.zeros((1, 6), np.int32),
        segment_ids=np.array([[1, 1, 2, 2, 2, 0]], np.int32),
        positions=np.array([[0, 1, 0, 1, 2, 0]], np.int32),
        loss_mask=np.array([[1, 1, 1, 0, 1, 0]], bool),
    )
    found = learnt_targets(batch)
    np.testing.assert_array_equal(found, [[True, False, False, True, False, False]])


def test_only_adapters_learn() -> None:
    learner = tiny.learner(one_device(), config=tiny.LORA)
    state = tiny.begin(learner, tiny.LORA)
    before = jax.device_get((state.params, state.frozen))
    names = {
        jax.tree_util.keystr(path).rsplit("'", 2)[1]
        for path, _ in jax.tree_util.tree_flatten_with_path(state.opt_state)[0]
        if "'" in jax.tree_util.keystr(path)
    }
    assert names == {"lora_a", "lora_b"}
    losses = []
    for _ in range(5):
        state, metrics = learner(state, tiny.rows(0))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.frozen), before[1])
    moved = jax.tree.map(lambda new, old: bool((new != old).any()), state.params, before[0])
    assert all(jax.tree.leaves(moved))


def test_layers_computed_again_learn_the_same() -> None:
    config = dataclasses.replace(tiny.CONFIG, remat=True)
    learner = tiny.learner(one_device(), config=config)
    _, metrics = learner(tiny.begin(learner), tiny.rows(0))
    first = course(1, 1, 20)[0]
    assert float(metrics["grad_norm"]) == pytest.approx(first["grad_norm"], rel=1e-5)


def straight_line(
    params: Any, batch: Any, denominator: jax.Array, key: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """A loss that costs nothing to compile."""
    errors = jnp.square(batch["x"] * params["slope"] - batch["y"])
    return jnp.sum(errors) / denominator, {"rows": jnp.float32(errors.size)}


def toy(accumulate: int = 1, loss: Loss = straight_line) -> tuple[Learner, TrainState]:
    mesh = one_device()
    here = NamedSharding(mesh, PartitionSpec())
    learner = make_learner(
        loss,
        lambda batch: jnp.float32(batch["x"].size),
        make_optimizer(tiny.settings(optimizer__weight_decay=0.1)),
        params={"slope": jax.ShapeDtypeStruct((), jnp.float32, sharding=here)},
        frozen={},
        mesh=mesh,
        accumulate=accumulate,
    )
    return learner, learner.begin({"slope": jax.device_put(np.float32(0.5), here)}, {}, seed=0)


def points(value: float = 1.0) -> dict[str, np.ndarray]:
    return {"x": np.full(4, value, np.float32), "y": np.ones(4, np.float32)}


@pytest.mark.parametrize("harm", [np.nan, np.inf, 1e30])
def test_a_step_that_is_not_finite_changes_only_counts(harm: float) -> None:
    """The last one has a loss and gradient whose squares overflow."""
    learner, state = toy()
    state, _ = learner(state, points())
    before = jax.device_get(state)
    for number in (1, 2):
        state, metrics = learner(state, points(harm))
        assert (int(metrics["skipped"]), int(metrics["bad_streak"])) == (number, number)
    after = jax.device_get(state)
    assert (after.step, after.skipped, after.bad_streak) == (3, 2, 2)
    counts = {"step": 0, "skipped": 0, "bad_streak": 0}
    jax.tree.map(np.testing.assert_array_equal, after._replace(**counts), before._replace(**counts))
    state, metrics = learner(state, points())
    assert (int(metrics["skipped"]), int(metrics["bad_streak"])) == (2, 0)
    assert float(state.params["slope"]) != before.params["slope"]
    assert learner.step._cache_size() == 1


def test_one_bad_part_spoils_the_batch() -> None:
    learner, state = toy(accumulate=2)
    batch = points()
    batch["x"][3] = np.nan
    state, metrics = learner(state, batch)
    assert int(metrics["skipped"]) == 1
    assert float(state.params["slope"]) == 0.5


def test_every_part_of_every_step_has_its_own_key() -> None:
    def draw(params: Any, batch: Any, denominator: jax.Array, key: jax.Array) -> Any:
        value = jax.random.uniform(key)
        return params["slope"] * 0, {"low": value, "high_max": value}

    learner, state = toy(accumulate=4, loss=draw)
    seen = []
    for _ in range(2):
        state, metrics = learner(state, points())
        seen += [float(metrics["low"]), float(metrics["high_max"])]
    assert len(set(seen)) == 4
    _, again = toy(accumulate=4, loss=draw)
    _, metrics = learner(again, points())
    assert float(metrics["low"]) == seen[0]


def test_metrics_of_parts() -> None:
    parts = {
        "tokens": jnp.array([3.0, 1.0, 0.0]),
        "rows": jnp.array([2.0, 1.0, 0.0]),
        "nll": jnp.array([1.0, 2.0, jnp.nan]),
        "perplexity": jnp.exp(jnp.array([1.0, 2.0, 0.0])),
        "ratio_max": jnp.array([1.0, 7.0, 0.0]),
    }
    found = {name: float(value) for name, value in merge_metrics(parts).items()}
    assert found == pytest.approx(
        {"tokens": 4, "rows": 3, "nll": 1.25, "perplexity": np.exp(1.25), "ratio_max": 7}
    )
    found = {name: float(v) for name, v in merge_metrics({"low": parts["tokens"]}).items()}
    assert found == pytest.approx({"low": 4 / 3})


def test_batches_land_in_parts_on_their_devices() -> None:
    learner = tiny.learner(make_mesh({"data": 2, "fsdp": 2, "tensor": 2}), accumulate=2)
    placed = learner.place(tiny.rows(0))
    assert placed.tokens.shape == (2, 4, 12)
    assert {shard.data.shape for shard in placed.tokens.addressable_shards} == {(2, 1, 12)}
    np.testing.assert_array_equal(placed.tokens.reshape(8, 12), tiny.rows(0).tokens)


@pytest.mark.parametrize(("rows", "accumulate", "parts"), [(6, 1, 4), (8, 3, 1), (0, 1, 1)])
def test_rows_that_cannot_be_shared_out(rows: int, accumulate: int, parts: int) -> None:
    with pytest.raises(UsageError, match=f"batch.rows is {rows}.* need a multiple of"):
        check_rows(rows, accumulate, parts)
