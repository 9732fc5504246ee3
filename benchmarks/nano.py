"""The small experiment over several seeds: mean and standard error of what its models reach.

    python benchmarks/nano.py --workdir runs/nano

Each seed is a run of `configs/nano.py` in a process of its own; one that is done is not run again.
Writes `benchmarks/nano.md` and `benchmarks/nano.png`.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent


def main() -> None:
    """Runs what is missing and writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    args = parser.parse_args()
    runs = [run(args.workdir / f"seed{seed}", seed, quick=args.quick) for seed in args.seeds]
    text = report(runs)
    print(text)
    if not args.quick:
        (HERE / "nano.md").write_text(text)
        plot(runs, HERE / "nano.png")


def run(workdir: Path, seed: int, *, quick: bool) -> dict[str, Any]:
    """The results of a seed, and the seconds that it took."""
    done = workdir / "seconds.json"
    if not done.exists():
        command = [
            sys.executable,
            "-c",
            "from grm_jax.cli.main import main; raise SystemExit(main())",
        ]
        command += ["train", "--config", str(HERE.parent / "configs/nano.py")]
        command += ["--workdir", str(workdir), f"--config.seed={seed}"]
        if quick:
            command += ["--config.rft.steps=110", "--config.rl.steps=6", "--config.meta.steps=11"]
            command += ["--config.rft.data.comparisons=('nano:train:600',)"]
            command += ["--config.meta.data.comparisons=('nano:train:40:2',)"]
            command += ["--config.eval.data.comparisons=('nano:test:20',)"]
        began = time.perf_counter()
        subprocess.run(command, check=True)
        done.write_text(json.dumps(time.perf_counter() - began))
    results: dict[str, Any] = json.loads((workdir / "eval/results.json").read_text())
    return {**results, "seconds": json.loads(done.read_text())}


def mean(values: list[float]) -> str:
    """Mean and standard error, in per cent."""
    found = 100 * np.asarray(values)
    error = found.std(ddof=1) / len(found) ** 0.5 if len(found) > 1 else float("nan")
    return f"{found.mean():.1f} ± {error:.1f}"


def accuracies(runs: list[dict[str, Any]], curve: str, k: int) -> list[float]:
    """Accuracy at k of every run."""
    return [p["accuracy"] for one in runs for p in one["curves"][curve] if p["k"] == k]


def report(runs: list[dict[str, Any]]) -> str:
    """The tables, in Markdown."""
    greedy = {name: [one["greedy"][name]["value"] for one in runs] for name in runs[0]["greedy"]}
    ks = [point["k"] for point in runs[0]["curves"]["vote"]]
    most = max(ks)
    gain = np.asarray(greedy["rl"]) - np.asarray(greedy["rft"])
    votes = np.asarray(accuracies(runs, "vote", most))
    guided = {
        curve: mean(list(np.asarray(accuracies(runs, curve, most)) - votes))
        for curve in runs[0]["curves"]
        if curve != "vote"
    }
    over = votes - np.asarray(greedy["rl"])
    minutes = ", ".join(f"{one['seconds'] / 60:.1f}" for one in runs)
    lines = [
        "# The small experiment",
        "",
        f"`python benchmarks/nano.py`: `configs/nano.py` with {len(runs)} seeds, accuracy in per "
        "cent on 1,000 comparisons whose problems were never trained on, ties counting as their "
        "share; "
        f"mean and standard error over seeds. Chance is {100 * runs[0]['chance']:.1f}.",
        "",
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}; "
        f"minutes a run, everything included: {minutes}.",
        "",
        "| greedy | accuracy | unreadable | tokens |",
        "| --- | --- | --- | --- |",
    ]
    for name, values in greedy.items():
        unread = [one["greedy"][name]["unreadable"] for one in runs]
        tokens = np.mean([one["greedy"][name]["completion_tokens"] for one in runs])
        lines.append(f"| {name} | {mean(values)} | {mean(unread)} | {tokens:.1f} |")
    lines += ["", "| samples of rl | " + " | ".join(map(str, ks)) + " |"]
    lines.append("| --- |" + " --- |" * len(ks))
    for curve in runs[0]["curves"]:
        cells = " | ".join(mean(accuracies(runs, curve, k)) for k in ks)
        lines.append(f"| {curve} | {cells} |")
    meta = [one["meta"]["auc"] for one in runs]
    ends = [p for one in runs for p in one["curves"]["vote"] if p["k"] == most]
    widest = 100 * max((p["high"] - p["low"]) / 2 for p in ends)
    lines += [
        "",
        "Differences: greedy after reinforcement learning over rejective fine-tuning "
        f"{mean(list(gain))}; vote at {most} over greedy {mean(list(over))}; at {most} over it: "
        + ", ".join(f"{curve} {value}" for curve, value in guided.items())
        + f". The meta reward model's AUC on single samples: {mean(meta)}.",
        "",
        "A guided vote is that of the samples which the meta reward model trusts most, so many of "
        "them; in a weighted vote all count, each with the chance that it is right.",
        "",
        f"Votes that stop early, by the stated error (of all {most} samples); the interval is the "
        f"widest of the seeds', where that of the vote of all itself is up to ± {widest:.1f}:",
        "",
        "| stated error | samples | tokens, share | winner changed | accuracy | over that of all |",
        "| --- | --- | --- | --- | --- | --- |",
        *early_rows(runs),
        "",
        "![Accuracy by number of samples](nano.png)",
        "",
    ]
    return "\n".join(lines)


def early_rows(runs: list[dict[str, Any]]) -> list[str]:
    """What stopping early saves and costs at each stated error, a row of the table each."""
    rows = []
    for early in zip(*(one["adaptive"] for one in runs), strict=True):
        low = min(one["difference"]["low"] for one in early)
        high = max(one["difference"]["high"] for one in early)
        cells = [
            f"{early[0]['error']:.0%}",
            f"{np.mean([one['mean_samples'] for one in early]):.1f}",
            *(mean([one[key] for one in early]) for key in ("token_share", "changed", "value")),
            f"{mean([one['difference']['value'] for one in early])} "
            f"({100 * low:.1f} to {100 * high:.1f})",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def plot(runs: list[dict[str, Any]], path: Path) -> None:
    """All curves with standard errors over seeds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    ks = [point["k"] for point in runs[0]["curves"]["vote"]]
    curves = list(runs[0]["curves"])
    for place, curve in enumerate(curves):
        found = 100 * np.asarray([accuracies(runs, curve, k) for k in ks])
        error = found.std(axis=1, ddof=1) / found.shape[1] ** 0.5 if found.shape[1] > 1 else None
        # Side by side, so that no bar hides another.
        beside = np.asarray(ks) * 2 ** (0.1 * (place - (len(curves) - 1) / 2))
        axes.errorbar(beside, found.mean(axis=1), yerr=error, marker="o", capsize=3, label=curve)
    for name, style in zip(runs[0]["greedy"], (":", "--"), strict=True):
        level = 100 * np.mean([one["greedy"][name]["value"] for one in runs])
        axes.axhline(level, linestyle=style, color="grey", label=f"{name}, greedy")
    axes.set_xscale("log", base=2)
    axes.set_xticks(ks, [str(k) for k in ks])
    axes.set_xlabel("samples")
    axes.set_ylabel("accuracy, %")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120, metadata={})


if __name__ == "__main__":
    main()
