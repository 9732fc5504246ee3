"""`grm-jax train`: a stage from its configuration to a model that can be used."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from grm_jax import checkpoints
from grm_jax.cli.train import STAGES
from grm_jax.data.nano import nano_comparisons
from grm_jax.prompts import tokenizer_from_folder
from grm_jax.training.config import Settings
from grm_jax.training.trajectories import write_teacher_trajectories
from tests.cli.conftest import Call, Outcome
from tests.training.folder import write_config, write_examples, write_model

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration with its model and its data."""
    folder = tmp_path_factory.mktemp("sft")
    model, examples = write_model(folder / "base"), write_examples(folder / "a.jsonl")
    return write_config(folder / "tiny.py", model, examples)


def lines(workdir: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if k not in ("seconds", "tokens_per_second")}
        for line in found
    ]


def test_fine_tuning_from_end_to_end(call: Call, config: Path, tmp_path: Path) -> None:
    arguments = ("train", "--config", config, "--workdir", tmp_path, "--config.batch.rows=16")
    outcome = call(*arguments)
    assert (outcome.status, outcome.out) == (0, "")
    assert "6 steps to do" in outcome.err
    found = lines(tmp_path)
    assert [line["step"] for line in found] == [1, 2, 3, 4, 5, 6]
    assert found[-1]["loss"] < found[0]["loss"]
    about = json.loads((tmp_path / "run.json").read_text())
    assert about["settings"]["batch.rows"] == 16
    # What it leaves is a model like any other.
    trained, params = checkpoints.load(str(tmp_path / "model"))
    base = checkpoints.open_checkpoint(str(config.parent / "base")).config
    assert trained == base
    moved = params["embedding"] - checkpoints.load(str(config.parent / "base"))[1]["embedding"]
    assert 1e-4 < np.abs(moved).max() < 0.1
    tokenizer = tokenizer_from_folder(tmp_path / "model", vocab_size=260)
    assert tokenizer.decode(tokenizer.encode("Count")) == "Count"
    # The same again has nothing left to do.
    again = call(*arguments)
    assert again.status == 0
    assert "resumed after step 6 of 6" in again.err
    assert lines(tmp_path) == found
    # And another run is not mixed into it.
    other = call(*arguments, "--config.seed=1")
    assert other.status == 2
    assert "was begun with seed 0 and this run has 1" in other.err


def test_adapters_become_a_peft_folder(call: Call, config: Path, tmp_path: Path) -> None:
    changes = ("--config.model.lora_rank=2", "--config.model.lora_targets=('q','up')")
    more = ("--config.steps=2", "--config.data.too_long=keep_end", "--config.data.length=64")
    outcome = call("train", "--config", config, "--workdir", tmp_path, *changes, *more)
    assert outcome.status == 0, outcome.err
    written = json.loads((tmp_path / "model" / "adapter_config.json").read_text())
    assert written["r"] == 2
    assert sorted(written["target_modules"]) == ["q_proj", "up_proj"]
    assert written["base_model_name_or_path"] == str(config.parent / "base")
    resumed = call("train", "--config", config, "--workdir", tmp_path, *changes, *more)
    assert "resumed after step 2 of 2" in resumed.err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--config.stage=sftt", "stage is 'sftt'; it must be one of sft"),
        ("--config.optimizer.lerning_rate=1", "the nearest is 'optimizer.learning_rate'"),
        ("--config.steps=no", "an override does not fit"),
        ("--confg.steps=1", "is no override; write --config.key=value"),
        ("--config.mesh.fsdp=3", "fsdp=3, tensor=1 needs 3 devices"),
        ("--config.batch.rows=3", "batch.rows is 3, but 1 micro-batches over 8 devices"),
        ("--config.data.files=()", "data.files is empty"),
        ("--config.data.files=('/none',)", "cannot read /none"),
        ("--config.data.weights=(1.0,2.0)", "data.weights has 2 shares for 1 data.files"),
        ("--config.data.length=512", "data.length is 512, but the model reads 256 tokens"),
        ("--config.model.dtype=float16", "model.dtype is 'float16'; it must be one of"),
        ("--config.checkpoint.keep=1", "checkpoint.keep is 1; keep at least 2"),
    ],
)
def test_calls_that_are_wrong(
    change: str, message: str, call: Call, config: Path, tmp_path: Path
) -> None:
    outcome = call("train", "--config", config, "--workdir", tmp_path, change)
    assert outcome.status == 2
    assert outcome.err.startswith("grm-jax: ")
    assert message in outcome.err
    assert outcome.err.count("\n") == 1


def test_sequences_that_are_too_long(call: Call, config: Path, tmp_path: Path) -> None:
    outcome = call("train", "--config", config, "--workdir", tmp_path, "--config.data.length=16")
    assert outcome.status == 2
    assert "a row has 16; make rows longer" in outcome.err


def test_a_key_that_the_stage_does_not_read(call: Call, config: Path, tmp_path: Path) -> None:
    text = config.read_text().replace("config.steps = 6", "config.momentum = 0.9")
    (tmp_path / "c.py").write_text(text)
    outcome = call("train", "--config", tmp_path / "c.py", "--workdir", tmp_path / "w")
    assert outcome.status == 2
    assert "nothing reads the configuration's momentum in this stage" in outcome.err


def test_other_commands_take_no_overrides(call: Call) -> None:
    with pytest.raises(SystemExit) as caught:
        call("convert", "a", "b", "--config.steps=1")
    assert caught.value.code == 2


def test_stages_take_settings_and_a_folder(
    call: Call, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def stage(settings: Settings, workdir: Path) -> bool:
        seen.append((settings["steps"], workdir))
        return False

    monkeypatch.setattr("grm_jax.cli.train.STAGES", {**STAGES, "sft": stage})
    outcome = call("train", "--config", config, "--workdir", tmp_path, "--config.steps=3")
    # Being asked to stop is no failure.
    assert outcome.status == 0
    assert seen == [(3, tmp_path)]


# --- as programs ---


def start(workdir: Path, config: Path, *more: str, **variables: str) -> "subprocess.Popen[str]":
    program = "from grm_jax.cli.main import main; raise SystemExit(main())"
    command = [sys.executable, "-c", program, "train", "--config", str(config)]
    # One cache, and not the user's.
    variables["JAX_COMPILATION_CACHE_DIR"] = str(config.parent / "compiled")
    return subprocess.Popen(
        [*command, "--workdir", str(workdir), *more],
        cwd=ROOT,
        env={**os.environ, **variables},
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: "subprocess.Popen[str]") -> Outcome:
    _, said = process.communicate(timeout=900)
    return Outcome(process.returncode, "", said)


SAID = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}


@pytest.mark.parametrize(
    ("asked", "variables", "told"),
    [(2, {}, [2]), (0, {}, []), (2, SAID, []), (2, {"JAX_NUM_CPU_DEVICES": "3"}, [])],
)
def test_cpus_look_like_as_many_devices_as_are_asked_for(
    call: Call,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    asked: int,
    variables: dict[str, str],
    told: list[int],
) -> None:
    """Unless the environment says how many."""
    for name in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    found: dict[str, list[Any]] = {}
    monkeypatch.setattr(
        jax.config, "update", lambda name, value: found.setdefault(name, []).append(value)
    )
    config = tmp_path / "empty.py"
    config.write_text(
        "from grm_jax.training import spct\n\n\n"
        "def get_config():\n    return spct.default_config()\n"
    )
    outcome = call(
        "train", "--config", config, "--workdir", tmp_path, f"--config.cpu_devices={asked}"
    )
    assert "order is empty" in outcome.err
    assert found.get("jax_num_cpu_devices", []) == told


def test_fewer_than_no_devices(call: Call, tmp_path: Path) -> None:
    outcome = call(
        "train",
        *("--config", ROOT / "configs" / "nano.py", "--workdir", tmp_path),
        "--config.cpu_devices=-1",
    )
    assert (outcome.status, outcome.err.count("\n")) == (2, 1)
    assert "cpu_devices is -1" in outcome.err


@pytest.mark.slow
def test_killed_and_stopped_programs_end_like_one_that_ran(
    call: Call, config: Path, tmp_path: Path
) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    assert call("train", "--config", config, "--workdir", one).status == 0
    process = start(other, config)
    wait_for_line(other, process)
    process.send_signal(signal.SIGKILL)
    finish(process)
    process = start(other, config)
    wait_for_line(other, process, 3)
    process.send_signal(signal.SIGTERM)
    outcome = finish(process)
    assert outcome.status == 0, outcome.err
    assert finish(start(other, config)).status == 0
    assert lines(one) == lines(other)
    found, wanted = (checkpoints.load(str(folder / "model"))[1] for folder in (other, one))
    np.testing.assert_array_equal(found["embedding"], wanted["embedding"])


def wait_for_line(workdir: Path, process: "subprocess.Popen[str]", count: int = 1) -> None:
    """Returns when the run has written so many lines, or is over."""
    path = workdir / "metrics.jsonl"
    while process.poll() is None:
        if path.exists() and path.read_text().count("\n") >= count:
            return
        time.sleep(0.01)


def in_processes(
    workdir: Path, config: Path, *changes: str, count: int = 2, devices: int = 8
) -> list[Outcome]:
    """As SLURM would start them, with as many devices each, in one mesh."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    processes = [
        start(
            workdir,
            config,
            *changes,
            "--distributed",
            XLA_FLAGS=f"--xla_force_host_platform_device_count={devices // count}",
            JAX_COORDINATOR_ADDRESS=address,
            SLURM_JOB_ID="1",
            SLURM_STEP_NODELIST="localhost",
            SLURM_NTASKS=str(count),
            SLURM_PROCID=str(number),
            SLURM_LOCALID=str(number),
        )
        for number in range(count)
    ]
    return [finish(process) for process in processes]


@pytest.mark.slow
def test_two_processes_learn_what_one_does(call: Call, config: Path, tmp_path: Path) -> None:
    changes = ("--config.mesh.fsdp=4", "--config.mesh.tensor=2")
    one, two = tmp_path / "one", tmp_path / "two"
    outcome = call("train", "--config", config, "--workdir", one, *changes)
    assert outcome.status == 0, outcome.err
    for _ in range(2):  # The second time, they resume.
        outcomes = in_processes(two, config, *changes)
        assert [outcome.status for outcome in outcomes] == [0, 0], outcomes
    assert "resumed after step 6 of 6" in outcomes[0].err
    assert "resumed" not in outcomes[1].err
    for mine, theirs in zip(lines(one), lines(two), strict=True):
        assert theirs == pytest.approx(mine, rel=1e-4)
    found, wanted = (checkpoints.load(str(folder / "model"))[1] for folder in (two, one))
    np.testing.assert_allclose(found["embedding"], wanted["embedding"], atol=1e-4)


OF_STAGES = {
    "rft": """
    config.data.length = 128
    config.sampler.files = (rft.TEACHER,)
    config.sampler.hinted = "off"
""",
    "rl": """
    config.data.max_prompt = 36
    config.rollout.max_new_tokens = 16
    # What ends early is better, which is all that random parameters have to learn from.
    config.rollout.overlong_buffer = 16
    config.batch.rows = 64
    # Adam would otherwise make as much of rounding as of what is learnt.
    config.optimizer.eps = 1e-3
""",
    "meta": """
    config.data.trajectories = (TRAJECTORIES,)
    config.data.template = "nano"
""",
    "bt": "",
    "pairwise": """
    config.data.template = "nano"
""",
}
"""What is particular about the configuration of each stage."""

CONFIG = """
from grm_jax.training import {stage}

TRAJECTORIES = {trajectories!r}


def get_config():
    config = {stage}.default_config()
    config.model.name = "tiny"
    config.model.tokenizer = "nano"
    config.model.shape = dict(
        family="llama", num_layers=1, width=32, num_heads=2, num_kv_heads=2, mlp_dim=64,
        max_context=256, tie_embeddings=True,
    )
    config.data.comparisons = ("nano:train:60",)
    config.batch.rows = 16
    config.steps = 20
    config.optimizer.learning_rate = 1e-3
    config.optimizer.schedule = "constant"
    if "length" in config.data:
        config.data.length = 256
    if "prompt" in config:
        config.prompt.template = "nano"
        config.prompt.single = ""
{particular}
    return config
"""


def write_stage(folder: Path, stage: str) -> Path:
    """Its configuration and its data."""
    trajectories = folder / "trajectories.jsonl"
    comparisons = list(islice(nano_comparisons("train", seed=0), 60))
    write_teacher_trajectories(trajectories, comparisons, samples=2, seed=0)
    config = folder / "tiny.py"
    config.write_text(
        CONFIG.format(
            stage=stage, trajectories=str(trajectories), particular=OF_STAGES[stage].rstrip()
        )
    )
    return config


@pytest.mark.slow
@pytest.mark.parametrize("stage", OF_STAGES)
def test_stages_killed_ten_times_end_like_one_that_ran(stage: str, tmp_path: Path) -> None:
    config = write_stage(tmp_path, stage)
    changes = ("--config.checkpoint.every=2", "--config.steps=30")
    one, other = tmp_path / "one", tmp_path / "other"
    assert finish(start(one, config, *changes)).status == 0
    rng = random.Random(stage)
    for _ in range(10):
        metrics = other / "metrics.jsonl"
        done = metrics.read_text().count("\n") if metrics.exists() else 0
        process = start(other, config, *changes)
        wait_for_line(other, process, min(done + rng.randint(0, 3), 29))
        # Steps take milliseconds here and every other one writes a checkpoint.
        time.sleep(rng.uniform(0, 0.2))
        process.send_signal(signal.SIGKILL)
        finish(process)
    outcome = finish(start(other, config, *changes))
    assert outcome.status == 0, outcome.err
    assert len(lines(one)) == 30
    assert lines(other) == lines(one)
    found, wanted = (checkpoints.load(str(folder / "model"))[1] for folder in (other, one))
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("stage", OF_STAGES)
def test_stages_learn_the_same_on_any_devices(stage: str, tmp_path: Path) -> None:
    """On one, on eight, and on eight of two processes."""
    config = write_stage(tmp_path, stage)
    one, eight, two = (tmp_path / name for name in ("one", "eight", "two"))
    mesh = ("--config.mesh.fsdp=4", "--config.mesh.tensor=2")
    flag = "--xla_force_host_platform_device_count="
    outcomes = [
        finish(start(one, config, XLA_FLAGS=flag + "1")),
        finish(start(eight, config, *mesh, XLA_FLAGS=flag + "8")),
        *in_processes(two, config, *mesh),
    ]
    assert [outcome.status for outcome in outcomes] == [0, 0, 0, 0], outcomes
    wanted = lines(one)
    assert len(wanted) == 20
    for workdir in (eight, two):
        for mine, theirs in zip(wanted, lines(workdir), strict=True):
            assert theirs["loss"] == pytest.approx(mine["loss"], rel=5e-3, abs=1e-5)
            assert theirs["grad_norm"] == pytest.approx(mine["grad_norm"], rel=2e-2, abs=1e-5)


NANO = """
import runpy

get_nano = runpy.run_path({nano!r})["get_config"]


def get_config():
    config = get_nano()[{stage!r}]
    config.model.name = {model!r}
    config.steps = {steps}
    config.log.every = 1
    # Of a run in which no draw hangs on the last bits of a probability: one token that is another
    # makes all that follow others.
    config.seed = 1
    return config
"""


@pytest.mark.slow
def test_nano_learns_the_same_in_several_processes(tmp_path: Path) -> None:
    """Reinforcement learning at its full size, from a model that has learnt to write judgements."""
    nano, trained = str(ROOT / "configs" / "nano.py"), str(tmp_path / "rft" / "model")
    for stage, model, steps in (("rft", "nano", 300), ("rl", trained, 20)):
        text = NANO.format(nano=nano, stage=stage, model=model, steps=steps)
        (tmp_path / f"{stage}.py").write_text(text)
    first = finish(start(tmp_path / "rft", tmp_path / "rft.py", XLA_FLAGS=""))
    assert first.status == 0, first.err
    config = tmp_path / "rl.py"
    flag = "--xla_force_host_platform_device_count=4"
    outcome = finish(start(tmp_path / "1", config, XLA_FLAGS=flag))
    assert outcome.status == 0, outcome.err
    wanted = lines(tmp_path / "1")
    assert len(wanted) == 20
    assert all(line["loss"] or line["grad_norm"] for line in wanted)
    for count in (2, 4):
        outcomes = in_processes(tmp_path / str(count), config, count=count, devices=4)
        assert [outcome.status for outcome in outcomes] == [0] * count, outcomes
        for mine, theirs in zip(wanted, lines(tmp_path / str(count)), strict=True):
            for name in ("loss", "grad_norm", "reward"):
                assert theirs[name] == pytest.approx(mine[name], rel=5e-3, abs=1e-5), name
