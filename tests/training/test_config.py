"""Configurations: files, overrides, and keys that are misspelt or mean nothing."""

from pathlib import Path

import pytest
from ml_collections import ConfigDict

from grm_jax.errors import UsageError
from grm_jax.training.config import Settings, base_config, changed_key, load_config

FILE = """
from grm_jax.training.config import base_config


def get_config(stage="sft"):
    config = base_config(stage)
    config.steps = 7
    return config
"""


@pytest.fixture
def path(tmp_path: Path) -> str:
    (tmp_path / "a.py").write_text(FILE)
    return str(tmp_path / "a.py")


def test_files_and_overrides(path: str) -> None:
    assert load_config(path).steps == 7
    assert load_config(f"{path}:rl").stage == "rl"
    found = load_config(
        path,
        [
            "--config.optimizer.learning_rate=1",
            "--config.model.lora_targets=('q','v')",
            "--config.mesh.fsdp=-1",
            "--config.model.random=true",
            "--config.model.name=a b=c",
        ],
    )
    assert found.optimizer.learning_rate == 1.0
    assert found.model.lora_targets == ("q", "v")
    assert found.model.random is True
    assert found.model.name == "a b=c"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--config.optimizer.learning_rte=1", "no key 'optimizer.learning_rte'; the nearest is"),
        ("--config.learning_rate=1", "the nearest is 'optimizer.learning_rate'"),
        ("--config.steps=many", "an override does not fit: .*steps=many"),
        ("--config.steps=1.5", "an override does not fit: .*steps=1.5"),
        ("--config.optimizer=1", "'optimizer' is a group; name one such as 'optimizer.b1'"),
        ("--config.steps", "is no override; write --config.key=value"),
        ("--steps=1", "is no override; write --config.key=value"),
    ],
)
def test_overrides_that_do_not_fit(override: str, message: str, path: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_config(path, [override])


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"there is no configuration .*b\.py"):
        load_config(str(tmp_path / "b.py"))
    (tmp_path / "c.py").write_text("get = 1\n")
    with pytest.raises(UsageError, match=r"c\.py has no get_config\(\)"):
        load_config(str(tmp_path / "c.py"))
    (tmp_path / "d.py").write_text("get_config = dict\n")
    with pytest.raises(UsageError, match=r"get_config\(\) of .*d\.py returns no ConfigDict"):
        load_config(str(tmp_path / "d.py"))


def test_keys_that_nothing_reads() -> None:
    settings = Settings(ConfigDict({"a": 1, "b": {"c": 2, "d": 3}, "e": {"f": {"g": 4}}}))
    assert settings["a"] == 1
    assert settings["b.c"] == 2
    with pytest.raises(UsageError, match=r"nothing reads the configuration's b\.d, e\.f\.g in"):
        settings.check_all_read()
    assert settings.group("e") == {"f.g": 4}
    assert settings.group("b") == {"c": 2, "d": 3}
    settings.check_all_read()
    assert settings.to_dict() == {"a": 1, "b.c": 2, "b.d": 3, "e.f.g": 4}


def test_keys_that_do_not_exist() -> None:
    settings = Settings(base_config("sft"))
    with pytest.raises(UsageError, match=r"no key 'optimizer\.b3'; the nearest is 'optimizer\.b"):
        settings["optimizer.b3"]
    with pytest.raises(UsageError, match="the nearest is 'mesh"):
        settings.group("mash")


def test_values_out_of_their_range() -> None:
    settings = Settings(ConfigDict({"a": "x", "b": 0, "c": 1.5}))
    assert settings.choice("a", ("x", "y")) == "x"
    assert settings.at_least("b", 0) == 0
    with pytest.raises(UsageError, match="a is 'x'; it must be one of y, z"):
        settings.choice("a", ("y", "z"))
    for key in ("b", "c"):
        with pytest.raises(UsageError, match=f"{key} is .*a whole number from 1 up"):
            settings.at_least(key, 1)


def test_changes_that_make_another_run() -> None:
    now = Settings(base_config("sft")).to_dict()
    assert changed_key(now, {**now, "mesh.fsdp": 2, "log.every": 5, "checkpoint.keep": 3}) is None
    assert changed_key(now, {**now, "model.remat": True, "batch.accumulate": 2}) is None
    assert changed_key(now, {**now, "model.name": "other"}) == "model.name"
    assert changed_key({**now, "new": 1}, now) == "new"
    assert changed_key(now, {**now, "steps": 5}) == "steps"
    constant = {**now, "optimizer.schedule": "constant"}
    assert changed_key(constant, {**constant, "steps": 5}) is None
    # JSON has no tuples.
    listed = {**now, "model.lora_targets": list(now["model.lora_targets"])}
    assert changed_key(listed, now) is None
