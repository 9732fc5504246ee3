"""Whether a TPU gathers parameters beside products: what the compiler makes of two flags.

    python benchmarks/overlap.py

Compiles the gradient of a scan over layers whose kernels are in parts, for a small slice of each
kind, as it comes and with the flags that `docs/scale.md` names, and counts the gatherings that are
started apart from where their result is needed. It needs libtpu (`pip install 'jax[tpu]'`) and no
TPU; libtpu reads its flags once, so each of them is tried in a process of its own.
"""

import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

FLAGS = (
    "--xla_enable_async_all_gather=true "
    "--xla_tpu_enable_async_collective_fusion_fuse_all_gather=true"
)
SLICES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
LAYERS, WIDTH, ROWS = 16, 4096, 8192


def beside(slice_name: str) -> int:
    """In how many of the gradient's two loops kernels are gathered beside products."""
    topology = topologies.get_topology_desc(platform="tpu", topology_name=slice_name)
    mesh = Mesh(np.asarray(topology.devices), ("fsdp",))
    parts = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    rows = NamedSharding(mesh, PartitionSpec("fsdp"))

    def loss(kernels: jax.Array, x: jax.Array) -> jax.Array:
        def layer(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, None]:
            return jnp.tanh(x @ kernel), None

        return jnp.sum(jnp.square(jax.lax.scan(layer, x, kernels)[0].astype(jnp.float32)))

    kernels = jax.ShapeDtypeStruct((LAYERS, WIDTH, WIDTH), jnp.bfloat16, sharding=parts)
    x = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.bfloat16, sharding=rows)
    compiled = jax.jit(jax.grad(loss), out_shardings=parts).lower(kernels, x).compile()
    text = compiled.as_text() or ""
    return len(set(re.findall(r"%(async-collective-start[.\d]*) =", text)))


def main() -> None:
    """Prints a row of a table for each kind of chip."""
    if len(sys.argv) > 1:
        print(beside(sys.argv[1]))
        return
    print("| chip | loops that gather beside products | with the flags |\n| --- | --- | --- |")
    for chip, slice_name in SLICES.items():
        cells = []
        for flags in ("", FLAGS):
            env = os.environ | {"LIBTPU_INIT_ARGS": flags}
            command = [sys.executable, __file__, slice_name]
            done = subprocess.run(command, env=env, check=True, capture_output=True, text=True)
            cells.append(f"{done.stdout.split()[-1]} of 2")
        print(f"| {chip} | {cells[0]} | {cells[1]} |", flush=True)


if __name__ == "__main__":
    main()
