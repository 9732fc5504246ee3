"""The reference run: SPCT of the embedded model on real comparisons, and what it reaches.

    python -m benchmarks.reference_run prepare --data TRAIN --workdir DIR
    python -m benchmarks.reference_run train --workdir DIR [--variant NAME] [--config.key=value …]
    python -m benchmarks.reference_run judge --workdir DIR --benchmarks EVAL [--only JUDGE …]
    python -m benchmarks.reference_run store --workdir DIR
    python -m benchmarks.reference_run report --data TRAIN --workdir DIR --benchmarks EVAL

`prepare` picks pairs, `train` runs `configs/smollm2_135m.py` or a variant of it, `judge` samples
judgements of the comparisons that were held out and of benchmarks, `store` keeps their scores,
without any text, in `benchmarks/reference_run/`, and `report` makes every number of
`benchmarks/reference_run.md` from these. Each goes on where it was stopped. TRAIN and EVAL are
folders with files of comparisons, `NAME.jsonl.gz`. The full run is for a GPU of 80 GB; with `--size
cpu` it is what two cores do in two hours, and with `--size short` a few steps of everything. All
parts of a run take the same size.
"""

import argparse
import gzip
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.reference_data import prepare
from benchmarks.reference_report import STORED, report, stored_path
from grm_jax.data import LineWriter
from grm_jax.evaluation.benchmarks import load_benchmark
from grm_jax.evaluation.judging import Judging, open_judge

HERE = Path(__file__).parent
NAME = "smollm2-135m"

WAYS = ("greedy", "sampled")

_KEPT = ("order", "scores", "meta", "logprob", "finish")


@dataclass(frozen=True, kw_only=True)
class Size:
    """How large a run is.

    Attributes:
      longest: Tokens of the longest prompt to train on.
      judgement: Tokens of a judgement.
      samples: Of a comparison, for votes.
      rows: Of a batch that is decoded; None for what suits the device.
      comparisons: Judged of each set; None for all of `SETS`.
    """

    longest: int = 512
    judgement: int = 64
    samples: int = 32
    rows: int | None = 2048
    comparisons: int | None = None


SIZES = {
    "full": Size(),
    "cpu": Size(longest=256, judgement=40, rows=128, comparisons=200),
    "short": Size(samples=4, rows=None, comparisons=4),
}

VARIANTS: dict[str, tuple[str, ...]] = {
    "main": (),
    # The same judgements, but for those that were written with a hint.
    "no_hints": ("--config.rft.sampler.hinted=off",),
    # Comparisons that all judgements got right are learnt from as well.
    "all_easy": ("--config.rft.reject.too_easy=False",),
    # What is kept is as the untuned model has it, that likes the first response.
    "unbalanced": ("--config.rft.reject.balance_places=False",),
}
"""Settings of `configs/smollm2_135m.py`; all but the first stop after the first stage."""


@dataclass(frozen=True, kw_only=True)
class Judge:
    """A judge of the tables.

    Attributes:
      folder: Of its adapters (of its model, for a scalar judge), in the working directory; empty
        for the untuned model.
      kind: As `grm-jax eval --judge` has it.
      constrain: Whether it is held to the layout.
      sampled: Whether it is sampled for votes.
      meta: Whether the meta reward model looks at the samples.
    """

    folder: str = ""
    kind: str = "grm"
    constrain: bool = False
    sampled: bool = False
    meta: bool = False


JUDGES = {
    "spct": Judge(folder="main/rl/model", sampled=True, meta=True),
    "base": Judge(constrain=True, sampled=True),
    "rft": Judge(folder="main/rft/model", sampled=True),
    "bt": Judge(folder="bt/model", kind="bt"),
    "no_hints": Judge(folder="no_hints/rft/model"),
    "all_easy": Judge(folder="all_easy/rft/model"),
    "unbalanced": Judge(folder="unbalanced/rft/model"),
    "base_free": Judge(),
}

SETS: dict[str, tuple[str, int | None]] = {
    "heldout": ("comparisons", None),
    "rewardbench": ("rewardbench", 1000),
    "ifbench_arm": ("comparisons", 300),
    "rmb_pairwise": ("comparisons", 400),
    "rmb_bon": ("comparisons", 200),
    "mmlu_pro_bon": ("comparisons", 40),
    "zeroeval_bon": ("comparisons", 20),
}
"""What is judged: as which benchmark, and how many comparisons of it at most."""


def main() -> None:
    """Runs one part."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("part", choices=("prepare", "train", "judge", "store", "report"))
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--data", type=Path, help="comparisons to train on")
    parser.add_argument("--benchmarks", type=Path, help="comparisons to judge")
    parser.add_argument("--variant", choices=(*VARIANTS, "bt"), default="main")
    parser.add_argument("--stages", nargs="+", default=[], help="those to train; all by default")
    parser.add_argument("--only", nargs="+", choices=JUDGES, default=list(JUDGES))
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, help="to judge")
    parser.add_argument("--size", choices=SIZES, default="full")
    args, overrides = parser.parse_known_args()
    if not all(one.startswith("--config.") for one in overrides):
        parser.error(f"what is {' '.join(overrides)}?")
    match args.part:
        case "prepare":
            prepare(args.data, args.workdir, longest=SIZES[args.size].longest)
        case "train":
            train(args.workdir, args.variant, overrides, stages=args.stages, size=args.size)
        case "judge":
            for name in args.only:
                judge(args.workdir, args.benchmarks, name, args.sets, args.ways, size=args.size)
        case "store":
            store(args.workdir)
        case "report":
            prepare(args.data, args.workdir, longest=SIZES[args.size].longest)
            most = SIZES[args.size].comparisons
            comparisons = {
                name: _open(name, args.workdir, args.benchmarks, most) for name in args.sets
            }
            (HERE / "reference_run.md").write_text(report(comparisons))


def train(
    workdir: Path,
    variant: str,
    overrides: Sequence[str] = (),
    *,
    stages: Sequence[str] = (),
    size: str = "full",
) -> None:
    """Trains a variant, or goes on with it."""
    folder = workdir / variant
    stages = (["rft"] if variant in VARIANTS and variant != "main" else []) + list(stages)
    data = ",".join([str(workdir / "data"), *([] if size == "full" else [size]), *stages])
    file = "smollm2_135m_bt" if variant == "bt" else "smollm2_135m"
    command = [
        sys.executable,
        "-c",
        "from grm_jax.cli.main import main; raise SystemExit(main())",
        *("train", "--config", f"{HERE.parent}/configs/{file}.py:{data}"),
        *("--workdir", str(folder)),
    ]
    if variant not in ("main", "bt"):
        sampled = sorted((workdir / "main/rft/trajectories").glob("*.jsonl"))
        command += [
            f"--config.rft.sampler.files={tuple(map(str, sampled))}",
            *VARIANTS[variant],
        ]
    began = time.perf_counter()
    subprocess.run([*command, *overrides], check=True)
    times = folder / "seconds.json"
    before = json.loads(times.read_text()) if times.exists() else []
    times.write_text(json.dumps([*before, round(time.perf_counter() - began, 1)]))


def judge(
    workdir: Path,
    benchmarks: Path,
    name: str,
    sets: Sequence[str],
    ways: Sequence[str],
    *,
    size: str = "full",
) -> None:
    """Judges what is missing, greedily and by sampling."""
    one = JUDGES[name]
    chosen = SIZES[size]
    samples = dict(zip(WAYS, (1, chosen.samples), strict=True))
    judging: dict[str, Judging] = {}
    for part in sets:
        comparisons = _open(part, workdir, benchmarks, chosen.comparisons)
        for how in ways if one.sampled else {"greedy"} & set(ways):
            settings = _settings(one, workdir, samples=samples[how], tokens=chosen.judgement)
            file = workdir / "judged" / part / f"{name}.{how}.jsonl"
            with LineWriter.open(file, settings | {"judge": name, "folder": one.folder}) as writer:
                rest = comparisons[len(writer.done) :]
                began = time.perf_counter()
                if rest and how not in judging:
                    judging[how] = _load(one, workdir, settings | {"batch_rows": chosen.rows})
                for judgement in judging[how](rest) if rest else ():
                    writer.write(judgement.to_record())
            seconds = time.perf_counter() - began
            print(f"{name} {part} {how}: {len(rest)} in {seconds:.1f} s", flush=True)


def _settings(one: Judge, workdir: Path, *, samples: int, tokens: int) -> dict[str, Any]:
    """Of `open_judge`; greedy if there is one sample."""
    return {
        "samples": samples,
        "temperature": 1.0 if samples > 1 else 0.0,
        "top_p": 1.0,
        "top_k": 0,
        "max_new_tokens": tokens,
        "orders": "shuffle",
        "scores": "sampled",
        "constrain": one.constrain,
        "template": "compact",
        "meta_model": str(workdir / "main/meta/model") if samples > 1 and one.meta else None,
        "k_meta": None,
        "adaptive": False,
        "seed": 0,
    }


def _load(one: Judge, workdir: Path, settings: dict[str, Any]) -> Judging:
    folder = str(workdir / one.folder) if one.folder else None
    if one.kind == "grm":
        return open_judge("grm", NAME, adapter=folder, critic=None, settings=settings)[1]
    return open_judge(one.kind, str(folder), adapter=None, critic=None, settings=settings)[1]


def store(workdir: Path) -> None:
    """Keeps scores, orders, meta rewards and lengths of all that was judged, and no text."""
    STORED.mkdir(exist_ok=True)
    for file in sorted((workdir / "judged").glob("*/*.jsonl")):
        lines = []
        for line in file.read_text().splitlines():
            record = json.loads(line)
            samples = [
                {key: sample[key] for key in _KEPT if key in sample} for sample in record["samples"]
            ]
            kept = {"id": record["id"], "samples": samples, "usage": record["usage"]}
            if "error" in record:
                kept["error"] = record["error"]
            lines.append(json.dumps(kept, separators=(",", ":")) + "\n")
        path = stored_path(file.parent.name, *file.stem.split("."))
        path.write_bytes(gzip.compress("".join(lines).encode(), mtime=0))


def _open(name: str, workdir: Path, benchmarks: Path, most: int | None) -> list[Any]:
    benchmark, limit = SETS[name]
    limit = min((one for one in (limit, most) if one is not None), default=None)
    held_out = name == "heldout"
    path = workdir / "data/heldout.jsonl" if held_out else benchmarks / f"{name}.jsonl.gz"
    return load_benchmark(benchmark, path, limit=limit)


if __name__ == "__main__":
    main()
