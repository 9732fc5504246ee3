"""The one step that all stages learn by.

A stage brings a loss of parameters and a batch; the rest is here: micro-batches with exact
normalisers, the optimiser, the mesh, and a guard that lets no NaN into the parameters.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, final

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from grm_jax.distributed import batch_parts, logical_to_sharding, on_mesh
from grm_jax.errors import UsageError
from grm_jax.models import Params, join_lora
from grm_jax.training.losses import Metrics
from grm_jax.training.optimizer import Optimizer
from grm_jax.training.state import TrainState, abstract_state, init_state, shardings_of

Loss = Callable[[Params, Any, jax.Array, jax.Array], tuple[jax.Array, Metrics]]
"""`loss(params, batch, denominator, key) -> (loss, metrics)`: of the whole model's parameters and a
micro-batch. Micro-batches share the denominator, and their losses add up to that of the batch."""

Denominator = Callable[[Any], jax.Array]
"""What the loss of a batch divides by, given all micro-batches stacked: see `loss_denominator`."""


@final
@dataclass(frozen=True, kw_only=True)
class Learner:
    """A compiled step on a mesh, and how states and batches get there.

    Attributes:
      mesh: The mesh.
      target: The state's shapes and shardings.
      accumulate: Micro-batches in a batch.
      init: The jitted `init_state`.
      step: The jitted step; both donate what they replace.
    """

    mesh: Mesh
    target: TrainState
    accumulate: int
    init: Callable[[Params, Params, jax.Array], TrainState]
    step: Callable[[TrainState, Any], tuple[TrainState, Metrics]]

    def begin(self, params: Params, frozen: Params, seed: int) -> TrainState:
        """The state before the first step; the parameters' arrays become part of it."""
        with self.here():
            return self.init(params, frozen, jax.random.key(seed))

    def place(self, batch: Any) -> Any:
        """Puts a batch on the devices.

        Args:
          batch: Tree of host arrays `[B, ...]`, the same on every process: the rows of all of them.

        Returns:
          Tree of arrays `[A, B / A, ...]` for A micro-batches, each split over the
          mesh's batch axes.

        Raises:
          UsageError: The rows cannot be shared out.
        """
        parts = batch_parts(self.mesh)

        def put(array: np.ndarray) -> jax.Array:
            check_rows(len(array), self.accumulate, parts)
            split = array.reshape(self.accumulate, -1, *array.shape[1:])
            axes = (None, "batch", *(None for _ in array.shape[1:]))
            sharding = logical_to_sharding(axes, self.mesh)
            return jax.make_array_from_callback(split.shape, sharding, lambda index: split[index])

        return jax.tree.map(put, batch)

    def __call__(self, state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        """Learns from a batch of host arrays; see `place`. The state that is given is gone."""
        placed = self.place(batch)
        # A batch that was left on the host would be copied in every step, and nobody would know.
        with self.here(), jax.transfer_guard("disallow"):
            return self.step(state, placed)

    @contextlib.contextmanager
    def here(self) -> Iterator[None]:
        """Where programs on the learner's arrays are called."""
        with on_mesh(self.mesh):
            yield


def make_learner(
    loss: Loss,
    denominator: Denominator,
    optimizer: Optimizer,
    *,
    params: Params,
    frozen: Params,
    mesh: Mesh,
    accumulate: int = 1,
    pending: Any = (),
) -> Learner:
    """Compiles nothing yet: that happens at the first step.

    Args:
      loss: The stage's; see `Loss`.
      denominator: See `Denominator`.
      optimizer: From `make_optimizer`.
      params: Shapes and shardings of what learns, as `jax.ShapeDtypeStruct`s.
      frozen: Those of the base model under adapters; empty without.
      mesh: Where all of it lives.
      accumulate: In how many micro-batches a batch is learnt from.
      pending: Shapes and shardings of what a stage keeps in `TrainState.pending` between steps; the
        step itself takes and gives states without it.

    Returns:
      The learner.
    """
    target = abstract_state(params, frozen, optimizer.transform, mesh, pending)
    shardings = shardings_of(target)
    everywhere = NamedSharding(mesh, PartitionSpec())
    return Learner(
        mesh=mesh,
        target=target,
        accumulate=accumulate,
        init=jax.jit(
            functools.partial(init_state, transform=optimizer.transform, pending=pending),
            donate_argnums=(0, 1),
            out_shardings=shardings,
        ),
        step=jax.jit(
            functools.partial(_step, loss, denominator, optimizer, shardings.params),
            donate_argnums=0,
            out_shardings=(shardings._replace(pending=()), everywhere),
        ),
    )


def _step(
    loss: Loss,
    denominator: Denominator,
    optimizer: Optimizer,
    shardings: Any,
    state: TrainState,
    batch: Any,
) -> tuple[TrainState, Metrics]:
    count = denominator(batch)
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)

    def of_part(params: Params, part: Any, index: jax.Array) -> tuple[jax.Array, Metrics]:
        model = join_lora(params, state.frozen)
        return loss(model, part, count, jax.random.fold_in(key, index))

    def add_part(
        total: tuple[jax.Array, Params], part: tuple[jax.Array, Any]
    ) -> tuple[tuple[jax.Array, Params], Metrics]:
        index, rows = part
        (value, metrics), gradient = jax.value_and_grad(of_part, has_aux=True)(
            state.params, rows, index
        )
        # In parts as the parameters are, so that each device sums its own.
        gradient = lax.with_sharding_constraint(gradient, shardings)
        return jax.tree.map(jnp.add, total, (value, gradient)), metrics

    nothing = jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.params)
    parts = len(jax.tree.leaves(batch)[0])
    (value, gradient), metrics = lax.scan(add_part, nothing, (jnp.arange(parts), batch))
    norm = optax.tree.norm(gradient)
    good = jnp.isfinite(value) & jnp.isfinite(norm)
    updates, opt_state = optimizer.transform.update(gradient, state.opt_state, state.params)
    moved = optax.apply_updates(state.params, updates)
    # A step that is not finite changes nothing but the counts.
    params, opt_state = jax.tree.map(
        lambda new, old: jnp.where(good, new, old),
        (moved, opt_state),
        (state.params, state.opt_state),
    )
    bad = 1 - good.astype(jnp.int32)
    after = state._replace(
        params=params,
        opt_state=opt_state,
        step=state.step + 1,
        skipped=state.skipped + bad,
        bad_streak=(state.bad_streak + bad) * bad,
    )
    return after, {
        **merge_metrics(metrics),
        "loss": value,
        "grad_norm": norm,
        "learning_rate": jnp.asarray(optimizer.schedule(state.step - state.skipped), jnp.float32),
        "skipped": after.skipped,
        "bad_streak": after.bad_streak,
    }


def merge_metrics(metrics: Metrics) -> Metrics:
    """The metrics of a batch from those of its micro-batches.

    `tokens` and `rows` are added up and `*_max` is the largest. Everything else is a mean: over
    tokens where these are counted, else over rows. `perplexity` is made of the mean `nll`.

    Args:
      metrics: Each `f32[A]`, one value a micro-batch.

    Returns:
      Each `f32[]`.
    """
    weights = metrics.get("tokens", metrics.get("rows"))
    merged: Metrics = {}
    for name, values in metrics.items():
        if name in ("tokens", "rows"):
            merged[name] = jnp.sum(values)
        elif name.endswith("_max"):
            merged[name] = jnp.max(values)
        elif weights is None:
            merged[name] = jnp.mean(values)
        else:
            # A part without a token has a mean of nothing, which must not count.
            total = jnp.sum(jnp.where(weights > 0, values * weights, 0.0))
            merged[name] = total / jnp.maximum(jnp.sum(weights), 1.0)
    if "perplexity" in merged and "nll" in merged:
        merged["perplexity"] = jnp.exp(merged["nll"])
    return merged


def check_rows(rows: int, accumulate: int, parts: int) -> None:
    """Makes sure that a batch can be shared out.

    Args:
      rows: B.
      accumulate: Micro-batches.
      parts: Devices along the mesh's batch axes together.

    Raises:
      UsageError: It cannot.
    """
    if rows < 1 or accumulate < 1 or rows % (accumulate * parts):
        raise UsageError(
            f"batch.rows is {rows}, but {accumulate} micro-batches over {parts} devices "
            f"(data x fsdp x expert) need a multiple of {max(accumulate, 1) * parts}"
        )
