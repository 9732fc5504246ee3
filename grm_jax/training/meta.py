"""The meta reward model: of a judgement, a logit that it is right.

    grm-jax train --config configs/X.py --workdir DIR

It learns from trajectories, judgements of comparisons whose best response is known: a judgement
that puts it above all others is right, and any other is wrong (arXiv:2504.02495, section 4). What
comes out chooses which samples vote: `grm-jax judge --meta-model DIR/model`. The paper trains on
the trajectories of rejective sampling, the rejected ones included, and on those of the very policy
that is to be guided. Judgements whose writer was told the answer are left out, since no judge at
work is.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from grm_jax.data import BadRecord, Comparison, turns
from grm_jax.data.pipeline import Mapped, Source
from grm_jax.data.trajectories import Trajectory
from grm_jax.distributed import make_mesh
from grm_jax.errors import UsageError
from grm_jax.prompts import Template, Tokenizer, load_template
from grm_jax.sampling import judged_tokens
from grm_jax.training.classifiers import (
    Group,
    GroupData,
    heldout_config,
    heldout_share,
    labelled,
    make_group,
    row_length,
    train_classifier,
)
from grm_jax.training.comparisons import (
    all_comparisons,
    comparison_data,
    comparison_sources,
)
from grm_jax.training.config import Settings, base_config
from grm_jax.training.heldout import evenly, is_held_out
from grm_jax.training.model import open_model
from grm_jax.training.trajectories import (
    Templates,
    judge_settings,
    load_templates,
    load_trajectories,
    sample_trajectories,
    sampler_config,
)

SAMPLED = "trajectories"
"""The folder in the working directory for the judgements that are sampled for a run."""


class Judged(NamedTuple):
    """A judgement and what it judges.

    Attributes:
      comparison: The comparison.
      trajectory: The judgement.
    """

    comparison: Comparison
    trajectory: Trajectory


def default_config() -> ConfigDict:
    """Every key of the stage with its default.

    `data.comparisons`, and `data.trajectories` or `sampler.model`, are for the user to fill in.
    """
    config = base_config("meta")
    config.data = comparison_data()
    # Files of judgements of these comparisons.
    config.data.trajectories = ()
    # Tokens of the longest row that is learnt from; judgements with a longer one are left out.
    config.data.length = 4096
    # How the model is shown what was judged; another than this must be named again when the model
    # is loaded.
    config.data.template = "meta"
    config.prompt = ConfigDict(
        {
            # How judges are asked: for scores of several responses, and whether a single one is
            # correct; empty to leave single responses out.
            "template": "compact",
            "single": "single01",
        }
    )
    # The policy that is to be guided, whose own judgements are learnt from as well.
    config.sampler = sampler_config()
    config.heldout = heldout_config()
    return config


def run(settings: Settings, workdir: Path) -> bool:
    """Runs the stage on the judgements of `data.trajectories` and of the policy.

    Args:
      settings: Of `default_config`.
      workdir: Where everything goes; the model that comes out, whole or as adapters with a head, is
        in its folder `model`, for `GRM.meta_model`, and how good it is on comparisons that it has
        not seen in `report.json`.

    Returns:
      Whether all steps are done.

    Raises:
      UsageError: A setting or the data is wrong.
    """
    mesh = make_mesh(settings.group("mesh"))
    model = open_model(settings, mesh, num_labels=1)
    template = load_template(str(settings["data.template"]))
    length = row_length(settings, model.config)
    sources = comparison_sources(settings, workdir)
    templates = load_templates(str(settings["prompt.template"]), str(settings["prompt.single"]))
    files = [Path(file) for file in settings["data.trajectories"]]
    files += sample_policy(settings, workdir, all_comparisons(sources), templates)
    if not files:
        raise UsageError(
            "there are no judgements; name files of them in data.trajectories, or a judge in "
            "sampler.model"
        )
    judged, left_out = read_judged(sources, files, templates)

    def encode(one: Judged) -> Group:
        return judged_group(model.tokenizer, template, one, length=length)

    share = heldout_share(settings)
    kept = [[one for one in part if is_held_out(one.comparison.id, share)] for part in judged]
    learnt = [[one for one in part if not is_held_out(one.comparison.id, share)] for part in judged]
    if not any(learnt):
        raise UsageError(
            f"there is no judgement to learn from; left out are {dict(left_out) or 'none'}, "
            f"held out are {sum(map(len, kept))}"
        )
    train = [one for part in learnt for one in part]
    heldout = [one for part in kept for one in part]
    data = GroupData(
        train=[
            Source(name=source.name, records=Mapped(part, encode), weight=source.weight)
            for source, part in zip(sources, learnt, strict=True)
            if part
        ],
        heldout=[encode(one) for one in evenly(heldout, settings.at_least("heldout.limit", 0))],
        counts={
            "train_judgements": len(train),
            "train_positives": _positives(train),
            "heldout_judgements": len(heldout),
            "heldout_positives": _positives(heldout),
            "judgements_left_out": dict(left_out),
        },
    )
    return train_classifier(settings, workdir, mesh, model, data, labelled(1))


def sample_policy(
    settings: Settings, workdir: Path, comparisons: Sequence[Comparison], templates: Templates
) -> list[Path]:
    """Samples the judgements of `sampler.model`, or goes on with what an earlier call has sampled.

    Each process of a group samples its own share, and returns when all are done.

    Args:
      settings: The run's.
      workdir: Where the files go; all processes must see it.
      comparisons: What is judged; those of which nothing is known are passed over.
      templates: How the policy is asked.

    Returns:
      The files of all processes; none if there is no policy.

    Raises:
      UsageError: There is no such model, or a setting is wrong.
    """
    judge = judge_settings(settings)
    if not judge.model:
        return []
    index, count = jax.process_index(), jax.process_count()
    files = [workdir / SAMPLED / f"{number + 1}-of-{count}.jsonl" for number in range(count)]
    sample_trajectories(
        judge.load,
        comparisons[index::count],
        files[index],
        name=judge.name,
        templates=templates,
        **judge.how,
    )
    if count > 1:
        multihost_utils.sync_global_devices("judgements of the policy")
    return files


def read_judged(
    sources: Sequence[Source[Comparison]], files: Sequence[Path], templates: Templates
) -> tuple[list[list[Judged]], Counter[str]]:
    """Reads judgements and puts them with their comparisons.

    Args:
      sources: The comparisons.
      files: Of trajectories.
      templates: How their writers were asked.

    Returns:
      The judgements of each source's comparisons, and how many lines are left out, by the reason:
      the writer was `hinted`, or the line is `bad`.

    Raises:
      UsageError: A file cannot be read, or two comparisons have the same id.
    """
    comparisons = {comparison.id: comparison for comparison in all_comparisons(sources)}
    # In the order of the comparisons, however many processes sampled them.
    judged: dict[str, list[Judged]] = {name: [] for name in comparisons}
    left_out = Counter[str]()
    for found in load_trajectories(files, comparisons, templates):
        if isinstance(found, BadRecord):
            left_out["bad"] += 1
        elif found.hinted:
            left_out["hinted"] += 1
        else:
            judged[found.id].append(Judged(comparisons[found.id], found))
    by_source = [
        [one for index in range(len(source.records)) for one in judged[source.records[index].id]]
        for source in sources
    ]
    return by_source, left_out


def judged_group(tokenizer: Tokenizer, template: Template, one: Judged, *, length: int) -> Group:
    """A judgement as `MetaModel` reads it, and whether it is right.

    Args:
      tokenizer: The meta reward model's.
      template: How it is shown the comparison.
      one: The judgement.
      length: Most tokens.
    """
    comparison, trajectory = one
    responses = [comparison.responses[index] for index in trajectory.order]
    return make_group(
        lambda: [judged_tokens(tokenizer, template, turns(comparison), responses, trajectory.text)],
        (float(trajectory.correct),),
        length=length,
    )


def _positives(judged: Sequence[Judged]) -> float | None:
    """The share that is right; None of nothing."""
    return float(np.mean([one.trajectory.correct for one in judged])) if judged else None
