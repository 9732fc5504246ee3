"""Comparisons that a tiny classifier can learn, and runs on them: for the stages of scalars."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from grm_jax.training.config import Settings
from tests.training.changes import changed
from tests.training.folder import write_model

TEMPLATE = "{{ conversation }}{% for response in responses %}|{{ response }}{% endfor %}"
STEPS = 12


def comparisons(count: int = 48) -> list[dict[str, Any]]:
    """Comparisons of two or three responses, of which the best has the most exclamation marks."""
    made: list[dict[str, Any]] = []
    for number in range(count):
        size = 2 + number % 2
        best = number * 7 % size
        made.append(
            {
                "id": f"c{number}",
                "messages": [{"role": "user", "content": f"Q{number % 10}"}],
                "responses": ["!!!!!!" if place == best else "??????" for place in range(size)],
                "label": {"kind": "best", "index": best},
            }
        )
    return made


def write_lines(path: Path, records: list[dict[str, Any]]) -> Path:
    """Writes JSON Lines."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def write_folder(folder: Path) -> Path:
    """A folder with a tokenizer, a short template, and comparisons, some of them of no use."""
    folder.mkdir()
    write_model(folder / "base")
    (folder / "short.jinja").write_text(TEMPLATE)
    useless = [
        {"id": "alone", "label": {"kind": "pointwise", "correct": True}, "responses": ["!"]},
        {"id": "tied", "label": {"kind": "scores", "values": [3, 3]}, "responses": ["!", "?"]},
        {"id": "unknown", "responses": ["!", "?"]},
    ]
    asked = [{"role": "user", "content": "Q"}]
    write_lines(
        folder / "c.jsonl", [*comparisons(), *({**one, "messages": asked} for one in useless)]
    )
    return folder


def config(default: Callable[[], ConfigDict], folder: Path, **changes: Any) -> ConfigDict:
    """A short run, and changes by key with `__` for dots."""
    return changed(
        default(),
        {
            "model.name": str(folder / "base"),
            "data.comparisons": (str(folder / "c.jsonl"),),
            "data.length": 128,
            "batch.rows": 16,
            "steps": STEPS,
            "checkpoint.every": STEPS // 2,
            "heldout.share": 0.25,
            "heldout.every": STEPS // 2,
            "optimizer.learning_rate": 1e-2,
            "optimizer.schedule": "constant",
        },
        changes,
    )


def lines(workdir: Path) -> list[dict[str, Any]]:
    """The metrics of a run, without what depends on the machine's mood."""
    found = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    moods = ("seconds", "tokens_per_second")
    return [{name: value for name, value in line.items() if name not in moods} for line in found]


def report(workdir: Path) -> Mapping[str, Any]:
    """What a run says of what it has learnt."""
    found: Mapping[str, Any] = json.loads((workdir / "report.json").read_text())
    return found


def settings(default: Callable[[], ConfigDict], folder: Path, **changes: Any) -> Settings:
    """As `config`, for a stage."""
    made = Settings(config(default, folder, **changes))
    # The command reads it, to find the stage.
    assert made["stage"]
    return made
