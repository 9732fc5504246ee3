"""Supervised fine-tuning: packed sequences, of which the completions are learnt.

    grm-jax train --config configs/X.py --workdir DIR

The first stage of training, and the pattern of the others: a stage reads its settings, makes a
loss and batches, and hands them to the one loop.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from grm_jax.data.packing import PackedRows, TokenSequence, TooLong, packed_batches
from grm_jax.data.pipeline import Mapped, Source
from grm_jax.distributed import batch_parts, make_mesh
from grm_jax.errors import UsageError
from grm_jax.models import DecoderConfig, Params
from grm_jax.training.config import Settings, base_config
from grm_jax.training.examples import ExampleFile, example_tokens
from grm_jax.training.learner import Learner, Loss, check_rows, make_learner
from grm_jax.training.loop import Advanced
from grm_jax.training.losses import Metrics, loss_denominator, sft_loss
from grm_jax.training.model import Model, next_token_logprobs, open_model, train_model
from grm_jax.training.optimizer import make_optimizer
from grm_jax.training.state import TrainState


def default_config() -> ConfigDict:
    """Every key of the stage with its default; `data.files` is for the user to fill in."""
    config = base_config("sft")
    config.data = ConfigDict(
        {
            # Files of examples, and the share of each; without shares each example comes as often
            # as any other.
            "files": (),
            "weights": (),
            # Tokens in a row, and what becomes of a sequence that has more: error, keep_start or
            # keep_end.
            "length": 1024,
            "too_long": "error",
            # Whether prompts are learnt like completions, as in pretraining.
            "learn_prompts": False,
            # How often every example comes; 0 for as long as there are steps.
            "epochs": 0,
            "threads": 2,
        }
    )
    # Entries of the vocabulary whose logits are in memory at a time.
    config.vocab_chunk = 4096
    return config


def run(settings: Settings, workdir: Path) -> bool:
    """Runs the stage on the examples of `data.files`.

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
    files = [ExampleFile(Path(file)) for file in settings["data.files"]]
    if not files:
        raise UsageError("data.files is empty; name at least one file of examples")
    weights = settings["data.weights"] or [None] * len(files)
    if len(weights) != len(files):
        raise UsageError(f"data.weights has {len(weights)} shares for {len(files)} data.files")
    sources = [
        Source(
            name=str(name),
            records=Mapped(file, lambda example: example_tokens(model.tokenizer, example)),
            weight=weight,
        )
        for name, file, weight in zip(settings["data.files"], files, weights, strict=True)
    ]
    return train_on_sequences(settings, workdir, mesh, model, sources)


def train_on_sequences(
    settings: Settings,
    workdir: Path,
    mesh: Mesh,
    model: Model,
    sources: Sequence[Source[TokenSequence]],
) -> bool:
    """Trains a model on sequences of tokens, wherever they come from.

    Args:
      settings: Of `default_config`, but for the keys that name the data.
      workdir: As in `run`.
      mesh: Where everything lives.
      model: From `open_model` on that mesh.
      sources: The sequences.

    Returns:
      As `run`.

    Raises:
      UsageError: As `run`.
    """
    rows, length = settings.at_least("batch.rows", 1), settings.at_least("data.length", 2)
    accumulate = settings.at_least("batch.accumulate", 1)
    check_rows(rows, accumulate, batch_parts(mesh))
    if length > model.config.max_context:
        raise UsageError(
            f"data.length is {length}, but the model reads {model.config.max_context} tokens"
        )
    if settings["data.learn_prompts"]:
        sources = [
            dataclasses.replace(source, records=Mapped(source.records, _all_learnt))
            for source in sources
        ]
    batches = packed_batches(
        sources,
        rows=rows,
        length=length,
        seed=settings.at_least("seed", 0),
        too_long=_too_long(settings),
        epochs=settings.at_least("data.epochs", 0) or None,
        threads=settings.at_least("data.threads", 0),
    )
    learner = make_sft_learner(settings, mesh, model)

    def advance(state: TrainState, batch: PackedRows) -> Advanced:
        after, metrics = learner(state, batch)
        return Advanced(state=after, metrics=metrics, learnt=batch)

    state = train_model(
        model,
        settings=settings,
        workdir=workdir,
        learner=learner,
        batches=batches,
        advance=advance,
    )
    return state is not None


def make_sft_learner(settings: Settings, mesh: Mesh, model: Model) -> Learner:
    """The learner of `PackedRows`.

    Args:
      settings: The run's.
      mesh: Where everything lives.
      model: From `open_model` on that mesh.
    """
    return make_learner(
        make_loss(model.config, mesh, chunk=settings.at_least("vocab_chunk", 1)),
        lambda batch: loss_denominator(learnt_targets(batch), aggregate="token"),
        make_optimizer(settings),
        params=model.params,
        frozen=model.frozen,
        mesh=mesh,
        accumulate=settings.at_least("batch.accumulate", 1),
    )


def make_loss(config: DecoderConfig, mesh: Mesh, *, chunk: int = 4096) -> Loss:
    """The negative log-likelihood of the learnt tokens of packed rows.

    Args:
      config: The decoder's.
      mesh: Over whose `tensor` axis the vocabulary is split, if it can be.
      chunk: As in `token_logprobs`.

    Returns:
      The loss, for `make_learner`, of `PackedRows`.
    """

    def loss(
        params: Params, batch: PackedRows, denominator: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        tokens, segments = jnp.asarray(batch.tokens), jnp.asarray(batch.segment_ids)
        logprobs, _ = next_token_logprobs(
            params,
            config,
            tokens,
            lengths=jnp.sum(segments > 0, axis=1, dtype=jnp.int32),
            mesh=mesh,
            segment_ids=segments,
            chunk=chunk,
        )
        mask = learnt_targets(batch)
        return sft_loss(logprobs=logprobs, mask=mask, denominator=denominator)

    return loss


def learnt_targets(batch: PackedRows) -> jax.Array:
    """Which positions predict a token that is learnt: the next one, if of the same sequence.

    Args:
      batch: Rows `[..., S]`.

    Returns:
      `bool[..., S]`.
    """
    segments, mask = jnp.asarray(batch.segment_ids), jnp.asarray(batch.loss_mask)
    follows = (segments[..., 1:] == segments[..., :-1]) & mask[..., 1:]
    return jnp.concatenate([follows, jnp.zeros_like(follows[..., :1])], axis=-1)


def _all_learnt(sequence: TokenSequence) -> TokenSequence:
    return sequence._replace(loss_mask=np.ones(len(sequence.tokens), bool))


def _too_long(settings: Settings) -> TooLong:
    match settings.choice("data.too_long", get_args(TooLong)):
        case "keep_start":
            return "keep_start"
        case "keep_end":
            return "keep_end"
        case _:
            return "error"
