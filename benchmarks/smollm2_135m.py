"""A short real run of SPCT on the embedded default model: its log, and numbers before and after.

    python benchmarks/smollm2_135m.py --data FOLDER --workdir runs/smollm2

Runs `configs/smollm2_135m.py`, or goes on with it, and writes `benchmarks/smollm2_135m.md`. The
folder holds the file of comparisons that the configuration names.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent


def main() -> None:
    """Runs what is missing and writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    args = parser.parse_args()
    seconds = run(args.workdir, args.data, quick=args.quick)
    text = report(args.workdir, seconds)
    print(text)
    if not args.quick:
        (HERE / "smollm2_135m.md").write_text(text)


def run(workdir: Path, data: Path, *, quick: bool) -> list[float]:
    """The seconds of every call that the run took."""
    command = [
        sys.executable,
        "-c",
        "from grm_jax.cli.main import main; raise SystemExit(main())",
    ]
    command += ["train", "--config", f"{HERE.parent / 'configs/smollm2_135m.py'}:{data}"]
    command += ["--workdir", str(workdir)]
    if quick:
        file = data / "hh_harmless.jsonl.gz"
        command += [f"--config.rft.data.comparisons=('{file}#0:8',)", "--config.rft.steps=2"]
        command += [f"--config.rl.data.comparisons=('{file}#60:70',)", "--config.rl.steps=1"]
        command += [f"--config.eval.data.comparisons=('{file}#1000:1004',)"]
        command += ["--config.rl.checkpoint.every=1", "--config.rft.checkpoint.every=1"]
    kept = workdir / "seconds.json"
    calls: list[float] = json.loads(kept.read_text()) if kept.exists() else []
    if not (workdir / "eval" / "results.json").exists():
        began = time.perf_counter()
        try:
            subprocess.run(command, check=True)
        finally:
            workdir.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps([*calls, time.perf_counter() - began]))
    found: list[float] = json.loads(kept.read_text())
    return found


def report(workdir: Path, seconds: Sequence[float]) -> str:
    """The log and the tables, in Markdown."""
    results = json.loads((workdir / "eval" / "results.json").read_text())
    rejection = json.loads((workdir / "rft" / "rejection.json").read_text())
    names = results["settings"]["data.comparisons"]
    first, _, last = names[0].rpartition("#")[2].partition(":")
    calls = "" if len(seconds) == 1 else f" in {len(seconds)} calls"
    lines = [
        "# A short run on the embedded default model",
        "",
        "`python benchmarks/smollm2_135m.py`: `configs/smollm2_135m.py` as it stands, which is a "
        "few steps on a CPU. It shows that the way works, not how far it leads.",
        "",
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}; "
        f"{sum(seconds) / 60:.0f} minutes{calls}, everything included.",
        "",
        "## Before and after",
        "",
        f"Greedy accuracy in per cent on {int(last) - int(first)} comparisons that were not "
        "trained on, ties counting as their share, with the 95 % interval of a bootstrap over "
        f"comparisons. Chance is {100 * results['chance']:.1f}.",
        "",
        "| model | accuracy | right, ties counting nothing | unreadable | tokens |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, one in results["greedy"].items():
        interval = f"{100 * one['low']:.1f} to {100 * one['high']:.1f}"
        lines.append(
            f"| {name} | {100 * one['value']:.1f} ({interval}) | {100 * one['strict']:.1f} | "
            f"{100 * one['unreadable']:.1f} | {one['completion_tokens']:.1f} |"
        )
    lines += ["", f"Votes of {results['settings']['scaled']}:", ""]
    points = results["curves"]["vote"]
    lines.append("| samples | " + " | ".join(str(point["k"]) for point in points) + " |")
    lines.append("| --- |" + " --- |" * len(points))
    cells = [
        f"{100 * p['accuracy']:.1f} ({100 * p['low']:.1f} to {100 * p['high']:.1f})" for p in points
    ]
    lines.append("| accuracy | " + " | ".join(cells) + " |")
    kinds = list(rejection["all"]["all"])
    lines += ["", "## Rejective fine-tuning", "", "| trajectories | " + " | ".join(kinds) + " |"]
    lines.append("| --- |" + " --- |" * len(kinds))
    for name, counts in rejection["hint"].items():
        lines.append(f"| {name} | " + " | ".join(str(counts[kind]) for kind in kinds) + " |")
    lines += ["", *_log(workdir / "rft", ("loss", "tokens", "seconds"), every=3)]
    shown = ("reward", "accuracy", "unreadable", "tied", "uniform_groups", "kl", "seconds")
    lines += ["## Reinforcement learning", "", *_log(workdir / "rl", shown, every=1)]
    return "\n".join(lines)


def _log(workdir: Path, keys: Sequence[str], *, every: int) -> list[str]:
    """Means of the logged numbers over so many steps each, as a table."""
    text = (workdir / "metrics.jsonl").read_text()
    logged: list[dict[str, Any]] = [json.loads(line) for line in text.splitlines()]
    lines = ["| step | " + " | ".join(key.replace("_", " ") for key in keys) + " |"]
    lines.append("| --- |" + " --- |" * len(keys))
    for index in range(0, len(logged), every):
        part = logged[index : index + every]
        cells = [f"{np.mean([one[key] for one in part]):.3g}" for key in keys]
        steps = f"{part[0]['step']}" + (f" to {part[-1]['step']}" if len(part) > 1 else "")
        lines.append(f"| {steps} | " + " | ".join(cells) + " |")
    return [*lines, ""]


if __name__ == "__main__":
    main()
