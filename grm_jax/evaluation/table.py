"""One table of several judges on several benchmarks, beside the rows that the paper published.

Its shape is that of Table 2 of arXiv:2504.02495: a column for each of four benchmarks and their
mean. Other benchmarks stand behind it.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from grm_jax.errors import UsageError
from grm_jax.evaluation.benchmarks import BENCHMARKS
from grm_jax.evaluation.reference import OVERALL

COLUMNS = ("rewardbench", "ppe_preference", "ppe_correctness", "rmb")
"""Benchmarks whose mean is the overall result."""

_LIMITED = "not the whole of {}"


def read_results(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """What `grm-jax eval` wrote into folders as `results.json`.

    Raises:
      UsageError: If a folder has none, or it is something else.
    """
    found = []
    for folder in folders:
        path = folder / "results.json" if folder.is_dir() else folder
        try:
            results = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UsageError(f"cannot read {path}; give folders that eval has written") from error
        if not isinstance(results, dict) or results.get("benchmark") not in BENCHMARKS:
            raise UsageError(f"{path} holds no results of eval")
        found.append(results)
    return found


def combined_rows(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each judge, way to vote and number of samples that any of the results has.

    Args:
      results: From `read_results`, at most one of each benchmark and judge.

    Returns:
      JSON-ready objects: `judge`, `vote`, `k`, `scores` in percent by benchmark, `overall`, their
      mean if all four are there, and `note`.

    Raises:
      UsageError: If two results are of the same judge on the same benchmark.
    """
    rows: dict[tuple[str, str, int], dict[str, Any]] = {}
    for one in results:
        for model in one["models"]:
            total = model["measures"][0]["name"]
            for vote, points in model["curves"].items():
                for point in points:
                    key = (model["name"], vote, point["k"])
                    row = rows.setdefault(key, {"scores": {}, "notes": []})
                    if one["benchmark"] in row["scores"]:
                        raise UsageError(
                            f"{model['name']} is judged on {one['benchmark']} twice; give one"
                        )
                    value = point["scores"][total]["value"]
                    row["scores"][one["benchmark"]] = None if value is None else 100 * value
                    if one["limit"] is not None:
                        row["notes"].append(_LIMITED.format(BENCHMARKS[one["benchmark"]].title))
    return [
        {
            "judge": judge,
            "vote": vote,
            "k": k,
            "scores": row["scores"],
            "overall": _overall(row["scores"]),
            "note": "; ".join(row["notes"]),
        }
        for (judge, vote, k), row in rows.items()
    ]


def write_table(folder: Path, results: Sequence[Mapping[str, Any]]) -> str:
    """Writes `table.md` and `table.json` into a folder; returns the former's text."""
    rows = combined_rows(results)
    others = sorted({name for row in rows for name in row["scores"]} - set(COLUMNS))
    titles = [BENCHMARKS[name].title for name in (*COLUMNS, *others)]
    lines = [
        "# Judges on benchmarks",
        "",
        "In percent. Overall is the mean of the first four.",
        "",
        _line(["judge", "vote", "k", *titles[:4], "Overall", *titles[4:], "note"]),
        _line(["---"] * (5 + len(titles))),
    ]
    for row in rows:
        cells = [_cell(row["scores"].get(name)) for name in (*COLUMNS, *others)]
        lines.append(
            _line(
                [
                    row["judge"],
                    row["vote"],
                    str(row["k"]),
                    *cells[:4],
                    _cell(row["overall"]),
                    *cells[4:],
                    row["note"],
                ]
            )
        )
    lines += [
        "",
        "## Published by the paper",
        "",
        "arXiv:2504.02495, Tables 2, 6 and 7; its prompts, samples and tie rule (random) differ.",
        "",
        _line(["model", "votes", *titles[:4], "Overall", "note"]),
        _line(["---"] * 8),
    ]
    for published in OVERALL:
        parts = [_cell(part) for part in published.parts]
        lines.append(
            _line(
                [published.name, published.setting, *parts, _cell(published.total), published.note]
            )
        )
    text = "\n".join(lines) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.md").write_text(text, encoding="utf-8")
    (folder / "table.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return text


def _overall(scores: Mapping[str, float | None]) -> float | None:
    values = [scores.get(name) for name in COLUMNS]
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(COLUMNS) else None


def _cell(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
