"""The load test runs, on a tiny model, and finds nothing wrong."""

import dataclasses
from pathlib import Path

import pytest

from benchmarks import service
from tests.training import folder


@pytest.mark.slow
def test_a_short_load_finds_nothing_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(folder, "CONFIG", dataclasses.replace(folder.CONFIG, max_context=4096))
    model = folder.write_model(tmp_path / "model")
    flags = ["--quick", "--model", str(model), "--max-new-tokens", "64"]
    with pytest.raises(SystemExit) as ended:
        service.main([*flags, "--", "--template", "nano"])
    captured = capsys.readouterr()
    assert ended.value.code == 0, captured.err
    assert "| answers with another's nonce or scores | 0 |" in captured.out


def test_percentiles_are_of_the_ordered_values() -> None:
    assert service.percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert service.percentile([float(n) for n in range(100)], 0.99) == 99.0
    assert service.percentile([5.0], 0.99) == 5.0
