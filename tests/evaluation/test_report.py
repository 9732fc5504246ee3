"""Reports from drawn judgements: complete, self-contained, and silent about private text."""

import json
import re
from pathlib import Path

import pytest

from tests.evaluation.fixtures import (
    made,
    realmistake_zip,
    rewardbench_rows,
    write_lines,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report on a few rows of each section of RewardBench."""
    folder = tmp_path_factory.mktemp("report")
    rows = rewardbench_rows(["mt-bench-med", "mt-bench-hard", "donotanswer", "hep-go"], 15)
    made("rewardbench", write_lines(folder / "rows.jsonl", rows), folder)
    return folder


def test_results_hold_every_number(folder: Path) -> None:
    (model,) = json.loads((folder / "results.json").read_text())["models"]
    assert list(model["curves"]) == ["vote", "guided, half", "guided, 1", "weighted"]
    points = model["curves"]["vote"]
    assert [point["k"] for point in points] == [1, 2, 8]
    for point in points:
        total = point["scores"]["total"]
        assert 0 <= total["low"] <= total["value"] <= total["high"] <= 1
    assert points[0]["scores"]["total"]["value"] < points[-1]["scores"]["total"]["value"]
    policies = model["tie_policies"]
    assert policies["strict"] <= policies["half"]
    assert points[-1]["scores"]["total"]["value"] == pytest.approx(policies["half"])
    early = model["adaptive"]
    assert [one["error"] for one in early] == [0.01, 0.02, 0.05, 0.1]
    drawn = [one["mean_samples"] for one in early]
    assert drawn == sorted(drawn, reverse=True)
    assert drawn[-1] < drawn[0] <= 8
    # Every judgement is made up of as many tokens, so their share is that of samples.
    assert [8 * one["token_share"] for one in early] == pytest.approx(drawn, rel=0.05)
    assert all(one["changed"] <= 0.05 for one in early)
    assert 0 < model["unreadable"]["samples"] < 0.15
    assert 0.7 < model["meta"]["auc"] < 0.95
    assert [one["k_meta"] for one in model["curves"]["guided, half"]] == [1, 1, 4]


def test_costs_grow_with_samples_but_prompts_are_shared(folder: Path) -> None:
    (model,) = json.loads((folder / "results.json").read_text())["models"]
    one, two, eight = (point["cost"] for point in model["curves"]["vote"])
    assert one["completion_tokens"] == 10
    assert eight["completion_tokens"] == 80
    assert eight["seconds"] == pytest.approx(0.5)
    # Two responses have two orders: no more prompts are ever read.
    assert one["prompt_tokens"] < two["prompt_tokens"] < eight["prompt_tokens"] == 100
    assert one["flops"] < two["flops"] < eight["flops"] < 8 * one["flops"]


def test_the_markdown_has_tables_and_the_papers_errors(folder: Path) -> None:
    text = (folder / "report.md").read_text()
    for heading in ("Results", "Cost of a comparison", "Stopping early", "Trust", "Parts"):
        assert f"## {heading}" in text
    assert "Published by the paper" in text
    assert "swapped in the paper" in text
    for name in re.findall(r"\]\((plots/[^)]+)\)", text):
        assert (folder / name).read_text().startswith("<svg")


def test_the_page_loads_nothing_and_runs_no_text(folder: Path) -> None:
    page = (folder / "report.html").read_text()
    assert page.count("<svg") == 5
    assert page.count("<script") == page.count("</script>") == 2
    addresses = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?(\w+:|//)""", page)
    assert set(addresses) <= {"data:"}
    data = re.search(r'id="data">(.*?)</script>', page, re.DOTALL)
    assert data is not None
    items = json.loads(data[1])
    assert items[0]["samples"][0]["text"].endswith("</script>")
    assert {"wrong", "unreadable"} <= {kind for item in items for kind in item["kinds"]}


def test_the_same_judgements_make_the_same_report(folder: Path, tmp_path: Path) -> None:
    made("rewardbench", folder / "rows.jsonl", tmp_path)
    for name in ("results.json", "report.md", "report.html"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_private_text_is_in_no_report(tmp_path: Path) -> None:
    made("realmistake", realmistake_zip(tmp_path / "r.zip"), tmp_path / "out")
    for file in (tmp_path / "out").rglob("*.*"):
        text = file.read_text()
        assert "Secret" not in text
        assert "Analysis" not in text
    assert "not be published" in (tmp_path / "out" / "report.html").read_text()
