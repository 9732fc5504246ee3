"""`grm-jax eval` on a tiny judge: the whole way from official files to a report."""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from grm_jax import GRM
from grm_jax.data import Comparison, Judgement
from tests.cli.conftest import Call
from tests.evaluation.fixtures import rewardbench_rows, write_lines

SETTINGS = ("--constrain", "--max-new-tokens", "60", "--samples", "1,2", "--orders", "fixed")


@pytest.fixture
def evaluate(call: Call, tiny_grm: GRM, monkeypatch: pytest.MonkeyPatch) -> Call:
    """Calls `grm-jax eval` on RewardBench with a tiny model under any name."""
    monkeypatch.setattr(GRM, "from_pretrained", lambda name, adapter, mesh: tiny_grm)

    def run(*arguments: str | Path) -> Any:
        return call("eval", "--benchmark", "rewardbench", *SETTINGS, *arguments)

    return run


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Six rows of RewardBench."""
    return write_lines(tmp_path / "rows.jsonl", rewardbench_rows(["hep-go", "donotanswer"], 3))


def without_times(folder: Path) -> dict[str, str]:
    """The texts of a report but for what a clock says."""
    results = re.sub(r'"seconds": [^,}\n]+', "", (folder / "results.json").read_text())
    lines = (folder / "judgements.jsonl").read_text()
    return {"results": results, "judgements": re.sub(r'"seconds": [^,}]+', "", lines)}


def test_a_run_that_was_stopped_ends_with_the_same_report(
    evaluate: Call, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = evaluate("--data", rows, "--output", tmp_path / "whole")
    assert whole.status == 0, whole.err
    assert "total" in whole.out
    (model,) = json.loads((tmp_path / "whole" / "results.json").read_text())["models"]
    assert model["comparisons"] == 6
    assert model["unreadable"]["samples"] == 0
    assert [point["k"] for point in model["curves"]["vote"]] == [1, 2]
    assert model["curves"]["vote"][-1]["cost"]["flops"] > 0

    judge_batch = GRM.judge_batch

    def stops(self: GRM, comparisons: Iterable[Comparison], **settings: Any) -> Iterator[Judgement]:
        judgements = judge_batch(self, comparisons, **settings)
        yield next(judgements)
        yield next(judgements)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(GRM, "judge_batch", stops)
        assert evaluate("--data", rows, "--output", tmp_path / "cut").status == 130
    assert len((tmp_path / "cut" / "judgements.jsonl").read_text().splitlines()) == 2
    assert not (tmp_path / "cut" / "report.md").exists()
    assert evaluate("--data", rows, "--output", tmp_path / "cut").status == 0
    assert without_times(tmp_path / "cut") == without_times(tmp_path / "whole")

    # A finished run is reported again without its model.
    monkeypatch.delattr(GRM, "from_pretrained")
    again = evaluate("--data", rows, "--output", tmp_path / "cut", "--ties", "strict")
    assert again.status == 0, again.err
    assert "Tie policy strict" in (tmp_path / "cut" / "report.md").read_text()


def test_two_judges_make_one_table(evaluate: Call, rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "two"
    found = evaluate("--data", rows, "--output", out, "--limit", "2", "--model", "a", "b")
    assert found.status == 0, found.err
    results = json.loads((out / "results.json").read_text())
    assert [model["name"] for model in results["models"]] == ["a", "b"]
    between = [one for one in results["comparisons"] if one["second"]["judge"] == "b"]
    # The same model under two names: no difference at all.
    assert {one["difference"] for one in between if one["first"]["judge"] == "a"} == {0.0}
    assert "not the numbers of the whole benchmark" in (out / "report.md").read_text()


def test_ways_to_vote_and_kinds_of_judges(evaluate: Call, rows: Path, tmp_path: Path) -> None:
    """Expected scores, confidence and LLM-as-a-judge, and the table of what they reach."""
    out = tmp_path / "ways"
    found = evaluate(
        *("--data", rows, "--output", out, "--limit", "3", "--scores", "expected"),
        *("--judge", "grm", "verdict"),
    )
    assert found.status == 0, found.err
    grm, verdict = json.loads((out / "results.json").read_text())["models"]
    assert (grm["name"], verdict["name"]) == ("smollm2-135m", "smollm2-135m (verdict)")
    assert list(grm["curves"]) == ["vote", "expected", "confident, half"]
    assert list(verdict["curves"]) == ["vote", "expected"]
    assert grm["curves"]["expected"][0]["tie_rate"] == 0
    table = evaluate("--table", out, "--output", tmp_path / "table")
    assert table.status == 0, table.err
    assert "| smollm2-135m (verdict) | vote | 2 |" in table.out
    assert (tmp_path / "table" / "table.md").read_text() == table.out


def test_samples_that_stop_early(evaluate: Call, rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "early"
    found = evaluate(
        *("--data", rows, "--output", out, "--samples", "1,8", "--adaptive"),
        *("--adaptive-error", "0.4"),
    )
    assert found.status == 0, found.err
    (model,) = json.loads((out / "results.json").read_text())["models"]
    drawn = [
        len(json.loads(line)["samples"])
        for line in (out / "judgements.jsonl").read_text().splitlines()
    ]
    assert min(drawn) < 8
    assert model["adaptive"][0]["mean_samples"] == sum(drawn) / len(drawn)
    assert [point["k"] for point in model["curves"]["vote"]] == [8]
    assert "| 40.0 |" in (out / "report.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--judge", "bt", "--adapter", "x"), "a bt judge is a classifier"),
        (("--judge", "cloud"), "--critic names the model"),
        (("--judge", "verdict", "--adaptive"), "a verdict judge has none"),
        (("--adaptive-error", "0.1"), "give --adaptive"),
        (("--model", "a", "b", "c", "--judge", "grm", "bt"), "3 models and 2 kinds"),
        (("--table", "nowhere"), "cannot read nowhere"),
        (("--samples", "0,8"), "no list of numbers"),
        (("--k-meta", "4"), "give --meta-model"),
        (("--model", "a", "b", "--adapter", "x", "y", "z"), "2 models and 3 adapters"),
        (("--limit", "0"), "limit is 0"),
        (("--data", "nowhere.parquet"), "there is no file"),
    ],
)
def test_wrong_calls_are_one_line(
    evaluate: Call, rows: Path, tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    try:
        outcome = evaluate("--data", rows, "--output", tmp_path / "out", *arguments)
    except SystemExit as end:
        assert end.code == 2
        return
    assert outcome.status == 2
    assert said in outcome.err
    assert len(outcome.err.splitlines()) == 1
    assert not (tmp_path / "out").exists()
