"""The least slice of each kind of chip on which each configuration fits.

    python benchmarks/slices.py configs/deepseek_grm_27b.py --chip v5p v5e v6e

Slices are planned from the smallest on until one fits, in the configuration's own settings but for
where things lie: parameters are in no more parts than the configuration says, times `--tensor`, and
a device learns from one row at a time, or one group whose prompt it computes once. It needs libtpu
and no TPU.
"""

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
from ml_collections import ConfigDict

from grm_jax.cli.plan import duration, size
from grm_jax.distributed import MESH_AXES
from grm_jax.errors import UsageError
from grm_jax.plan import (
    CHIPS,
    ProgramReport,
    Stage,
    build_stage,
    devices_of,
    parse_topology,
    plan_stage,
    stage_configs,
)
from grm_jax.plan.chips import mesh_on
from grm_jax.plan.sizes import held_bytes
from grm_jax.training.config import load_config

SHAPES: Mapping[str, tuple[str, ...]] = {
    "v5p": ("1x1x1", "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
    + ("8x8x16", "8x16x16"),
    "v5e": ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    "v6e": ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
}


def fitted(stage: ConfigDict, chips: int, tensor: int = 1) -> None:
    """Lays a stage on so many chips, and lets each learn from one row or group at a time.

    Args:
      stage: The stage, which is changed.
      chips: Of the slice.
      tensor: Parts of heads, hidden units and vocabulary while it learns, on as many chips or more.
    """
    expert = math.gcd(stage.mesh.expert, chips)
    tensor = math.gcd(tensor, chips // expert)
    left = chips // expert // tensor
    # What a configuration leaves to the slice is no bound.
    fsdp = left if stage.mesh.fsdp < 1 else math.gcd(stage.mesh.fsdp, left)
    stage.mesh = ConfigDict(
        {"data": left // fsdp, "fsdp": fsdp, "tensor": tensor, "expert": expert}
    )
    # Rows are shared out over all axes but `tensor`.
    each = stage.rollout.group if "rollout" in stage else 1
    stage.batch.accumulate = max(stage.batch.rows // (left * expert * each), 1)
    if "rollout" in stage and any(stage.rollout.mesh[axis] for axis in MESH_AXES):
        mesh = stage.rollout.mesh
        tensor = math.gcd(mesh.tensor, chips)
        expert = math.gcd(mesh.expert, chips // tensor)
        data = chips // tensor // expert
        stage.rollout.mesh = ConfigDict(
            {"data": data, "fsdp": 1, "tensor": tensor, "expert": expert}
        )


def planned(
    path: str, name: str, text: str, tensor: int
) -> tuple[Stage, list[ProgramReport]] | None:
    """A stage on a slice and the plans of its programs; None if one does not fit."""
    topology, config = parse_topology(text), stage_configs(load_config(path))[name]
    experts = config.mesh.expert
    while True:
        fitted(config, topology.chips, tensor)
        try:
            mesh = mesh_on(topology, config.mesh.to_dict(), devices_of(topology))
            stage = build_stage(name, config, mesh, platform=topology.chip.kind)
            break
        except UsageError as error:
            print(f"{path} {name} {text}: {error}", file=sys.stderr)
        # Not every slice can be laid out in as many parts.
        experts, odd = divmod(experts, 2)
        if odd:
            return None
        config = stage_configs(load_config(path))[name]
        config.mesh.expert = experts
    if held_bytes(stage.held) > topology.chip.memory:
        return None
    found: list[ProgramReport] = []
    # The one that takes most comes first, as it tells soonest that the slice is too small.
    for wanted in ("update", "rollout", "experience", "reshard"):
        for program in plan_stage(stage, topology, only=(wanted,)):
            if not program.fits:
                print(f"{path} {name} {text}: {wanted} does not fit", file=sys.stderr)
                return None
            found.append(program)
    return stage, found


def least(path: str, name: str, chip: str, tensor: int, chips: int) -> Sequence[str]:
    """The least slice on which a stage fits, and what it takes there, as cells of the table."""
    for shape in SHAPES[chip]:
        if math.prod(map(int, shape.split("x"))) < chips:
            continue
        found = planned(path, name, f"{chip}:{shape}", tensor)
        if found is not None:
            stage, programs = found
            mesh = ", ".join(f"{axis}={n}" for axis, n in stage.mesh.shape.items() if n > 1)
            return (
                f"`{chip}:{shape}`",
                mesh or "one chip",
                size(held_bytes(stage.held)),
                f"{size(max(one.total for one in programs))} of {size(CHIPS[chip].memory)}",
                duration(sum(one.times * one.bound.seconds for one in programs)),
            )
    return f"none up to `{chip}:{SHAPES[chip][-1]}`", "", "", "", ""


def main() -> None:
    """Prints the table, a line as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", nargs="+")
    parser.add_argument("--chip", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--stage", nargs="+", help="only these")
    parser.add_argument("--from-chips", type=int, default=1, help="leave smaller slices out")
    parser.add_argument("--tensor", type=int, default=1, help="parts of heads and hidden units")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)
    print("| configuration | stage | least slice | mesh | state | peak | a step, at least |")
    print("|" + " --- |" * 7)
    for path in args.config:
        for name in stage_configs(load_config(path)):
            for chip in args.chip if args.stage is None or name in args.stage else ():
                cells = (
                    f"`{Path(path).stem}`",
                    name,
                    *least(path, name, chip, args.tensor, args.from_chips),
                )
                print("| " + " | ".join(cells) + " |")
                sys.stdout.flush()


if __name__ == "__main__":
    main()
