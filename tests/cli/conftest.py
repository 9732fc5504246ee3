"""The command line on a tiny model, in this process."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from grm_jax import GRM
from grm_jax.cli import main as program


@dataclass(frozen=True)
class Outcome:
    """What one call of the program did."""

    status: int
    out: str
    err: str

    @property
    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.out.splitlines()]


Call = Callable[..., Outcome]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Calls `grm-jax` with these arguments; nothing is kept in the user's cache."""
    monkeypatch.setattr(program, "_keep_compiled_programs", lambda: None)

    def run(*arguments: str | Path) -> Outcome:
        capsys.readouterr()
        status = program.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Outcome(status, captured.out, captured.err)

    return run


@pytest.fixture
def judge(call: Call, tiny_grm: GRM, monkeypatch: pytest.MonkeyPatch) -> Call:
    """Calls `grm-jax judge` with a tiny model under any name, and settings that suit it."""
    monkeypatch.setattr(GRM, "from_pretrained", lambda name, adapter, mesh: tiny_grm)
    # Two samples and one order make one shape, and so one compilation for all tests.
    settings = ("--constrain", "--max-new-tokens", "80", "--samples", "2", "--orders", "fixed")

    def run(*arguments: str | Path) -> Outcome:
        return call("judge", "--adapter", "none", *settings, *arguments)

    return run
