"""Where trajectories come from: a judge that is sampled, or the teacher of the small comparisons.

Sampling takes hours and may be killed at any moment: the same call goes on where the file ends, and
leaves the file of a run that was left alone, to the last byte.
"""

import dataclasses
import hashlib
import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, final

from ml_collections import ConfigDict
from rich.console import Console
from rich.progress import track

from grm_jax.data import BadRecord, Comparison, Judgement, LineWriter, to_line, to_record
from grm_jax.data.comparison import PointwiseLabel
from grm_jax.data.trajectories import (
    Trajectory,
    has_truth,
    make_trajectory,
    read_trajectories,
)
from grm_jax.distributed import local_mesh
from grm_jax.errors import UsageError
from grm_jax.judge import GRM
from grm_jax.models import dtype_name
from grm_jax.prompts import Template, load_template, parse_scores
from grm_jax.prompts.nano import Teacher
from grm_jax.sampling import response_orders
from grm_jax.training.config import Settings

SINGLE_TEMPLATE = "single01"
"""Asks whether a single response is correct, with a score of 0 or 1."""


def sampler_config() -> ConfigDict:
    """The keys of the group `sampler`, but for those of one stage."""
    return ConfigDict(
        {
            # Whose judgements they are, and its adapters, as in `model.adapter`; empty for none.
            "model": "",
            "adapter": "",
            # Judgements of each comparison, and how they are sampled.
            "samples": 3,
            "temperature": 0.5,
            "top_p": 1.0,
            "max_new_tokens": 512,
            # Hold the judge to the layout of a judgement.
            "constrain": False,
            "orders": "shuffle",
            # Samples decoded at a time; 0 for what suits the device.
            "batch_rows": 0,
            # Of the devices of each process, which samples its own share of the comparisons.
            "mesh": {"data": -1, "fsdp": 1, "tensor": 1, "expert": 1},
        }
    )


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class JudgeSettings:
    """What `sampler.*` says; see `sampler_config`.

    Attributes:
      model: The judge's name.
      adapter: Its adapters'; empty for none.
      dtype: What it computes in, by name, or auto.
      mesh: Of the devices of each process.
      how: The arguments of `sample_trajectories` that are about sampling.
    """

    model: str
    adapter: str
    dtype: str
    mesh: Mapping[str, int]
    how: Mapping[str, Any]

    @property
    def name(self) -> str:
        """What the judge is called."""
        return f"{self.model} with {self.adapter}" if self.adapter else self.model

    def load(self) -> GRM:
        """Loads the judge onto the devices of this process alone, as each samples by itself."""
        return GRM.from_pretrained(
            self.model,
            adapter=self.adapter or None,
            mesh=local_mesh(self.mesh),
            dtype=None if self.dtype == "auto" else dtype_name(self.dtype),
        )


def judge_settings(settings: Settings) -> JudgeSettings:
    """Reads the keys of `sampler_config`.

    Raises:
      UsageError: One of them is wrong.
    """
    return JudgeSettings(
        model=str(settings["sampler.model"]),
        adapter=str(settings["sampler.adapter"]),
        dtype=str(settings["model.dtype"]),
        mesh=settings.group("sampler.mesh"),
        how={
            "samples": settings.at_least("sampler.samples", 1),
            "temperature": float(settings["sampler.temperature"]),
            "top_p": float(settings["sampler.top_p"]),
            "max_new_tokens": settings.at_least("sampler.max_new_tokens", 1),
            "constrain": bool(settings["sampler.constrain"]),
            "orders": str(settings["sampler.orders"]),
            "batch_rows": settings.at_least("sampler.batch_rows", 0) or None,
            "seed": settings.at_least("seed", 0),
        },
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Templates:
    """How a judge is asked for trajectories.

    Attributes:
      several: Where there are several responses.
      single: Where a single response is correct or not; its scores are 0 and 1. None if such
        comparisons are left out.
    """

    several: Template
    single: Template | None = None

    def of(self, comparison: Comparison) -> Template | None:
        """The template of a comparison; None if its truth is not known or it is left out."""
        if not has_truth(comparison):
            return None
        return self.single if isinstance(comparison.label, PointwiseLabel) else self.several


def load_templates(several: str, single: str = SINGLE_TEMPLATE) -> Templates:
    """Loads templates by name or path; an empty one of single responses leaves these out.

    Raises:
      UsageError: There is no such template, or that of single responses has other scores.
    """
    if not single:
        return Templates(several=load_template(several))
    found = load_template(single)
    if (found.low, found.high) != (0, 1):
        raise UsageError(
            f"template {single} asks for scores from {found.low} to {found.high}; single responses "
            "are trained on with 0 and 1"
        )
    return Templates(several=load_template(several), single=found)


def load_trajectories(
    paths: Iterable[str | Path], comparisons: Mapping[str, Comparison], templates: Templates
) -> Iterator[Trajectory | BadRecord]:
    """Reads the trajectories of files, one after another; see `read_trajectories`.

    Args:
      paths: The files.
      comparisons: What was judged, by id.
      templates: How the judge was asked.

    Raises:
      UsageError: A file cannot be opened.
    """
    several = templates.several
    return read_trajectories(
        paths, comparisons, parse=parse_scores, low=several.low, high=several.high
    )


def sample_trajectories(
    load: Callable[[], GRM],
    comparisons: Sequence[Comparison],
    path: Path,
    *,
    name: str,
    samples: int,
    templates: Templates,
    hinted: bool = False,
    temperature: float = 0.5,
    top_p: float = 1.0,
    max_new_tokens: int = 256,
    constrain: bool = False,
    orders: str = "shuffle",
    batch_rows: int | None = None,
    seed: int = 0,
) -> None:
    """Samples judgements into a file, one a line, or goes on with it.

    Comparisons of several responses come first in the file, then single responses; a comparison
    that cannot be judged has one line, with an `error`.

    Args:
      load: Loads the judge; it is not called if there is nothing left to do.
      comparisons: What to judge; those without a template in `templates` are passed over.
      path: The file. Its settings are kept beside it, and other ones are refused.
      name: What the judge is called, one of these settings.
      samples: Judgements of each comparison.
      templates: How the judge is asked.
      hinted: Whether it is told which response is best.
      temperature: As in `GRM.judge_batch`, like the rest.
      top_p: Likewise.
      max_new_tokens: Likewise.
      constrain: Likewise.
      orders: Likewise.
      batch_rows: Likewise.
      seed: Likewise.

    Raises:
      UsageError: A setting is wrong, or the file is another run's.
    """
    asked = [kind for kind in (templates.several, templates.single) if kind is not None]
    everything = [item for kind in asked for item in comparisons if templates.of(item) is kind]
    judged: dict[str, Any] = {
        "samples": samples,
        "hinted": hinted,
        "temperature": temperature,
        "top_p": top_p,
        "max_new_tokens": max_new_tokens,
        "constrain": constrain,
        "orders": orders,
        "batch_rows": batch_rows,
        "seed": seed,
    }
    about = {
        "model": name,
        **judged,
        "templates": [_digest([template.source]) for template in asked],
        "comparisons": _digest(to_line(to_record(item)) for item in everything),
    }
    with LineWriter.open(path, about) as writer:
        begun = list(dict.fromkeys(writer.done))
        if begun != [comparison.id for comparison in everything[: len(begun)]]:
            raise UsageError(f"{path} holds other comparisons; move it away")
        # A run may have been killed between two samples of a comparison. All are drawn again, the
        # same, and those that the file lacks are written.
        part = writer.done.count(begun[-1]) if begun else samples
        written = part if part < samples else 0
        rest = everything[len(begun) - (written > 0) :]
        if not rest:
            return
        grm = load()
        total = len(everything)
        shown = _with_progress(_judged(grm, rest, templates, judged), total - len(rest), total)
        for comparison, judgement in shown:
            for record in _records(comparison, judgement, templates, hinted)[written:]:
                writer.write(record)
            written = 0


def write_teacher_trajectories(
    path: Path,
    comparisons: Iterable[Comparison],
    *,
    samples: int,
    seed: int,
    orders: str = "shuffle",
    teacher: Teacher | None = None,
) -> None:
    """Writes judgements of the small comparisons of `grm_jax.data.nano` by their teacher.

    Args:
      path: The file; it is there whole or as it was before.
      comparisons: What to judge.
      samples: Judgements of each.
      seed: Of the orders of the responses and of what the teacher looks at.
      orders: As in `GRM.judge_batch`.
      teacher: Who judges; the usual teacher if None.

    Raises:
      UsageError: A comparison is of another kind, or there is no such order.
    """
    judge = Teacher() if teacher is None else teacher

    def lines() -> Iterator[dict[str, Any]]:
        for comparison in comparisons:
            shown = response_orders(
                orders,
                record_id=comparison.id,
                num_responses=len(comparison.responses),
                samples=samples,
                seed=seed,
            )
            for number, order in enumerate(shown):
                rng = random.Random(f"{seed} {number} {comparison.id}")
                responses = tuple(comparison.responses[index] for index in order)
                text = judge.judge(dataclasses.replace(comparison, responses=responses), rng)
                made = make_trajectory(comparison, text, parse=parse_scores, order=order)
                yield made.to_record()

    write_lines(path, lines())


def write_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Writes records, one a line, to a file that is there whole or as it was before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        for record in records:
            file.write(to_line(record) + "\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _judged(
    grm: GRM,
    comparisons: Sequence[Comparison],
    templates: Templates,
    settings: Mapping[str, Any],
) -> Iterator[tuple[Comparison, Judgement]]:
    for template in (templates.several, templates.single):
        if template is not None:
            asked = [item for item in comparisons if templates.of(item) is template]
            found = grm.judge_batch(asked, template=template, **settings)
            yield from zip(asked, found, strict=True)


def _with_progress(
    judged: Iterator[tuple[Comparison, Judgement]], done: int, total: int
) -> Iterator[tuple[Comparison, Judgement]]:
    """Passes judgements on under a progress bar, if standard error is a terminal."""
    console = Console(stderr=True)
    hidden = not console.is_terminal
    yield from track(
        judged, "sampling", total=total, completed=done, console=console, disable=hidden
    )


def _records(
    comparison: Comparison, judgement: Judgement, templates: Templates, hinted: bool
) -> list[dict[str, Any]]:
    """The lines of a comparison."""
    if not judgement.samples:
        return [{"id": comparison.id, "error": judgement.error}]
    return [
        make_trajectory(
            comparison,
            sample.text,
            parse=parse_scores,
            order=sample.order,
            hinted=hinted,
            finish=sample.finish,
            low=templates.several.low,
            high=templates.several.high,
        ).to_record()
        for sample in judgement.samples
    ]


def _digest(texts: Iterable[str]) -> str:
    found = hashlib.blake2b(digest_size=16)
    for text in texts:
        found.update(text.encode(errors="surrogatepass") + b"\n")
    return found.hexdigest()
