"""Rollouts of the policy: prompts in, judgements with their rewards out, all on the devices.

One compiled program reads the prompts, samples G judgements of each, reads their scores and rewards
them by rule. Nothing of it comes to the host but what is logged.

Letters for shapes: `B` prompts, `G` rollouts of each, `N` responses at most, `P` prompt tokens, `T`
generated tokens.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple, final

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import ArrayLike

from grm_jax import grammar
from grm_jax.data import Comparison, PointwiseLabel, best_index, turns
from grm_jax.data.packing import pad_prompts
from grm_jax.errors import UsageError
from grm_jax.models import DecoderConfig, Params, abstract_params, cpu_decoder, merge_lora
from grm_jax.prompts import Template, Tokenizer, encode_chat, render
from grm_jax.rewards import (
    extract_scores,
    extract_verdicts,
    outcome_reward,
    pointwise_outcome_reward,
    restore_order,
)
from grm_jax.sampling import Controls, decode, prefill, response_orders
from grm_jax.sampling.scheduling import LENGTHS, bucket
from grm_jax.training.groups import overlong_penalty


class Task(NamedTuple):
    """A prompt for a rollout and what would be right.

    Attributes:
      tokens: The prompt's; a stand-in where the comparison cannot be used.
      order: Input index of the response shown at each place.
      answer: Index of the best response in input order, or for a single response the score that
        is true of it; -1 where the comparison cannot be used.
    """

    tokens: Sequence[int]
    order: tuple[int, ...]
    answer: int


UNUSABLE = Task((0, 0), (0,), -1)
"""Stands in for a comparison that cannot be used, and for one that is missing."""


class Tasks(NamedTuple):
    """B of them in arrays.

    Attributes:
      tokens: `i32[B, P]`.
      lengths: `i32[B]`.
      order: `i32[B, N]`.
      counts: `i32[B]`, responses.
      answers: `i32[B]`.
    """

    tokens: np.ndarray | jax.Array
    lengths: np.ndarray | jax.Array
    order: np.ndarray | jax.Array
    counts: np.ndarray | jax.Array
    answers: np.ndarray | jax.Array


class Rolled(NamedTuple):
    """G rollouts of each of B prompts.

    Attributes:
      prompts: `i32[B, P]`.
      prompt_lengths: `i32[B]`.
      tokens: `i32[B, G, T]`, the completions.
      lengths: `i32[B, G]`, tokens of them, the end of the turn included.
      stopped: `bool[B, G]`, whether it ended by itself.
      sampler_logprobs: `f32[B, G, T]`, of each token under the distribution that was drawn from; 0
        beyond the last.
      scores: `f32[B, G, N]`, in input order; 0 where unreadable.
      valid: `bool[B, G]`, whether scores were readable.
      outcomes: `f32[B, G]`, +1 or -1 by the rule.
      rewards: `f32[B, G]`, with what else is counted.
      usable: `bool[B]`, whether the prompt is one.
      shown: `i32[B]`, at which place the best response was shown; -1 for single responses.
    """

    prompts: jax.Array
    prompt_lengths: jax.Array
    tokens: jax.Array
    lengths: jax.Array
    stopped: jax.Array
    sampler_logprobs: jax.Array
    scores: jax.Array
    valid: jax.Array
    outcomes: jax.Array
    rewards: jax.Array
    usable: jax.Array
    shown: jax.Array


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskMaker:
    """Turns comparisons into tasks.

    Attributes:
      tokenizer: The model's.
      template: The prompt for several responses.
      single: That for one response, whose scores are 0 and 1; None to leave such records out.
      max_tokens: The longest prompt.
      max_responses: N.
      seed: Of the order in which responses are shown.
    """

    tokenizer: Tokenizer
    template: Template
    single: Template | None
    max_tokens: int
    max_responses: int
    seed: int

    def __call__(self, comparison: Comparison) -> Task:
        """The task, or one whose answer is -1 if the comparison has no label or is too long."""
        count = len(comparison.responses)
        if count == 1:
            label = comparison.label
            template = self.single
            answer = int(label.correct) if isinstance(label, PointwiseLabel) else None
        else:
            template, answer = self.template, best_index(comparison)
        if template is None or answer is None or count > self.max_responses:
            return UNUSABLE
        order = response_orders(
            "shuffle", record_id=comparison.id, num_responses=count, samples=1, seed=self.seed
        )[0]
        shown = [comparison.responses[index] for index in order]
        tokens = encode_chat(self.tokenizer, render(template, turns(comparison), shown))
        return UNUSABLE if len(tokens) > self.max_tokens else Task(tokens, order, answer)

    def pad(self, tasks: Sequence[Task], rows: int) -> Tasks:
        """The tasks in arrays, prompts padded to the least of a few lengths that holds them.

        Args:
          tasks: At most B of them.
          rows: B; what is missing cannot be used.
        """
        tasks = [*tasks, *(UNUSABLE for _ in range(rows - len(tasks)))]
        sizes = (*(size for size in LENGTHS if size < self.max_tokens), self.max_tokens)
        prompts = pad_prompts(
            [task.tokens for task in tasks], bucket=lambda size: bucket(size, sizes)
        )
        order = np.tile(np.arange(self.max_responses, dtype=np.int32), (len(tasks), 1))
        for row, task in zip(order, tasks, strict=True):
            row[: len(task.order)] = task.order
        return Tasks(
            tokens=prompts.tokens,
            lengths=prompts.lengths,
            order=order,
            counts=np.asarray([len(task.order) for task in tasks], np.int32),
            answers=np.asarray([task.answer for task in tasks], np.int32),
        )


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class RolloutSettings:
    """How rollouts are sampled and rewarded.

    Attributes:
      group: G.
      temperature: Above 0.
      max_new_tokens: T.
      low: The lowest score for one of several responses.
      high: The highest.
      verdict: Whether the model names the best response instead of scoring all of them: the number
        of its place, from 1 (the LLM-as-a-judge baseline).
      overlong_buffer: Over how many tokens before the limit a penalty grows; 0 for none.
      overlong_scale: How large it gets.
    """

    group: int
    temperature: float
    max_new_tokens: int
    low: int
    high: int
    verdict: bool = False
    overlong_buffer: int = 0
    overlong_scale: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise UsageError(
                f"rollout.temperature is {self.temperature}; rollouts need one above 0"
            )


class Completed(NamedTuple):
    """G completions of each of B prompts; see `Rolled`.

    Attributes:
      tokens: `i32[B, G, T]`.
      lengths: `i32[B, G]`.
      stopped: `bool[B, G]`.
      sampler_logprobs: `f32[B, G, T]`.
    """

    tokens: jax.Array
    lengths: jax.Array
    stopped: jax.Array
    sampler_logprobs: jax.Array


Completer = Callable[[Params, ArrayLike, ArrayLike, ArrayLike, jax.Array], Completed]
"""`completer(params, tokens i32[B, P], lengths i32[B], active bool[B], key) -> completed`."""

Sampler = Callable[[Params, Tasks, jax.Array], Rolled]
"""`sampler(params, tasks, key) -> rolled`, to be jitted."""


def make_completer(
    config: DecoderConfig,
    mesh: Mesh,
    *,
    eos_ids: tuple[int, ...],
    group: int,
    temperature: float,
    max_new_tokens: int,
) -> Completer:
    """Makes the program that samples completions.

    Args:
      config: The decoder's, as it learns.
      mesh: Where the parameters live.
      eos_ids: Tokens that end a completion.
      group: G.
      temperature: Above 0.
      max_new_tokens: T.

    Returns:
      A pure function, to be jitted: parameters, prompts, which of them are wanted, and a key in,
      completions out.
    """
    on_cpu = all(device.platform == "cpu" for device in mesh.devices.flat)
    cast = jax.tree.map(lambda leaf: leaf.dtype, abstract_params(config, config.dtype))
    plain = dataclasses.replace(config, remat=False)

    def completer(
        params: Params,
        tokens: ArrayLike,
        lengths: ArrayLike,
        active: ArrayLike,
        key: jax.Array,
    ) -> Completed:
        # Once, and not again for every token.
        params = jax.tree.map(lambda leaf, dtype: leaf.astype(dtype), params, cast)
        loop = plain
        if plain.dtype == "float32" and plain.quantization is None:
            # Rounded to fewer bits, a kernel would lose what is added to it.
            loop, params = merge_lora(plain, params)
        reading = loop
        if on_cpu:
            loop, params = cpu_decoder(loop, params)
            reading = dataclasses.replace(loop, weights_first=False)
        tokens, lengths = jnp.asarray(tokens), jnp.asarray(lengths)
        prefix = prefill(params, reading, tokens, lengths - 1)
        last = jnp.take_along_axis(tokens, lengths[:, None] - 1, axis=1)[:, 0]
        keys = jax.random.split(key, (len(tokens), group))
        out = decode(
            params,
            loop,
            prefix,
            last,
            keys,
            Controls(
                temperature=jnp.float32(temperature),
                top_p=jnp.float32(1),
                max_new_tokens=jnp.int32(max_new_tokens),
            ),
            active=jnp.broadcast_to(jnp.asarray(active)[:, None], keys.shape),
            eos_ids=eos_ids,
            capacity=max_new_tokens,
        )
        written = jnp.arange(max_new_tokens) < out.length[..., None]
        return Completed(
            tokens=out.tokens,
            lengths=out.length,
            stopped=out.stopped,
            sampler_logprobs=jnp.where(written, out.sampled_logprobs, 0.0),
        )

    return completer


def make_sampler(
    config: DecoderConfig,
    tokenizer: Tokenizer,
    mesh: Mesh,
    settings: RolloutSettings,
) -> Sampler:
    """Makes the program that rolls out.

    Args:
      config: The decoder's, as it learns.
      tokenizer: Its tokenizer.
      mesh: Where the parameters live.
      settings: How to sample and reward.

    Returns:
      A pure function: parameters, tasks and a key in, rollouts out.
    """
    table = grammar.token_table(tokenizer.token_bytes)
    completer = make_completer(
        config,
        mesh,
        eos_ids=tokenizer.eos_ids,
        group=settings.group,
        temperature=settings.temperature,
        max_new_tokens=settings.max_new_tokens,
    )

    def sampler(params: Params, tasks: Tasks, key: jax.Array) -> Rolled:
        usable = jnp.asarray(tasks.answers) >= 0
        out = completer(params, tasks.tokens, tasks.lengths, usable, key)
        said = judge_rollouts(out.tokens, out.lengths - out.stopped, tasks, table, settings)
        rewards = said.outcomes
        if settings.overlong_buffer:
            rewards = rewards + overlong_penalty(
                out.lengths,
                max_length=settings.max_new_tokens,
                buffer=settings.overlong_buffer,
                scale=settings.overlong_scale,
            )
        return Rolled(
            prompts=jnp.asarray(tasks.tokens),
            prompt_lengths=jnp.asarray(tasks.lengths),
            tokens=out.tokens,
            lengths=out.lengths,
            stopped=out.stopped,
            sampler_logprobs=out.sampler_logprobs,
            rewards=rewards,
            usable=usable,
            **said._asdict(),
        )

    return sampler


class Verdicts(NamedTuple):
    """What rollouts say and whether they are right; see `Rolled`.

    Attributes:
      scores: `f32[B, G, N]`.
      valid: `bool[B, G]`.
      outcomes: `f32[B, G]`.
      shown: `i32[B]`.
    """

    scores: jax.Array
    valid: jax.Array
    outcomes: jax.Array
    shown: jax.Array


def judge_rollouts(
    tokens: jax.Array,
    lengths: jax.Array,
    tasks: Tasks,
    table: grammar.TokenTable,
    settings: RolloutSettings,
) -> Verdicts:
    """Reads completions and rewards them by the outcome rules (eq 11, arXiv:2504.02495).

    Args:
      tokens: `i32[B, G, T]`, what was generated.
      lengths: `i32[B, G]`, tokens of it, without the end of the turn.
      tasks: Of the prompts.
      table: The vocabulary, as the score automaton reads it.
      settings: The range of scores, and whether they are verdicts.
    """
    order, counts = jnp.asarray(tasks.order), jnp.asarray(tasks.counts)[:, None]
    answers = jnp.asarray(tasks.answers)[:, None]
    most = order.shape[-1]
    read = functools.partial(extract_scores, tokens, lengths, table)
    single, single_valid = read(1, max_responses=1, low=0, high=1)
    if settings.verdict:
        named, valid = extract_verdicts(tokens, lengths, table, counts, max_responses=most)
        # The place that is named has the only point.
        scores = jax.nn.one_hot(named, most)
    else:
        scores, valid = read(counts, max_responses=most, low=settings.low, high=settings.high)
    scores = restore_order(scores, jnp.broadcast_to(order[:, None], scores.shape))
    alone = counts == 1
    only = jnp.pad(single, ((0, 0), (0, 0), (0, most - 1)))
    place = jnp.argmax(order == answers, axis=-1)
    return Verdicts(
        scores=jnp.where(alone[..., None], only, scores),
        valid=jnp.where(alone, single_valid, valid),
        outcomes=jnp.where(
            alone,
            pointwise_outcome_reward(single[..., 0], single_valid, answers),
            outcome_reward(scores, valid, answers, counts),
        ),
        shown=jnp.where((counts > 1) & (answers >= 0), place[:, None], -1)[:, 0],
    )
