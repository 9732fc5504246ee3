"""The meta reward model: one number for each sampled judgement, which says whether to trust it."""

import contextlib
import functools
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import jax
import numpy as np

from grm_jax.distributed import batch_parts, split_rows
from grm_jax.errors import UsageError
from grm_jax.models import DecoderConfig, Params, Segment, reward
from grm_jax.prompts import Template, Tokenizer, encode_chat, render
from grm_jax.sampling.batching import on_cpu
from grm_jax.sampling.expected import each
from grm_jax.sampling.prefix import prefill
from grm_jax.sampling.scheduling import bucket, power_of_two

_CPU_TOKENS = 8_192
_ACCELERATOR_TOKENS = 131_072
# Products of a query and a key that are held at once where texts are read behind a prompt.
_CPU_SCORES = 1 << 26
_ACCELERATOR_SCORES = 1 << 29
# Tokens that must be spared for a common beginning to be read by itself: less is lost again by
# reading what follows in smaller batches.
_LEAST_SPARED = 512


_reward = jax.jit(reward, static_argnames="config")


def judged_tokens(
    tokenizer: Tokenizer,
    template: Template,
    messages: Sequence[Mapping[str, str]],
    responses: Sequence[str],
    judgement: str,
) -> list[int]:
    """A comparison and a judgement of it, as a classifier is trained on them and asked about them.

    Args:
      tokenizer: The classifier's.
      template: How the comparison is shown; the judgement follows as the assistant's turn.
      messages: The conversation.
      responses: The responses in the order in which the judgement speaks of them.
      judgement: Its text.

    Raises:
      UsageError: If the template or the tokenizer's chat template refuses.
    """
    chat = render(template, messages, responses, judgement=judgement)
    return encode_chat(tokenizer, chat, add_generation_prompt=False)


@dataclass(frozen=True, kw_only=True, eq=False)
class MetaModel:
    """A sequence classifier of one output over a comparison and a judgement of it.

    Attributes:
      name: What it was loaded by.
      config: The decoder's configuration, with `num_labels` 1.
      params: Its parameters.
      tokenizer: Its tokenizer.
      template: How the comparison is shown; the judgement follows as the assistant's turn.
      mesh: The mesh that the parameters lie on; None for one device.
    """

    name: str
    config: DecoderConfig
    params: Params
    tokenizer: Tokenizer
    template: Template
    mesh: jax.sharding.Mesh | None = None

    def __post_init__(self) -> None:
        if self.config.num_labels != 1:
            raise UsageError(
                f"{self.name} is no meta reward model: that is a sequence classifier of one output"
            )

    def tokens(
        self, messages: Sequence[Mapping[str, str]], responses: Sequence[str], judgement: str
    ) -> list[int]:
        """What the model reads of one judgement.

        Args:
          messages: The conversation.
          responses: The responses in the order in which the judgement speaks of them.
          judgement: Its text.

        Raises:
          UsageError: If that is longer than the model's context.
        """
        ids = judged_tokens(self.tokenizer, self.template, messages, responses, judgement)
        if len(ids) > self.config.max_context:
            raise UsageError(
                f"a judgement and what it judges take {len(ids)} tokens, but the meta reward model "
                f"reads {self.config.max_context}; shorten the record"
            )
        return ids

    def rewards(
        self, sequences: Sequence[Sequence[int]], alike: Sequence[Hashable] | None = None
    ) -> np.ndarray:
        """The meta rewards of token sequences.

        Args:
          sequences: From `tokens`.
          alike: A name for each; those of one name begin alike, such as judgements of the same
            prompt, and what they begin with is read once. None if there is nothing to spare.

        Returns:
          `f32[n]`.
        """
        found = np.zeros(len(sequences), np.float32)
        groups: dict[Hashable, list[int]] = {}
        for index, name in enumerate(range(len(sequences)) if alike is None else alike):
            groups.setdefault(name, []).append(index)
        apart = []
        with contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh):
            for group in groups.values():
                members = [list(sequences[index]) for index in group]
                # Each keeps a token of its own, at which it is read.
                begin = min(_alike(min(members), max(members)), *(len(ids) - 1 for ids in members))
                if begin * (len(group) - 1) >= _LEAST_SPARED:
                    found[group] = self._read(
                        [ids[begin:] for ids in members], behind=members[0][:begin]
                    )
                else:
                    apart += group
            if apart:
                found[apart] = self._read([sequences[index] for index in apart])
        return found

    def _read(self, sequences: Sequence[Sequence[int]], behind: Sequence[int] = ()) -> np.ndarray:
        """The rewards of sequences, each behind the same tokens."""
        # Behind a prefix, those of experts are read in turn, each by all devices.
        split = None if behind and self.config.experts is not None else self.mesh
        cpu, parts = on_cpu(self.params), batch_parts(split)
        size = bucket(max(map(len, sequences)))
        rows = (_CPU_TOKENS if cpu else _ACCELERATOR_TOKENS) // size
        score = functools.partial(_reward, self.params, self.config)
        if behind:
            head = np.zeros((1, bucket(len(behind))), np.int32)
            head[0, : len(behind)] = behind
            length = np.asarray([len(behind)], np.int32)
            prefix = prefill(self.params, self.config, head, length)
            score = functools.partial(_reward_behind, self.params, self.config, prefix)
            scores = size * (size + head.shape[1]) * self.config.num_heads
            rows = min(rows, (_CPU_SCORES if cpu else _ACCELERATOR_SCORES) // scores)
        # Whole powers of two, so that few programs are compiled.
        each_part = power_of_two(-(-len(sequences) // parts))
        rows = parts * min(1 << (max(1, rows).bit_length() - 1), each_part)
        out = []
        for first in range(0, len(sequences), rows):
            part = sequences[first : first + rows]
            tokens = np.zeros((rows, size), np.int32)
            held = np.ones(rows, np.int32)
            for row, ids in enumerate(part):
                tokens[row, : len(ids)] = ids
                held[row] = len(ids)
            found = score(*split_rows((tokens, held), split))
            out.append(np.asarray(found)[: len(part)])
        return np.concatenate(out)


def _alike(one: Sequence[int], other: Sequence[int]) -> int:
    """With how many equal tokens two sequences begin."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))


@functools.partial(jax.jit, static_argnames="config")
def _reward_behind(
    params: Params,
    config: DecoderConfig,
    prefix: Segment,
    tokens: jax.Array,
    lengths: jax.Array,
) -> jax.Array:
    """The rewards `f32[n]` of texts `i32[n, T]` that each stand behind the prefix, of one row."""

    def of_text(tokens: jax.Array, length: jax.Array) -> jax.Array:
        return reward(params, config, tokens[None], length[None], prefix)[0]

    return each(config, of_text, tokens, lengths)
