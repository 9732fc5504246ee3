"""Plans a run for hardware that is not here: what it takes of a chip, and whether it fits.

    grm-jax plan --config configs/X.py --topology v5p:4x4x8

The programs of a run are compiled ahead of time, for a slice of TPUs by the compiler that would
serve it, or for simulated devices. What the compiler says of memory is reported as it is; FLOPs,
bytes and collectives are read from the compiled text with all loops multiplied out. For GPUs, whose
compiler needs one, figures are counted on paper and marked so.
"""

import math
from collections.abc import Callable, Sequence

import jax
from ml_collections import ConfigDict

from grm_jax.errors import UsageError
from grm_jax.plan.chips import CHIPS, Chip, Topology, devices_of, mesh_on, parse_topology
from grm_jax.plan.compiling import plan_stage
from grm_jax.plan.report import Change, Memory, ProgramReport, Report, StageReport
from grm_jax.plan.search import nearest_change
from grm_jax.plan.sizes import held_bytes
from grm_jax.plan.stages import Program, Stage, build_stage, stage_configs

__all__ = [
    "CHIPS",
    "Change",
    "Chip",
    "Memory",
    "Program",
    "ProgramReport",
    "Report",
    "Stage",
    "StageReport",
    "Topology",
    "build_stage",
    "devices_of",
    "parse_topology",
    "plan",
    "plan_stage",
    "stage_configs",
]


def plan(
    config: ConfigDict,
    topology: Topology,
    *,
    name: str = "",
    stages: Sequence[str] = (),
    search: bool = True,
    say: Callable[[str], None] = lambda _: None,
) -> Report:
    """Plans the stages of a configuration.

    Args:
      config: From `grm_jax.training.config.load_config`.
      topology: What it is to run on.
      name: What the report calls the configuration.
      stages: Those that are wanted, by name; all that can be planned if empty.
      search: Whether to look for the nearest change that fits, where a stage does not.
      say: Is told what is being done.

    Raises:
      UsageError: A setting is wrong, or there is no such stage or topology.
    """
    found = stage_configs(config)
    for wanted in stages:
        if wanted not in found:
            raise UsageError(f"no stage {wanted!r} can be planned; there are {', '.join(found)}")
    devices = devices_of(topology)
    whole = config.get("stage") != "spct"
    reports = []
    for stage_name in stages or found:
        stage_config = found[stage_name]
        mesh = mesh_on(topology, stage_config.mesh.to_dict(), devices)
        stage = build_stage(stage_name, stage_config, mesh, platform=topology.chip.kind)
        programs = plan_stage(stage, topology, say=say)
        state = held_bytes(stage.held)
        change, note = None, ""
        if search and not all(program.fits for program in programs):
            change, note = nearest_change(
                stage_name,
                stage_config,
                topology,
                devices,
                programs,
                state,
                prefix="" if whole else f"{stage_name}.",
                say=say,
            )
        reports.append(
            StageReport(
                name=stage_name,
                kind=stage.kind,
                model=str(stage_config.model.name),
                parameters=_count(stage),
                mesh=dict(mesh.shape),
                state=state,
                programs=programs,
                change=change,
                note=note,
            )
        )
    return Report(config=name, topology=topology, stages=tuple(reports))


def _count(stage: Stage) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves((stage.params, stage.frozen)))
