"""`grm-jax plan`: whether a run fits on chips that are not here, and what bounds it."""

import argparse
import contextlib
import json
import sys

import jax
from rich.console import Console
from rich.table import Table

from grm_jax.plan import Report, StageReport, Topology, parse_topology, plan
from grm_jax.training.config import load_config


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds `plan` to the subcommands."""
    parser = commands.add_parser(
        "plan",
        help="see whether a run fits on chips that are not here",
        description="Compiles the programs of a configuration's stages ahead of time and reports, "
        "for each, the memory, FLOPs and collectives of a chip and what bounds its time.",
        epilog="Any key of the configuration can be set: --config.rl.batch.accumulate=8",
    )
    add = parser.add_argument
    add("--config", required=True, metavar="FILE.py", help="a file with get_config()")
    add(
        "--topology",
        required=True,
        metavar="CHIP:SHAPE",
        help="v4, v5e, v5p or v6e with the shape of a slice (v5p:4x4x8, or v5e:16x16*2 for two); "
        "a100, h100, h200 or b200 with how many there are (h100:8); or cpu:8 for simulated devices",
    )
    add("--stage", action="append", default=[], metavar="NAME", help="only this stage; repeatable")
    add("--no-search", action="store_true", help="do not look for a change that fits")
    add("--json", action="store_true", help="print the plan as JSON")
    parser.set_defaults(run=run, overrides=[])


def run(args: argparse.Namespace) -> bool:
    """Prints the plan; returns True whether the run fits or not, or raises what is wrong."""
    topology = parse_topology(args.topology)
    config = load_config(args.config, args.overrides)
    _prepare(topology)
    report = plan(
        config,
        topology,
        name=args.config,
        stages=args.stage,
        search=not args.no_search,
        say=lambda line: print(f"grm-jax: {line}", file=sys.stderr),
    )
    if args.json:
        print(json.dumps(report.to_dict(), indent=2))
    else:
        show(report, Console())
    return True


def _prepare(topology: Topology) -> None:
    """Keeps JAX from looking for the chips of this machine, and simulates as many as are asked."""
    jax.config.update("jax_platforms", "cpu")
    # A program for other chips is of no use to a later run on this machine.
    jax.config.update("jax_enable_compilation_cache", False)
    if topology.chip.kind != "tpu":
        # Where JAX has begun already, it must have enough of them, which is looked at later.
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", topology.chips)


def show(report: Report, console: Console) -> None:
    """Prints a plan for people."""
    topology = report.topology
    chip = topology.chip
    console.print(
        f"[bold]{report.config}[/] on {topology.text}: {topology.chips} chips, each with "
        f"{size(chip.memory)} and {chip.flops / 1e12:.0f} TFLOP/s"
    )
    for stage in report.stages:
        _show_stage(stage, console)
    verdict = "[bold green]fits[/]" if report.fits else "[bold red]does not fit[/]"
    console.print(f"\n{report.config} {verdict}")


def _show_stage(stage: StageReport, console: Console) -> None:
    mesh = ", ".join(f"{axis}={count}" for axis, count in stage.mesh.items() if count > 1)
    console.print(
        f"\n[bold]{stage.name}[/] ({stage.kind}): {stage.model}, "
        f"{stage.parameters / 1e9:.2f}B parameters, mesh {mesh or 'of one chip'}; "
        f"{size(stage.state)} of a chip throughout; a step takes at least "
        f"{duration(stage.step_seconds)}"
    )
    table = Table(title="of one chip", title_justify="left")
    table.add_column("program")
    for name in ("arguments", "temporaries", "peak", "with state", "TFLOPs", "moved", "sent"):
        table.add_column(name, justify="right")
    for name in ("at least", "bound by", "tokens/s", "fits", "figures"):
        table.add_column(name, justify="right")
    for program in stage.programs:
        memory = program.memory
        table.add_row(
            program.name,
            size(memory.arguments),
            size(memory.temporaries),
            size(memory.peak if program.needs is None else program.needs),
            size(program.total),
            f"{program.flops / 1e12:.2f}",
            size(program.moved),
            size(sum(one.wire for one in program.traffic)),
            duration(program.bound.seconds),
            program.bound.binds,
            f"{program.tokens_per_second:,.0f}",
            "yes" if program.fits else "[red]no[/]",
            program.method,
        )
    console.print(table)
    table = Table(title="collectives", title_justify="left")
    table.add_column("program")
    for name in ("kind", "among", "times", "each chip's", "sent by each"):
        table.add_column(name, justify="right")
    for program in stage.programs:
        for one in program.traffic:
            table.add_row(
                program.name,
                one.kind,
                f"{one.chips}{' of several slices' if one.across else ''}",
                f"{one.count:,.0f}",
                size(one.payload),
                size(one.wire),
            )
    if table.row_count:
        console.print(table)
    if stage.change is not None:
        overrides = " ".join(stage.change.overrides)
        console.print(f"[yellow]fits with[/] {overrides} ({size(stage.change.total)} of a chip)")
    elif stage.note:
        console.print(f"[yellow]{stage.note}[/]")


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1000:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:,.4g} GiB" if count < 1000 else f"{count / 1024:,.4g} TiB"


def duration(seconds: float) -> str:
    """Seconds for people."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.3g} us"
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:,.3g} s"
