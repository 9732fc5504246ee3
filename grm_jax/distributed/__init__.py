"""Where every array lives: the device mesh, the rules from logical axes to its axes, the hosts."""

from grm_jax.distributed.hosts import Place, ending_together, join, place_of
from grm_jax.distributed.mesh import (
    BATCH_AXES,
    MESH_AXES,
    RULES,
    Axes,
    Rules,
    arranged,
    batch_parts,
    local_mesh,
    logical_to_sharding,
    make_mesh,
    on_mesh,
    rows_sharding,
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
    "arranged",
    "batch_parts",
    "ending_together",
    "join",
    "local_mesh",
    "logical_to_sharding",
    "make_mesh",
    "on_mesh",
    "place_of",
    "rows_sharding",
    "split_rows",
    "tree_shardings",
    "with_shardings",
]
