"""Where every array lives: the device mesh, the rules from logical axes to its axes, the hosts."""

from grm_jax.distributed.hosts import Place, ending_together, join, place_of
from grm_jax.distributed.mesh import (
    BATCH_AXES,
    MESH_AXES,
    RULES,
    Axes,
    Rules,
    batch_parts,
    local_mesh,
    logical_to_sharding,
    make_mesh,
    split_rows,
    tree_shardings,
    with_shardings,
)

__all__ = [
    "BATCH_AXES",
    "MESH_AXES",
    "RULES",
    "Axes",
    "Place",
    "Rules",
    "batch_parts",
    "ending_together",
    "join",
    "local_mesh",
    "logical_to_sharding",
    "make_mesh",
    "place_of",
    "split_rows",
    "tree_shardings",
    "with_shardings",
]
