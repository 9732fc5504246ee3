"""The state of a training run: everything that a step changes, in one tree."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from grm_jax.models import Params, join_lora


class TrainState(NamedTuple):
    """What a step takes and returns; its memory is donated on the way.

    Attributes:
      params: What learns, float32: all parameters, or the adapters alone.
      frozen: The base model's parameters under adapters; empty without.
      opt_state: The optimiser's.
      step: `i32[]`, steps done, skipped ones included.
      key: `u32[...]`, the data of the run's random key; it stays the same, and steps derive theirs
        from it.
      skipped: `i32[]`, steps whose loss or gradient was not finite and that changed nothing.
      bad_streak: `i32[]`, how many of the latest steps were skipped in a row.
      pending: What was sampled for the next step, where sampling runs ahead; empty elsewhere.
    """

    params: Params
    frozen: Params
    opt_state: optax.OptState
    step: jax.Array
    key: jax.Array
    skipped: jax.Array
    bad_streak: jax.Array
    pending: Any = ()

    @property
    def model(self) -> Params:
        """The parameters of the whole model, as `grm_jax.models` takes them."""
        return join_lora(self.params, self.frozen)


def init_state(
    params: Params,
    frozen: Params,
    key: jax.Array,
    transform: optax.GradientTransformation,
    pending: Any = (),
) -> TrainState:
    """The state before the first step, with the data of a typed key; pure.

    Of what is pending, shapes are given, and zeros are there before the first step.
    """
    # The key's data, because typed keys come back with a sharding that is written in another way,
    # and another program is compiled for them. A zero for each count, because an array that is
    # donated must not be there twice.
    return TrainState(
        params=params,
        frozen=frozen,
        opt_state=transform.init(params),
        step=jnp.zeros((), jnp.int32),
        key=jax.random.key_data(key),
        skipped=jnp.zeros((), jnp.int32),
        bad_streak=jnp.zeros((), jnp.int32),
        pending=jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), pending),
    )


def abstract_state(
    params: Params,
    frozen: Params,
    transform: optax.GradientTransformation,
    mesh: Mesh,
    pending: Any = (),
) -> TrainState:
    """The shapes of a state, and where its arrays live.

    The optimiser's moments live where their parameters do; what is not of a parameter, such as a
    count, is on every device.

    Args:
      params: Trees of `jax.ShapeDtypeStruct`s with shardings: of what learns,
      frozen: and of what does not.
      transform: The optimiser's.
      mesh: The mesh of the shardings.
      pending: Shapes and shardings of what is pending.

    Returns:
      A state of `jax.ShapeDtypeStruct`s with shardings.
    """
    everywhere = NamedSharding(mesh, PartitionSpec())

    def place(leaf: Any, sharding: NamedSharding) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    key = jax.eval_shape(lambda: jax.random.key(0))
    shapes = jax.eval_shape(lambda p, f, k: init_state(p, f, k, transform), params, frozen, key)
    opt_state = optax.tree_utils.tree_map_params(
        transform,
        lambda leaf, param: place(leaf, param.sharding),
        shapes.opt_state,
        params,
        transform_non_params=lambda leaf: place(leaf, everywhere),
    )
    return TrainState(
        params=params,
        frozen=frozen,
        opt_state=opt_state,
        step=place(shapes.step, everywhere),
        key=place(shapes.key, everywhere),
        skipped=place(shapes.skipped, everywhere),
        bad_streak=place(shapes.bad_streak, everywhere),
        pending=pending,
    )


def shardings_of(state: Any) -> Any:
    """The shardings of a tree of arrays or `jax.ShapeDtypeStruct`s."""
    return jax.tree.map(lambda leaf: leaf.sharding, state)
