"""Which adapter a command judges with, and what it says of that."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from grm_jax import GRM, serving
from grm_jax.checkpoints import shipped
from grm_jax.errors import UsageError
from tests.checkpoints.shipping import ship

Call = Callable[..., Any]
Asked = list[str | None]


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return ship(tmp_path, monkeypatch)


@pytest.fixture
def asked(tiny_grm: GRM, monkeypatch: pytest.MonkeyPatch) -> Asked:
    """The adapters that were asked for, with any model."""
    found: Asked = []

    def load(name: str, adapter: str | None, mesh: object) -> GRM:
        found.append(adapter)
        return tiny_grm

    monkeypatch.setattr(GRM, "from_pretrained", load)
    return found


@pytest.fixture
def nothing(tmp_path: Path) -> Path:
    """A file of no records."""
    (tmp_path / "in.jsonl").write_text("")
    return tmp_path / "in.jsonl"


SAID = "judges with the adapter tiny-spct, which was trained for it; --adapter none leaves it out"


@pytest.mark.parametrize(
    ("flags", "adapter", "said"),
    [
        ([], "tiny-spct", True),
        (["--adapter", "none"], None, False),
        (["--adapter", "tiny-spct"], "tiny-spct", False),
        (["--adapter", "./none"], "./none", False),
        (["--model", "other"], None, False),
        (["--model", "tiny-spct"], None, False),
    ],
)
def test_the_default_is_what_was_trained_for_the_model(
    call: Call, base: Path, asked: Asked, nothing: Path,
    flags: list[str], adapter: str | None, said: bool,
) -> None:  # fmt: skip
    outcome = call("judge", nothing, "--model", base, *flags)
    assert (outcome.status, outcome.out, asked) == (0, "", [adapter])
    assert outcome.err == (f"grm-jax: {base} {SAID}\n" if said else "")


def test_nothing_changes_where_nothing_was_trained(
    call: Call, base: Path, asked: Asked, nothing: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for one in shipped.SHIPPED.values():
        (one.folder / shipped.FILE).unlink()
    assert call("judge", nothing, "--model", base).err == ""
    monkeypatch.setattr(shipped, "SHIPPED", {})
    assert call("judge", nothing, "--model", base).err == ""
    assert call("judge", nothing).err == ""
    assert asked == [None] * 3


def test_a_wrong_setting_is_still_one_line(
    call: Call, base: Path, asked: Asked, nothing: Path
) -> None:
    outcome = call("judge", nothing, "--model", base, "--samples", "0")
    assert (outcome.status, asked) == (2, ["tiny-spct"])
    assert outcome.err == "grm-jax: samples is 0; it must be 1 or more\n"


def test_an_output_goes_on_with_the_same_adapter(
    call: Call, base: Path, asked: Asked, tmp_path: Path
) -> None:
    (tmp_path / "in.jsonl").write_text("{oops\n")
    flags = ("judge", tmp_path / "in.jsonl", "--model", base, "--output", tmp_path / "out.jsonl")
    assert call(*flags).status == 1
    whole = (tmp_path / "out.jsonl").read_bytes()
    # Named or by default, it is the same one.
    assert call(*flags, "--adapter", "tiny-spct").status == 1
    refused = call(*flags, "--adapter", "none")
    assert refused.status == 2
    assert "adapter" in refused.err
    assert (tmp_path / "out.jsonl").read_bytes() == whole


def test_a_service_has_the_same_default(
    call: Call, base: Path, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ready(**_: object) -> None:
        raise UsageError("ready")

    monkeypatch.setattr(serving, "ModelEngine", ready)
    assert call("serve", "--model", base).err == f"grm-jax: {base} {SAID}\ngrm-jax: ready\n"
    assert call("serve", "--model", base, "--adapter", "none").err == "grm-jax: ready\n"
    assert asked == ["tiny-spct", None]


def test_evaluation_names_its_adapters(
    call: Call, base: Path, asked: Asked, tmp_path: Path
) -> None:
    (tmp_path / "c.jsonl").write_text(
        '{"id": "a", "messages": [{"role": "user", "content": "?"}], "responses": ["a", "b"], '
        '"label": {"kind": "best", "index": 0}}\n'
    )
    flags = ("--benchmark", "comparisons", "--data", tmp_path / "c.jsonl", "--constrain")
    flags += ("--max-new-tokens", "60", "--samples", "1", "--orders", "fixed")
    outcome = call(
        "eval", *flags, "--model", base, "--adapter", "none", "-", "tiny-spct",
        "--output", tmp_path / "out",
    )  # fmt: skip
    assert outcome.status == 0, outcome.err
    assert asked == [None, None, "tiny-spct"]
    assert f"{base} + tiny-spct: accuracy" in outcome.out
