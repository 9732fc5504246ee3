"""What a chip holds, computes and sends as the slice grows, at the same work for each chip.

    python benchmarks/growth.py configs/deepseek_grm_27b.py --stage rft --rows 8 \
      --config.rft.mesh.fsdp=16

Plans one stage of a configuration for slices of 16 to 1,024 chips, with a batch that grows with
them, and prints a table; with `--plot FILE.png` a figure as well. It needs libtpu and no TPU. What
should be flat is: each chip gathers all parameters whatever the number of chips, and what it
computes does not change. Parameters are in as many parts as the configuration says, or as there are
chips if these are fewer; beyond that, `data` grows.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import jax
import matplotlib.pyplot as plt

from grm_jax.cli.plan import duration, size
from grm_jax.plan import ProgramReport, StageReport, parse_topology, plan
from grm_jax.training.config import load_config

# All of them can be laid out in parts of 16, which are products of whole axes.
SHAPES = {
    16: "2x2x4",
    32: "2x4x4",
    64: "4x4x4",
    128: "4x4x8",
    256: "4x4x16",
    512: "4x8x16",
    1024: "8x8x16",
}


def planned(args: argparse.Namespace, chips: int) -> StageReport:
    """The plan for so many chips."""
    config = load_config(args.config, args.override)
    stage = config if config.get("stage") != "spct" else config[args.stage]
    stage.batch.rows = args.rows * chips
    if stage.mesh.fsdp > 0:
        stage.mesh.fsdp = math.gcd(stage.mesh.fsdp, chips)
    topology = parse_topology(f"{args.chip}:{SHAPES[chips]}")
    (report,) = plan(config, topology, stages=[args.stage], search=False).stages
    return report


def row(chips: int, stage: StageReport, program: ProgramReport) -> Sequence[str]:
    """A line of the table."""
    memory = program.memory
    wire = sum(one.wire for one in program.traffic)
    return (
        str(chips),
        program.name,
        size(stage.state),
        size(memory.temporaries),
        size(program.total),
        f"{program.flops / 1e12:.2f}",
        size(program.moved),
        size(wire),
        duration(program.bound.seconds),
        program.bound.binds,
    )


HEAD = ("chips", "program", "state", "temporaries", "in all", "TFLOPs", "moved", "sent")
HEAD += ("at least", "bound by")


def main() -> None:
    """Prints the table, a line as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config")
    parser.add_argument("--stage", default="rl")
    parser.add_argument("--chip", default="v5p")
    parser.add_argument("--rows", type=int, default=4, help="rows of a batch for each chip")
    parser.add_argument("--chips", type=int, nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--plot", type=Path)
    # Any key of the configuration can be set, as for `grm-jax plan`.
    args, args.override = parser.parse_known_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)
    print("| " + " | ".join(HEAD) + " |")
    print("|" + " --- |" * len(HEAD))
    found: dict[int, StageReport] = {}
    for chips in args.chips:
        found[chips] = planned(args, chips)
        for program in found[chips].programs:
            print("| " + " | ".join(row(chips, found[chips], program)) + " |")
        sys.stdout.flush()
    print(f"\nJAX {jax.__version__}, libtpu {version('libtpu')}.")
    if args.plot is not None:
        plot(found, args.plot)


def plot(found: dict[int, StageReport], path: Path) -> None:
    """Draws bytes of a chip, and bytes that it sends, over the number of chips."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5))
    names = [program.name for program in next(iter(found.values())).programs]
    for index, name in enumerate(names):
        programs = [stage.programs[index] for stage in found.values()]
        axes[0].plot(list(found), [one.total / 2**30 for one in programs], "o-", label=name)
        sent = [sum(one.wire for one in program.traffic) / 2**30 for program in programs]
        axes[1].plot(list(found), sent, "o-", label=name)
    for axis, title in zip(axes, ("GiB of a chip", "GiB sent by a chip"), strict=True):
        axis.set(title=title, xlabel="chips", xscale="log", ylim=(0, None))
        axis.set_xticks(list(found), [str(chips) for chips in found])
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
