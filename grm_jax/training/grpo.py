"""The step of rule-based reinforcement learning: rollouts in, an update by GRPO out.

GRPO (eq 15, arXiv:2504.02495) compares the rollouts of one prompt with each other: their rewards,
standardised in the group, are the advantages of all their tokens. One update a rollout needs no
pass of its own for the old policy, and the reference policy is either what learns as it was at
first or, under adapters, the base model.

A prompt is computed once for the rollouts that follow it, here as in sampling: for all G of them
where every device has whole groups in each micro-batch, else for as many as can be kept together.

Letters for shapes: `B` prompts of `P` tokens, `G` rollouts of each, of `T` tokens; `R = B * G` rows
in `A` micro-batches; `M` rows behind one computed prompt, of which there are `N` in a micro-batch.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, final

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from grm_jax.distributed import (
    arranged,
    batch_parts,
    make_mesh,
    on_mesh,
    rows_sharding,
    with_shardings,
)
from grm_jax.errors import UsageError
from grm_jax.models import DecoderConfig, Params, abstract_params, join_lora
from grm_jax.rewards import group_advantages
from grm_jax.training.config import Settings
from grm_jax.training.groups import informative
from grm_jax.training.learner import Learner, Loss, make_learner
from grm_jax.training.loop import Advanced
from grm_jax.training.losses import (
    Aggregate,
    Metrics,
    Ratio,
    grpo_loss,
    loss_denominator,
    truncated_importance,
)
from grm_jax.training.model import Model, completion_logprobs, placed
from grm_jax.training.optimizer import make_optimizer
from grm_jax.training.rollouts import Rolled, RolloutSettings, Task, Tasks, make_sampler
from grm_jax.training.state import TrainState, shardings_of


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class LossSettings:
    """What `loss.*` says; see `rl.default_config`."""

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


class Experience(NamedTuple):
    """Rollouts as the learner takes them, R rows in A micro-batches; see `rollouts.Rolled`.

    Attributes:
      prompts: `i32[A, N, P]`.
      prompt_lengths: `i32[A, N]`.
      tokens: `i32[A, N, M, T]`, the completions of each.
      mask: `bool[A, N, M, T]`, the tokens to learn from.
      sampler_logprobs: `f32[A, N, M, T]`.
      advantages: `f32[A, N, M]`.
      old_logprobs: `f32[A, N, M, T]` under the policy that sampled; None with one update.
      ref_logprobs: `f32[A, N, M, T]` under the reference policy; None without one.
    """

    prompts: jax.Array
    prompt_lengths: jax.Array
    tokens: jax.Array
    mask: jax.Array
    sampler_logprobs: jax.Array
    advantages: jax.Array
    old_logprobs: jax.Array | None
    ref_logprobs: jax.Array | None


def make_loss(config: DecoderConfig, mesh: Mesh, settings: LossSettings, *, chunk: int) -> Loss:
    """GRPO's loss of an `Experience`, for `make_learner`."""

    def loss(
        params: Params, batch: Experience, denominator: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        logprobs, entropy = completion_logprobs(
            params,
            config,
            batch.prompts,
            batch.tokens,
            lengths=batch.prompt_lengths,
            mesh=mesh,
            temperature=settings.temperature,
            chunk=chunk,
            with_entropy=True,
        )
        old, ref = batch.old_logprobs, batch.ref_logprobs
        logprobs, mask = _rows(logprobs), _rows(batch.mask)
        old, ref = None if old is None else _rows(old), None if ref is None else _rows(ref)
        weights, gaps = truncated_importance(
            logprobs=logprobs if old is None else old,
            sampler_logprobs=_rows(batch.sampler_logprobs),
            mask=mask,
            cap=settings.importance_cap or 1.0,
        )
        if not settings.importance_cap:
            gaps = {name: gaps[name] for name in ("sampler_gap_mean", "sampler_gap_max")}
        value, metrics = grpo_loss(
            logprobs=logprobs,
            old_logprobs=old,
            ref_logprobs=ref,
            advantages=batch.advantages.ravel(),
            mask=mask,
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
            total = jnp.sum(_rows(entropy), where=mask)
            metrics["entropy"] = total / jnp.maximum(jnp.sum(mask), 1)
        return value, metrics | gaps

    return loss


class Lent(NamedTuple):
    """What rollouts need of a state, where they are sampled.

    Attributes:
      params: The whole model.
      key: `u32[...]`, as in the state.
      step: `i32[]`, likewise.
    """

    params: Params
    key: jax.Array
    step: jax.Array


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class Programs:
    """What a step runs on the devices; all but `lend` of one mesh are jitted.

    Attributes:
      learner: Takes the state and an `Experience`.
      updates: How often it does, of each batch of rollouts.
      sampling: The mesh of rollouts: the learner's, another of the same devices, or one of others.
      lent: Shapes and shardings of what is lent to that mesh.
      lend: From the state to what is lent; another mesh gets a copy.
      roll: From what was lent, tasks and the number of the round to rollouts, on that mesh.
      learn_from: From the state, rollouts and the reference to what the learner takes, and metrics.
        The reference is what learns as it was when the run began; empty for the base model without
        adapters; None without a reference.
      choose: See `choose`.
    """

    learner: Learner
    updates: int
    sampling: Mesh
    lent: Lent
    lend: Callable[[TrainState], Lent]
    roll: Callable[[Lent, Tasks, ArrayLike], Rolled]
    learn_from: Callable[[TrainState, Rolled, Params | None], tuple[Experience, Metrics]]
    choose: Callable[[Rolled, Rolled | None], tuple[Rolled, jax.Array]]


def make_programs(
    settings: Settings,
    mesh: Mesh,
    model: Model,
    rollout: RolloutSettings,
    losses: LossSettings,
) -> Programs:
    """Makes the programs of a step; compiles nothing yet.

    Args:
      settings: The run's.
      mesh: Where everything lives but rollouts.
      model: The policy, on that mesh.
      rollout: How rollouts are sampled and rewarded.
      losses: What is made of them.
    """
    config, accumulate = model.config, settings.at_least("batch.accumulate", 1)
    updates = settings.at_least("rollout.updates", 1)
    chunk = settings.at_least("vocab_chunk", 1)
    apart = settings.at_least("rollout.devices", 0)
    sampling = _sampling_mesh(settings, mesh, apart)
    rows, parts = settings.at_least("batch.rows", 1), accumulate * batch_parts(mesh)
    together = kept_together(rows, rollout.group, parts)
    sampler = make_sampler(config, model.tokenizer, sampling, rollout)
    pending: Any = ()
    if apart:
        tasks = _widest_tasks(settings, rollout)
        params = join_lora(model.params, model.frozen)
        rolled = jax.eval_shape(sampler, params, tasks, jax.random.key(0))
        shardings = jax.tree.map(lambda leaf: rows_sharding(mesh, leaf.shape), rolled)
        pending = with_shardings(rolled, shardings)
    learner = make_learner(
        make_loss(config, mesh, losses, chunk=chunk),
        lambda batch: loss_denominator(_rows(batch.mask), aggregate=losses.aggregate),
        make_optimizer(settings, updates=updates),
        params=model.params,
        frozen=model.frozen,
        mesh=mesh,
        accumulate=accumulate,
        pending=pending,
    )
    lent, lend = _lending(learner, sampling, config)
    plain = dataclasses.replace(config, lora=None)

    def roll(lent: Lent, tasks: Tasks, part: jax.Array) -> Rolled:
        key = jax.random.fold_in(jax.random.wrap_key_data(lent.key), lent.step)
        return sampler(lent.params, tasks, jax.random.fold_in(key, part))

    def score(params: Params, base: bool, batch: Experience) -> jax.Array:
        def of_part(part: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
            prompts, lengths, tokens = part
            return completion_logprobs(
                params,
                plain if base else config,
                prompts,
                tokens,
                lengths=lengths,
                mesh=mesh,
                temperature=losses.temperature,
                chunk=chunk,
            )[0]

        return lax.map(of_part, (batch.prompts, batch.prompt_lengths, batch.tokens))

    def learn_from(
        state: TrainState, rolled: Rolled, held: Params | None
    ) -> tuple[Experience, Metrics]:
        batch, metrics = to_experience(rolled, losses, accumulate=accumulate, together=together)
        if updates > 1:
            batch = batch._replace(old_logprobs=score(state.model, False, batch))
        if held is not None:
            known = join_lora(held, state.frozen) if held else state.frozen
            batch = batch._replace(ref_logprobs=score(known, not held, batch))
        return batch, metrics

    return Programs(
        learner=learner,
        updates=updates,
        sampling=sampling,
        lent=lent,
        lend=lend,
        roll=jax.jit(roll),
        learn_from=jax.jit(learn_from),
        choose=jax.jit(choose),
    )


def kept_together(rows: int, group: int, parts: int) -> int:
    """M: how many rollouts of a prompt are behind one computation of it when they are learnt from.

    Args:
      rows: R.
      group: G.
      parts: Of the batch, each a device's share of a micro-batch.

    Returns:
      G if each part can have whole groups; else the largest part of a group that each can have.
    """
    return max(
        (size for size in range(1, group + 1) if group % size == 0 and rows % (size * parts) == 0),
        default=1,
    )


def learners(devices: Sequence[jax.Device], apart: int) -> Sequence[jax.Device]:
    """The devices that learn, where so many others only sample.

    Raises:
      UsageError: None would be left, or there are several processes.
    """
    if not apart:
        return devices
    if jax.process_count() > 1:
        raise UsageError("rollout.devices works within one process; leave it at 0 on many hosts")
    if apart >= len(devices):
        raise UsageError(
            f"rollout.devices is {apart}, but there are {len(devices)} devices; leave one to learn"
        )
    return devices[: len(devices) - apart]


def _sampling_mesh(settings: Settings, mesh: Mesh, apart: int) -> Mesh:
    """Where rollouts are sampled; the others are `learners`."""
    shape = settings.group("rollout.mesh")
    if not apart:
        return arranged(mesh, shape)
    others = [device for device in jax.devices() if device not in set(mesh.devices.flat)]
    if not any(shape.values()):
        shape = {"data": -1}
    return make_mesh({axis: size or 1 for axis, size in shape.items()}, others)


def _widest_tasks(settings: Settings, rollout: RolloutSettings) -> Tasks:
    """The shapes of the largest batch."""
    rows = settings.at_least("batch.rows", 1) // rollout.group
    each = jax.ShapeDtypeStruct((rows,), jnp.int32)

    def of(size: int) -> Any:
        return jax.ShapeDtypeStruct((rows, size), jnp.int32)

    widest, most = (settings.at_least(f"data.max_{name}", 1) for name in ("prompt", "responses"))
    return Tasks(tokens=of(widest), lengths=each, order=of(most), counts=each, answers=each)  # type: ignore[arg-type]


def _lend(state: TrainState) -> Lent:
    return Lent(state.model, state.key, state.step)


def _lending(
    learner: Learner, mesh: Mesh, config: DecoderConfig
) -> tuple[Lent, Callable[[TrainState], Lent]]:
    """The shapes and shardings of what is lent to a mesh, and `lend`.

    To another mesh than the learner's, parameters are lent in the type that is computed with.
    """
    if mesh is learner.mesh:
        return _lend(learner.target), _lend
    apart = set(mesh.devices.flat).isdisjoint(learner.mesh.devices.flat)
    own, shapes = learner.mesh, abstract_params(config, config.dtype)
    everywhere = NamedSharding(mesh, PartitionSpec())
    _, *numbers = _lend(learner.target)
    key, step = with_shardings(numbers, [everywhere] * 2)
    to = Lent(placed(config, shapes, mesh), key, step)
    path = [to.params]
    split, tensor = own.shape["fsdp"], mesh.shape["tensor"]
    if not apart and own.shape["tensor"] == 1 and split % tensor == 0:
        # First heads are dealt out among neighbours, then parts are joined. The compiler does not
        # find this way by itself where it is far shorter than that over whole arrays.
        sizes = {**own.shape, "fsdp": split // tensor, "tensor": tensor}
        path.insert(0, placed(config, shapes, arranged(own, sizes)))

    def lend(state: TrainState) -> Lent:
        lent = _lend(state)
        params = jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), lent.params, to.params)
        for stop in () if apart else path:
            params = lax.with_sharding_constraint(params, shardings_of(stop))
        return lent._replace(params=params)

    if not apart:
        return to, jax.jit(lend, out_shardings=shardings_of(to))
    cast = jax.jit(lend)
    return to, lambda state: jax.device_put(cast(state), shardings_of(to))


def place_rows(tree: Any, mesh: Mesh) -> Any:
    """Puts arrays `[B, ...]` on a mesh, by `rows_sharding`.

    Args:
      tree: Of arrays on the same devices, or on the host and the same on every process.
      mesh: Where they are to be.
    """

    def place(array: jax.Array | np.ndarray) -> jax.Array:
        sharding = rows_sharding(mesh, array.shape)
        if isinstance(array, jax.Array):
            return jax.device_put(array, sharding)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(place, tree)


def make_advance(
    programs: Programs,
    pad: Callable[[Sequence[Task], int], Tasks],
    *,
    size: int,
    rounds: int,
    reference: Params | None,
) -> Callable[[TrainState, Sequence[Task]], Advanced]:
    """A step: rollouts, their rewards, and what is learnt from them.

    Args:
      programs: What it runs.
      pad: Puts tasks in arrays of as many rows as are asked for, so that one program does where the
        last batch is short.
      size: B, prompts of a round.
      rounds: In how many parts a batch of tasks is rolled out, if the first leaves groups that
        teach nothing; those of later parts take their place.
      reference: See `Programs.learn_from`.
    """
    learner = programs.learner

    def advance(state: TrainState, tasks: Sequence[Task]) -> Advanced:
        kept: Rolled | None = None
        parts = [tasks[first : first + size] for first in range(0, len(tasks), size)]
        with on_mesh(programs.sampling):
            lent = programs.lend(state)
            for tried, part in enumerate(parts, 1):
                tasks_of_part = place_rows(pad(part, size), programs.sampling)
                rolled = programs.roll(lent, tasks_of_part, tried - 1)
                if rounds == 1:
                    break
                kept, useful = programs.choose(rolled, kept)
                rolled = kept
                if int(useful) == size:
                    break
            # A copy makes room for what is learnt.
            del lent
        with learner.here():
            rolled = place_rows(rolled, learner.mesh)
            batch, measured = programs.learn_from(state, rolled, reference)
            for _ in range(programs.updates):
                state, metrics = learner.step(state, batch)
        if rounds > 1:
            metrics = metrics | {"rounds": jnp.float32(tried)}
        return Advanced(state=state, metrics=metrics | measured, learnt=batch)

    return advance


def make_advance_ahead(
    programs: Programs,
    pad: Callable[[Sequence[Task], int], Tasks],
    *,
    size: int,
    reference: Params | None,
) -> Callable[[TrainState, tuple[Sequence[Task], Sequence[Task] | None]], Advanced]:
    """A step in which other devices sample what the next one learns from.

    Rollouts are of the policy as it was before the step that runs meanwhile. They are part of the
    state, so that a run that is resumed learns from the same ones.

    Args:
      programs: What it runs; sampling has devices of its own.
      pad: As in `make_advance`, like the rest.
      size: B.
      reference: See `Programs.learn_from`.

    Returns:
      From the state, and the tasks of this step and of the next (None if there is none), to what
      becomes of it.
    """
    learner = programs.learner

    def sample(lent: Lent, tasks: Sequence[Task], part: int) -> Rolled:
        with on_mesh(programs.sampling):
            placed_tasks = place_rows(pad(tasks, size), programs.sampling)
            rolled = programs.roll(lent, placed_tasks, part)
        found: Rolled = place_rows(rolled, learner.mesh)
        return found

    def advance(state: TrainState, tasks: tuple[Sequence[Task], Sequence[Task] | None]) -> Advanced:
        now, later = tasks
        lent, pending = programs.lend(state), state.pending
        rolled = pending if int(state.step) else sample(lent, now, 0)
        coming = None if later is None else sample(lent, later, 1)
        del lent
        with learner.here():
            # As long as in a run in turn, whatever room there is for longer ones.
            rolled = _to_width(rolled, pad(now, size).tokens.shape[1])
            state = state._replace(pending=())
            batch, measured = programs.learn_from(state, rolled, reference)
            for _ in range(programs.updates):
                state, metrics = learner.step(state, batch)
            if coming is not None:
                pending = _to_width(coming, pending.prompts.shape[-1])
        return Advanced(
            state=state._replace(pending=pending), metrics=metrics | measured, learnt=batch
        )

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
        longest = max(rolled.prompts.shape[-1], before.prompts.shape[-1])
        rolled = jax.tree.map(
            lambda *both: jnp.concatenate(both),
            _to_width(before, longest),
            _to_width(rolled, longest),
        )
    useful = informative(rolled.rewards)[:, 0] & rolled.usable
    chosen = jnp.argsort(~useful, stable=True)[:size]
    return jax.tree.map(lambda leaf: leaf[chosen], rolled), jnp.sum(useful[chosen])


def to_experience(
    rolled: Rolled, settings: LossSettings, *, accumulate: int, together: int
) -> tuple[Experience, Metrics]:
    """Advantages of rollouts, laid out for the learner, and what is to be known of them.

    Args:
      rolled: B groups of G.
      settings: Of the loss.
      accumulate: A.
      together: M, from `kept_together`.

    Returns:
      The experience, without log-probabilities of other policies, and metrics, each `f32[]`. Those
      of correctness follow the rule alone. `accuracy_best_at_i` is the share of right judgements
      where the best response was shown at place i, from 1; NaN if it nowhere was.
    """
    groups, each, time = rolled.tokens.shape
    usable = jnp.broadcast_to(rolled.usable[:, None], (groups, each))
    differ = informative(rolled.rewards)
    advantages = group_advantages(
        rolled.rewards, floor=settings.deviation_floor, deviation=settings.deviation
    )
    learnt = usable & differ if settings.drop_uniform else usable
    mask = (jnp.arange(time) < rolled.lengths[..., None]) & learnt[..., None]

    def split(array: jax.Array) -> jax.Array:
        return array.reshape(accumulate, -1, together, *array.shape[2:])

    def split_prompts(array: jax.Array) -> jax.Array:
        often = jnp.repeat(array, each // together, axis=0)
        return often.reshape(accumulate, -1, *array.shape[1:])

    batch = Experience(
        prompts=split_prompts(rolled.prompts),
        prompt_lengths=split_prompts(rolled.prompt_lengths),
        tokens=split(rolled.tokens),
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


def _rows(array: jax.Array) -> jax.Array:
    """`[..., T]` as rows of one batch."""
    return array.reshape(-1, array.shape[-1])


@functools.partial(jax.jit, static_argnames="size")
def _to_width(rolled: Rolled, size: int) -> Rolled:
    """Rollouts whose prompts are in an array of so many tokens, which holds the longest."""
    prompts = rolled.prompts[:, :size]
    return rolled._replace(prompts=jnp.pad(prompts, ((0, 0), (0, size - prompts.shape[1]))))
