"""Where metrics go."""

import io
import json
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from grm_jax.errors import UsageError
from grm_jax.training.metrics import JsonLines, Metrics, ProgressBar, open_metrics


def asked(workdir: Path, **changes: Any) -> Metrics:
    settings: dict[str, Any] = {
        "step": 0,
        "steps": 4,
        "every": 1,
        "tensorboard": False,
        "wandb": "",
        "config": {"a": 1},
        "writes": True,
    }
    return open_metrics(workdir, **(settings | changes))


def test_lines_go_on_after_a_step(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 2, "loss": 1}\n{"step": 4}\n{"step": 6}\n{"step": 8}\n{"ste')
    file = JsonLines(path, step=5)
    assert path.read_text() == '{"step": 2, "loss": 1}\n{"step": 4}\n'
    file.write(6, {"loss": float("nan"), "low": 0.5, "high": float("inf")})
    file.close()
    last = json.loads(path.read_text().splitlines()[-1])
    assert last == {"step": 6, "loss": None, "low": 0.5, "high": None}


def test_logging_steps(tmp_path: Path) -> None:
    with asked(tmp_path, every=2) as metrics:
        for step in (1, 2, 3, 4):
            metrics.write(step, {"loss": 1.0 / step, "tokens": 10.0})
    found = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in found] == [(2, 0.5), (4, 0.25)]
    for line in found:
        assert line["tokens_per_second"] == pytest.approx(10 / line["seconds"])


def test_only_one_process_writes(tmp_path: Path) -> None:
    with asked(tmp_path, writes=False, tensorboard=True, wandb="x") as metrics:
        metrics.write(1, {"loss": 1.0})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "package"), [({"tensorboard": True}, "tensorboardX"), ({"wandb": "p"}, "wandb")]
)
def test_packages_that_are_not_there(
    change: dict[str, Any], package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UsageError, match=f"needs the package {package}; install it"):
        asked(tmp_path, **change)


def test_other_writers_get_what_they_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    class Summary:
        def __init__(self, folder: str, purge_step: int) -> None:
            calls.append(("open", folder, purge_step))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            calls.append((name, value, step))

        def close(self) -> None:
            calls.append("closed")

    class Online:
        def log(self, metrics: Mapping[str, float], step: int) -> None:
            calls.append((metrics["loss"], step))

        def finish(self) -> None:
            calls.append("finished")

    def init(**settings: Any) -> Online:
        calls.append((settings["project"], settings["config"], settings["resume"]))
        return Online()

    for name, content in (("tensorboardX", {"SummaryWriter": Summary}), ("wandb", {"init": init})):
        module = types.ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    with asked(tmp_path, step=3, tensorboard=True, wandb="p") as metrics:
        metrics.write(4, {"loss": 2.0})
    assert calls[:2] == [("open", str(tmp_path / "tensorboard"), 4), ("p", {"a": 1}, "allow")]
    assert ("loss", 2.0, 4) in calls
    assert (2.0, 4) in calls
    assert calls[-2:] == ["closed", "finished"]


def test_the_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with asked(tmp_path) as metrics:
        metrics.write(1, {"loss": 1.5, "tokens": 10.0})
    shown = terminal.getvalue()
    assert "loss 1.5000" in shown
    assert "tokens/s" in shown
    assert "1/4" in shown
    bar = ProgressBar(step=2, steps=4, title="t")
    bar.write(3, {"loss": 0.25})
    bar.close()
    assert "loss 0.2500" in terminal.getvalue()
