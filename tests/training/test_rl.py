"""Reinforcement learning as a run, from comparisons to a model."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from grm_jax import checkpoints
from grm_jax.errors import UsageError
from grm_jax.training import rl
from grm_jax.training.config import Settings
from tests.training.changes import changed
from tests.training.folder import write_comparisons, write_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with random parameters, a template that takes few bytes, and comparisons."""
    folder = tmp_path_factory.mktemp("small")
    write_model(folder / "model")
    write_comparisons(folder / "comparisons.jsonl", 40)
    (folder / "short.jinja").write_text("{{ conversation }}{{ responses | join('|') }}")
    return folder


def config(folder: Path, **changes: Any) -> ConfigDict:
    """It is rewarded for short answers, since it can't be right."""
    return changed(
        rl.default_config(),
        {
            "model.name": str(folder / "model"),
            "data.comparisons": (str(folder / "comparisons.jsonl"),),
            "data.max_prompt": 64,
            "data.threads": 0,
            "prompt.template": str(folder / "short.jinja"),
            "prompt.single": "",
            "rollout.max_new_tokens": 8,
            "rollout.overlong_buffer": 8,
            "rollout.overlong_scale": 1.0,
            "batch.rows": 32,
            "steps": 4,
            "optimizer.learning_rate": 1e-2,
            "checkpoint.every": 2,
        },
        changes,
    )


def lines(workdir: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if k not in ("seconds", "tokens_per_second")}
        for line in found
    ]


def run(folder: Path, workdir: Path, **changes: Any) -> list[dict[str, Any]]:
    settings = Settings(config(folder, **changes))
    assert settings["stage"] == "rl"
    assert rl.run(settings, workdir)
    return lines(workdir)


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of eight steps on eight devices."""
    workdir = tmp_path_factory.mktemp("rl")
    run(folder, workdir, steps=8)
    return workdir


def test_the_policy_moves_to_what_is_rewarded(whole: Path) -> None:
    found = lines(whole)
    assert [line["step"] for line in found] == list(range(1, 9))
    assert found[-1]["reward"] > found[0]["reward"]
    assert found[-1]["response_length"] < found[0]["response_length"]
    first = found[0]
    # Of random text nothing can be read, and without the penalty all groups are alike.
    assert (first["accuracy"], first["unreadable"]) == (0.0, 1.0)
    assert (first["kl"], first["ratio_mean"], first["ratio_max"]) == pytest.approx(
        (0, 1, 1), abs=1e-6
    )
    assert 0 < first["sampler_gap_max"] < 1e-4
    assert found[-1]["kl"] > 0
    assert 0 < first["entropy"] < np.log(260)
    assert checkpoints.load(str(whole / "model"))[0].num_layers == 2


@pytest.mark.slow
def test_a_stopped_run_goes_on_as_if_it_had_not_been(
    folder: Path, whole: Path, tmp_path: Path
) -> None:
    run(folder, tmp_path, steps=3)
    assert run(folder, tmp_path, steps=8) == lines(whole)
    ours, theirs = (checkpoints.load(str(one / "model"))[1] for one in (tmp_path, whole))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"mesh__fsdp": 4, "mesh__tensor": 2, "batch__accumulate": 2},
        # A device has two rows of a micro-batch, so that a prompt is computed for two at a time.
        {"batch__accumulate": 2},
    ],
)
def test_another_mesh_learns_the_same(
    folder: Path, whole: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    found = run(folder, tmp_path, steps=3, **changes)
    for ours, theirs, rel in zip(found, lines(whole), (1e-5, 1e-2, 1e-2), strict=False):
        for name in ("reward", "loss", "grad_norm", "entropy", "kl"):
            assert ours[name] == pytest.approx(theirs[name], rel=rel, abs=1e-6), name


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_rollouts_on_another_mesh_are_the_same(
    folder: Path, whole: Path, tmp_path: Path, lora_rank: int
) -> None:
    """Rollouts with heads split and learning with parameters in parts, and back after a stop."""
    changes: dict[str, Any] = {"model__lora_rank": lora_rank, "optimizer__schedule": "constant"}
    split = {"rollout__mesh__data": 2, "rollout__mesh__fsdp": 1, "rollout__mesh__tensor": 4}
    wanted = run(folder, tmp_path / "one", steps=3, **changes)
    run(folder, tmp_path / "other", steps=2, **changes, **split)
    found = run(folder, tmp_path / "other", steps=3, **changes)
    for ours, theirs in zip(found, wanted, strict=True):
        for name in ("reward", "response_length", "loss", "grad_norm", "entropy", "kl"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-2, abs=1e-6), name


AHEAD = {
    "rollout__devices": 4,
    "loss__importance_cap": 2.0,
    "optimizer__schedule": "constant",
}


def test_rollouts_on_other_devices_are_one_step_old(folder: Path, tmp_path: Path) -> None:
    """Stopped or not, and the first step as in turn."""
    wanted = run(folder, tmp_path / "one", steps=4, **AHEAD)
    run(folder, tmp_path / "other", steps=2, **AHEAD)
    assert run(folder, tmp_path / "other", steps=4, **AHEAD) == wanted
    ours, theirs = (checkpoints.load(str(tmp_path / one / "model"))[1] for one in ("one", "other"))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    turns = run(folder, tmp_path / "turns", steps=2, **(AHEAD | {"rollout__devices": 0}))
    for name in ("reward", "response_length", "loss", "grad_norm", "entropy"):
        assert wanted[0][name] == pytest.approx(turns[0][name], rel=1e-3, abs=1e-6), name
    # What was sampled before the first update is learnt from after it.
    assert turns[1]["sampler_gap_mean"] < 1e-4
    assert wanted[1]["sampler_gap_mean"] > 10 * turns[1]["sampler_gap_mean"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rollout__devices": 8}, "rollout.devices is 8, but there are 8 devices"),
        (
            {**AHEAD, "loss__importance_cap": 0.0},
            "and a loss.importance_cap",
        ),
        ({**AHEAD, "rollout__refills": 1}, "needs rollout.refills of 0"),
    ],
)
def test_what_sampling_ahead_needs(
    folder: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        run(folder, tmp_path, **changes)


def test_a_mesh_for_rollouts_that_the_devices_do_not_fill_is_refused(
    folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="tensor=3 needs 24 devices, but there are 8"):
        run(folder, tmp_path, rollout__mesh__tensor=3)


@pytest.mark.slow
def test_every_setting_changes_what_is_learnt(folder: Path, whole: Path, tmp_path: Path) -> None:
    before = lines(whole)[1]
    for number, (key, value) in enumerate(
        {
            "loss__beta": 0.0,
            "loss__aggregate": "sum",
            "loss__deviation": False,
            "rollout__updates": 2,
            "rollout__group": 8,
            "rollout__temperature": 0.5,
        }.items()
    ):
        found = run(folder, tmp_path / str(number), steps=2, **{key: value})[1]
        assert found["loss"] != before["loss"], key


@pytest.mark.slow
def test_rounds_and_adapters(folder: Path, whole: Path, tmp_path: Path) -> None:
    found = run(
        folder,
        tmp_path,
        steps=2,
        rollout__refills=2,
        rollout__overlong_buffer=0,
        loss__drop_uniform=True,
        model__name=str(whole / "model"),
        model__lora_rank=2,
        loss__reference="base",
    )
    # All groups are wrong throughout: every round is tried and nothing is learnt.
    assert [line["rounds"] for line in found] == [3.0, 3.0]
    assert [line["uniform_groups"] for line in found] == [1.0, 1.0]
    assert [line["grad_norm"] for line in found] == [0.0, 0.0]
    assert (tmp_path / "model" / "adapter_config.json").is_file()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rollout__group": 5}, "must be a multiple of rollout.group, 5"),
        ({"rollout__temperature": 0.0}, "rollout.temperature is 0.0"),
        ({"loss__reference": "base"}, "there are no adapters"),
        ({"loss__reference": "mine"}, "must be one of copy, base"),
        ({"rollout__max_new_tokens": 200}, "but the model reads 256 tokens"),
        ({"prompt__single": "compact"}, "other scores than 0 and 1"),
        ({"data__comparisons": ()}, "data.comparisons is empty"),
        ({"data__comparisons": ("nano:other:3",)}, "nano has the splits"),
        ({"model__lora_rank": 2, "model__random": True}, "nothing to adapt"),
        ({"batch__rows": 12}, "multiple of 8"),
    ],
)
def test_settings_that_do_not_fit(
    changes: dict[str, Any], message: str, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        run(folder, tmp_path, **changes)


@pytest.mark.slow
def test_a_program_is_compiled_once_for_each_length(folder: Path, tmp_path: Path) -> None:
    """Of prompts, of which there is one here."""
    compiled: list[str] = []

    def count(event: str, seconds: float, **about: Any) -> None:
        if event.endswith("backend_compile_duration"):
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        run(folder, tmp_path / "few", steps=2, checkpoint__every=50)
        few = len(compiled)
        run(folder, tmp_path / "many", steps=50, checkpoint__every=50)
        many = len(compiled)
        # Of the last batch half is missing.
        some = (f"{folder / 'comparisons.jsonl'}#0:36",)
        found = run(folder, tmp_path / "all", steps=5, data__epochs=1, data__comparisons=some)
    finally:
        jax.monitoring.unregister_event_duration_listener(count)
    # A run compiles its own programs, however long it is.
    assert many - few <= few
    assert len(compiled) - many <= few
    assert [line["unusable_prompts"] for line in found] == [0, 0, 0, 0, 0.5]
