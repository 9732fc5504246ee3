"""Plain answers from a judge's model: what it writes to a conversation, free of any layout."""

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax

from grm_jax.errors import UsageError
from grm_jax.judge import GRM
from grm_jax.prompts import encode_chat
from grm_jax.sampling import run_in_order
from grm_jax.sampling.batching import (
    JudgeSampler,
    PromptJob,
    PromptResult,
    SamplingSettings,
    sample_keys,
)
from grm_jax.sampling.stream import JudgeStream


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One answer.

    Attributes:
      text: What the model wrote.
      finish: `"stop"` if it ended its turn, `"length"` if its tokens ran out.
      tokens: How many it took, the end of its turn included.
    """

    text: str
    finish: str
    tokens: int


def chat_jobs(
    sampler: JudgeSampler, messages: Sequence[Mapping[str, str]], *, samples: int, seed: int
) -> list[PromptJob]:
    """The jobs that sample answers to a conversation.

    What is sampled depends on the conversation, the seed and the sample's number alone.

    Args:
      sampler: Of the model.
      messages: The conversation.
      samples: Answers wanted.
      seed: Of the samples.

    Raises:
      UsageError: If it is too long for the model, or the model's chat template refuses it.
    """
    tokens = encode_chat(sampler.tokenizer, messages)
    new, context = sampler.settings.max_new_tokens, sampler.config.max_context
    if len(tokens) + new > context:
        raise UsageError(
            f"the conversation takes {len(tokens)} tokens and the answer up to {new}, but the "
            f"model reads {context}; shorten one of them"
        )
    if len(tokens) < 2:
        raise UsageError("the conversation is empty")
    said = json.dumps([[turn["role"], turn["content"]] for turn in messages])
    digest = hashlib.blake2b(said.encode(), digest_size=4).digest()
    key = jax.random.fold_in(jax.random.key(seed), int.from_bytes(digest, "little"))
    keys = sample_keys(key, samples)
    room = sampler.room(samples, 1)
    return [
        PromptJob(tokens=tokens, order=(0,), keys=keys[first : first + room], room=room)
        for first in range(0, samples, room)
    ]


def read_answers(sampler: JudgeSampler, results: Sequence[PromptResult]) -> list[Completion]:
    """The answers that the jobs of a conversation gave, in order."""
    return [
        Completion(
            text=sampler.tokenizer.decode(tokens.tolist()),
            finish="stop" if stopped else "length",
            tokens=int(length),
        )
        for result in results
        for tokens, stopped, length in zip(
            result.tokens, result.stopped, result.lengths, strict=True
        )
    ]


def complete(
    grm: GRM,
    chats: Sequence[Sequence[Mapping[str, str]]],
    *,
    samples: int = 1,
    temperature: float = 0.7,
    top_p: float = 1.0,
    max_new_tokens: int = 256,
    seed: int = 0,
) -> list[list[Completion]]:
    """Samples answers to conversations.

    Args:
      grm: Whose model answers.
      chats: The conversations.
      samples: Answers to each.
      temperature: 0 takes the likeliest token.
      top_p: Sample among the likeliest tokens that make up this probability.
      max_new_tokens: Tokens an answer may take.
      seed: Of the samples.

    Returns:
      The answers to each conversation.

    Raises:
      UsageError: If a conversation is too long or a setting is wrong.
    """
    settings = SamplingSettings(temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens)
    sampler = grm.sampler(settings)
    finished = run_in_order(
        (chat_jobs(sampler, chat, samples=samples, seed=seed) for chat in chats),
        jobs=lambda jobs: jobs,
        shape=sampler.shape,
        open_stream=functools.partial(JudgeStream, sampler),
    )
    return [read_answers(sampler, results) for _, results in finished]
