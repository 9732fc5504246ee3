"""Who a process is among others, and how processes end together."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from grm_jax.distributed import Place, ending_together, place_of
from grm_jax.errors import UsageError
from tests.training.folder import write_config, write_examples, write_model

ROOT = Path(__file__).parents[2]


def test_explicit_variables_say_who_a_process_is() -> None:
    environment = {
        "JAX_COORDINATOR_ADDRESS": "a:1",
        "JAX_NUM_PROCESSES": "4",
        "JAX_PROCESS_ID": "3",
        "SLURM_PROCID": "1",
    }
    assert place_of(environment) == Place("a:1", 4, 3)


def test_schedulers_that_jax_knows_are_left_to_it() -> None:
    slurm = {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "2", "SLURM_PROCID": "0"}
    assert place_of(slurm) == Place()
    assert place_of({**slurm, "JAX_COORDINATOR_ADDRESS": "a:1"}) == Place("a:1")
    four = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "OMPI_MCA_orte_hnp_uri": "1"}
    assert place_of(four) == Place()


def test_newer_open_mpi_needs_an_address() -> None:
    five = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}
    with pytest.raises(UsageError, match="set JAX_COORDINATOR_ADDRESS to its host"):
        place_of(five)
    assert place_of({**five, "JAX_COORDINATOR_ADDRESS": "a:1"}) == Place("a:1", 2, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"JAX_PROCESS_ID": "x"}, "JAX_PROCESS_ID is 'x'; it must be a whole number"),
        ({"JAX_PROCESS_ID": "2"}, "JAX_PROCESS_ID is 2, but there are 2 processes"),
        ({"JAX_COORDINATOR_ADDRESS": ""}, "JAX_COORDINATOR_ADDRESS must be set too"),
        ({"JAX_NUM_PROCESSES": ""}, "JAX_NUM_PROCESSES must be set too"),
    ],
)
def test_variables_that_contradict_each_other(change: dict[str, str], message: str) -> None:
    good = {
        "JAX_COORDINATOR_ADDRESS": "a:1",
        "JAX_NUM_PROCESSES": "2",
        "JAX_PROCESS_ID": "0",
    }
    with pytest.raises(UsageError, match=message):
        place_of({**good, **change})


def test_a_process_alone_fails_like_any_program() -> None:
    with pytest.raises(RuntimeError, match="x"), ending_together():
        raise RuntimeError("x")


# --- as programs ---


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration with its model and its data."""
    folder = tmp_path_factory.mktemp("sft")
    model, examples = write_model(folder / "base"), write_examples(folder / "a.jsonl")
    return write_config(folder / "tiny.py", model, examples)


def start(config: Path, workdir: Path) -> list["subprocess.Popen[str]"]:
    """Two processes with two devices each, whose run is too long to end by itself."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    program = "from grm_jax.cli.main import main; raise SystemExit(main())"
    command = [sys.executable, "-c", program, "train", "--config", str(config)]
    command += ["--workdir", str(workdir), "--distributed", "--config.steps=100000"]
    command += ["--config.checkpoint.every=2", "--config.optimizer.schedule=constant"]
    variables = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": "2",
        "JAX_COMPILATION_CACHE_DIR": str(config.parent / "compiled"),
    }
    return [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env={**variables, "JAX_PROCESS_ID": str(index)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]


def steps(workdir: Path) -> int:
    """The last step that is in the metrics."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return int(json.loads(lines[-1])["step"]) if lines else 0


def wait_for(workdir: Path, step: int, processes: list["subprocess.Popen[str]"]) -> None:
    while steps(workdir) < step and all(one.poll() is None for one in processes):
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_dies_ends_the_others(victim: int, config: Path, tmp_path: Path) -> None:
    processes = start(config, tmp_path)
    wait_for(tmp_path, 4, processes)
    began = time.monotonic()
    processes[victim].kill()
    other = processes[1 - victim]
    _, said = other.communicate(timeout=120)
    assert time.monotonic() - began < 60
    assert other.returncode not in (0, 2)
    assert "another host died" in said or "another task died" in said, said
    processes[victim].communicate()
    # The same again goes on from the last checkpoint, and a signal to all ends it in order.
    processes = start(config, tmp_path)
    reached = steps(tmp_path)
    wait_for(tmp_path, reached + 2, processes)
    for process in processes:
        process.send_signal(signal.SIGTERM)
    said_by = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said_by
    assert "resumed after step" in said_by[0]
    assert "the same command goes on from there" in said_by[0]
    # Only the first one reports.
    assert "grm-jax:" not in said_by[1]


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all(config: Path, tmp_path: Path) -> None:
    processes = start(config, tmp_path)
    wait_for(tmp_path, 2, processes)
    processes[1].send_signal(signal.SIGTERM)
    said_by = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said_by
    assert "stopped after step" in said_by[0]
