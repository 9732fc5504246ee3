"""Files of results, one JSON object a line, that a killed run goes on with."""

import fcntl
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, final

from grm_jax.errors import UsageError

_PACKAGES = ("grm_jax", "jax", "jaxlib", "flax", "numpy", "tokenizers", "sentencepiece")


def to_line(record: Mapping[str, Any]) -> str:
    """A record as one line of JSON, without the line's end.

    Halves of surrogate pairs, which UTF-8 cannot carry, are written as escapes.
    """
    line = json.dumps(record, ensure_ascii=False)
    with suppress(UnicodeEncodeError):
        line.encode()
        return line
    return json.dumps(record)


def provenance(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a run needs to be repeated: its settings, package versions and git commit."""
    versions = {}
    for name in _PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "settings": dict(settings),
        "versions": {"python": platform.python_version(), **versions},
        "commit": _commit(),
    }


@final
class LineWriter:
    """Appends records to a file so that none is lost, doubled or left in half.

    Beside `results.jsonl` it keeps `results.jsonl.run.json`, the `provenance` of the run; a run
    with other settings is refused, as the two halves would not belong together.

    Attributes:
      done: Ids of the records that the file already held, in order.
      failed: How many of them have an `error`.
    """

    def __init__(self, file: int, done: list[str], failed: int) -> None:
        self._file = file
        self.done = done
        self.failed = failed

    @classmethod
    def open(cls, path: Path, settings: Mapping[str, Any]) -> "LineWriter":
        """Opens a new file, or one that an earlier run has left.

        Raises:
          UsageError: If the file cannot be written, is another run's at this moment, holds
            something else than records, or was written with other settings.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise UsageError(f"cannot write {path}: {error.strerror}") from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with open(file, "rb", closefd=False) as reader:
                content = reader.read()
            _check_settings(path, settings, begun=bool(content))
            done, failed = _read_done(path, content)
            # A line that was cut off by the end of the run is written again.
            whole = content.rfind(b"\n") + 1
            os.ftruncate(file, whole)
            os.lseek(file, whole, os.SEEK_SET)
        except BlockingIOError as error:
            os.close(file)
            raise UsageError(f"{path} is being written by another run") from error
        except UsageError:
            os.close(file)
            raise
        return cls(file, done, failed)

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends a record; when this returns, the line is in the file."""
        data = (to_line(record) + "\n").encode()
        while data:
            data = data[os.write(self._file, data) :]

    def __enter__(self) -> "LineWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        os.close(self._file)


def _read_done(path: Path, content: bytes) -> tuple[list[str], int]:
    done, failed = [], 0
    for number, line in enumerate(content.split(b"\n")[:-1], 1):
        try:
            record = json.loads(line)
            done.append(str(record["id"]))
            failed += "error" in record
        except (ValueError, TypeError, KeyError) as error:
            raise UsageError(
                f"{path}, line {number}, is not a record of results; give another --output"
            ) from error
    return done, failed


def _check_settings(path: Path, settings: Mapping[str, Any], *, begun: bool) -> None:
    beside = path.with_name(path.name + ".run.json")
    if begun:
        try:
            before = json.loads(beside.read_text())["settings"]
        except FileNotFoundError as error:
            raise UsageError(
                f"{path} exists, but without {beside.name} it is no run's to go on with; give "
                "another --output"
            ) from error
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UsageError(f"{beside} cannot be read; give another --output") from error
        settings = json.loads(json.dumps(dict(settings)))
        for name in sorted({*before, *settings}):
            if before.get(name) != settings.get(name):
                raise UsageError(
                    f"{path} was begun with {name} {before.get(name)!r} and this run has "
                    f"{settings.get(name)!r}; use the same, or give another --output"
                )
    else:
        partial = beside.with_name(beside.name + ".partial")
        partial.write_text(json.dumps(provenance(settings), indent=2) + "\n")
        partial.replace(beside)


def _commit() -> str | None:
    """The git commit of the running code, if it is a clone; `+` marks uncommitted changes."""
    folder = Path(__file__).parent
    command = ["git", "-C", str(folder), "describe", "--always", "--abbrev=40", "--dirty=+"]
    with suppress(OSError, subprocess.CalledProcessError):
        tracked = ["git", "-C", str(folder), "ls-files", "--error-unmatch", Path(__file__).name]
        subprocess.run(tracked, check=True, capture_output=True)
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    return None
