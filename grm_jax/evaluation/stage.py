"""The last stage of an experiment: what its models reach on comparisons that none has seen.

    grm-jax train --config configs/nano.py --workdir DIR

It belongs into a configuration of stages (`grm_jax.training.spct`), where the models of earlier
ones are compared; `grm-jax eval` measures finished models on benchmarks.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from grm_jax.data import Comparison
from grm_jax.data.output import LineWriter
from grm_jax.data.pipeline import Source
from grm_jax.distributed import local_mesh
from grm_jax.errors import UsageError
from grm_jax.evaluation.adaptive import early_stopping
from grm_jax.evaluation.judged import Judged, judged_from_records, read_judgements
from grm_jax.evaluation.measures import Measure
from grm_jax.evaluation.methods import WEIGHTED
from grm_jax.evaluation.metrics import auc, bootstrap_mean, correctness
from grm_jax.evaluation.scaling import plot_curve, scaling_curve
from grm_jax.judge import GRM
from grm_jax.training.comparisons import all_comparisons, open_records
from grm_jax.training.config import Settings

RESULTS, PLOT = "results.json", "curve.png"


def default_config() -> ConfigDict:
    """Every key of the stage with its default; models and comparisons are for the user to name."""
    return ConfigDict(
        {
            "stage": "eval",
            "seed": 0,
            # Named as in all stages.
            "data": {"comparisons": ()},
            # Models by the name to show; each judges greedily.
            "models": {},
            # PEFT folders, or names of those that come with the package, of those among them that
            # have adapters.
            "adapters": {},
            # Names of those that must follow the layout of a judgement.
            "constrained": (),
            # Which of them is sampled for the scaling curve.
            "scaled": "",
            "samples": 32,
            "ks": (1, 2, 4, 8, 16, 32),
            "temperature": 1.0,
            "max_new_tokens": 256,
            "template": "compact",
            # A meta reward model for guided votes; empty for none.
            "meta_model": "",
            "meta_template": "meta",
            # Which shares of the samples vote in guided votes, each rounded down to at least one.
            "meta_shares": (0.5,),
            "batch_rows": 0,
            # Of the devices of this process; each axis as in `sampler.mesh` of other stages.
            "mesh": {"data": -1, "fsdp": 1, "tensor": 1, "expert": 1},
        }
    )


def run(settings: Settings, workdir: Path) -> bool:
    """Judges, and writes `results.json`, `curve.png` and every judgement.

    Args:
      settings: Of `default_config`.
      workdir: Where they go.

    Returns:
      True.

    Raises:
      UsageError: A setting, a model or the data is wrong.
    """
    models = {name: str(path) for name, path in settings.group("models").items()}
    adapters = {name: str(path) for name, path in settings.group_or_empty("adapters").items()}
    if not adapters.keys() <= models.keys():
        raise UsageError(f"adapters names {', '.join(adapters.keys() - models.keys())}, no model")
    constrained = {str(name) for name in settings["constrained"]}
    if not constrained <= models.keys():
        raise UsageError(f"constrained names {', '.join(constrained - models.keys())}, no model")
    scaled = settings.choice("scaled", list(models))
    samples = settings.at_least("samples", 1)
    ks = [int(k) for k in settings["ks"]]
    if not ks or max(ks) > samples:
        raise UsageError(f"ks is {ks}; name at least one, and none above samples, {samples}")
    seed = settings.at_least("seed", 0)
    common: dict[str, Any] = {
        "max_new_tokens": settings.at_least("max_new_tokens", 1),
        "template": str(settings["template"]),
        "batch_rows": settings.at_least("batch_rows", 0) or None,
        "seed": seed,
    }
    temperature = float(settings["temperature"])
    meta_name, meta_template = str(settings["meta_model"]), str(settings["meta_template"])
    shares = [float(share) for share in settings["meta_shares"]]
    if not all(0 < share <= 1 for share in shares):
        raise UsageError(f"meta_shares is {shares}; give shares above 0 and up to 1")
    names = [str(name) for name in settings["data.comparisons"]]
    if not names:
        raise UsageError("data.comparisons is empty; name at least one file of comparisons")
    comparisons = all_comparisons(
        [Source(name=name, records=open_records(name, workdir)) for name in names]
    )
    mesh = local_mesh(settings.group("mesh"))
    settings.check_all_read()
    workdir.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"settings": settings.to_dict(), "greedy": {}, "curves": {}}
    for name, path in models.items():
        grm = GRM.from_pretrained(path, adapter=adapters.get(name), mesh=mesh)
        file = workdir / f"greedy_{name}.jsonl"
        how = {**common, "constrain": name in constrained}
        judged = _judge(name, grm, comparisons, file, {**how, "samples": 1, "temperature": 0.0})
        right = _right(judged)
        interval = bootstrap_mean(right, seed=seed)
        found["greedy"][name] = {
            **dataclasses.asdict(interval),
            "strict": float(_strict(judged).mean()),
            "unreadable": float(1 - judged.valid.mean()),
            "completion_tokens": float(judged.completion_tokens.mean()),
        }
        if name == scaled:
            meta = None
            if meta_name:
                meta = GRM.meta_model(meta_name, template=meta_template, mesh=mesh)
            sampled = {**how, "samples": samples, "temperature": temperature}
            votes = _judge(name, grm, comparisons, workdir / "sampled.jsonl", sampled, meta)
            arrays = (votes.scores, votes.valid, votes.right, votes.counts)
            found["curves"]["vote"] = scaling_curve(*arrays, ks=ks, seed=seed)
            found["adaptive"] = _adaptive(votes, seed)
            if votes.meta is not None:
                for share in shares:
                    found["curves"][f"guided vote of {share:.0%}"] = [
                        point
                        for k in ks
                        for point in scaling_curve(
                            *arrays,
                            ks=[k],
                            meta=votes.meta,
                            k_meta=max(1, int(share * k)),
                            seed=seed,
                        )
                    ]
                found["curves"]["weighted vote"] = scaling_curve(
                    WEIGHTED.votes(votes), *arrays[1:], ks=ks, seed=seed
                )
                strict = _strict(votes)
                found["meta"] = {
                    "auc": auc(votes.meta.ravel(), strict.ravel()),
                    "positives": float(strict.mean()),
                }
    found["chance"] = float(np.mean(1 / np.array([len(c.responses) for c in comparisons])))
    plot_curve(found["curves"], workdir / PLOT, title=f"{len(comparisons)} comparisons")
    curves = {
        name: [dataclasses.asdict(point) for point in points]
        for name, points in found["curves"].items()
    }
    text = json.dumps({**found, "curves": curves}, indent=2)
    (workdir / RESULTS).write_text(text + "\n")
    print(_table(found), file=sys.stderr)
    return True


def _judge(
    name: str,
    grm: GRM,
    comparisons: list[Comparison],
    path: Path,
    settings: dict[str, Any],
    meta: Any = None,
) -> Judged:
    """Judges what an earlier run has not, and reads all of it."""
    about = {**settings, "model": name, "meta_model": None if meta is None else meta.name}
    with LineWriter.open(path, about) as writer:
        rest = comparisons[len(writer.done) :]
        for judgement in grm.judge_batch(rest, meta_model=meta, **settings):
            writer.write(judgement.to_record())
    return judged_from_records(comparisons, list(read_judgements(path)), settings["samples"])


def _right(judged: Judged) -> np.ndarray:
    """Credit for the only sample, `f64[C]`; ties share it."""
    return correctness(judged.scores[:, 0], judged.right, judged.counts, ties="half")


def _strict(judged: Judged) -> np.ndarray:
    """Which samples are right by eq 10 (arXiv:2504.02495), `bool[C, K]`."""
    each = [
        correctness(judged.scores[:, k], judged.right, judged.counts, ties="strict")
        for k in range(judged.samples)
    ]
    return (np.stack(each, axis=1) > 0) & judged.valid


def _adaptive(judged: Judged, seed: int) -> list[dict[str, Any]]:
    """What stopping early would have saved and cost: votes against those of all samples."""
    totals = np.sum(judged.scores * judged.valid[..., None], axis=1)
    correct = correctness(totals, judged.right, judged.counts, ties="half")
    everything = Measure(name="all", metric="accuracy", members=np.arange(len(correct)), level=0)
    return early_stopping(judged, everything, correct, ties="half", seed=seed)


def _table(found: dict[str, Any]) -> str:
    lines = [f"chance {100 * found['chance']:.1f} %"]
    for name, one in found["greedy"].items():
        lines.append(f"{name}, greedy: {100 * one['value']:.1f} %")
    for name, points in found["curves"].items():
        lines += [f"{name} at {p.k}: {100 * p.accuracy:.1f} %" for p in points]
    for early in found.get("adaptive", ()):
        lines.append(
            f"vote that stops early, at a stated error of {early['error']:.0%}: "
            f"{100 * early['value']:.1f} % with {early['mean_samples']:.1f} samples on average"
        )
    return "\n".join(f"grm-jax: {line}" for line in lines)
