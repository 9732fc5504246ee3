"""Rule-based reinforcement learning: the policy's own judgements, rewarded if they are right.

    grm-jax train --config configs/X.py --workdir DIR

The defaults are the paper's GRPO (arXiv:2504.02495, section 3.2 and appendix C): four rollouts of a
prompt, a reward of +1 or -1 by the outcome rule and none for format, standardised advantages, the
mean over a sequence's tokens and then over sequences, a divergence of 0.08 in the loss, one update
a rollout. Prompts, rollouts, rewards and updates stay on the devices; the host logs.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, final, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from grm_jax.data.pipeline import Mapped, Source, batches
from grm_jax.distributed import make_mesh
from grm_jax.errors import UsageError
from grm_jax.models import DecoderConfig, Params, join_lora
from grm_jax.prompts import load_template
from grm_jax.rewards import group_advantages
from grm_jax.training.comparisons import comparison_data, comparison_sources
from grm_jax.training.config import Settings, base_config
from grm_jax.training.groups import informative
from grm_jax.training.learner import Learner, Loss, check_rows, make_learner
from grm_jax.training.loop import Advanced, Run, train
from grm_jax.training.losses import (
    Aggregate,
    Metrics,
    Ratio,
    grpo_loss,
    loss_denominator,
    truncated_importance,
)
from grm_jax.training.model import Model, next_token_logprobs, open_model, save_model
from grm_jax.training.optimizer import make_optimizer
from grm_jax.training.rollouts import (
    Rolled,
    RolloutSettings,
    Sampler,
    Task,
    TaskMaker,
    Tasks,
    make_sampler,
)
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
            # Rollouts of a prompt; `batch.rows` counts rollouts.
            "group": 4,
            "temperature": 1.0,
            "max_new_tokens": 512,
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


class Experience(NamedTuple):
    """Rollouts as the learner takes them, R rows in A micro-batches; see `rollouts.Rolled`.

    Attributes:
      tokens: `i32[A, R / A, S]`.
      lengths: `i32[A, R / A]`, prompt and completion.
      mask: `bool[A, R / A, S]`, at t whether token t + 1 is learnt from.
      sampler_logprobs: `f32[A, R / A, S]`.
      advantages: `f32[A, R / A]`.
      old_logprobs: `f32[A, R / A, S]` under the policy that sampled; None with one update.
      ref_logprobs: `f32[A, R / A, S]` under the reference policy; None without one.
    """

    tokens: jax.Array
    lengths: jax.Array
    mask: jax.Array
    sampler_logprobs: jax.Array
    advantages: jax.Array
    old_logprobs: jax.Array | None
    ref_logprobs: jax.Array | None


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class LossSettings:
    """What `loss.*` says; see `default_config`."""

    clip: float
    clip_high: float | None
    beta: float
    aggregate: Aggregate
    ratio: Ratio
    deviation: bool
    deviation_floor: float
    drop_uniform: bool
    importance_cap: float
    max_length: int
    temperature: float


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
    mesh = make_mesh(settings.group("mesh"))
    model = open_model(settings, mesh)
    template = load_template(str(settings["prompt.template"]))
    single = str(settings["prompt.single"])
    rollout = RolloutSettings(
        group=settings.at_least("rollout.group", 2),
        temperature=float(settings["rollout.temperature"]),
        max_new_tokens=settings.at_least("rollout.max_new_tokens", 1),
        low=template.low,
        high=template.high,
        verdict=bool(settings["prompt.verdict"]),
        overlong_buffer=settings.at_least("rollout.overlong_buffer", 0),
        overlong_scale=float(settings["rollout.overlong_scale"]),
    )
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
    check_rows(rows, accumulate, mesh.shape["data"] * mesh.shape["fsdp"])
    if rows % rollout.group:
        raise UsageError(
            f"batch.rows is {rows}; it counts rollouts, so it must be a multiple of rollout.group, "
            f"{rollout.group}"
        )
    rounds = 1 + settings.at_least("rollout.refills", 0)
    records = batches(
        [
            Source(name=source.name, records=Mapped(source.records, maker), weight=source.weight)
            for source in comparison_sources(settings, workdir)
        ],
        batch_size=rounds * rows // rollout.group,
        seed=maker.seed,
        epochs=settings.at_least("data.epochs", 0) or None,
        threads=settings.at_least("data.threads", 0),
    )
    losses = _loss_settings(settings, rollout)
    updates = settings.at_least("rollout.updates", 1)
    chunk = settings.at_least("vocab_chunk", 1)
    learner = make_learner(
        make_loss(model.config, mesh, losses, chunk=chunk),
        lambda batch: loss_denominator(_rows(batch.mask), aggregate=losses.aggregate),
        make_optimizer(settings, updates=updates),
        params=model.params,
        frozen=model.frozen,
        mesh=mesh,
        accumulate=accumulate,
    )
    sampler = make_sampler(model.config, model.tokenizer, mesh, rollout)
    outcome = train(
        Run(
            settings=settings,
            workdir=workdir,
            learner=learner,
            load_params=model.load_params,
            load_frozen=model.load_frozen,
            batches=records,
            advance=make_advance(
                model,
                learner,
                sampler,
                maker.pad,
                losses,
                rounds=rounds,
                updates=updates,
                reference=_reference(settings, model, losses),
                chunk=chunk,
            ),
            updates=updates,
        )
    )
    if outcome.finished:
        save_model(model, outcome.state, workdir / "model")
    return outcome.finished


def make_loss(config: DecoderConfig, mesh: Mesh, settings: LossSettings, *, chunk: int) -> Loss:
    """GRPO's loss of an `Experience`, for `make_learner`."""

    def loss(
        params: Params, batch: Experience, denominator: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        logprobs, entropy = next_token_logprobs(
            params,
            config,
            batch.tokens,
            lengths=batch.lengths,
            mesh=mesh,
            temperature=settings.temperature,
            chunk=chunk,
            with_entropy=True,
        )
        weights, gaps = truncated_importance(
            logprobs=logprobs if batch.old_logprobs is None else batch.old_logprobs,
            sampler_logprobs=batch.sampler_logprobs,
            mask=batch.mask,
            cap=settings.importance_cap or 1.0,
        )
        if not settings.importance_cap:
            gaps = {name: gaps[name] for name in ("sampler_gap_mean", "sampler_gap_max")}
        value, metrics = grpo_loss(
            logprobs=logprobs,
            old_logprobs=batch.old_logprobs,
            ref_logprobs=batch.ref_logprobs,
            advantages=batch.advantages,
            mask=batch.mask,
            clip=settings.clip,
            clip_high=settings.clip_high,
            beta=settings.beta,
            aggregate=settings.aggregate,
            ratio=settings.ratio,
            max_length=settings.max_length,
            importance_weights=weights if settings.importance_cap else None,
            denominator=denominator,
        )
        if entropy is not None:
            total = jnp.sum(entropy, where=batch.mask)
            metrics["entropy"] = total / jnp.maximum(jnp.sum(batch.mask), 1)
        return value, metrics | gaps

    return loss


def make_advance(
    model: Model,
    learner: Learner,
    sampler: Sampler,
    pad: Callable[[Sequence[Task]], Tasks],
    settings: LossSettings,
    *,
    rounds: int,
    updates: int,
    reference: Params | None,
    chunk: int,
) -> Callable[[TrainState, Sequence[Task]], Advanced]:
    """A step: rollouts, their rewards, and what is learnt from them.

    Args:
      model: The policy.
      learner: Its learner.
      sampler: From `make_sampler`.
      pad: Puts tasks in arrays.
      settings: Of the loss.
      rounds: In how many parts a batch of tasks is rolled out, if the first leaves groups that
        teach nothing; those of later parts take their place.
      updates: Of each batch of rollouts.
      reference: What learns, as it was when the run began; empty for the base model without
        adapters; None without a reference.
      chunk: As in `token_logprobs`.
    """
    mesh, config = learner.mesh, model.config
    plain = dataclasses.replace(config, lora=None)

    def roll(state: TrainState, tasks: Tasks, part: jax.Array) -> Rolled:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        return sampler(state.model, tasks, jax.random.fold_in(key, part))

    def score(params: Params, base: bool, batch: Experience) -> jax.Array:
        def of_part(part: tuple[jax.Array, jax.Array]) -> jax.Array:
            tokens, lengths = part
            return next_token_logprobs(
                params,
                plain if base else config,
                tokens,
                lengths=lengths,
                mesh=mesh,
                temperature=settings.temperature,
                chunk=chunk,
            )[0]

        return lax.map(of_part, (batch.tokens, batch.lengths))

    def learn_from(
        state: TrainState, rolled: Rolled, held: Params | None
    ) -> tuple[Experience, Metrics]:
        batch, metrics = to_experience(rolled, settings, accumulate=learner.accumulate)
        if updates > 1:
            batch = batch._replace(old_logprobs=score(state.model, False, batch))
        if held is not None:
            known = join_lora(held, state.frozen) if held else state.frozen
            batch = batch._replace(ref_logprobs=score(known, not held, batch))
        return batch, metrics

    rolling, learning, choosing = jax.jit(roll), jax.jit(learn_from), jax.jit(choose)

    def advance(state: TrainState, tasks: Sequence[Task]) -> Advanced:
        size = len(tasks) // rounds
        kept: Rolled | None = None
        with learner.here():
            for part in range(rounds):
                placed = learner.put(pad(tasks[part * size : (part + 1) * size]))
                rolled = rolling(state, placed, part)
                if rounds == 1:
                    kept = rolled
                    break
                kept, useful = choosing(rolled, kept)
                if int(useful) == size:
                    break
            batch, measured = learning(state, kept, reference)
            for _ in range(updates):
                state, metrics = learner.step(state, batch)
        if rounds > 1:
            metrics = metrics | {"rounds": jnp.float32(part + 1)}
        return Advanced(state=state, metrics=metrics | measured, learnt=batch)

    return advance


def choose(rolled: Rolled, before: Rolled | None) -> tuple[Rolled, jax.Array]:
    """The B most useful groups of those at hand: with differing rewards first, earlier ones first.

    Args:
      rolled: The latest.
      before: Those kept so far, which may be of another P; None at first.

    Returns:
      What is kept, and how many of them have rewards that differ, `i32[]`.
    """
    size = len(rolled.usable)
    if before is not None:
        longest = max(rolled.tokens.shape[-1], before.tokens.shape[-1])

        def join(one: jax.Array, other: jax.Array) -> jax.Array:
            return jnp.concatenate([_to_length(one, longest), _to_length(other, longest)])

        wide = ("tokens", "sampler_logprobs")
        rolled = Rolled(
            **{
                name: join(one, other) if name in wide else jnp.concatenate([one, other])
                for name, one, other in zip(Rolled._fields, before, rolled, strict=True)
            }
        )
    useful = informative(rolled.rewards)[:, 0] & rolled.usable
    chosen = jnp.argsort(~useful, stable=True)[:size]
    return jax.tree.map(lambda leaf: leaf[chosen], rolled), jnp.sum(useful[chosen])


def to_experience(
    rolled: Rolled, settings: LossSettings, *, accumulate: int
) -> tuple[Experience, Metrics]:
    """Advantages of rollouts, laid out for the learner, and what is to be known of them.

    Args:
      rolled: B groups of G.
      settings: Of the loss.
      accumulate: A.

    Returns:
      The experience, without log-probabilities of other policies, and metrics, each `f32[]`. Those
      of correctness follow the rule alone. `accuracy_best_at_i` is the share of right judgements
      where the best response was shown at place i, from 1; NaN if it nowhere was.
    """
    groups, each, size = rolled.tokens.shape
    rows = groups * each
    usable = jnp.broadcast_to(rolled.usable[:, None], (groups, each))
    differ = informative(rolled.rewards)
    advantages = group_advantages(
        rolled.rewards, floor=settings.deviation_floor, deviation=settings.deviation
    )
    learnt = usable & differ if settings.drop_uniform else usable
    starts = rolled.prompt_lengths[:, None, None]
    place = jnp.arange(size) + 1
    mask = (place >= starts) & (place < starts + rolled.lengths[..., None]) & learnt[..., None]

    def split(array: jax.Array) -> jax.Array:
        return array.reshape(accumulate, rows // accumulate, *array.shape[2:])

    batch = Experience(
        tokens=split(rolled.tokens),
        lengths=split(rolled.prompt_lengths[:, None] + rolled.lengths),
        mask=split(mask),
        sampler_logprobs=split(rolled.sampler_logprobs),
        advantages=split(advantages),
        old_logprobs=None,
        ref_logprobs=None,
    )
    right = rolled.outcomes > 0
    best = jnp.max(rolled.scores, axis=-1, keepdims=True)
    several = rolled.shown[:, None] >= 0
    tied = rolled.valid & several & (jnp.sum(rolled.scores == best, axis=-1) > 1)

    def share(what: jax.Array, among: jax.Array = usable) -> jax.Array:
        return jnp.sum(what, where=among, dtype=jnp.float32) / jnp.sum(among)

    metrics = {
        "reward": share(rolled.rewards),
        "accuracy": share(right),
        "unreadable": share(~rolled.valid),
        "tied": share(tied),
        "uniform_groups": share(~differ),
        "unusable_prompts": jnp.mean(~rolled.usable, dtype=jnp.float32),
        "response_length": share(rolled.lengths),
        "truncated": share(~rolled.stopped),
    }
    for at in range(rolled.scores.shape[-1]):
        among = usable & (rolled.shown[:, None] == at)
        metrics[f"accuracy_best_at_{at + 1}"] = share(right, among)
    return batch, metrics


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


def _loss_settings(settings: Settings, rollout: RolloutSettings) -> LossSettings:
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


def _rows(mask: jax.Array) -> jax.Array:
    """Micro-batches as one batch."""
    return mask.reshape(-1, mask.shape[-1])


def _to_length(array: jax.Array, size: int) -> jax.Array:
    extra = size - array.shape[-1]
    return jnp.pad(array, [*((0, 0) for _ in array.shape[:-1]), (0, extra)])
