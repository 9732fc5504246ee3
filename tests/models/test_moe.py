"""Products by groups, and experts that are elsewhere, against one loop over all experts."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from grm_jax.distributed import make_mesh
from grm_jax.models.config import Experts
from grm_jax.models.moe import (
    _over_mesh,
    _plain_kernel_gradient,
    grouped_product,
    kernel_gradient,
    route,
)
from tests.training import tiny

WIDTH, HIDDEN, COUNT = 16, 24, 8
CONFIG = dataclasses.replace(
    tiny.CONFIG, width=WIDTH, experts=Experts(count=COUNT, per_token=2, mlp_dim=HIDDEN)
)


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def test_products_by_groups_and_their_gradients() -> None:
    sizes = (3, 0, 5)
    rows, kernels = normal(0, 11, 6), normal(1, 3, 6, 4)
    weight = normal(2, 8, 4)

    def ours(rows: jax.Array, kernels: jax.Array) -> jax.Array:
        return jnp.sum(grouped_product(rows, kernels, jnp.asarray(sizes))[:8] * weight)

    def plain(rows: jax.Array, kernels: jax.Array) -> jax.Array:
        products = [rows[:3] @ kernels[0], rows[3:8] @ kernels[2]]
        return jnp.sum(jnp.concatenate(products) * weight)

    np.testing.assert_allclose(ours(rows, kernels), plain(rows, kernels), rtol=1e-5)
    found = jax.grad(ours, argnums=(0, 1))(rows, kernels)
    wanted = jax.grad(plain, argnums=(0, 1))(rows, kernels)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize(
    ("length", "width", "columns", "sizes"),
    [(300, 64, 96, (10, 0, 120, 70)), (256, 128, 256, (256, 0)), (1030, 72, 40, (500, 3, 500))],
)
def test_the_kernel_of_tpus(length: int, width: int, columns: int, sizes: tuple[int, ...]) -> None:
    """Whatever lies behind the last group, and whatever its tiles leave over."""
    rows, gradient = normal(0, length, width), normal(1, length, columns)
    at = np.cumsum([0, *sizes])
    wanted = np.stack([rows[a:b].T @ gradient[a:b] for a, b in itertools.pairwise(at)])
    for found in (
        kernel_gradient(rows, gradient, jnp.asarray(sizes), interpret=True),
        _plain_kernel_gradient(rows, gradient, jnp.asarray(sizes)),
    ):
        np.testing.assert_allclose(found, wanted, atol=1e-4)


@pytest.mark.parametrize("tokens", [32, 12])
@pytest.mark.parametrize(
    "mesh", [{"expert": 8}, {"fsdp": 2, "expert": 4}, {"data": 2, "tensor": 2, "expert": 2}]
)
def test_experts_on_other_devices(tokens: int, mesh: dict[str, int]) -> None:
    """Tokens that can be shared out over the devices, and tokens that all of them have."""
    x = normal(0, tokens, WIDTH)
    gate_up, down = normal(1, COUNT, WIDTH, 2, HIDDEN), normal(2, COUNT, HIDDEN, WIDTH)
    assert CONFIG.experts is not None
    weights, chosen = route(normal(3, tokens, COUNT), None, CONFIG.experts)

    def run(x: jax.Array, gate_up: jax.Array, down: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = _over_mesh(CONFIG, x, weights, chosen, gate_up, down)
        return jnp.sum(out**2), out

    backwards = jax.jit(jax.value_and_grad(run, argnums=(0, 1, 2), has_aux=True))
    wanted = jax.tree.leaves(backwards(x, gate_up, down))
    devices = make_mesh(mesh)
    with jax.set_mesh(devices):
        parts = NamedSharding(devices, PartitionSpec("expert"))
        found = backwards(x, *jax.device_put((gate_up, down), parts))
    for one, other in zip(jax.tree.leaves(found), wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-2)
