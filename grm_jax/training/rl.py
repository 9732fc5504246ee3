"""Rule-based reinforcement learning: the policy's own judgements, rewarded if they are right.

    grm-jax train --config configs/X.py --workdir DIR

The defaults are the paper's GRPO (arXiv:2504.02495, section 3.2 and appendix C): four rollouts of a
prompt, a reward of +1 or -1 by the outcome rule and none for format, standardised advantages, the
mean over a sequence's tokens and then over sequences, a divergence of 0.08 in the loss, one update
a rollout. Prompts, rollouts, rewards and updates stay on the devices; the host logs.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from grm_jax.data.pipeline import Ahead, Mapped, Source, batches
from grm_jax.distributed import batch_parts, make_mesh
from grm_jax.errors import UsageError
from grm_jax.models import Params
from grm_jax.prompts import Template, load_template
from grm_jax.training.comparisons import comparison_data, comparison_sources
from grm_jax.training.config import Settings, base_config
from grm_jax.training.grpo import (
    LossSettings,
    learners,
    make_advance,
    make_advance_ahead,
    make_programs,
)
from grm_jax.training.learner import check_rows
from grm_jax.training.loop import Advanced
from grm_jax.training.losses import Aggregate, Ratio
from grm_jax.training.model import Model, open_model, train_model
from grm_jax.training.rollouts import RolloutSettings, TaskMaker
from grm_jax.training.state import TrainState


def default_config() -> ConfigDict:
    """Every key of the stage with its default; `data.comparisons` is for the user to fill in."""
    config = base_config("rl")
    config.optimizer.learning_rate = 4e-7
    config.optimizer.schedule = "constant"
    config.data = comparison_data()
    # Prompts of more tokens, and comparisons of more responses, are left out and counted.
    config.data.max_prompt = 1024
    config.data.max_responses = 4
    config.prompt = ConfigDict(
        {
            "template": "compact",
            # For single responses that are right or wrong; empty to leave them out.
            "single": "single01",
            # Whether the template asks for the best response's number instead of scores.
            "verdict": False,
        }
    )
    config.rollout = ConfigDict(
        {
            # Rollouts of a prompt; `batch.rows` counts rollouts. Where a micro-batch has whole
            # groups for each device, a prompt is computed once for all of them, else more often.
            "group": 4,
            "temperature": 1.0,
            "max_new_tokens": 512,
            # How the same devices are arranged for them; 0 is as in `mesh`. Every token needs all
            # parameters, so that parts of them (`fsdp`) are gathered as often: split heads and
            # hidden units (`tensor`) until the model fits.
            "mesh": {"data": 0, "fsdp": 0, "tensor": 0, "expert": 0},
            # So many devices only sample, for the step after, while the others learn: rollouts are
            # then one step old, which `loss.importance_cap` has to make up for. 0: all devices
            # sample and learn in turn.
            "devices": 0,
            # Groups that are all right or all wrong are replaced by those of other prompts, for
            # which up to this many more rounds are rolled out.
            "refills": 0,
            # Updates that learn from the same rollouts.
            "updates": 1,
            # A penalty that grows over this many tokens before the limit (0 for none), and how
            # large it gets.
            "overlong_buffer": 0,
            "overlong_scale": 1.0,
        }
    )
    config.loss = ConfigDict(
        {
            "clip": 0.2,
            # Above 1; 0 for the same as below.
            "clip_high": 0.0,
            "beta": 0.08,
            # The policy that `beta` holds on to: copy (as it was at the first step) or base (the
            # model without its adapters).
            "reference": "copy",
            # sequence, token or sum; and what a ratio is of, token or sequence.
            "aggregate": "sequence",
            "ratio": "token",
            # Whether advantages are divided by their group's deviation, and by no less than this.
            "deviation": True,
            "deviation_floor": 1e-3,
            # Whether groups that are all right or all wrong are left out, divergence and all.
            "drop_uniform": False,
            # The largest weight that makes up for a sampler whose probabilities are not quite the
            # learner's; 0 for no weights.
            "importance_cap": 0.0,
        }
    )
    config.vocab_chunk = 4096
    return config


def run(settings: Settings, workdir: Path) -> bool:
    """Runs the stage on the comparisons of `data.comparisons`.

    Args:
      settings: Of `default_config`.
      workdir: Where everything goes; the model that comes out is in its folder `model`.

    Returns:
      Whether all steps are done.

    Raises:
      UsageError: A setting or the data is wrong.
    """
    apart = settings.at_least("rollout.devices", 0)
    mesh = make_mesh(settings.group("mesh"), learners(jax.devices(), apart))
    model = open_model(settings, mesh)
    template = load_template(str(settings["prompt.template"]))
    single = str(settings["prompt.single"])
    rollout = rollout_settings(settings, template)
    maker = TaskMaker(
        tokenizer=model.tokenizer,
        template=template,
        single=load_template(single) if single else None,
        max_tokens=settings.at_least("data.max_prompt", 2),
        max_responses=settings.at_least("data.max_responses", 1),
        seed=settings.at_least("seed", 0),
    )
    longest = maker.max_tokens + rollout.max_new_tokens
    if longest > model.config.max_context:
        raise UsageError(
            f"data.max_prompt and rollout.max_new_tokens are {longest} together, but the model "
            f"reads {model.config.max_context} tokens"
        )
    if maker.single is not None and (maker.single.low, maker.single.high) != (0, 1):
        raise UsageError("prompt.single asks for other scores than 0 and 1; name another template")
    rows, accumulate = settings.at_least("batch.rows", 1), settings.at_least("batch.accumulate", 1)
    check_rows(rows, accumulate, batch_parts(mesh))
    if rows % rollout.group:
        raise UsageError(
            f"batch.rows is {rows}; it counts rollouts, so it must be a multiple of rollout.group, "
            f"{rollout.group}"
        )
    size, rounds = rows // rollout.group, 1 + settings.at_least("rollout.refills", 0)
    records = batches(
        [
            Source(name=source.name, records=Mapped(source.records, maker), weight=source.weight)
            for source in comparison_sources(settings, workdir)
        ],
        batch_size=rounds * size,
        seed=maker.seed,
        epochs=settings.at_least("data.epochs", 0) or None,
        threads=settings.at_least("data.threads", 0),
    )
    losses = loss_settings(settings, rollout)
    programs = make_programs(settings, mesh, model, rollout, losses)
    reference = _reference(settings, model, losses)
    advance: Callable[[TrainState, Any], Advanced]
    if apart:
        if rounds > 1 or not losses.importance_cap:
            raise UsageError(
                "rollout.devices samples for the step after: it needs rollout.refills of 0 and a "
                "loss.importance_cap, such as 2"
            )
        advance = make_advance_ahead(
            programs,
            maker.pad,
            size=size,
            reference=reference,
        )
    else:
        advance = make_advance(programs, maker.pad, size=size, rounds=rounds, reference=reference)
    state = train_model(
        model,
        settings=settings,
        workdir=workdir,
        learner=programs.learner,
        batches=Ahead(records) if apart else records,
        advance=advance,
        updates=programs.updates,
    )
    return state is not None


def rollout_settings(settings: Settings, template: Template) -> RolloutSettings:
    """What `rollout.*` says of rollouts that are asked for by a template."""
    return RolloutSettings(
        group=settings.at_least("rollout.group", 2),
        temperature=float(settings["rollout.temperature"]),
        max_new_tokens=settings.at_least("rollout.max_new_tokens", 1),
        low=template.low,
        high=template.high,
        verdict=bool(settings["prompt.verdict"]),
        overlong_buffer=settings.at_least("rollout.overlong_buffer", 0),
        overlong_scale=float(settings["rollout.overlong_scale"]),
    )


def loss_settings(settings: Settings, rollout: RolloutSettings) -> LossSettings:
    """What `loss.*` says."""
    aggregate = settings.choice("loss.aggregate", get_args(Aggregate))
    ratio = settings.choice("loss.ratio", get_args(Ratio))
    return LossSettings(
        clip=float(settings["loss.clip"]),
        clip_high=float(settings["loss.clip_high"]) or None,
        beta=float(settings["loss.beta"]),
        aggregate=next(one for one in get_args(Aggregate) if one == aggregate),
        ratio=next(one for one in get_args(Ratio) if one == ratio),
        deviation=bool(settings["loss.deviation"]),
        deviation_floor=float(settings["loss.deviation_floor"]),
        drop_uniform=bool(settings["loss.drop_uniform"]),
        importance_cap=float(settings["loss.importance_cap"]),
        max_length=rollout.max_new_tokens,
        temperature=rollout.temperature,
    )


def _reference(settings: Settings, model: Model, losses: LossSettings) -> Params | None:
    kind = settings.choice("loss.reference", ("copy", "base"))
    if kind == "base" and model.config.lora is None:
        raise UsageError("loss.reference is base, but there are no adapters; choose copy")
    if not losses.beta:
        return None
    if kind == "base":
        return {}
    held = model.load_params()
    if model.config.lora is None:
        # It is only ever computed with.
        dtype = jnp.dtype(model.config.dtype)
        held = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf.astype(dtype), tree))(held)
    return held
