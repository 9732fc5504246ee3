"""Rejective fine-tuning, the cold start of SPCT (section 3.2 of arXiv:2504.02495).

    grm-jax train --config configs/X.py --workdir DIR

A judge writes several judgements of each comparison, those that are wrong or too easy are rejected,
and the rest is learnt, together with general instructions. The judge is the model itself, another
one, or whoever wrote files of trajectories; held to the layout of a judgement, even an untuned
model can be it. Where a judge was told the best response, the model learns to answer without.

Each part is kept in the working directory, and what is finished is not done again:

| file | holds |
| --- | --- |
| `trajectories/*.jsonl` | what was sampled |
| `examples.jsonl` | what is learnt |
| `rejection.json` | how much was kept and why the rest was not |
| `checkpoints/`, `model/` | as in all stages |
"""

import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, final

import jax
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from grm_jax.data import BadRecord, Comparison, turns
from grm_jax.data.packing import TokenSequence
from grm_jax.data.pipeline import Mapped, Source
from grm_jax.data.trajectories import Trajectory
from grm_jax.distributed import make_mesh
from grm_jax.errors import UsageError
from grm_jax.prompts import Tokenizer, render
from grm_jax.training import sft
from grm_jax.training.checkpointing import write_atomically
from grm_jax.training.comparisons import (
    all_comparisons,
    comparison_data,
    comparison_sources,
)
from grm_jax.training.config import Settings, changed_key
from grm_jax.training.examples import ExampleFile, example_tokens
from grm_jax.training.model import open_model
from grm_jax.training.rejection import (
    HINTED,
    Verdict,
    balance_places,
    count_verdicts,
    reject,
    verdict_table,
)
from grm_jax.training.trajectories import (
    JudgeSettings,
    Templates,
    judge_settings,
    load_templates,
    load_trajectories,
    sample_trajectories,
    sampler_config,
    write_lines,
    write_teacher_trajectories,
)

EXAMPLES, REPORT, SAMPLED = "examples.jsonl", "rejection.json", "trajectories"

TEACHER = "nano-teacher"
"""Among `sampler.files`, the teacher of the small comparisons in place of a file."""

# The keys that decide what is learnt; others may change between sampling and training.
_DECISIVE = ("seed", "prompt.", "sampler.", "reject.", "data.comparisons")
_SHOWN_ERRORS = 5


def default_config() -> ConfigDict:
    """Every key of the stage with its default; `data.comparisons` is for the user to fill in."""
    config = sft.default_config()
    config.stage = "rft"
    rows = {key: config.data[key] for key in ("length", "too_long", "learn_prompts")}
    config.data = comparison_data()
    # Files of general instructions as `sft` takes them, and their share of all examples; 0 if each
    # example is to come as often as any other.
    config.data.general = ()
    config.data.general_share = 0.0
    # As in `sft`.
    config.data.update(rows)
    config.prompt = ConfigDict(
        {
            "template": "compact",
            # For single responses that are right or wrong; empty to leave them out.
            "single": "single01",
        }
    )
    # Who writes trajectories: the model that is trained, unless another is named.
    config.sampler = sampler_config()
    config.sampler.temperature = 0.7
    # Or files of trajectories; "nano-teacher" stands for the teacher of the small comparisons.
    config.sampler.files = ()
    # Whether there are judgements without a hint, `samples` of each comparison.
    config.sampler.non_hinted = True
    # Whether one more is written with a hint at the best response: off, failed (where none without
    # it is right) or all. With sampler.constrain, it is held to scores that agree with the
    # hint as well.
    config.sampler.hinted = "failed"
    # Whether comparisons are rejected that all judgements without a hint got right.
    # And whether as many are kept for each place at which the best response is shown: judges that
    # like one place are right more often where the best response stands there.
    config.reject = ConfigDict({"too_easy": True, "balance_places": False})
    return config


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplerSettings:
    """Who writes which trajectories; see `default_config` for what each means."""

    judge: JudgeSettings
    files: tuple[str, ...]
    non_hinted: bool
    hinted: str


def run(settings: Settings, workdir: Path) -> bool:
    """Runs the stage on the comparisons of `data.comparisons`.

    Args:
      settings: Of `default_config`.
      workdir: Where everything goes; the model that comes out is in its folder `model`.

    Returns:
      Whether all steps are done.

    Raises:
      UsageError: A setting or the data is wrong, or nothing is left to learn.
    """
    mesh = make_mesh(settings.group("mesh"))
    model = open_model(settings, mesh)
    make_examples(settings, workdir)
    sources = _training_sources(settings, workdir, model.tokenizer)
    return sft.train_on_sequences(settings, workdir, mesh, model, sources)


def make_examples(settings: Settings, workdir: Path) -> None:
    """Samples, rejects, and writes `examples.jsonl`, as far as an earlier run has not.

    Every process of a group must call this.

    Args:
      settings: The run's.
      workdir: Its working directory.

    Raises:
      UsageError: A setting or the data is wrong, or what was sampled or learnt in the working
        directory was so with other settings.
    """
    sampler = _sampler_settings(settings)
    templates = load_templates(str(settings["prompt.template"]), str(settings["prompt.single"]))
    too_easy, balanced = (bool(settings[f"reject.{key}"]) for key in ("too_easy", "balance_places"))
    if settings["data.weights"]:
        raise UsageError("each comparison is sampled once here; leave data.weights empty")
    names = settings["data.comparisons"]
    decisive = _decisive(settings, sampler)
    if _already_made(workdir, decisive):
        return
    found = all_comparisons(comparison_sources(settings, workdir))
    usable = [item for item in found if templates.of(item) is not None]
    if not usable:
        raise UsageError(
            f"none of the {len(found)} comparisons in {', '.join(names)} has a label that tells "
            "right from wrong"
        )
    by_id = {comparison.id: comparison for comparison in usable}
    paths = _write_trajectories(sampler, templates, usable, workdir)
    _meet("trajectories")
    if jax.process_index() == 0:
        trajectories, bad = _sorted(load_trajectories(paths, by_id, templates), by_id)
        verdicts = reject(
            trajectories, non_hinted=sampler.non_hinted, hinted=sampler.hinted, too_easy=too_easy
        )
        if balanced:
            verdicts = balance_places(trajectories, verdicts, by_id)
        kept = [
            trajectory
            for trajectory, verdict in zip(trajectories, verdicts, strict=True)
            if verdict is Verdict.KEPT
        ]
        counts = count_verdicts(trajectories, verdicts, by_id)
        for line in _summary(len(found), len(usable), counts, bad):
            _say(line)
        write_lines(
            workdir / EXAMPLES,
            (example(by_id[item.id], item, templates) for item in kept),
        )
        report = {
            "settings": decisive,
            "examples": len(kept),
            "comparisons": len(found),
            "without_truth": len(found) - len(usable),
            "bad_lines": len(bad),
            "bad_line_errors": [record.error for record in bad[:_SHOWN_ERRORS]],
            **counts,
        }
        # The last to be written, it says that the examples are whole.
        write_atomically(workdir / REPORT, json.dumps(report, indent=2) + "\n")
    _meet("examples")


def example(comparison: Comparison, trajectory: Trajectory, templates: Templates) -> dict[str, Any]:
    """What is learnt from a trajectory: to write it without a hint, whether there was one or not.

    Args:
      comparison: What was judged.
      trajectory: The judgement.
      templates: How judges are asked.

    Returns:
      An example for `read_example`, with the responses in the order that the trajectory speaks of.
    """
    template = templates.of(comparison)
    if template is None:
        raise UsageError(f"record {comparison.id!r} has no template")
    responses = [comparison.responses[index] for index in trajectory.order]
    prompt = render(template, turns(comparison), responses)
    return {"prompt": prompt, "completion": trajectory.text}


def _sampler_settings(settings: Settings) -> SamplerSettings:
    judge = judge_settings(settings)
    sampler = SamplerSettings(
        judge=judge,
        files=tuple(map(str, settings["sampler.files"])),
        non_hinted=bool(settings["sampler.non_hinted"]),
        hinted=settings.choice("sampler.hinted", HINTED),
    )
    if not sampler.non_hinted and sampler.hinted != "all":
        raise UsageError(
            f"sampler.non_hinted is off and sampler.hinted is {sampler.hinted!r}, so nothing would "
            "be sampled for all comparisons; set sampler.hinted to 'all'"
        )
    if sampler.files and (judge.model or judge.adapter):
        raise UsageError("trajectories are those of sampler.files; leave sampler.model empty")
    if sampler.files or judge.model:
        return sampler
    if judge.adapter:
        raise UsageError("sampler.adapter belongs to sampler.model; name both")
    if settings["model.random"] or settings.group_or_empty("model.shape"):
        raise UsageError(
            "a model with random parameters writes nothing to learn from; name sampler.files or "
            "sampler.model"
        )
    itself = dataclasses.replace(
        judge, model=str(settings["model.name"]), adapter=str(settings["model.adapter"])
    )
    return dataclasses.replace(sampler, judge=itself)


def _write_trajectories(
    sampler: SamplerSettings, templates: Templates, usable: Sequence[Comparison], workdir: Path
) -> list[Path]:
    """Samples this process's share; returns the files of all processes."""
    folder, judge = workdir / SAMPLED, sampler.judge
    if sampler.files:
        teacher = folder / f"{TEACHER}.jsonl"
        if TEACHER in sampler.files and jax.process_index() == 0:
            write_teacher_trajectories(
                teacher, usable, **{key: judge.how[key] for key in ("samples", "seed", "orders")}
            )
        return [teacher if file == TEACHER else Path(file) for file in sampler.files]
    first, step = jax.process_index(), jax.process_count()
    mine = usable[first::step]

    def paths(kind: str) -> list[Path]:
        return [folder / f"{kind}-{number + 1}-of-{step}.jsonl" for number in range(step)]

    # One judge for both files. It is let go when this function returns, before training begins.
    sample = functools.partial(
        sample_trajectories, functools.cache(judge.load), name=judge.name, templates=templates
    )
    written = []
    if sampler.non_hinted:
        written += paths("non-hinted")
        sample(mine, paths("non-hinted")[first], **judge.how)
    if sampler.hinted != "off":
        written += paths("hinted")
        if sampler.hinted == "failed":
            known = {comparison.id: comparison for comparison in mine}
            tries = load_trajectories([paths("non-hinted")[first]], known, templates)
            right = {item.id for item in tries if isinstance(item, Trajectory) and item.correct}
            mine = [comparison for comparison in mine if comparison.id not in right]
        sample(mine, paths("hinted")[first], hinted=True, **{**judge.how, "samples": 1})
    return written


def _sorted(
    read: Iterable[Trajectory | BadRecord], comparisons: Mapping[str, Comparison]
) -> tuple[list[Trajectory], list[BadRecord]]:
    """Trajectories in the order of the comparisons, however many processes wrote them."""
    bad: list[BadRecord] = []
    found: dict[str, list[Trajectory]] = {name: [] for name in comparisons}
    for item in read:
        if isinstance(item, BadRecord):
            bad.append(item)
        else:
            found[item.id].append(item)
    return [trajectory for group in found.values() for trajectory in group], bad


def _training_sources(
    settings: Settings, workdir: Path, tokenizer: Tokenizer
) -> list[Source[TokenSequence]]:
    path = workdir / EXAMPLES
    if not path.stat().st_size:
        raise UsageError(
            f"no trajectory is left to learn from; {workdir / REPORT} says why. Sample more or "
            "hotter, constrain the judge, or let a better one write"
        )
    files = {EXAMPLES: ExampleFile(path)}
    files |= {str(name): ExampleFile(Path(name)) for name in settings["data.general"]}
    share = float(settings["data.general_share"])
    if not 0 <= share < 1 or (share and len(files) == 1):
        raise UsageError(
            f"data.general_share is {share}; it must be from 0 to below 1, and 0 without "
            "data.general"
        )
    general = sum(len(file) for name, file in files.items() if name != EXAMPLES)

    def weight(name: str) -> float | None:
        if not share:
            return None
        return 1 - share if name == EXAMPLES else share * len(files[name]) / general

    encode: Callable[[Any], TokenSequence] = functools.partial(example_tokens, tokenizer)
    return [
        Source(name=name, records=Mapped(file, encode), weight=weight(name))
        for name, file in files.items()
    ]


def _decisive(settings: Settings, sampler: SamplerSettings) -> dict[str, Any]:
    chosen = {key: v for key, v in settings.to_dict().items() if key.startswith(_DECISIVE)}
    chosen |= {"sampler.model": sampler.judge.model, "sampler.adapter": sampler.judge.adapter}
    # What depends on the machine alone.
    return {key: v for key, v in chosen.items() if not key.startswith("sampler.mesh.")}


def _already_made(workdir: Path, decisive: Mapping[str, Any]) -> bool:
    """Whether the examples are there, made with these settings."""
    path = workdir / REPORT
    if not path.exists() or not (workdir / EXAMPLES).exists():
        return False
    before = json.loads(path.read_text())["settings"]
    key = changed_key(before, decisive)
    if key is not None and any((workdir / "checkpoints").glob("*")):
        raise UsageError(
            f"{workdir / EXAMPLES}, which is being learnt, was made with {key} {before.get(key)!r} "
            f"and this run has {decisive.get(key)!r}; use the same, or another --workdir"
        )
    return key is None


def _summary(
    found: int,
    usable: int,
    counts: Mapping[str, Mapping[str, Mapping[str, int]]],
    bad: Sequence[BadRecord],
) -> Iterator[str]:
    yield f"trajectories of {usable} comparisons"
    if usable < found:
        yield f"{found - usable} comparisons are left out: nothing tells right from wrong"
    if bad:
        yield f"{len(bad)} lines are no trajectories; the first: {bad[0].error}"
    yield from verdict_table(counts).splitlines()


def _meet(what: str) -> None:
    """Waits until every process is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def _say(line: str) -> None:
    if jax.process_index() == 0:
        print(f"grm-jax: {line}", file=sys.stderr)
