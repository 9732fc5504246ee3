"""What stages have in common whose model gives a number instead of text.

Such a stage turns its records into groups of token sequences, and says by an `Objective` what the
numbers of a group should be like. The rest is here: rows padded to a few lengths, the one learner,
measurements on groups that were kept from training, and a report of it all.

Letters for shapes: `B` groups of a batch, `R` sequences in a group, `P` tokens in a padded row.
"""

import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, final

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from grm_jax.data.pipeline import Source, batches
from grm_jax.distributed import batch_parts
from grm_jax.errors import UsageError
from grm_jax.models import DecoderConfig, Params, reward
from grm_jax.sampling import bucket
from grm_jax.training.checkpointing import write_atomically
from grm_jax.training.config import Settings
from grm_jax.training.heldout import auc
from grm_jax.training.learner import Learner, Loss, check_rows, make_learner
from grm_jax.training.loop import Advanced
from grm_jax.training.losses import (
    Metrics,
    binary_reward_loss,
    bradley_terry_loss,
    loss_denominator,
)
from grm_jax.training.model import Model, train_model
from grm_jax.training.optimizer import make_optimizer
from grm_jax.training.state import TrainState

REPORT = "report.json"

Problem = Literal["too_long", "unreadable"]
"""Why a group is not learnt from: it has too many tokens, or a template refuses it."""


class Group(NamedTuple):
    """Sequences whose numbers are compared with one another, or with labels.

    Attributes:
      sequences: R sequences of token ids, or none if there is a problem.
      labels: R of them, what a binary objective wants to hear.
      problem: What keeps the group from being learnt from.
    """

    sequences: tuple[np.ndarray, ...]
    labels: tuple[float, ...]
    problem: Problem | None = None


class GroupRows(NamedTuple):
    """Groups in arrays of one shape.

    Attributes:
      tokens: `i32[B, R, P]`, padded at the end.
      lengths: `i32[B, R]`, at least 1.
      labels: `f32[B, R]`.
      mask: `bool[B]`, the groups to learn from.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    labels: np.ndarray
    mask: np.ndarray


@final
@dataclass(frozen=True, kw_only=True)
class Objective:
    """What the numbers of groups should be like.

    Attributes:
      sequences: R.
      loss: Of values `f32[B, R]`, labels `f32[B, R]`, a mask `bool[B]` and how many groups the
        whole batch has, `f32[]`: the mean over these, and metrics.
      ranks: Whether the numbers of different groups can be compared, so that they have an AUC.
    """

    sequences: int
    loss: Callable[[jax.Array, jax.Array, jax.Array, jax.Array], tuple[jax.Array, Metrics]]
    ranks: bool


class GroupData(NamedTuple):
    """What a stage learns from.

    Attributes:
      train: Sources of groups.
      heldout: Groups to measure on.
      counts: What the report says of the data.
    """

    train: Sequence[Source[Group]]
    heldout: Sequence[Group]
    counts: Mapping[str, Any]


def heldout_config() -> ConfigDict:
    """The keys of the group `heldout`."""
    return ConfigDict(
        {
            # How many comparisons are kept from training, by a hash of their ids, and on how many
            # of their rows to measure; 0 for all.
            "share": 0.02,
            "limit": 1000,
            # Steps between measurements; the last step is always followed by one.
            "every": 100,
        }
    )


def heldout_share(settings: Settings) -> float:
    """The value of `heldout.share`.

    Raises:
      UsageError: It is no share, or leaves nothing to learn from.
    """
    share = float(settings["heldout.share"])
    if not 0 <= share < 1:
        raise UsageError(f"heldout.share is {share}; give a share from 0 to below 1")
    return share


def preferred(centre: float = 0.0) -> Objective:
    """Of two sequences the first has the higher value; see `bradley_terry_loss`."""

    def loss(
        values: jax.Array, labels: jax.Array, mask: jax.Array, denominator: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        return bradley_terry_loss(
            chosen=values[:, 0],
            rejected=values[:, 1],
            mask=mask,
            centre=centre,
            denominator=denominator,
        )

    return Objective(sequences=2, loss=loss, ranks=False)


def labelled(sequences: int) -> Objective:
    """Each value is the logit of its label; see `binary_reward_loss`."""

    def loss(
        values: jax.Array, labels: jax.Array, mask: jax.Array, denominator: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        return binary_reward_loss(
            logits=values.reshape(-1),
            labels=labels.reshape(-1),
            mask=jnp.repeat(mask, sequences),
            denominator=denominator * sequences,
        )

    return Objective(sequences=sequences, loss=loss, ranks=True)


def row_length(settings: Settings, config: DecoderConfig) -> int:
    """Most tokens of a sequence, from `data.length`.

    Raises:
      UsageError: The model reads fewer.
    """
    length = settings.at_least("data.length", 1)
    if length > config.max_context:
        raise UsageError(
            f"data.length is {length}, but the model reads {config.max_context} tokens"
        )
    return length


def make_group(
    write: Callable[[], Iterable[Sequence[int]]], labels: Sequence[float], *, length: int
) -> Group:
    """Encodes a group; one that cannot be is returned with its problem, and stops nobody.

    Args:
      write: Encodes the sequences; a UsageError if a template refuses them.
      labels: One for each.
      length: Most tokens of a sequence.
    """
    try:
        sequences = tuple(np.asarray(ids, np.int32) for ids in write())
    except UsageError:
        return Group((), tuple(labels), "unreadable")
    if not all(map(len, sequences)):
        return Group((), tuple(labels), "unreadable")
    if max(map(len, sequences)) > length:
        return Group((), tuple(labels), "too_long")
    return Group(sequences, tuple(labels))


def pad_groups(groups: Sequence[Group], *, rows: int, sequences: int) -> GroupRows:
    """Lays groups out in rows as long as the bucket of the longest sequence.

    Args:
      groups: At most B of them.
      rows: B; what is missing is masked out, as are groups with a problem.
      sequences: R.
    """
    good = [group for group in groups if group.problem is None]
    longest = max((len(ids) for group in good for ids in group.sequences), default=1)
    out = GroupRows(
        tokens=np.zeros((rows, sequences, bucket(longest)), np.int32),
        lengths=np.ones((rows, sequences), np.int32),
        labels=np.zeros((rows, sequences), np.float32),
        mask=np.arange(rows) < len(good),
    )
    for row, group in enumerate(good):
        out.labels[row] = group.labels
        for place, ids in enumerate(group.sequences):
            out.tokens[row, place, : len(ids)] = ids
            out.lengths[row, place] = len(ids)
    return out


def group_values(
    params: Params, config: DecoderConfig, tokens: jax.Array, lengths: jax.Array
) -> jax.Array:
    """The classifier's outputs for groups.

    Args:
      params: The classifier's parameters.
      config: Its configuration.
      tokens: `i32[B, R, P]`.
      lengths: `i32[B, R]`.

    Returns:
      `f32[B, R]`.
    """
    values = reward(params, config, tokens.reshape(-1, tokens.shape[-1]), lengths.reshape(-1))
    return values.reshape(lengths.shape)


def make_loss(config: DecoderConfig, objective: Objective) -> Loss:
    """The objective as a loss of `GroupRows`, for `make_learner`."""

    def loss(
        params: Params, batch: GroupRows, denominator: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        tokens, lengths, labels, mask = map(jnp.asarray, batch)
        values = group_values(params, config, tokens, lengths)
        return objective.loss(values, labels, mask, denominator)

    return loss


def make_classifier_learner(
    settings: Settings, mesh: Mesh, model: Model, objective: Objective
) -> Learner:
    """The learner of a classifier: one program for each padded length.

    Args:
      settings: The run's.
      mesh: Where everything lives.
      model: From `open_model` on that mesh, with one label.
      objective: What it learns.
    """
    return make_learner(
        make_loss(model.config, objective),
        lambda batch: loss_denominator(batch.mask, aggregate="token"),
        make_optimizer(settings),
        params=model.params,
        frozen=model.frozen,
        mesh=mesh,
        accumulate=settings.at_least("batch.accumulate", 1),
    )


@final
class HeldOut:
    """Measures a classifier on groups that it does not learn from."""

    def __init__(
        self,
        groups: Sequence[Group],
        *,
        objective: Objective,
        config: DecoderConfig,
        learner: Learner,
        rows: int,
    ) -> None:
        """Sorts the groups by length, so that little is padded; those with a problem are left out.

        Args:
          groups: The groups.
          objective: What is measured.
          config: The classifier's.
          learner: Whose states are measured.
          rows: Groups at a time.
        """
        good = [group for group in groups if group.problem is None]
        self._groups = sorted(good, key=lambda group: max(map(len, group.sequences)))
        self._objective = objective
        self._learner = learner
        self._rows = rows

        def values(params: Params, rows: GroupRows) -> jax.Array:
            return lax.map(
                lambda part: group_values(params, config, *part), (rows.tokens, rows.lengths)
            )

        everywhere = NamedSharding(learner.mesh, PartitionSpec())
        self._values = jax.jit(values, out_shardings=everywhere)
        self._measure = jax.jit(objective.loss)

    def __len__(self) -> int:
        return len(self._groups)

    def measure(self, state: TrainState) -> dict[str, float]:
        """The loss and metrics of the objective, and the AUC if it has one; nothing of no groups.

        In a group of processes, all of them must call this.
        """
        if not self._groups:
            return {}
        found = []
        for first in range(0, len(self._groups), self._rows):
            part = self._groups[first : first + self._rows]
            padded = pad_groups(part, rows=self._rows, sequences=self._objective.sequences)
            placed = self._learner.place(padded)
            with self._learner.here():
                values = self._values(state.model, placed)
            found.append(np.asarray(values).reshape(self._rows, -1)[: len(part)])
        scores = np.concatenate(found)
        labels = np.asarray([group.labels for group in self._groups], np.float32)
        mask, count = np.ones(len(scores), bool), np.float32(len(scores))
        loss, metrics = self._measure(scores, labels, mask, count)
        out = {"loss": float(loss), **{name: float(value) for name, value in metrics.items()}}
        if self._objective.ranks:
            out["auc"] = auc(scores.reshape(-1), labels.reshape(-1) > 0.5)
        return out


def train_classifier(
    settings: Settings,
    workdir: Path,
    mesh: Mesh,
    model: Model,
    data: GroupData,
    objective: Objective,
) -> bool:
    """Trains a classifier on groups, wherever they come from.

    Args:
      settings: The run's.
      workdir: Where everything goes: the model in `model`, measurements in `report.json`.
      mesh: Where everything lives.
      model: From `open_model` on that mesh, with one label.
      data: The groups.
      objective: What is learnt.

    Returns:
      Whether all steps are done.

    Raises:
      UsageError: A setting or the data is wrong.
    """
    rows, steps = settings.at_least("batch.rows", 1), settings.at_least("steps", 1)
    check_rows(
        rows,
        settings.at_least("batch.accumulate", 1),
        batch_parts(mesh),
    )
    every, log_every = settings.at_least("heldout.every", 1), settings.at_least("log.every", 1)
    if every % log_every:
        raise UsageError(
            f"heldout.every is {every}; make it a multiple of log.every, {log_every}, or what is "
            "measured is not in the log"
        )
    groups = batches(
        data.train,
        batch_size=rows,
        seed=settings.at_least("seed", 0),
        epochs=settings.at_least("data.epochs", 0) or None,
        threads=settings.at_least("data.threads", 0),
    )
    learner = make_classifier_learner(settings, mesh, model, objective)
    heldout = HeldOut(
        data.heldout, objective=objective, config=model.config, learner=learner, rows=rows
    )
    _say(data.counts)

    def advance(state: TrainState, batch: list[Group]) -> Advanced:
        # Only the last batch of all can be short.
        step = math.ceil(groups.consumed / rows)
        padded = pad_groups(batch, rows=rows, sequences=objective.sequences)
        after, metrics = learner(state, padded)
        more: dict[str, float] = {"tokens": float(padded.lengths[padded.mask].sum())}
        problems = Counter(group.problem for group in batch)
        more |= {"too_long": problems["too_long"], "unreadable": problems["unreadable"]}
        if step % every == 0 or step == steps:
            found = heldout.measure(after)
            more |= {f"heldout_{name}": value for name, value in found.items()}
        metrics |= {name: jnp.asarray(value, jnp.float32) for name, value in more.items()}
        return Advanced(state=after, metrics=metrics, learnt=padded)

    state = train_model(
        model,
        settings=settings,
        workdir=workdir,
        learner=learner,
        batches=groups,
        advance=advance,
    )
    if state is None:
        return False
    found = heldout.measure(state)
    problems = Counter(group.problem for group in data.heldout if group.problem)
    if jax.process_index() == 0:
        report = {
            **data.counts,
            "heldout": {
                **{name: value if math.isfinite(value) else None for name, value in found.items()},
                **problems,
            },
            "steps": steps,
        }
        write_atomically(workdir / REPORT, json.dumps(report, indent=2) + "\n")
    return True


def _say(counts: Mapping[str, Any]) -> None:
    if jax.process_index() == 0:
        print(f"grm-jax: the data: {json.dumps(counts)}", file=sys.stderr)
