"""`grm-jax judge`: judges the comparisons of a file."""

import argparse
import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from jax.sharding import Mesh
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from grm_jax.checkpoints import default_adapter
from grm_jax.cli.display import show_judgement
from grm_jax.data import (
    BadRecord,
    Comparison,
    Judgement,
    LineWriter,
    read_comparisons,
    to_line,
)
from grm_jax.distributed import local_mesh
from grm_jax.errors import UsageError
from grm_jax.judge import DEFAULT_TEMPLATE, GRM
from grm_jax.rewards import STATED_ERROR
from grm_jax.sampling import ORDER_POLICIES, SCORE_POLICIES

NO_ADAPTER = "none"


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that say which model judges and how it is sampled."""
    add = parser.add_argument
    add(
        "--model",
        default="smollm2-135m",
        help="a built-in name, hf:owner/name, a folder or a GGUF file",
    )
    add(
        "--adapter",
        metavar="NAME",
        help="a PEFT folder with LoRA adapters for the model, or the name of one that comes with "
        "the package (default: the one that was trained for this model, if there is one); none "
        "for the bare model",
    )
    add("--samples", type=int, default=8, metavar="K", help="judgements a record (default 8)")
    add("--temperature", type=float, default=0.5, metavar="T", help="0 is greedy (default 0.5)")
    add("--top-p", type=float, default=1.0, metavar="P", help="nucleus mass (default 1, all)")
    add("--top-k", type=int, default=0, metavar="N", help="likeliest tokens only (default 0, all)")
    add(
        "--max-new-tokens", type=int, default=256, metavar="T", help="tokens a sample (default 256)"
    )
    add("--orders", choices=ORDER_POLICIES, default="shuffle", help="order of the responses")
    add(
        "--scores",
        choices=SCORE_POLICIES,
        default="sampled",
        help="what votes: the scores as sampled, or the mean of each under the model's own "
        "distribution, which hardly ever ties",
    )
    add(
        "--constrain",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="make samples follow the layout of a judgement, so that all are readable",
    )
    add(
        "--meta-model",
        metavar="NAME",
        help="a classifier that chooses which samples vote: as --model, or a PEFT folder with a "
        "head, or the name of one that comes with the package",
    )
    add("--k-meta", type=int, metavar="N", help="how many it chooses (default half of K)")
    add("--template", default=DEFAULT_TEMPLATE, help="a built-in prompt template or a file")
    add("--seed", type=int, default=0, help="of samples, orders and ties (default 0)")
    add(
        "--mesh",
        default="data=-1",
        metavar="AXES",
        help="how several devices are used: data=-1 deals out the samples (default), tensor=-1 "
        "splits a model that is too large for one, data=2,tensor=4 does both",
    )


def adapter_of(args: argparse.Namespace) -> str | None:
    """The adapter that the flags ask for: the one that comes with the package if they name none."""
    if args.adapter is None:
        return default_adapter(args.model)
    return None if args.adapter == NO_ADAPTER else str(args.adapter)


def say_default(args: argparse.Namespace) -> None:
    """Says which adapter judges, where the flags do not."""
    if args.adapter is None and (name := adapter_of(args)) is not None:
        print(
            f"grm-jax: {args.model} judges with the adapter {name}, which was trained for it; "
            f"--adapter {NO_ADAPTER} leaves it out",
            file=sys.stderr,
        )


def mesh_of(args: argparse.Namespace) -> Mesh | None:
    """The mesh that the flags describe; None where there is one device.

    Raises:
      UsageError: If it cannot be read, or does not fit the devices.
    """
    shape = {}
    for part in args.mesh.split(","):
        axis, _, size = part.partition("=")
        try:
            shape[axis.strip()] = int(size)
        except ValueError:
            raise UsageError(
                f"--mesh is {args.mesh!r}; write sizes of axes, as in data=2,tensor=4"
            ) from None
    return local_mesh(shape)


def sampling_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The settings of `GRM.judge_batch` that the flags state."""
    return {
        "samples": args.samples,
        "temperature": args.temperature,
        "top_p": args.top_p,
        "top_k": args.top_k,
        "max_new_tokens": args.max_new_tokens,
        "orders": args.orders,
        "scores": args.scores,
        "constrain": args.constrain,
        "template": args.template,
        "meta_model": args.meta_model,
        "k_meta": args.k_meta,
        "seed": args.seed,
    }


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds `judge` to the subcommands."""
    parser = commands.add_parser(
        "judge",
        help="judge the comparisons of a file",
        description="Judges comparisons, one JSON object a line. On a terminal it shows a table "
        "with the winning critique, elsewhere it writes JSON lines.",
    )
    parser.add_argument("file", metavar="FILE", help="JSON lines, plain or gzipped; - for stdin")
    add_sampling_flags(parser)
    parser.add_argument(
        "--output", type=Path, metavar="PATH", help="write JSON lines there; resumes if killed"
    )
    add_adaptive_flags(parser)
    parser.set_defaults(run=run)


def add_adaptive_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags by which sampling stops early."""
    parser.add_argument(
        "--adaptive",
        action="store_true",
        help="draw no more samples of a record once the rest would hardly change its winner",
    )
    parser.add_argument(
        "--adaptive-error",
        type=float,
        metavar="E",
        help=f"the chance that they would (default {STATED_ERROR}; 0 for never)",
    )


def adaptive_error(args: argparse.Namespace) -> bool | float:
    """The setting `adaptive` of `GRM.judge_batch` that the flags state."""
    if args.adaptive_error is None:
        return bool(args.adaptive)
    if not args.adaptive:
        raise UsageError("--adaptive-error says when sampling stops early; give --adaptive")
    return float(args.adaptive_error)


def run(args: argparse.Namespace) -> bool:
    """Judges the file; returns whether every record could be judged."""
    named = sampling_settings(args) | {"adaptive": adaptive_error(args)}
    records = read_comparisons(args.file)
    total = None if args.file == "-" else sum(1 for _ in read_comparisons(args.file))
    if args.output is None:
        grm, settings = _load(args)
        return _to_screen(grm, records, total, settings)
    source = {"model": args.model, "adapter": adapter_of(args)}
    with LineWriter.open(args.output, source | named) as writer:
        rest = _skip_done(records, writer.done, args.output)
        grm, settings = _load(args)
        failed = writer.failed
        shown = with_progress(grm.judge_batch(rest, **settings), total, len(writer.done))
        for judgement in shown:
            # Times differ from run to run; without them the file is the same to the last byte.
            record = judgement.to_record()
            record["usage"]["seconds"] = None
            writer.write(record)
            failed += judgement.error is not None
    return failed == 0


def _load(args: argparse.Namespace) -> tuple[GRM, dict[str, Any]]:
    """The judge, and the settings with what they name loaded."""
    mesh = mesh_of(args)
    grm = GRM.from_pretrained(args.model, adapter=adapter_of(args), mesh=mesh)
    meta = None if args.meta_model is None else GRM.meta_model(args.meta_model, mesh=mesh)
    settings = sampling_settings(args) | {"adaptive": adaptive_error(args), "meta_model": meta}
    # It checks the settings, so that a wrong call says nothing else.
    grm.judge_batch([], **settings)
    say_default(args)
    return grm, settings


def _to_screen(
    grm: GRM,
    records: Iterable[Comparison | BadRecord],
    total: int | None,
    settings: dict[str, Any],
) -> bool:
    waiting: dict[str, Comparison] = {}

    def remembered() -> Iterator[Comparison | BadRecord]:
        for record in records:
            if isinstance(record, Comparison):
                waiting[record.id] = record
            yield record

    failed = 0
    console = Console() if sys.stdout.isatty() else None
    for judgement in with_progress(grm.judge_batch(remembered(), **settings), total, 0):
        comparison = waiting.pop(judgement.id, None)
        if console is None:
            print(to_line(judgement.to_record()), flush=True)
        else:
            show_judgement(console, comparison, judgement)
        failed += judgement.error is not None
    return failed == 0


def _skip_done(
    records: Iterator[Comparison | BadRecord], done: list[str], output: Path
) -> Iterator[Comparison | BadRecord]:
    for written, record in zip(done, islice(records, len(done)), strict=False):
        if record.id != written:
            raise UsageError(
                f"{output} goes on from another input: it has {written!r} where this one has "
                f"{record.id!r}; give another --output"
            )
    return records


def with_progress(
    judgements: Iterator[Judgement], total: int | None, done: int
) -> Iterator[Judgement]:
    """Passes judgements on under a progress bar, if standard error is a terminal."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("judging", total=total, completed=done, rate="")
        tokens = 0
        for judgement in judgements:
            tokens += judgement.completion_tokens
            elapsed = progress.tasks[task].elapsed or 0.0
            rate = f"{tokens / elapsed:.0f} tokens/s" if elapsed > 0 else ""
            progress.update(task, advance=1, rate=rate)
            yield judgement
