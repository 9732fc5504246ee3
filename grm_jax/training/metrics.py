"""Where a run's metrics go: a file of JSON lines, a progress bar, TensorBoard and W&B."""

import hashlib
import importlib
import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from grm_jax.errors import UsageError

FILE = "metrics.jsonl"


class Writer(Protocol):
    """Takes the metrics of logging steps."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


@final
class JsonLines:
    """One JSON object a logging step, and never two for one step: a resumed run cuts off the rest.

    What is not finite is written as null, since JSON has no other word for it.
    """

    def __init__(self, path: Path, *, step: int) -> None:
        """Opens the file as it was when a step was done.

        Args:
          path: The file; made if it does not exist.
          step: The step that the run goes on from; what follows it will be written again.
        """
        kept = []
        if path.exists():
            for line in path.read_bytes().split(b"\n")[:-1]:
                if json.loads(line)["step"] > step:
                    break
                kept.append(line + b"\n")
        partial = path.with_name(path.name + ".partial")
        partial.write_bytes(b"".join(kept))
        partial.replace(path)
        self._file = path.open("ab", buffering=0)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends a line; when this returns, it is in the file."""
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._file.write(json.dumps({"step": step, **finite}).encode() + b"\n")

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


@final
class TensorBoard:
    """Event files, written by tensorboardX."""

    def __init__(self, folder: Path, *, step: int) -> None:
        """Opens new event files that take the place of what came after a step."""
        library = _library("tensorboardX", "log.tensorboard")
        self._writer = library.SummaryWriter(str(folder), purge_step=step + 1)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds a point to every curve."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Writes what is left."""
        self._writer.close()


@final
class WeightsAndBiases:
    """A run on Weights & Biases; the same working directory goes on with the same run."""

    def __init__(self, project: str, folder: Path, config: Mapping[str, Any]) -> None:
        """Begins the run or goes on with it."""
        library = _library("wandb", "log.wandb")
        name = hashlib.blake2b(str(folder.absolute()).encode(), digest_size=8).hexdigest()
        self._run = library.init(
            project=project,
            id=name,
            name=folder.name,
            dir=str(folder),
            config=dict(config),
            resume="allow",
        )

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Logs the metrics of a step."""
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        """Ends the run."""
        self._run.finish()


@final
class ProgressBar:
    """A bar on a terminal with the loss, tokens a second and the time left."""

    def __init__(self, *, step: int, steps: int, title: str) -> None:
        """Begins the bar at a step."""
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[shown]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._task = self._progress.add_task(title, total=steps, completed=step, shown="compiling")
        self._progress.start()

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Moves the bar."""
        shown = f"loss {metrics['loss']:.4f}"
        if "tokens_per_second" in metrics:
            shown += f"  {metrics['tokens_per_second']:,.0f} tokens/s"
        self._progress.update(self._task, completed=step, shown=shown)

    def close(self) -> None:
        """Leaves the bar as it is."""
        self._progress.stop()


@final
class Metrics:
    """All places that a run's metrics go to, and its clock."""

    def __init__(self, writers: list[Writer], *, every: int, bar: ProgressBar | None) -> None:
        """Starts the clock.

        Args:
          writers: Take the metrics of logging steps.
          every: Steps between these.
          bar: Takes those of every step.
        """
        self._writers = writers
        self._every = every
        self._bar = bar
        self._last = time.monotonic()
        self._tokens = 0.0
        self._steps = 0

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Takes the metrics of the next step.

        Speeds are means since the last logging step; `seconds` are those of one step.
        """
        self._steps += 1
        self._tokens += metrics.get("tokens", 0.0)
        elapsed = max(time.monotonic() - self._last, 1e-9)
        full = {**metrics, "seconds": elapsed / self._steps}
        if "tokens" in metrics:
            full["tokens_per_second"] = self._tokens / elapsed
        if self._bar is not None:
            self._bar.write(step, full)
        if step % self._every == 0:
            for writer in self._writers:
                writer.write(step, full)
            self._last, self._tokens, self._steps = time.monotonic(), 0.0, 0

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for writer in [*self._writers, *([self._bar] if self._bar is not None else [])]:
            writer.close()


def open_metrics(
    workdir: Path,
    *,
    step: int,
    steps: int,
    every: int,
    tensorboard: bool,
    wandb: str,
    config: Mapping[str, Any],
    writes: bool,
) -> Metrics:
    """Opens what the configuration asks for.

    Args:
      workdir: The run's folder.
      step: The step that the run goes on from.
      steps: Steps of the whole run.
      every: Steps between lines.
      tensorboard: Whether to write event files.
      wandb: Name of the W&B project; empty for none.
      config: The run's configuration.
      writes: Whether this process is the one that writes.

    Raises:
      UsageError: A package that is asked for is not installed.
    """
    if not writes:
        return Metrics([], every=every, bar=None)
    writers: list[Writer] = [JsonLines(workdir / FILE, step=step)]
    if tensorboard:
        writers.append(TensorBoard(workdir / "tensorboard", step=step))
    if wandb:
        writers.append(WeightsAndBiases(wandb, workdir, config))
    shows = sys.stderr.isatty()
    bar = ProgressBar(step=step, steps=steps, title=workdir.name) if shows else None
    return Metrics(writers, every=every, bar=bar)


def _library(name: str, key: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UsageError(
            f"{key} needs the package {name}; install it, or leave the key out"
        ) from error
