"""The meta reward model: one number for each sampled judgement, which says whether to trust it."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax
import numpy as np

from grm_jax.distributed import batch_parts, split_rows
from grm_jax.errors import UsageError
from grm_jax.models import DecoderConfig, Params, reward
from grm_jax.prompts import Template, Tokenizer, encode_chat, render
from grm_jax.sampling.batching import on_cpu
from grm_jax.sampling.scheduling import bucket, power_of_two

_CPU_TOKENS = 8_192
_ACCELERATOR_TOKENS = 131_072


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

    def rewards(self, sequences: Sequence[Sequence[int]]) -> np.ndarray:
        """The meta rewards `f32[n]` of n token sequences, from `tokens`."""
        lengths = np.asarray([len(ids) for ids in sequences], np.int32)
        size = bucket(int(lengths.max()))
        rows = max(1, (_CPU_TOKENS if on_cpu(self.params) else _ACCELERATOR_TOKENS) // size)
        # Whole powers of two, so that few programs are compiled.
        parts = batch_parts(self.mesh)
        rows = parts * min(1 << (rows.bit_length() - 1), power_of_two(-(-len(sequences) // parts)))
        out = []
        with contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh):
            for first in range(0, len(sequences), rows):
                part = sequences[first : first + rows]
                tokens = np.zeros((rows, size), np.int32)
                held = np.ones(rows, np.int32)
                for row, ids in enumerate(part):
                    tokens[row, : len(ids)] = ids
                    held[row] = len(ids)
                tokens, held = split_rows((tokens, held), self.mesh)
                found = _reward(self.params, self.config, tokens, held)
                out.append(np.asarray(found)[: len(part)])
        return np.concatenate(out)
