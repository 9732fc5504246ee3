"""Where every array lives: the device mesh and the rules from logical axes to its axes."""

from grm_jax.distributed.mesh import (
    MESH_AXES,
    RULES,
    Axes,
    Rules,
    logical_to_sharding,
    make_mesh,
    tree_shardings,
)

__all__ = [
    "MESH_AXES",
    "RULES",
    "Axes",
    "Rules",
    "logical_to_sharding",
    "make_mesh",
    "tree_shardings",
]
