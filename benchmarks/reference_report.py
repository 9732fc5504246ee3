"""The tables of the reference run, from stored judgements alone.

python -m benchmarks.reference_run report --data TRAIN --workdir DIR --benchmarks EVAL
"""

import gzip
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from grm_jax.checkpoints import open_checkpoint
from grm_jax.data import Comparison
from grm_jax.evaluation.benchmarks import find_benchmark
from grm_jax.evaluation.cost import model_cost
from grm_jax.evaluation.evaluate import Evaluation, compare, evaluate
from grm_jax.evaluation.judged import judged_from_records

HERE = Path(__file__).parent
STORED = HERE / "reference_run"
KS = (1, 2, 4, 8, 16, 32)
TITLES = {
    "base_free": "untuned",
    "base": "untuned, held to the layout",
    "rft": "rejective fine-tuning",
    "spct": "SPCT: reinforcement learning on top",
    "no_hints": "rejective, without hints",
    "all_easy": "rejective, without the too-easy filter",
    "unbalanced": "rejective, places not balanced",
    "bt": "Bradley-Terry",
}


def stored_path(part: str, judge: str, how: str) -> Path:
    """Where the judgements of a part are kept."""
    return STORED / f"{part}.{judge}.{how}.jsonl.gz"


def report(comparisons: Mapping[str, Sequence[Comparison]]) -> str:
    """All tables, in Markdown, of what is stored of each set of comparisons."""
    cost = model_cost(open_checkpoint("smollm2-135m").config)
    found = {
        (part, judge, how): _evaluation(part, judge, how, items, cost)
        for part, items in comparisons.items()
        for judge in TITLES
        for how in ("greedy", "sampled")
        if stored_path(part, judge, how).exists()
    }
    lines = ["# The reference run", "", *(HERE / "reference_run_notes.md").read_text().splitlines()]
    for part, items in comparisons.items():
        here = {key[1:]: one for key, one in found.items() if key[0] == part}
        if here:
            lines += ["", f"## {part}", "", *_part(here, items)]
    return "\n".join(lines) + "\n"


def _evaluation(
    part: str, judge: str, how: str, items: Sequence[Comparison], cost: Any
) -> Evaluation:
    text = gzip.decompress(stored_path(part, judge, how).read_bytes()).decode()
    records = [json.loads(line) for line in text.splitlines()]
    samples = max(len(record["samples"]) for record in records)
    benchmark = find_benchmark("rewardbench" if part == "rewardbench" else "comparisons")
    judged = judged_from_records(items[: len(records)], records, samples)
    ks = [k for k in KS if k <= samples]
    return evaluate(benchmark, judged, name=judge, ks=ks, model=cost, ties="half")


def _part(here: Mapping[tuple[str, str], Evaluation], items: Sequence[Comparison]) -> list[str]:
    chance = sum(1 / len(item.responses) for item in items) / len(items)
    lines = [
        f"{len(items)} comparisons; a choice at random is right in {100 * chance:.1f} %.",
        "",
        "| judge | greedy, % | right without a tie, % | unreadable, % | ties, % | tokens | best "
        "shown first / last, % | longer one chosen (better), % |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (judge, how), one in here.items():
        if how == "greedy":
            lines.append(_greedy(judge, one))
    for (judge, how), one in here.items():
        if how == "sampled":
            lines += ["", f"Votes of {TITLES[judge]}:", "", *_votes(one)]
    lines += ["", *_differences(here)]
    return lines


def _greedy(judge: str, one: Evaluation) -> str:
    results = one.results
    point = results["curves"]["vote"][0]
    total = one.measures[0].name
    positions, lengths = results["positions"] or {}, results["lengths"] or {}
    places = [value for value in positions.get("accuracy", ()) if value is not None]
    cells = [
        TITLES[judge],
        _interval(point["scores"][total]),
        _percent(results["tie_policies"].get("strict")),
        _percent(results["unreadable"]["samples"]),
        _percent(point["tie_rate"]),
        f"{point['cost']['completion_tokens']:.0f}",
        f"{_percent(places[0])} / {_percent(places[-1])}" if places else "",
        f"{_percent(lengths.get('chosen_longest'))} ({_percent(lengths.get('best_longest'))})",
    ]
    return "| " + " | ".join(cells) + " |"


def _votes(one: Evaluation) -> list[str]:
    total = one.measures[0].name
    lines = [
        "| vote of | " + " | ".join(f"k = {k}" for k in one.ks) + " |",
        "| --- |" + " --- |" * len(one.ks),
    ]
    for method, points in one.results["curves"].items():
        cells = [_interval(point["scores"][total]) for point in points]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    costs = [f"{point['cost']['flops'] / 1e9:.0f}" for point in one.results["curves"]["vote"]]
    lines.append("| GFLOP a comparison | " + " | ".join(costs) + " |")
    lines.append("")
    lines.append(f"Unreadable: {_percent(one.results['unreadable']['samples'])} % of all samples.")
    meta = one.results["meta"]
    if meta is not None:
        lines.append(f"AUC of the meta reward model: {_number(meta['auc'], 3)}.")
    confidence = one.results["confidence"]
    if confidence is not None:
        lines.append(f"AUC of the judge's own log-probability: {_number(confidence['auc'], 3)}.")
    return lines


def _differences(here: Mapping[tuple[str, str], Evaluation]) -> list[str]:
    """Paired differences of the total that are asked about."""
    asked = [
        (("base", "greedy", "vote", 1), ("rft", "greedy", "vote", 1)),
        (("base", "greedy", "vote", 1), ("spct", "greedy", "vote", 1)),
        (("rft", "greedy", "vote", 1), ("spct", "greedy", "vote", 1)),
        (("spct", "greedy", "vote", 1), ("spct", "sampled", "vote", 32)),
        (("spct", "sampled", "vote", 1), ("spct", "sampled", "vote", 32)),
        (("spct", "sampled", "vote", 32), ("spct", "sampled", "guided, half", 32)),
        (("spct", "sampled", "vote", 32), ("spct", "sampled", "weighted", 32)),
        (("bt", "greedy", "vote", 1), ("spct", "sampled", "vote", 32)),
    ]
    lines = [
        "| from | to | difference, points (95 %) | p, paired bootstrap |",
        "| --- | --- | --- | --- |",
    ]
    for pair in asked:
        sides = [
            (here[judge, how], method, k)
            for judge, how, method, k in pair
            if (judge, how) in here and (method, k) in here[judge, how].points
        ]
        if len(sides) < 2:
            continue
        found = compare(sides[0], sides[1], resamples=10_000)
        names = [_called(*side) for side in pair]
        low, high = 100 * found["low"], 100 * found["high"]
        lines.append(
            f"| {names[0]} | {names[1]} | {100 * found['difference']:+.1f} ({low:+.1f} to "
            f"{high:+.1f}) | {found['p_value']:.4f} |"
        )
    return lines if len(lines) > 2 else []


def _called(judge: str, how: str, method: str, k: int) -> str:
    return f"{TITLES[judge]}, " + ("greedy" if how == "greedy" else f"{method} of {k}")


def _interval(found: Mapping[str, Any]) -> str:
    if found["value"] is None:
        return "-"
    return f"{_percent(found['value'])} ({_percent(found['low'])} to {_percent(found['high'])})"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
