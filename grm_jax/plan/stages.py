"""The programs of each training stage, with shapes in place of arrays.

They are built by the very functions that a run builds them by, from the very settings; only the
model is not opened, and batches are shapes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, final

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from grm_jax.data.packing import PackedRows
from grm_jax.distributed import batch_parts, logical_to_sharding, rows_sharding
from grm_jax.errors import UsageError
from grm_jax.models import DecoderConfig, DtypeName, Params, dtype_name
from grm_jax.plan.architectures import decoder_of
from grm_jax.plan.work import Decoded, Pass, Work
from grm_jax.prompts import Tokenizer, load_template
from grm_jax.prompts.nano import nano_tokenizer
from grm_jax.sampling import bucket
from grm_jax.training import rl, sft
from grm_jax.training.classifiers import (
    GroupRows,
    labelled,
    make_classifier_learner,
    preferred,
    row_length,
)
from grm_jax.training.config import Settings
from grm_jax.training.grpo import kept_together, make_programs
from grm_jax.training.learner import Learner, check_rows
from grm_jax.training.model import NANO, Model, decoder_of_shape, place_model
from grm_jax.training.rollouts import Tasks

WORKDIR = "{workdir}"


@final
@dataclass(frozen=True, kw_only=True)
class Program:
    """A jitted function and what it will be called with.

    Attributes:
      name: What the report calls it.
      function: The function, jitted.
      mesh: Where it runs.
      arguments: Trees of `jax.ShapeDtypeStruct`s with shardings.
      held: Which of the arguments are in memory throughout the run.
      turns: How often a loop runs whose end depends on data, at most.
      tokens: That one call learns from, or writes.
      work: What is to be computed, for an analytic count.
      times: Calls in a step.
      gives: Shapes and shardings of large arrays that it leaves, beside what it took.
    """

    name: str
    function: Any
    mesh: Mesh
    arguments: tuple[Any, ...]
    held: tuple[int, ...]
    turns: int
    tokens: int
    work: Work
    times: int = 1
    gives: Any = ()


Outputs = Mapping[str, Any]
"""By the name of a program, its outputs as trees of `jax.ShapeDtypeStruct`s with shardings."""


@final
@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stage on a mesh.

    Attributes:
      name: In the configuration; that of the stage itself where there is only one.
      kind: What it does.
      mesh: Where it learns.
      config: The decoder's.
      params: Shapes and shardings of what learns.
      frozen: Those of what does not.
      accumulate: Micro-batches.
      chunk: Entries of the vocabulary whose logits are in memory at a time.
      held: Trees that are in memory throughout the run.
      steps: Makes each program from the outputs of those before it.
    """

    name: str
    kind: str
    mesh: Mesh
    config: DecoderConfig
    params: Params
    frozen: Params
    accumulate: int
    chunk: int
    held: tuple[Any, ...]
    steps: tuple[Callable[[Outputs], Program], ...]


def stage_configs(config: ConfigDict) -> Mapping[str, ConfigDict]:
    """The configurations of the stages that train, by name; each model by its first ancestor.

    A stage that begins with what an earlier one leaves is planned with the model that this began
    with, whose shape is the same.

    Raises:
      UsageError: There is none, or a model is left by no stage.
    """
    if config.get("stage") != "spct":
        named = {str(config.get("stage")): config}
    else:
        named = {str(name): config[name] for name in config.order}
    found = {
        name: ConfigDict(stage.to_dict()) for name, stage in named.items() if stage.stage in _KINDS
    }
    if not found:
        raise UsageError(
            f"the configuration has no stage to plan; these can be planned: {', '.join(_KINDS)}"
        )
    for stage in found.values():
        seen: set[str] = set()
        while str(stage.model.name).startswith(WORKDIR):
            earlier = str(stage.model.name).split("/")[1]
            if earlier in seen or earlier not in named:
                raise UsageError(f"no stage of the configuration leaves {stage.model.name}")
            seen.add(earlier)
            model = named[earlier].model
            stage.model.name = model.name
            stage.model.shape = ConfigDict(model.shape.to_dict())
            if model.tokenizer and not stage.model.tokenizer:
                stage.model.tokenizer = model.tokenizer
    return found


def build_stage(name: str, config: ConfigDict, mesh: Mesh, *, platform: str) -> Stage:
    """Prepares the programs of a stage; traces and compiles nothing.

    Args:
      name: What it is called.
      config: From `stage_configs`.
      mesh: Where it is to run; its devices may be another machine's.
      platform: What it is computed by: cpu, gpu or tpu.

    Raises:
      UsageError: A setting is wrong, or the shape of the model is not known.
    """
    settings = Settings(config)
    kind = str(settings["stage"])
    labels = 0 if kind in ("sft", "rft", "rl") else 1
    model = abstract_model(settings, mesh, num_labels=labels, platform=platform)
    rows, accumulate = settings.at_least("batch.rows", 1), settings.at_least("batch.accumulate", 1)
    check_rows(rows, accumulate, batch_parts(mesh))
    return _KINDS[kind](name, settings, mesh, model)


def abstract_model(settings: Settings, mesh: Mesh, *, num_labels: int = 0, platform: str) -> Model:
    """The model of a run without its weights, and with a tokenizer that has only a size.

    Args:
      settings: The run's.
      mesh: Where it is to live.
      num_labels: As in `open_model`.
      platform: What it will be computed by, for `model.dtype` auto.
    """
    shape = settings.group_or_empty("model.shape")
    tokenizer = nano_tokenizer() if settings["model.tokenizer"] == NANO else None
    if shape:
        if tokenizer is None:
            raise UsageError("model.shape has no size of a vocabulary; only nano's is known here")
        stored = decoder_of_shape(shape, tokenizer)
    else:
        stored = decoder_of(str(settings["model.name"]))
    if tokenizer is None:
        tokenizer = _stand_in(stored.vocab_size)
    named = settings.choice("model.dtype", ("auto", "float32", "bfloat16"))
    dtype: DtypeName = "float32" if platform == "cpu" else "bfloat16"
    if named != "auto":
        dtype = dtype_name(named)
    placed = place_model(settings, mesh, stored, dtype=dtype, num_labels=num_labels)

    def load() -> Params:
        raise RuntimeError("a model that is planned for has no weights")

    return Model(
        name=str(settings["model.name"]),
        config=placed.config,
        tokenizer=tokenizer,
        params=placed.params,
        frozen=placed.frozen,
        load_params=load,
        load_frozen=load,
    )


def _stand_in(size: int) -> Tokenizer:
    """A vocabulary of so many entries. The widest has as many bytes as a line of a score table."""
    return Tokenizer(
        token_bytes=(b"12345678", *(b"a" for _ in range(size - 2)), b"<end>"),
        control_ids=frozenset({size - 1}),
        bos_id=None,
        eos_ids=(size - 1,),
        add_bos=False,
        chat_template=None,
        text_encoder=lambda _: [],
    )


def _sequences(name: str, settings: Settings, mesh: Mesh, model: Model) -> Stage:
    """Stages that learn packed sequences."""
    learner = sft.make_sft_learner(settings, mesh, model)
    rows, length = settings.at_least("batch.rows", 1), settings.at_least("data.length", 2)
    shape = (learner.accumulate, rows // learner.accumulate, length)

    def put(dtype: Any) -> jax.ShapeDtypeStruct:
        sharding = logical_to_sharding((None, "batch", None), mesh)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    batch = PackedRows(
        tokens=put(jnp.int32),  # type: ignore[arg-type]
        segment_ids=put(jnp.int32),  # type: ignore[arg-type]
        positions=put(jnp.int32),  # type: ignore[arg-type]
        loss_mask=put(jnp.bool_),  # type: ignore[arg-type]
    )
    work = Pass(rows=rows, length=length, learns=True, logits=True)
    chunk = settings.at_least("vocab_chunk", 1)
    return _updates(name, settings, mesh, model, learner, batch, work, chunk=chunk)


def _classifier(name: str, settings: Settings, mesh: Mesh, model: Model) -> Stage:
    """Stages whose model gives a number."""
    pairs = settings["stage"] == "bt"
    objective = preferred() if pairs else labelled(1)
    learner = make_classifier_learner(settings, mesh, model, objective)
    groups, each = settings.at_least("batch.rows", 1), objective.sequences
    # The longest rows, which are those that must fit.
    length = bucket(row_length(settings, model.config))
    parts, part = learner.accumulate, groups // learner.accumulate

    def put(dtype: Any, *shape: int) -> Any:
        axes = (None, "batch", *(None for _ in shape))
        sharding = logical_to_sharding(axes, mesh)
        return jax.ShapeDtypeStruct((parts, part, *shape), dtype, sharding=sharding)

    batch = GroupRows(
        tokens=put(jnp.int32, each, length),
        lengths=put(jnp.int32, each),
        labels=put(jnp.float32, each),
        mask=put(jnp.bool_),
    )
    work = Pass(rows=groups * each, length=length, learns=True)
    return _updates(name, settings, mesh, model, learner, batch, work, chunk=1)


def _updates(
    name: str,
    settings: Settings,
    mesh: Mesh,
    model: Model,
    learner: Learner,
    batch: Any,
    work: Pass,
    *,
    chunk: int,
) -> Stage:
    """A stage whose steps are one update each."""
    update = Program(
        name="update",
        function=learner.step,
        mesh=mesh,
        arguments=(learner.target, batch),
        held=(0,),
        turns=1,
        tokens=work.rows * work.length,
        work=Work((work,)),
    )
    return Stage(
        name=name,
        kind=str(settings["stage"]),
        mesh=mesh,
        config=model.config,
        params=model.params,
        frozen=model.frozen,
        accumulate=learner.accumulate,
        chunk=chunk,
        held=(learner.target,),
        steps=(lambda _: update,),
    )


def _reinforcement(name: str, settings: Settings, mesh: Mesh, model: Model) -> Stage:
    """Rollouts, what is to be learnt from them, and the update."""
    if settings["rollout.devices"]:
        raise UsageError(
            "a plan has sampling and learning in turn on all chips; leave rollout.devices at 0"
        )
    rollout = rl.rollout_settings(settings, load_template(str(settings["prompt.template"])))
    losses = rl.loss_settings(settings, rollout)
    programs = make_programs(settings, mesh, model, rollout, losses)
    target = programs.learner.target
    rows, each = settings.at_least("batch.rows", 1), rollout.group
    if rows % each:
        raise UsageError(f"batch.rows is {rows}; it must be a multiple of rollout.group, {each}")
    prompts, size = rows // each, settings.at_least("data.max_prompt", 2)
    new, accumulate = rollout.max_new_tokens, programs.learner.accumulate
    together = kept_together(rows, each, accumulate * batch_parts(mesh))
    scoring = Pass(rows=rows // together, length=size, logits=True, branches=together, behind=new)

    sampling = programs.sampling

    def put(*shape: int) -> Any:
        sharding = rows_sharding(sampling, (prompts, *shape))
        return jax.ShapeDtypeStruct((prompts, *shape), jnp.int32, sharding=sharding)

    tasks = Tasks(
        tokens=put(size),
        lengths=put(),
        order=put(settings.at_least("data.max_responses", 1)),
        counts=put(),
        answers=put(),
    )
    reference = _reference(settings, model)
    scored = (programs.updates > 1) + (reference is not None)

    def lend(_: Outputs) -> Program:
        return Program(
            name="reshard",
            function=programs.lend,
            mesh=sampling,
            arguments=(target,),
            held=(0,),
            turns=1,
            tokens=rows * new,
            work=Work(()),
            gives=programs.lent,
        )

    def roll(_: Outputs) -> Program:
        return Program(
            name="rollout",
            function=programs.roll,
            mesh=sampling,
            arguments=(programs.lent, tasks, np.int32(0)),
            # What is lent to the same mesh is the state itself.
            held=(0,) if sampling is mesh else (),
            turns=new,
            tokens=rows * new,
            work=Work(
                (Pass(rows=prompts, length=size, cached=True),),
                decoded=Decoded(prompts=prompts, samples=each, prompt=size, tokens=new),
            ),
        )

    def learn(outputs: Outputs) -> Program:
        return Program(
            name="experience",
            function=programs.learn_from,
            mesh=mesh,
            arguments=(target, rows_on(outputs["rollout"], mesh), reference),
            held=(0, 2),
            turns=1,
            tokens=rows * new,
            work=Work((scoring,) * scored),
        )

    def update(outputs: Outputs) -> Program:
        return Program(
            name="update",
            function=programs.learner.step,
            mesh=mesh,
            arguments=(target, outputs["experience"][0]),
            held=(0,),
            turns=1,
            tokens=rows * new,
            work=Work((scoring._replace(learns=True),)),
            times=programs.updates,
        )

    return Stage(
        name=name,
        kind="rl",
        mesh=mesh,
        config=model.config,
        params=model.params,
        frozen=model.frozen,
        accumulate=accumulate,
        chunk=settings.at_least("vocab_chunk", 1),
        held=(target, reference),
        steps=(roll, learn, update) if sampling is mesh else (lend, roll, learn, update),
    )


def _reference(settings: Settings, model: Model) -> Params | None:
    """Shapes of what `rl.run` holds beside the state as its reference."""
    if not float(settings["loss.beta"]):
        return None
    if settings["loss.reference"] == "base":
        return {}
    if model.config.lora is not None:
        return model.params
    dtype = jnp.dtype(model.config.dtype)

    def kept(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding)

    return jax.tree.map(kept, model.params)


def rows_on(shapes: Any, mesh: Mesh) -> Any:
    """Shapes of arrays whose rows are shared out over a mesh, as `rows_sharding` does it."""

    def put(leaf: Any) -> jax.ShapeDtypeStruct:
        empty = NamedSharding(mesh, PartitionSpec())
        sharding = rows_sharding(mesh, leaf.shape) if leaf.shape else empty
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(put, shapes)


_Builder = Callable[[str, Settings, Mesh, Model], Stage]

_KINDS: Mapping[str, _Builder] = MappingProxyType(
    {
        "sft": _sequences,
        "rft": _sequences,
        "rl": _reinforcement,
        "meta": _classifier,
        "bt": _classifier,
    }
)
