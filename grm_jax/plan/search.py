"""The nearest change to a configuration with which a stage fits, found by trying."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from grm_jax.errors import UsageError
from grm_jax.plan.chips import GIB, Topology, mesh_on
from grm_jax.plan.compiling import plan_stage
from grm_jax.plan.report import Change, ProgramReport
from grm_jax.plan.sizes import held_bytes
from grm_jax.plan.stages import Stage, build_stage

MOST_TRIES = 6
"""Changes that are compiled; those whose state alone is too large are not."""


def nearest_change(
    name: str,
    config: ConfigDict,
    topology: Topology,
    devices: Sequence[jax.Device],
    programs: Sequence[ProgramReport],
    state: int,
    *,
    prefix: str,
    say: Callable[[str], None],
) -> tuple[Change | None, str]:
    """Tries smaller micro-batches, computing layers again, and other meshes, in this order.

    None of these changes what is learnt.

    Args:
      name: The stage's.
      config: Its configuration.
      topology: What has to hold it.
      devices: Its devices.
      programs: As they are; some do not fit.
      state: Bytes of a chip throughout the run.
      prefix: Of the stage's keys on the command line.
      say: Is told what is being tried.

    Returns:
      The change, if one was found, and what there is to say if none was.
    """
    capacity = int(topology.chip.memory)
    failed = [program.name for program in programs if not program.fits]
    fine = [program.name for program in programs if program.fits]
    tried = 0
    for change in candidates(config, held_fits=state < capacity):
        try:
            stage = _changed(name, config, change, devices, topology)
        except UsageError:
            continue  # rows, heads or chips that cannot be shared out so
        if held_bytes(stage.held) >= capacity:
            continue
        if tried == MOST_TRIES:
            break
        tried += 1
        overrides = tuple(f"--config.{prefix}{key}={value}" for key, value in change.items())
        say(f"{name}: trying {' '.join(overrides)}")
        found = plan_stage(stage, topology, only=failed)
        if all(program.fits for program in found) and fine:
            found += plan_stage(stage, topology, only=fine)
        if all(program.fits for program in found):
            total = max(program.total for program in found)
            return Change(overrides=overrides, total=total), ""
    if state >= capacity:
        least = math.ceil(state * topology.chips / capacity)
        return None, (
            f"parameters, optimiser and reference take {state / GIB:.1f} GiB of a chip's "
            f"{capacity / GIB:.1f}; shared out evenly they need more than {least} chips"
        )
    return None, f"none of {tried} changes fits; take a larger slice or a smaller batch"


def candidates(config: ConfigDict, *, held_fits: bool) -> Iterator[Mapping[str, Any]]:
    """Changes of a stage's keys, the nearest first.

    Args:
      config: The stage's.
      held_fits: Whether what is in memory throughout fits; otherwise only the mesh can help.
    """
    parts, rows = int(config.batch.accumulate), int(config.batch.rows)
    smaller = [parts * times for times in (2, 4, 8) if rows % (parts * times) == 0]
    remat = {} if config.model.remat else {"model.remat": True}
    if held_fits:
        yield from ({"batch.accumulate": count} for count in smaller)
        if remat:
            yield remat
            yield from ({**remat, "batch.accumulate": count} for count in smaller)
    for tensor in (2, 4, 8, 16):
        if tensor == config.mesh.tensor:
            continue
        mesh = {"mesh.data": 1, "mesh.fsdp": -1, "mesh.tensor": tensor}
        yield {**mesh, **remat}
        if smaller:
            yield {**mesh, **remat, "batch.accumulate": smaller[-1]}


def _changed(
    name: str,
    config: ConfigDict,
    change: Mapping[str, Any],
    devices: Sequence[jax.Device],
    topology: Topology,
) -> Stage:
    changed = ConfigDict(config.to_dict())
    changed.update_from_flattened_dict(dict(change))
    mesh = mesh_on(topology, changed.mesh.to_dict(), devices)
    return build_stage(name, changed, mesh, platform=topology.chip.kind)
