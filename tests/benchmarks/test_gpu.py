"""The benchmark of one GPU runs, on a CPU, and its table says what was measured."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks import gpu

RESULTS = {
    "machine": {"card": "NVIDIA H200", "jax": "0.11.2"},
    "ceilings": {"state": "done", "speed": 4.3e12, "flops": 780e12},
    "Gemma-2-2B, decode": {
        "state": "done",
        "what": "64 x 32 samples of 64 tokens",
        "tokens": 131_072,
        "steps": 64,
        "compile": 12.3,
        "gib": 23.4,
        "flops": 780e12,
        "moved": 4.3e12,
        "bound": 1.0,
        "binds": "compute",
        "seconds": 2.0,
    },
    "Gemma-2-2B, decode, prefill": {"what": "64 prompts", "tokens": 32_768, "seconds": 0.5},
    "Gemma-2-2B, rl": {"state": "skipped, out of time"},
    "transformers, Gemma-2-2B, generate": {"what": "x", "tokens": 32_768, "seconds": 8.0},
}


def test_the_table_says_what_was_measured_and_what_was_not() -> None:
    text = gpu.table(RESULTS)
    assert "NVIDIA H200" in text
    assert "4.30 TB/s and multiplied bfloat16 matrices at 780 TFLOP/s" in text
    row = "| 2 (31.2) | 65,536 | 390 | 2.15 | 1 (compute) | **50%** | 23.4 | 12 |"
    assert f"| Gemma-2-2B, decode | 64 x 32 samples of 64 tokens {row}" in text
    assert "- Gemma-2-2B, rl: skipped, out of time" in text
    # The seconds of prompts are in both.
    assert "samples: 52,429 tokens/s against 4,096 of `transformers`, **12.80** times" in text


def test_bounds_and_what_becomes_of_sections(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[gpu.Bench] = []
    output = tmp_path / "gpu.json"
    output.write_text(json.dumps(RESULTS))
    monkeypatch.setattr(gpu, "sections", lambda side: {"one": lambda b, s: seen.append(b)})
    arguments = ["gpu.py", "--quick", "--side=transformers", f"--output={output}"]
    monkeypatch.setattr(sys, "argv", arguments)
    gpu.main()
    (bench,) = seen
    assert bench.bound(780e12, 4.3e12 * 2)["bound"] == pytest.approx(2)
    assert bench.bound(780e12 * 3, 4.3e12)["binds"] == "compute"
    assert gpu.load(output)["one"]["state"] == "done"
    # What is there is not run again, and nothing is begun without time.
    monkeypatch.setattr(gpu, "sections", lambda side: {n: lambda b, s: 1 / 0 for n in ("one", "b")})
    gpu.main()
    assert gpu.load(output)["b"]["state"].startswith("ZeroDivisionError")
    monkeypatch.setattr(gpu, "sections", lambda side: {"late": lambda b, s: b.time(lambda: None)})
    monkeypatch.setattr(sys, "argv", [*arguments, "--seconds=0"])
    gpu.main()
    assert gpu.load(output)["late"]["state"] == "skipped, out of time"


@pytest.mark.slow
def test_all_of_it_runs_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "gpu.json"
    arguments = ["--quick", f"--output={output}", f"--cache={tmp_path / 'cache'}"]
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setattr(sys, "argv", ["gpu.py", *arguments, "--seconds=1000"])
    gpu.main()
    found = gpu.load(output)
    for side in ("grm_jax", "transformers"):
        assert {found[name]["state"] for name in gpu.sections(side)} == {"done"}
    assert found["Gemma-2-2B, rl"]["seconds"] > found["Gemma-2-2B, rl, update"]["seconds"]
