"""schemathesis looks for a difference between the service and what it says of itself."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.serving.live import serve
from tests.serving.stub import StubEngine, make_service

CONFIG = Path(__file__).with_name("schemathesis.toml")
PROGRAM = Path(sys.executable).with_name("schemathesis")


@pytest.mark.slow
def test_schemathesis_finds_nothing(tmp_path: Path) -> None:
    with serve(make_service(StubEngine(limit=256), token="secret", queue=2048)) as live:
        command = [
            PROGRAM, "--config-file", CONFIG, "run", f"http://127.0.0.1:{live.port}/openapi.json",
            "--header", "Authorization: Bearer secret", "--max-examples", "40", "--seed", "1",
            "--no-color",
        ]  # fmt: skip
        found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert found.returncode == 0, found.stdout[-8000:] + found.stderr[-2000:]
