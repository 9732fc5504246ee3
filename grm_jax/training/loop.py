"""The loop that all stages share: batches in, checkpoints and metrics out, and no step lost.

A run is a function of its configuration. It may be killed at any moment: the same command goes on
from the last checkpoint and ends with the parameters, and the lines of metrics, of a run that was
left alone.
"""

import contextlib
import json
import math
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, final

import jax
import numpy as np
from jax.experimental import multihost_utils

from grm_jax.data import provenance
from grm_jax.data.pipeline import Resumable
from grm_jax.errors import UsageError
from grm_jax.models import Params
from grm_jax.training import losses
from grm_jax.training.checkpointing import Checkpoints, write_atomically
from grm_jax.training.config import Settings
from grm_jax.training.learner import Learner
from grm_jax.training.metrics import Metrics, open_metrics

MAX_BAD_STREAK = 3
"""Skipped steps in a row that end a run."""


class Advanced(NamedTuple):
    """What a step of a stage returns.

    Attributes:
      state: After it.
      metrics: Of it, those of the `Learner` among them.
      learnt: Tree of arrays that it learnt from, to be looked at if they did harm.
    """

    state: Any
    metrics: losses.Metrics
    learnt: Any


@final
@dataclass(frozen=True, kw_only=True)
class Run:
    """What a stage hands to the loop.

    Attributes:
      settings: The run's; all that the stage wants of it has been read.
      workdir: Where everything goes.
      learner: The step.
      load_params: Loads the parameters that learn, for a run that begins.
      load_frozen: Loads the others, for one that goes on as well.
      batches: The data.
      advance: One step: from the state and a batch as the data has it.
      updates: Of the learner in a step.
    """

    settings: Settings
    workdir: Path
    learner: Learner
    load_params: Callable[[], Params]
    load_frozen: Callable[[], Params]
    batches: Resumable[Any]
    advance: Callable[[Any, Any], Advanced]
    updates: int = 1


class Outcome(NamedTuple):
    """How a run ended.

    Attributes:
      state: After its last step.
      finished: Whether that was the last of all; False if it was asked to stop.
    """

    state: Any
    finished: bool


def train(run: Run) -> Outcome:
    """Runs or resumes, until all steps are done or the process is asked to stop.

    SIGTERM and SIGINT end the run after the current step, with a checkpoint; a second one ends it
    at once.

    Raises:
      UsageError: The configuration has keys that mean nothing or differ from those that the run was
        begun with, the data ends too early, or losses are not finite.
    """
    settings = run.settings
    seed = settings.at_least("seed", 0)
    steps = settings.at_least("steps", 1)
    every = settings.at_least("checkpoint.every", 1)
    log_every = settings.at_least("log.every", 1)
    keep, keep_every = settings["checkpoint.keep"], settings.at_least("checkpoint.keep_every", 0)
    tensorboard, wandb = bool(settings["log.tensorboard"]), str(settings["log.wandb"])
    settings.check_all_read()
    config = settings.to_dict()
    about = provenance(config)
    first = jax.process_index() == 0
    run.workdir.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        asked = stack.enter_context(_stop_signals())
        checkpoints = stack.enter_context(
            Checkpoints(
                run.workdir / "checkpoints",
                keep=keep,
                keep_every=keep_every,
                config=config,
                provenance={"versions": about["versions"], "commit": about["commit"]},
            )
        )
        restored = checkpoints.restore(run.learner.target, run.load_frozen)
        if restored is None:
            step, state = 0, run.learner.begin(run.load_params(), run.load_frozen(), seed)
        else:
            step, state = restored.step // run.updates, restored.state
            run.batches.set_state(restored.position)
        if first:
            write_atomically(run.workdir / "run.json", _pretty(about))
            _say(f"resumed after step {step} of {steps}" if restored else f"{steps} steps to do")
        metrics = stack.enter_context(
            open_metrics(
                run.workdir,
                step=step,
                steps=steps,
                every=log_every,
                tensorboard=tensorboard,
                wandb=wandb,
                config=config,
                writes=first,
            )
        )
        report = _Report(metrics, run.workdir)
        saved = step
        while step < steps and not _agreed(asked.stop, step % log_every == 0):
            try:
                batch = next(run.batches)
            except StopIteration:
                raise UsageError(
                    f"the data ends after {step} of {steps} steps; raise data.epochs, or ask for "
                    "fewer steps"
                ) from None
            position = run.batches.get_state()
            state, measured, learnt = run.advance(state, batch)
            step += 1
            report.take(step, measured, learnt)
            if step % every == 0 or step == steps:
                # Lines up to a checkpoint are in the file before it is, or they would be missing
                # from a run that goes on from it.
                report.settle()
                checkpoints.save(state, position)
                saved = step
        report.settle()
        if saved != step:
            checkpoints.save(state, position)
        checkpoints.wait()
        run.batches.close()
    if step < steps:
        if first:
            _say(f"stopped after step {step} of {steps}; the same command goes on from there")
        return Outcome(state, finished=False)
    done = int(jax.device_get(state.step))
    if done != steps * run.updates:
        raise RuntimeError(f"{done} updates were made in {steps} steps of {run.updates}")
    return Outcome(state, finished=True)


@final
class _Report:
    """Reads the metrics of a step while the next one runs."""

    def __init__(self, metrics: Metrics, workdir: Path) -> None:
        self._metrics = metrics
        self._workdir = workdir
        self._waiting: tuple[int, losses.Metrics, Any] | None = None

    def take(self, step: int, measured: losses.Metrics, learnt: Any) -> None:
        """Takes the metrics of a step that was begun, and settles those of the one before."""
        self.settle()
        self._waiting = step, measured, learnt

    def settle(self) -> None:
        """Writes what is waiting.

        Raises:
          UsageError: Too many steps in a row were not finite.
        """
        if self._waiting is None:
            return
        step, measured, learnt = self._waiting
        self._waiting = None
        found = {name: float(value) for name, value in jax.device_get(measured).items()}
        self._metrics.write(step, found)
        streak = int(found["bad_streak"])
        if not streak:
            return
        what = "loss" if not math.isfinite(found["loss"]) else "gradient"
        if jax.process_index() == 0:
            _say(f"step {step} is skipped: its {what} is not finite")
        if streak >= MAX_BAD_STREAK:
            path = self._workdir / f"bad_batch_step_{step}.npz"
            _save_batch(path, learnt)
            raise UsageError(
                f"{streak} steps in a row, up to step {step}, had no finite {what}; their last "
                f"batch is in {path}; look at it, or lower optimizer.learning_rate"
            )


def _save_batch(path: Path, batch: Any) -> None:
    """Writes a batch's arrays by their path in its tree; every process must call this."""
    arrays: dict[str, Any] = {}
    for key, leaf in jax.tree_util.tree_flatten_with_path(batch)[0]:
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            leaf = multihost_utils.process_allgather(leaf, tiled=True)
        arrays[jax.tree_util.keystr(key, simple=True, separator=".")] = np.asarray(leaf)
    if jax.process_index() == 0:
        np.savez(path, **arrays)


@final
class _Asked:
    """Whether a signal asked for the end."""

    stop = False


@contextlib.contextmanager
def _stop_signals() -> Iterator[_Asked]:
    asked = _Asked()
    before: dict[signal.Signals, Any] = {}

    def ask(number: int, frame: FrameType | None) -> None:
        asked.stop = True
        # Who asks twice does not want to wait.
        for one, handler in before.items():
            signal.signal(one, handler)

    for number in (signal.SIGTERM, signal.SIGINT):
        before[number] = signal.signal(number, ask)
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _agreed(stop: bool, asks: bool) -> bool:
    """Whether any process was asked to stop; all of them must end after the same step.

    Args:
      stop: Whether this one was.
      asks: Whether this is a step at which processes ask each other, which waits for all of them.
    """
    if jax.process_count() == 1:
        return stop
    return asks and bool(np.any(multihost_utils.process_allgather(np.asarray(stop))))


def _pretty(about: Mapping[str, Any]) -> str:
    return json.dumps(about, indent=2) + "\n"


def _say(line: str) -> None:
    print(f"grm-jax: {line}", file=sys.stderr)
