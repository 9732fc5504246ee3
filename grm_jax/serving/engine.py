"""What a judge's model does for the service: judgements and plain answers, as plans for a batcher.

Requests may choose settings of their own where that costs no memory and no new kind of program
without bound: the template, top-k, the meta model and what votes are the server's.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

from grm_jax.completion import Completion, chat_jobs, read_answers
from grm_jax.data import Comparison, Judgement, Message
from grm_jax.judge import GRM, Opener
from grm_jax.prompts import Template
from grm_jax.rounds import plan_record
from grm_jax.sampling import MetaModel
from grm_jax.sampling.batching import JudgeSampler, PromptJob, PromptResult, SamplingSettings
from grm_jax.serving.batcher import Plan


@final
@dataclass(frozen=True, kw_only=True)
class JudgeRequest:
    """A comparison to be judged, and how; the fields are those of `GRM.judge_batch`."""

    comparison: Comparison
    samples: int
    temperature: float
    top_p: float
    max_new_tokens: int
    orders: str
    constrain: bool
    seed: int


@final
@dataclass(frozen=True, kw_only=True)
class ChatRequest:
    """A conversation to be answered, and how; as in `grm_jax.completion.complete`."""

    messages: tuple[Message, ...]
    samples: int
    temperature: float
    top_p: float
    max_new_tokens: int
    seed: int


@final
@dataclass(frozen=True, kw_only=True)
class Answers:
    """The answers to a conversation.

    Attributes:
      completions: One for each sample.
      prompt_tokens: Tokens of the conversation.
    """

    completions: tuple[Completion, ...]
    prompt_tokens: int


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class ModelEngine:
    """A judge and those of its settings that requests cannot change.

    Attributes:
      grm: The judge.
      template: Of the judge prompt.
      top_k: Sample among this many likeliest tokens; 0 for all.
      meta_model: Says which samples to trust.
      k_meta: How many of them vote; half if None.
      scores: What of a sample votes, as in `GRM.judge_batch`.
    """

    grm: GRM
    template: Template
    top_k: int = 0
    meta_model: MetaModel | None = None
    k_meta: int | None = None
    scores: str = "sampled"

    @functools.cached_property
    def _samplers(self) -> dict[SamplingSettings, JudgeSampler]:
        return {}

    def _sampler(self, settings: SamplingSettings) -> JudgeSampler:
        # They hold little but tables of layouts, yet clients choose the settings.
        if settings not in self._samplers and len(self._samplers) >= 64:
            self._samplers.clear()
        return self._samplers.setdefault(settings, self.grm.sampler(settings))

    def plan(self, request: JudgeRequest | ChatRequest) -> Plan:
        """How a request is worked off.

        Raises:
          UsageError: If a setting is wrong or a conversation cannot be answered.
        """
        match request:
            case JudgeRequest():
                return self._judge(request)
            case ChatRequest():
                return self._chat(request)

    def _judge(self, request: JudgeRequest) -> Plan:
        settings = SamplingSettings(
            temperature=request.temperature,
            top_k=self.top_k,
            top_p=request.top_p,
            max_new_tokens=request.max_new_tokens,
            constrain=request.constrain,
            low=self.template.low,
            high=self.template.high,
        )
        sampler = self._sampler(settings)
        planned = plan_record(
            sampler,
            request.comparison,
            template=self.template,
            samples=request.samples,
            orders=request.orders,
            seed=request.seed,
            hinted=False,
        )
        voters = request.samples
        if self.meta_model is not None:
            voters = min(voters, self.k_meta or max(1, request.samples // 2))

        def finish(results: Sequence[PromptResult]) -> Judgement:
            return self.grm._judgement(
                planned, results, request.samples, request.seed, self.meta_model, voters
            )

        opener = self.grm.opener(sampler, self.scores)
        return _plan(sampler, planned.jobs, finish, opener, kind=self.scores)

    def _chat(self, request: ChatRequest) -> Plan:
        settings = SamplingSettings(
            temperature=request.temperature,
            top_k=self.top_k,
            top_p=request.top_p,
            max_new_tokens=request.max_new_tokens,
        )
        sampler = self._sampler(settings)
        messages = [{"role": turn["role"], "content": turn["content"]} for turn in request.messages]
        jobs = chat_jobs(sampler, messages, samples=request.samples, seed=request.seed)

        def finish(results: Sequence[PromptResult]) -> Answers:
            return Answers(
                completions=tuple(read_answers(sampler, results)),
                prompt_tokens=len(jobs[0].tokens),
            )

        return _plan(sampler, jobs, finish, self.grm.opener(sampler, "sampled"), kind="sampled")


def _plan(
    sampler: JudgeSampler,
    jobs: Sequence[PromptJob],
    finish: Callable[[Sequence[PromptResult]], object],
    opener: Opener,
    *,
    kind: str,
) -> Plan:
    return Plan(
        jobs=jobs,
        # Jobs that share a stream run in one that any of them has opened.
        shape=lambda job: (kind, sampler.settings, sampler.shape(job)),
        open_stream=lambda shape: opener(shape[-1]),
        finish=finish,
    )
