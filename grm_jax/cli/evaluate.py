"""`grm-jax eval`: judges a benchmark and reports what that shows."""

import argparse
import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grm_jax.cli.judge import (
    NO_ADAPTER,
    adaptive_error,
    add_adaptive_flags,
    add_sampling_flags,
    mesh_of,
    sampling_settings,
    with_progress,
)
from grm_jax.data import Comparison, LineWriter
from grm_jax.errors import UsageError
from grm_jax.evaluation import TIE_POLICIES
from grm_jax.evaluation.benchmarks import BENCHMARKS, Benchmark, find_benchmark, load_benchmark
from grm_jax.evaluation.browsing import browsable, left_out
from grm_jax.evaluation.cost import ModelCost, model_cost
from grm_jax.evaluation.evaluate import Evaluation, compare, evaluate
from grm_jax.evaluation.judged import judged_from_records, read_judgements
from grm_jax.evaluation.judging import KINDS, SINGLE, check_judge, open_judge
from grm_jax.evaluation.report import write_report
from grm_jax.evaluation.table import read_results, write_table
from grm_jax.rewards import STATED_ERROR

NO_ADAPTERS = (NO_ADAPTER, "-")


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds `eval` to the subcommands."""
    parser = commands.add_parser(
        "eval",
        help="judge a benchmark and report accuracy, scaling and biases",
        description="Judges a benchmark once, with the largest number of samples, and writes "
        "results.json, judgements.jsonl, report.md, report.html and plots into a folder. A run "
        "that was stopped goes on where it was.",
        conflict_handler="resolve",
    )
    add = parser.add_argument
    add("--benchmark", choices=BENCHMARKS, metavar="NAME", help=", ".join(BENCHMARKS))
    add("--data", type=Path, metavar="PATH", help="its official files, or records")
    add(
        "--table",
        nargs="+",
        type=Path,
        metavar="DIR",
        help="judge nothing, but make one table of what earlier runs have written into folders",
    )
    add("--output", required=True, type=Path, metavar="DIR", help="folder of the report")
    add("--limit", type=int, metavar="N", help="judge only N comparisons, from all parts")
    add("--ties", choices=TIE_POLICIES, help="how ties count (default as the benchmark's authors)")
    add_sampling_flags(parser)
    add_adaptive_flags(parser)
    add(
        "--judge",
        nargs="+",
        choices=KINDS,
        default=["grm"],
        metavar="KIND",
        help=f"{', '.join(KINDS)}: one for each model, or one for all (default grm)",
    )
    add("--critic", metavar="NAME", help="the model that writes critiques for a cloud judge")
    add(
        "--model",
        nargs="+",
        default=["smollm2-135m"],
        help="one or more: built-in names, hf:owner/name, folders or GGUF files",
    )
    add(
        "--adapter",
        nargs="+",
        default=[],
        metavar="NAME",
        help="PEFT folders, or names of those that come with the package: one for each model, or "
        "several for one model; none (or -) for the bare model, which is the default",
    )
    add(
        "--samples",
        type=_numbers,
        default=[1, 8],
        metavar="K,...",
        help="numbers of samples to report; the largest is drawn (default 1,8)",
    )
    add(
        "--k-meta",
        type=_numbers,
        default=[],
        metavar="N,...",
        help="how many samples vote if a meta model chooses, besides half of them",
    )
    parser.set_defaults(run=run)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Judge:
    """A judge as the flags name it."""

    kind: str
    model: str
    adapter: str | None
    critic: str | None

    @property
    def name(self) -> str:
        """What reports call it."""
        name = self.model if self.adapter is None else f"{self.model} + {Path(self.adapter).name}"
        return name if self.kind == "grm" else f"{name} ({self.kind})"

    def samples(self, asked: Sequence[int]) -> list[int]:
        """The numbers of samples to report."""
        return [1] if self.kind in SINGLE else list(asked)


def run(args: argparse.Namespace) -> bool:
    """Judges and reports; returns whether every record could be judged."""
    if args.table is not None:
        print(write_table(args.output, read_results(args.table)), end="")
        return True
    if args.benchmark is None or args.data is None:
        raise UsageError("give --benchmark and --data, or --table")
    benchmark = find_benchmark(args.benchmark)
    if args.k_meta and args.meta_model is None:
        raise UsageError("--k-meta says how many samples a meta model chooses; give --meta-model")
    judges = _judges(args)
    for judge in judges:
        check_judge(
            judge.kind, adapter=judge.adapter, critic=judge.critic, settings=_settings(args, judge)
        )
    comparisons = load_benchmark(args.benchmark, args.data, limit=args.limit)
    evaluations, shown = [], []
    for number, judge in enumerate(judges, 1):
        name = "judgements.jsonl" if len(judges) == 1 else f"judgements-{number}.jsonl"
        file = args.output / name
        cost = _judge(args, judge, comparisons, file)
        ks = judge.samples(args.samples)
        judged = judged_from_records(comparisons, read_judgements(file), max(ks))
        evaluation = evaluate(
            benchmark,
            judged,
            name=judge.name,
            ks=ks,
            model=cost,
            k_metas=args.k_meta,
            ties=args.ties,
            stated_error=args.adaptive_error if args.adaptive_error is not None else STATED_ERROR,
            seed=args.seed,
        )
        evaluations.append(evaluation)
        shown += browsable(benchmark, judged, read_judgements(file), judge=evaluation.name)
    _report(args, benchmark, evaluations, shown)
    return not any(evaluation.results["errors"] for evaluation in evaluations)


def _settings(args: argparse.Namespace, judge: _Judge) -> dict[str, Any]:
    return sampling_settings(args) | {
        "samples": max(judge.samples(args.samples)),
        "k_meta": None,
        "adaptive": adaptive_error(args),
    }


def _judge(
    args: argparse.Namespace, judge: _Judge, comparisons: Sequence[Comparison], file: Path
) -> ModelCost:
    """Judges what is not yet in the file; returns what the model's tokens cost."""
    settings = _settings(args, judge)
    named = dataclasses.asdict(judge) | {
        "benchmark": args.benchmark,
        "records": _fingerprint(comparisons),
    }
    about = file.with_name(file.name + ".model.json")
    with LineWriter.open(file, named | settings) as writer:
        if writer.done != [comparison.id for comparison in comparisons[: len(writer.done)]]:
            raise UsageError(f"{file} goes on from another input; give another --output")
        rest = comparisons[len(writer.done) :]
        if not rest and about.exists():
            return ModelCost(**json.loads(about.read_text()))
        config, judging = open_judge(
            judge.kind,
            judge.model,
            adapter=judge.adapter,
            critic=judge.critic,
            settings=settings,
            mesh=mesh_of(args),
        )
        cost = model_cost(config)
        about.write_text(json.dumps(dataclasses.asdict(cost)) + "\n")
        for judgement in with_progress(judging(rest), len(comparisons), len(writer.done)):
            writer.write(judgement.to_record())
    return cost


def _report(
    args: argparse.Namespace,
    benchmark: Benchmark,
    evaluations: Sequence[Evaluation],
    shown: Sequence[dict[str, Any]],
) -> None:
    pairs = []
    for one in evaluations:
        first, last = min(one.ks), max(one.ks)
        if first < last:
            pairs.append(((one, "vote", first), (one, "vote", last)))
        pairs += [((one, "vote", k), (one, "expected", k)) for k in one.ks if _has(one, "expected")]
        rest = [way for way in one.methods[1:] if way.name != "expected"]
        pairs += [((one, "vote", last), (one, way.name, last)) for way in rest]
    for other in evaluations[1:]:
        one = evaluations[0]
        common = sorted({*one.ks} & {*other.ks})
        pairs += [((one, "vote", k), (other, "vote", k)) for k in common]
        if max(one.ks) != max(other.ks):
            pairs.append(((one, "vote", max(one.ks)), (other, "vote", max(other.ks))))
    results = {
        "benchmark": benchmark.name,
        "data": args.data.name,
        "limit": args.limit,
        "ties": args.ties or benchmark.ties,
        "models": [evaluation.results for evaluation in evaluations],
        "comparisons": [compare(*pair, seed=args.seed) for pair in pairs],
    }
    skipped = left_out(benchmark, evaluations[0].judged)
    write_report(args.output, benchmark, results, shown, left_out=skipped)
    for evaluation in evaluations:
        total = evaluation.measures[0].name
        point = evaluation.results["curves"]["vote"][-1]
        score = point["scores"][total]
        if score["value"] is not None:
            print(
                f"{evaluation.name}: {total} {100 * score['value']:.1f} % "
                f"[{100 * (score['low'] or 0):.1f}, {100 * (score['high'] or 0):.1f}] "
                f"with {point['k']} samples"
            )
    print(f"report: {args.output / 'report.html'}")


def _has(evaluation: Evaluation, method: str) -> bool:
    return any(one.name == method for one in evaluation.methods)


def _judges(args: argparse.Namespace) -> list[_Judge]:
    models, kinds = args.model, args.judge
    adapters = [None if adapter in NO_ADAPTERS else adapter for adapter in args.adapter]
    if not adapters:
        adapters = [None] * len(models)
    elif len(models) == 1:
        models = models * len(adapters)
    elif len(models) != len(adapters):
        raise UsageError(
            f"there are {len(models)} models and {len(adapters)} adapters; give one adapter for "
            "each model, none for the bare one"
        )
    if len(kinds) == 1:
        kinds = kinds * len(models)
    elif len(models) == 1 and not args.adapter:
        models, adapters = models * len(kinds), adapters * len(kinds)
    elif len(kinds) != len(models):
        raise UsageError(
            f"there are {len(models)} models and {len(kinds)} kinds of judges; give one kind for "
            "each model, or one for all"
        )
    return [
        _Judge(
            kind=kind,
            model=model,
            adapter=adapter,
            critic=args.critic if kind == "cloud" else None,
        )
        for kind, model, adapter in zip(kinds, models, adapters, strict=True)
    ]


def _fingerprint(comparisons: Sequence[Comparison]) -> str:
    """A hash of what is judged, so that a run never goes on from other records."""
    digest = hashlib.blake2b(digest_size=8)
    for comparison in comparisons:
        digest.update(repr((comparison.id, comparison.messages, comparison.responses)).encode())
    return digest.hexdigest()


def _numbers(text: str) -> list[int]:
    """Parses `1,8,32`."""
    try:
        found = sorted({int(part) for part in text.split(",")})
    except ValueError:
        found = []
    if not found or found[0] < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers from 1, such as 1,8,32")
    return found
