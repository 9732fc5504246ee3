"""Where every array lives: the device mesh, the rules from logical axes to its axes, the hosts."""

from grm_jax.distributed.hosts import Place, ending_together, join, place_of
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
    "Place",
    "Rules",
    "ending_together",
    "join",
    "logical_to_sharding",
    "make_mesh",
    "place_of",
    "tree_shardings",
]
