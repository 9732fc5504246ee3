"""The device mesh, and the one table from logical axes to mesh axes.

Arrays name their axes by what they mean (`embed`, `heads`, `batch`); the table below says on which
mesh axes each meaning is split. A model never mentions a mesh, and another layout of the devices
needs no change in it.

- `data`: copies of the parameters, each with its own part of the batch;
- `fsdp`: the batch is split here as well, and parameters are kept in parts;
- `tensor`: heads, hidden units and vocabulary are split;
- `expert`: the batch is split here too, and the experts of a mixture.
"""

import contextlib
import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
from flax import linen as nn
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from grm_jax.errors import UsageError

MESH_AXES = ("data", "fsdp", "tensor", "expert")

BATCH_AXES = ("data", "fsdp", "expert")
"""Those over which a batch is split."""

Axes = tuple[str | None, ...]
"""Logical names of an array's axes, in order; None is an axis that is never split."""

Rules = Mapping[str, tuple[str, ...]]
"""Mesh axes, most significant first, over which each logical axis is split; none if empty."""

RULES: Rules = MappingProxyType(
    {
        # Parameters. An array `[embed, mlp]` is split over `fsdp` and `tensor` at once.
        "vocab": ("tensor",),
        "embed": ("fsdp",),
        "mlp": ("tensor",),
        "heads": ("tensor",),
        "kv_heads": ("tensor",),
        "experts": ("expert",),
        "head_dim": (),
        "layers": (),
        "norm": (),
        # Activations. `samples` is the leading axis of arrays whose rows are the samples of one
        # or more comparisons; an array with a `batch` axis too leaves its samples unnamed.
        "batch": BATCH_AXES,
        "samples": BATCH_AXES,
        "length": (),
        "cache_length": (),
        "embed_act": (),
    }
)


def make_mesh(
    shape: Mapping[str, int] | None = None, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """Arranges devices in a mesh that always has the axes `data`, `fsdp`, `tensor` and `expert`.

    Args:
      shape: Size of each axis; one that is missing has size 1, and one may be -1 to take all the
        devices that the others leave. The sizes must multiply to the number of devices. None puts
        every device on `fsdp`, where both batch and parameters are split.
      devices: The devices; all of the process group's if None.

    Returns:
      The mesh; its axes are `Auto`, so the compiler places what has no sharding of its own.

    Raises:
      UsageError: An axis does not exist, or the sizes do not fit the devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = _fill(shape if shape is not None else {"fsdp": -1}, len(devices))
    return jax.make_mesh(
        tuple(sizes[axis] for axis in MESH_AXES),
        MESH_AXES,
        axis_types=(AxisType.Auto,) * len(MESH_AXES),
        devices=devices,
    )


def logical_to_sharding(
    axes: Axes, mesh: Mesh, rules: Rules = RULES, shape: Sequence[int] | None = None
) -> NamedSharding:
    """Returns the sharding of an array whose axes have these logical names.

    Args:
      axes: Logical name of each axis, or None for one that is not split.
      mesh: The mesh, from `make_mesh`.
      rules: Mesh axes of each logical axis.
      shape: The array's shape, if known. An axis whose size the devices along its mesh axes do
        not divide is then not split: 3 key-value heads over `tensor` of 2 are kept whole on each.

    Returns:
      The sharding. Mesh axes of size 1 are left out, so equal layouts compare equal.

    Raises:
      UsageError: A name has no rule, a rule names no axis of the mesh, or two axes of the array
        would be split over the same mesh axis.
    """
    if shape is not None and len(shape) != len(axes):
        raise UsageError(f"{len(axes)} axis names {axes} for an array of shape {tuple(shape)}")
    owners: dict[str, str] = {}
    spec: list[tuple[str, ...] | None] = []
    for position, name in enumerate(axes):
        used = _mesh_axes(name, mesh, rules)
        for axis in used:
            if axis in owners:
                raise UsageError(
                    f"logical axes {owners[axis]!r} and {name!r} of one array are both split over "
                    f"mesh axis {axis!r}; give one of them another rule"
                )
            owners[axis] = str(name)
        used = tuple(axis for axis in used if mesh.shape[axis] > 1)
        parts = math.prod(mesh.shape[axis] for axis in used)
        if shape is not None and shape[position] % parts:
            used = ()
        spec.append(used or None)
    return NamedSharding(mesh, PartitionSpec(*spec))


def arranged(mesh: Mesh, shape: Mapping[str, int]) -> Mesh:
    """The same devices in the same order, as a mesh of other sizes.

    So one program may take arrays from one mesh and give them on the other.

    Args:
      mesh: From `make_mesh`.
      shape: As of `make_mesh`; an axis of size 0 is as long as that of the mesh.

    Returns:
      The mesh; the one that was given if its sizes are these.

    Raises:
      UsageError: As `make_mesh`.
    """
    wanted = {axis: size or mesh.shape.get(axis, 0) for axis, size in shape.items()}
    sizes = _fill(wanted, mesh.size)
    if sizes == dict(mesh.shape):
        return mesh
    devices = mesh.devices.reshape([sizes[axis] for axis in MESH_AXES])
    return Mesh(devices, MESH_AXES, axis_types=mesh.axis_types)


def rows_sharding(mesh: Mesh, shape: Sequence[int]) -> NamedSharding:
    """The sharding of an array of this shape whose leading axis is the batch.

    Where its rows cannot be shared out evenly, every device has all of them.
    """
    return logical_to_sharding(("batch", *(None for _ in shape[1:])), mesh, shape=shape)


@contextlib.contextmanager
def on_mesh(mesh: Mesh) -> Iterator[None]:
    """Where programs are called that name the axes of their arrays by `RULES`."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(tuple(RULES.items())):
        yield


def local_mesh(shape: Mapping[str, int]) -> Mesh | None:
    """The mesh of this process's devices, for programs that each process runs by itself.

    Args:
      shape: As of `make_mesh`.

    Returns:
      The mesh; None where there is one device, which needs none.

    Raises:
      UsageError: As `make_mesh`.
    """
    devices = jax.local_devices()
    mesh = make_mesh(shape, devices)
    return mesh if len(devices) > 1 else None


def batch_parts(mesh: Mesh | None) -> int:
    """In how many parts a batch is split over the mesh; 1 without one."""
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def split_rows(tree: Any, mesh: Mesh | None) -> Any:
    """Places arrays so that each part of the mesh has its share of the leading axis.

    Args:
      tree: Of arrays whose leading axis is the batch; a multiple of `batch_parts`.
      mesh: The mesh; without one, or with one of a single part, the tree stays as it is.
    """
    if mesh is None or batch_parts(mesh) == 1:
        return tree
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec(BATCH_AXES)))


def tree_shardings(axes: Any, mesh: Mesh, shapes: Any = None, rules: Rules = RULES) -> Any:
    """Returns the sharding of every array in a tree.

    Args:
      axes: Tree whose leaves are tuples of logical axis names.
      mesh: The mesh, from `make_mesh`.
      shapes: Tree of the same structure whose leaves have a `shape`, such as arrays or
        `jax.ShapeDtypeStruct`s; if None, every axis is taken to be divisible.
      rules: Mesh axes of each logical axis.

    Returns:
      Tree of the same structure with a `NamedSharding` for each leaf.

    Raises:
      UsageError: As `logical_to_sharding`.
    """
    if shapes is None:
        return jax.tree.map(
            lambda names: logical_to_sharding(names, mesh, rules), axes, is_leaf=_is_axes
        )
    return jax.tree.map(
        lambda names, array: logical_to_sharding(names, mesh, rules, array.shape),
        axes,
        shapes,
        is_leaf=_is_axes,
    )


def with_shardings(shapes: Any, shardings: Any) -> Any:
    """Shapes together with where their arrays are to live.

    Args:
      shapes: Tree of arrays or `jax.ShapeDtypeStruct`s.
      shardings: Tree of the same structure, with the sharding of each.

    Returns:
      Tree of `jax.ShapeDtypeStruct`s with shardings.
    """
    return jax.tree.map(
        lambda leaf, to: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=to),
        shapes,
        shardings,
    )


def _is_axes(node: object) -> bool:
    # Exactly `tuple`: a NamedTuple is a node of the tree, such as an optimiser's state.
    return type(node) is tuple and all(name is None or isinstance(name, str) for name in node)


def _mesh_axes(name: str | None, mesh: Mesh, rules: Rules) -> tuple[str, ...]:
    if name is None:
        return ()
    if name not in rules:
        raise UsageError(f"logical axis {name!r} has no rule{_nearest(name, rules)}")
    for axis in rules[name]:
        if axis not in mesh.shape:
            raise UsageError(
                f"the rule of logical axis {name!r} names mesh axis {axis!r}, but the mesh has "
                f"{', '.join(mesh.axis_names)}"
            )
    return rules[name]


def _fill(shape: Mapping[str, int], count: int) -> dict[str, int]:
    """Returns the size of every mesh axis, with the -1 worked out."""
    for axis, size in shape.items():
        if axis not in MESH_AXES:
            raise UsageError(f"mesh axis {axis!r} does not exist{_nearest(axis, MESH_AXES)}")
        if size < 1 and size != -1:
            raise UsageError(
                f"mesh axis {axis!r} is {size}; give a positive size, or -1 for the rest"
            )
    wanted = ", ".join(f"{axis}={size}" for axis, size in shape.items())
    free = [axis for axis, size in shape.items() if size == -1]
    if len(free) > 1:
        raise UsageError(f"mesh {wanted}: only one axis may be -1")
    sizes = {axis: shape.get(axis, 1) for axis in MESH_AXES}
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if free and count % fixed == 0:
        return sizes | {free[0]: count // fixed}
    if not free and count == fixed:
        return sizes
    asked = f"a multiple of {fixed}" if free else str(fixed)
    raise UsageError(
        f"mesh {wanted or 'of one device'} needs {asked} devices, but there are {count}; "
        f"{_what_fits(sizes, count)}"
    )


def _what_fits(sizes: Mapping[str, int], count: int) -> str:
    """Suggests a mesh for `count` devices that keeps as many of the wanted sizes as it can."""
    left = count
    kept: dict[str, int] = {}
    # The inner axes come first: they follow from the model, the batch axes from the machine.
    for axis in reversed(MESH_AXES[2:]):
        kept[axis] = sizes[axis] if sizes[axis] > 0 and left % sizes[axis] == 0 else 1
        left //= kept[axis]
    kept["data"] = sizes["data"] if sizes["data"] > 0 and left % sizes["data"] == 0 else 1
    kept["fsdp"] = left // kept["data"]
    shown = [f"{axis}={kept[axis]}" for axis in MESH_AXES if kept[axis] > 1]
    return f"{', '.join(shown) or 'no sizes at all'} would fit"


def _nearest(name: str, known: Mapping[str, Any] | Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; it can be {', '.join(known)}"
