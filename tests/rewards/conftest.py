"""Ways to call a function and meshes to call it on, shared by the tests of this room."""

import re
from collections.abc import Callable

import jax
import pytest
from jax.sharding import AxisType, Mesh


@pytest.fixture(params=["plain", "jit", "vmap", "jit(vmap)"])
def transform(request: pytest.FixtureRequest) -> Callable:
    """Takes a function of arrays with one leading dimension to the same, called another way."""
    return {
        "plain": lambda function: function,
        "jit": jax.jit,
        "vmap": jax.vmap,
        "jit(vmap)": lambda function: jax.jit(jax.vmap(function)),
    }[request.param]


@pytest.fixture(params=[AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def mesh(request: pytest.FixtureRequest) -> Mesh:
    """Eight simulated devices, with shardings inferred by the compiler or kept in types."""
    assert jax.device_count() == 8, "needs XLA_FLAGS=--xla_force_host_platform_device_count=8"
    return jax.make_mesh((8,), ("data",), axis_types=(request.param,))


@pytest.fixture
def run_sharded(mesh: Mesh) -> Callable:
    """Calls a function on arrays split over the mesh, and checks that they never meet.

    With `agreeing`, devices may tell one another a bit: whether any of them goes on with a loop.
    """
    split = jax.NamedSharding(mesh, jax.P("data"))

    def run(
        function: Callable, *arguments: jax.typing.ArrayLike, agreeing: bool = False
    ) -> list[jax.Array]:
        placed = [jax.device_put(argument, split) for argument in arguments]
        compiled = jax.jit(function).lower(*placed).compile()
        program = compiled.as_text()
        if agreeing:
            program, bits = re.subn(r"= pred\[\] all-reduce\(.*", "", program)
            assert bits
            program = re.sub(r"%all-reduce[.\d]*", "", program)
        for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
            assert collective not in program
        results = jax.tree.leaves(compiled(*placed))
        for result in results:
            assert result.sharding.is_equivalent_to(split, result.ndim)
        return results

    return run
