"""Judges of all kinds by name, for `grm-jax eval`."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from jax.sharding import Mesh

from grm_jax.data import Comparison, Judgement
from grm_jax.errors import UsageError
from grm_jax.evaluation.verdicts import VerdictJudge
from grm_jax.judge import GRM
from grm_jax.models import DecoderConfig
from grm_jax.prompts import load_template
from grm_jax.sampling.batching import SamplingSettings

KINDS = ("grm", "verdict", "bt", "pairwise", "cloud")
"""A generative reward model, LLM-as-a-judge, and the classifiers that training stages make."""

SINGLE = ("bt", "pairwise")
"""Kinds that say the same each time, so that there is one sample."""

_META, _VERDICT = "meta", "judge"

Judging = Callable[[Iterable[Comparison]], Iterator[Judgement]]


def open_judge(
    kind: str,
    model: str,
    *,
    adapter: str | None,
    critic: str | None,
    settings: Mapping[str, Any],
    mesh: Mesh | None = None,
) -> tuple[DecoderConfig, Judging]:
    """Loads a judge.

    Args:
      kind: One of `KINDS`.
      model: Its name, a folder or a file.
      adapter: A PEFT folder with adapters for the model, or the name of one; a classifier with
        adapters is named by its own folder.
      critic: For `cloud`, the model that writes critiques.
      settings: Of `GRM.judge_batch`, with the meta model by name; a kind uses those that concern
        it.
      mesh: Where models are placed; the default device if None.

    Returns:
      The configuration of the decoder that costs are counted by, and what judges.

    Raises:
      UsageError: If a model cannot be loaded, or a setting does not suit the kind.
    """
    check_judge(kind, adapter=adapter, critic=critic, settings=settings)
    seed, samples = settings["seed"], settings["samples"]
    if kind == "grm":
        grm = GRM.from_pretrained(model, adapter=adapter, mesh=mesh)
        name = settings["meta_model"]
        meta = None if name is None else GRM.meta_model(name, mesh=mesh)
        more = {"meta_model": meta, "logprobs": True}
        return grm.config, lambda found: grm.judge_batch(found, **(dict(settings) | more))
    if kind == "verdict":
        judge = VerdictJudge(
            grm=GRM.from_pretrained(model, adapter=adapter, mesh=mesh),
            template=load_template(_VERDICT),
            settings=SamplingSettings(
                temperature=settings["temperature"],
                top_k=settings["top_k"],
                top_p=settings["top_p"],
                max_new_tokens=settings["max_new_tokens"],
                constrain=settings["constrain"],
            ),
            probabilities=settings["scores"] == "expected",
        )
        orders = settings["orders"]
        return judge.config, lambda found: judge.judge_batch(
            found, samples=samples, orders=orders, seed=seed
        )
    # Imported here, as they share code with training, which is slow to import.
    from grm_jax.evaluation.baselines import (
        ClassifierJudge,
        CriticJudge,
        pairwise_scores,
        scalar_scores,
    )

    classifier = GRM.meta_model(model, template=_META, mesh=mesh)
    if kind == "cloud":
        writer = CriticJudge(
            model=classifier,
            critic=GRM.from_pretrained(str(critic), adapter=None, mesh=mesh),
            temperature=settings["temperature"],
            max_new_tokens=settings["max_new_tokens"],
        )
        return writer.config, lambda found: writer.judge_batch(found, samples=samples, seed=seed)
    score = scalar_scores if kind == "bt" else pairwise_scores
    single = ClassifierJudge(model=classifier, score=score)
    return single.config, lambda found: single.judge_batch(found, seed=seed)


def check_judge(
    kind: str, *, adapter: str | None, critic: str | None, settings: Mapping[str, Any]
) -> None:
    """Checks that settings suit a kind of judge; arguments as of `open_judge`.

    Raises:
      UsageError: If they do not.
    """
    if kind not in KINDS:
        raise UsageError(f"there is no judge {kind!r}; choose one of {', '.join(KINDS)}")
    if kind in ("bt", "pairwise", "cloud") and adapter is not None:
        raise UsageError(
            f"a {kind} judge is a classifier; name its own PEFT folder, if it has one, in --model"
        )
    if kind == "cloud" and critic is None:
        raise UsageError("--critic names the model that writes critiques: a cloud judge needs it")
    if kind != "grm" and settings["adaptive"] is not False:
        raise UsageError(f"--adaptive is of generative reward models; a {kind} judge has none")
