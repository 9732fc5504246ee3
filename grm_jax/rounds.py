"""Which samples of a record are drawn, and in which rounds: the first half of a judgement.

All samples are planned before any is drawn. They are one round, or several after each of which the
record may be settled; a sample's prompt and key do not depend on the round it is drawn in.
"""

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np

from grm_jax.data import BadRecord, Comparison, PointwiseLabel, best_index, turns
from grm_jax.errors import UsageError
from grm_jax.prompts import Template, encode_chat, render
from grm_jax.rewards import flip_chance, looks
from grm_jax.sampling import power_of_two, response_orders
from grm_jax.sampling.batching import JudgeSampler, PromptJob, PromptResult, sample_keys


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A record on its way through the sampler.

    Attributes:
      id: The record's.
      comparison: What is judged; None if there is an error.
      jobs: For the sampler, in the order of the rounds.
      places: For each job, which samples it draws.
      rounds: How many jobs there are up to the end of each round.
      error: What is wrong with the record.
    """

    id: str
    comparison: Comparison | None = None
    jobs: tuple[PromptJob, ...] = ()
    places: tuple[tuple[int, ...], ...] = ()
    rounds: tuple[int, ...] = (0,)
    error: str | None = None

    @property
    def first_round(self) -> tuple[PromptJob, ...]:
        """The jobs to begin with."""
        return self.jobs[: self.rounds[0]]


def plan_record(
    sampler: JudgeSampler,
    comparison: Comparison | BadRecord,
    *,
    template: Template,
    samples: int,
    orders: str,
    hinted: bool,
    seed: int,
    adaptive: bool = False,
) -> Planned:
    """What the sampler is to run for a record.

    Args:
      sampler: Of the judge's model.
      comparison: The record.
      template: As in `GRM.judge_batch`, like the rest.
      samples: Likewise.
      orders: Likewise.
      hinted: Likewise.
      seed: Likewise.
      adaptive: Whether there are several rounds.
    """
    if isinstance(comparison, BadRecord):
        return Planned(id=comparison.id, error=comparison.error)
    count = len(comparison.responses)
    shown = response_orders(
        orders, record_id=comparison.id, num_responses=count, samples=samples, seed=seed
    )
    keys = sample_keys(record_key(seed, comparison.id), samples)
    try:
        hints = {
            order: _hint(comparison, order) if hinted else None for order in dict.fromkeys(shown)
        }
        # What is right of a single response is 0 or 1, and no score of another scale.
        low, high = sampler.settings.low, sampler.settings.high
        answers = hints if count > 1 or (low, high) == (0, 1) else dict.fromkeys(hints)
        if sampler.settings.constrain:
            for answer in answers.values():
                sampler.layout(count, answer)
        prompts = {
            order: _prompt(sampler, template, comparison, order, hint)
            for order, hint in hints.items()
        }
    except UsageError as error:
        return Planned(id=comparison.id, error=str(error))
    jobs, chosen, rounds = [], [], []
    ends = (*(looks(samples) if adaptive else ()), samples)
    for begin, end in itertools.pairwise((0, *ends)):
        room = sampler.room(
            end - begin, 1 if orders == "fixed" else count, balanced=orders == "balanced"
        )
        places: dict[tuple[int, ...], list[int]] = {}
        for sample in range(begin, end):
            places.setdefault(shown[sample], []).append(sample)
        for order, numbers in places.items():
            for first in range(0, len(numbers), room):
                part = numbers[first : first + room]
                jobs.append(
                    PromptJob(
                        tokens=prompts[order],
                        order=order,
                        keys=keys[part],
                        room=room,
                        answer=answers[order],
                    )
                )
                chosen.append(tuple(part))
        rounds.append(len(jobs))
    return Planned(
        id=comparison.id,
        comparison=comparison,
        jobs=tuple(jobs),
        places=tuple(chosen),
        rounds=tuple(rounds),
    )


def next_round(
    record: Planned, results: Sequence[PromptResult], *, samples: int, span: float, error: float
) -> Sequence[PromptJob]:
    """The jobs of a record's next round; none if it is settled, or all have run.

    Args:
      record: From `plan_record`.
      results: Of all jobs so far.
      samples: K, over all rounds.
      span: The widest difference of two scores.
      error: The chance of another winner at which the record is settled.
    """
    done = len(results)
    if done == len(record.jobs):
        return ()
    count = len(results[0].scores[0])
    rows = np.zeros((power_of_two(samples), power_of_two(count)), np.float32)
    valid = np.zeros(len(rows), bool)
    for places, result in zip(record.places, results, strict=False):
        at = list(places)
        rows[at, :count] = result.scores if result.expected is None else result.expected
        valid[at] = result.valid
    left = samples - sum(map(len, record.places[:done]))
    if flip_chance(rows, valid, count, left, span=float(span)) <= error:
        return ()
    return record.jobs[done : record.rounds[record.rounds.index(done) + 1]]


def record_key(seed: int, record_id: str) -> jax.Array:
    """The random key of a record, from the seed and the record's id."""
    digest = hashlib.blake2b(record_id.encode(errors="surrogatepass"), digest_size=8).digest()
    return _fold_in(np.uint32(seed), np.frombuffer(digest, "<u4"))


@jax.jit
def _fold_in(seed: jax.Array, halves: jax.Array) -> jax.Array:
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), halves[0]), halves[1])


def _prompt(
    sampler: JudgeSampler,
    template: Template,
    comparison: Comparison,
    order: tuple[int, ...],
    hint: int | None,
) -> list[int]:
    """The tokens of a comparison with its responses in an order."""
    chat = render(
        template,
        turns(comparison),
        [comparison.responses[i] for i in order],
        hint=hint,
    )
    tokens = encode_chat(sampler.tokenizer, chat)
    new, context = sampler.settings.max_new_tokens, sampler.config.max_context
    if len(tokens) + new > context:
        raise UsageError(
            f"the prompt takes {len(tokens)} tokens and the answer up to {new}, but the model "
            f"reads {context}; shorten the record"
        )
    return tokens


def _hint(comparison: Comparison, order: Sequence[int]) -> int:
    """What `render` tells of a record's label, whose responses are shown in an order."""
    if isinstance(comparison.label, PointwiseLabel):
        return int(comparison.label.correct)
    best = best_index(comparison)
    if best is None or len(order) == 1:
        raise UsageError("there is nothing to hint at: the label names no best response")
    return list(order).index(best)
