"""One table over several benchmarks."""

import json
from pathlib import Path
from typing import Any

import pytest

from grm_jax.errors import UsageError
from grm_jax.evaluation.table import combined_rows, read_results, write_table


def results(benchmark: str, value: float | None, limit: int | None = None) -> dict[str, Any]:
    def curve(ks: list[int]) -> list[dict[str, Any]]:
        return [{"k": k, "scores": {"total": {"value": value}}} for k in ks]

    model = {
        "name": "mine",
        "measures": [{"name": "total"}],
        "curves": {"vote": curve([1, 8]), "guided, half": curve([8])},
    }
    return {"benchmark": benchmark, "limit": limit, "models": [model]}


FOUR = {"rewardbench": 0.8, "ppe_preference": 0.6, "ppe_correctness": 0.5, "rmb": 0.7}


def test_overall_is_the_mean_of_the_four() -> None:
    rows = combined_rows([results(name, value) for name, value in FOUR.items()])
    assert [(row["vote"], row["k"]) for row in rows] == [
        ("vote", 1), ("vote", 8), ("guided, half", 8),
    ]  # fmt: skip
    assert rows[0]["overall"] == pytest.approx(65.0)
    assert rows[0]["scores"]["rmb"] == pytest.approx(70.0)
    assert rows[0]["note"] == ""


def test_what_is_missing_has_no_overall() -> None:
    rows = combined_rows([results("rewardbench", 0.8, limit=100), results("realmistake", None)])
    assert rows[0]["overall"] is None
    assert rows[0]["note"] == "not the whole of RewardBench"
    assert rows[0]["scores"] == {"rewardbench": pytest.approx(80.0), "realmistake": None}


def test_the_table_stands_beside_the_papers(tmp_path: Path) -> None:
    folders = []
    for name, value in (FOUR | {"judgebench": 0.55}).items():
        folders.append(tmp_path / name)
        folders[-1].mkdir()
        (folders[-1] / "results.json").write_text(json.dumps(results(name, value)))
    text = write_table(tmp_path / "out", read_results(folders))
    assert (tmp_path / "out" / "table.md").read_text() == text
    assert "| mine | vote | 1 | 80.0 | 60.0 | 50.0 | 70.0 | 65.0 | 55.0 |" in text
    assert "| GRM-27B | greedy | 86.0 | 64.7 | 59.8 | 69.0 | 69.9 |" in text
    assert "its parts average 67.7" in text
    widths = {line.count("|") for line in text.split("## Published")[0].splitlines() if "|" in line}
    assert len(widths) == 1
    assert len(json.loads((tmp_path / "out" / "table.json").read_text())) == 3


def test_wrong_folders(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="give folders that eval has written"):
        read_results([tmp_path])
    (tmp_path / "results.json").write_text('{"greedy": {}}')
    with pytest.raises(UsageError, match="holds no results of eval"):
        read_results([tmp_path])
    with pytest.raises(UsageError, match="mine is judged on rmb twice"):
        combined_rows([results("rmb", 0.5), results("rmb", 0.5)])
