"""A report for people: `report.md`, and `report.html` that works offline and on a phone."""

import html
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from grm_jax.evaluation.benchmarks import Benchmark
from grm_jax.evaluation.plots import report_plots
from grm_jax.evaluation.reference import PUBLISHED

_CAPTIONS = {
    "scaling": "Scaling: the total by number of samples, with 95 % intervals",
    "compute": "The same at equal compute",
    "subsets": "Parts, by the vote of all samples",
    "positions": "Position bias of single samples",
    "meta": "Reliability of the meta model",
}


def markdown_report(results: Mapping[str, Any]) -> str:
    """The report as Markdown, from what `results.json` holds."""
    lines = [f"# {results['title']}", "", *_introduction(results), ""]
    for heading, note, rows in report_tables(results):
        lines += [f"## {heading}", "", *([note, ""] if note else [])]
        head, *body = rows
        lines += [_row(head), _row(["---"] * len(head)), *map(_row, body), ""]
    for name in results["plots"]:
        lines += [f"![{_CAPTIONS[name]}](plots/{name}.svg)", ""]
    return "\n".join(lines)


def html_report(
    results: Mapping[str, Any],
    plots: Mapping[str, str],
    judgements: Sequence[Mapping[str, Any]],
    *,
    left_out: str,
) -> str:
    """The report as one page that loads nothing.

    Args:
      results: What `results.json` holds.
      plots: SVG of each plot.
      judgements: For the browser of single judgements, from `browsing.browsable`.
      left_out: What the browser does not show, in a sentence; empty for nothing.
    """
    parts = [f"<p>{html.escape(line)}</p>" for line in _introduction(results)]
    for name, svg in plots.items():
        caption = html.escape(_CAPTIONS[name])
        parts.append(f"<figure id='plot-{name}'>{svg}<figcaption>{caption}</figcaption></figure>")
    for heading, note, rows in report_tables(results):
        head, *body = rows
        parts.append(f"<h2>{html.escape(heading)}</h2>")
        if note:
            parts.append(f"<p>{html.escape(note)}</p>")
        parts.append("<div class='scroll'><table><thead>" + _cells(head, "th") + "</thead><tbody>")
        parts += [_cells(row, "td") for row in body]
        parts.append("</tbody></table></div>")
    # Inside a script element only "</" and "<!--" could end or change what is read.
    data = json.dumps(list(judgements)).replace("<", "\\u003c")
    page = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    texts = {
        "TITLE": html.escape(results["title"]),
        "BODY": "\n".join(parts),
        "LEFT_OUT": html.escape(left_out),
        "DATA": data,
    }
    # In one pass, so that no text can hold the mark of another.
    return re.sub("@@([A-Z_]+)@@", lambda mark: texts[mark[1]], page)


def write_report(
    folder: Path,
    benchmark: Benchmark,
    results: dict[str, Any],
    judgements: Sequence[Mapping[str, Any]],
    *,
    left_out: str,
) -> None:
    """Writes `results.json`, `report.md`, `report.html` and `plots/` into a folder.

    Args:
      folder: Where.
      benchmark: What was judged.
      results: The numbers.
      judgements: As in `html_report`.
      left_out: As in `html_report`.
    """
    plots = report_plots(results["models"])
    results = {**results, "title": benchmark.title, "plots": sorted(plots, key=list(plots).index)}
    (folder / "plots").mkdir(parents=True, exist_ok=True)
    for name, svg in plots.items():
        _write(folder / "plots" / f"{name}.svg", svg)
    _write(folder / "results.json", json.dumps(results, indent=1) + "\n")
    _write(folder / "report.md", markdown_report(results))
    _write(folder / "report.html", html_report(results, plots, judgements, left_out=left_out))


def report_tables(results: Mapping[str, Any]) -> list[tuple[str, str, list[list[str]]]]:
    """The tables of a report: heading, note and rows, of which the first names the columns."""
    models = results["models"]
    tables = [("Results", _policy_note(results), _score_rows(models))]
    tables.append(("Cost of a comparison", _COST_NOTE, _cost_rows(models)))
    if results["comparisons"]:
        tables.append(("Differences", _DIFFERENCE_NOTE, _difference_rows(results["comparisons"])))
    if any(model["adaptive"] for model in models):
        tables.append(("Stopping early", _ADAPTIVE_NOTE, _adaptive_rows(models)))
    tables.append(("Trust", _TRUST_NOTE, _trust_rows(models)))
    tables.append(("Parts", "The vote of all samples.", _part_rows(models)))
    if any(model["errors"] for model in models):
        rows = [["judge", "record", "error"]]
        for model in models:
            rows += [[model["name"], key, text] for key, text in model["errors"].items()]
        tables.append(("Records that could not be judged", "", rows[:51]))
    if results["benchmark"] in PUBLISHED:
        columns, published = PUBLISHED[results["benchmark"]]
        rows = [["model", "votes", *columns, "total", "note"]]
        rows += [
            [row.name, row.setting, *map(str, row.parts), str(row.total), row.note]
            for row in published
        ]
        tables.append(("Published by the paper", _PUBLISHED_NOTE, rows))
    return tables


_COST_NOTE = (
    "Each distinct prompt is read once for all its samples. Seconds are measured at all samples "
    "and below that in proportion to the operations."
)
_DIFFERENCE_NOTE = "Second less first, in points of the total; paired bootstrap over comparisons."
_TRUST_NOTE = (
    "Agreement is the chance that two samples of a comparison choose alike, when they saw the "
    "responses in the same order, and when they did not. Longest: how often the longest response "
    "is chosen, and how often it is right. Confidence: the chance that of a right and a wrong "
    "sample the judge found the right one likelier to write; 50 tells nothing."
)
_ADAPTIVE_NOTE = (
    "The total if each comparison's samples had stopped once another winner was less likely than "
    "the stated error, against that of all samples. A judge without a difference did stop so, and "
    "there is nothing to compare it with."
)
_PUBLISHED_NOTE = (
    "arXiv:2504.02495, in percent; its prompts, samples and tie rule (random) differ from ours."
)


def _policy_note(results: Mapping[str, Any]) -> str:
    policy = results["ties"]
    said = {
        "strict": "a tie is wrong",
        "half": "a tie counts as the share of right responses in it, a half for a pair",
        "random": "a tie is broken at random",
    }[policy]
    return (
        f"Tie policy {policy}: {said}. In percent, with 95 % bootstrap intervals; accuracy at "
        "fewer samples is resampled from all."
    )


def _introduction(results: Mapping[str, Any]) -> list[str]:
    first = results["models"][0]
    lines = [
        f"{first['comparisons']} comparisons of {results['data']}, {first['samples']} samples each."
    ]
    if results["limit"] is not None:
        lines.append(
            f"Limited to {results['limit']} comparisons: these are not the numbers of the whole "
            "benchmark."
        )
    return lines


def _percent(score: Mapping[str, float | None]) -> str:
    if score["value"] is None:
        return "–"
    text = f"{100 * score['value']:.1f}"
    if score["low"] is not None and score["high"] is not None:
        text += f" [{100 * score['low']:.1f}, {100 * score['high']:.1f}]"
    return text


def _share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def _score_rows(models: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    names = [m["name"] for m in models[0]["measures"] if m["level"] < 2]
    rows = [["judge", "vote", "k", *names, "tied"]]
    for model in models:
        for method, points in model["curves"].items():
            rows += [
                [
                    model["name"],
                    method,
                    str(point["k"]),
                    *(_percent(point["scores"].get(name, _NOTHING)) for name in names),
                    _share(point["tie_rate"]),
                ]
                for point in points
            ]
    return rows


_NOTHING: dict[str, float | None] = {"value": None, "low": None, "high": None}


def _cost_rows(models: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    rows = [["judge", "k", "prompt tokens", "written tokens", "GFLOPs", "seconds"]]
    for model in models:
        for point in model["curves"]["vote"]:
            cost = point["cost"]
            rows.append(
                [
                    model["name"],
                    str(point["k"]),
                    f"{cost['prompt_tokens']:.0f}",
                    f"{cost['completion_tokens']:.0f}",
                    f"{cost['flops'] / 1e9:.3g}",
                    f"{cost['seconds']:.3g}",
                ]
            )
    return rows


def _difference_rows(found: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    def side(one: Mapping[str, Any]) -> str:
        return f"{one['judge']}, {one['method']}, k = {one['k']}"

    return [["first", "second", "difference", "p"]] + [
        [
            side(one["first"]),
            side(one["second"]),
            _percent({"value": one["difference"], "low": one["low"], "high": one["high"]}),
            "–" if one["p_value"] is None else f"{one['p_value']:.3f}",
        ]
        for one in found
    ]


def _adaptive_rows(models: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    columns = ["judge", "error", "mean samples", "of", "tokens", "total", "difference"]
    rows = [[*columns, "winner changed"]]
    for model in models:
        rows += [
            [
                model["name"],
                _share(found["error"]),
                f"{found['mean_samples']:.1f}",
                str(model["samples"]),
                _share(found["token_share"]),
                _share(found["value"]),
                _percent(found["difference"]),
                _share(found["changed"]),
            ]
            for found in model["adaptive"]
        ]
    return rows


def _trust_rows(models: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    rows = [
        [
            "judge",
            "unreadable samples",
            "unreadable comparisons",
            *(f"total, ties {policy}" for policy in ("strict", "half", "random")),
            "agreement, same order",
            "other order",
            "longest chosen",
            "longest right",
            "confidence, AUC",
        ]
    ]
    for model in models:
        positions = model["positions"] or {}
        lengths = model["lengths"] or {}
        rows.append(
            [
                model["name"],
                _share(model["unreadable"]["samples"]),
                _share(model["unreadable"]["comparisons"]),
                *(_share(model["tie_policies"].get(name)) for name in ("strict", "half", "random")),
                _share(positions.get("agreement_same_order")),
                _share(positions.get("agreement_other_order")),
                _share(lengths.get("chosen_longest")),
                _share(lengths.get("best_longest")),
                _share((model["confidence"] or {}).get("auc")),
            ]
        )
    return rows


def _part_rows(models: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    rows = [["part", "comparisons", *(model["name"] for model in models)]]
    for measure in models[0]["measures"]:
        name = measure["name"]
        values = [
            _percent(model["curves"]["vote"][-1]["scores"].get(name, _NOTHING)) for model in models
        ]
        rows.append([name, str(measure["comparisons"]), *values])
    return rows


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _cells(cells: Sequence[str], tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"


def _write(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
