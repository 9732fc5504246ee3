"""LLM-as-a-judge: the judge names the best response, and samples vote by the majority.

With token probabilities a sample counts for the chance that the judge gave to the response it
named, among all that it could have named (arXiv:2504.02495, section 5, "TokenProb").
"""

import functools
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import TypeVar, final

import jax
import numpy as np

from grm_jax.data import Comparison, Judgement, Sample
from grm_jax.judge import GRM
from grm_jax.models import DecoderConfig
from grm_jax.prompts import Template
from grm_jax.rewards import rank, tied_for_best
from grm_jax.rounds import Planned, plan_record, record_key
from grm_jax.sampling import ScoreReader, run_in_order
from grm_jax.sampling.batching import (
    JobShape,
    JudgeSampler,
    PromptJob,
    PromptResult,
    SamplingSettings,
)
from grm_jax.sampling.stream import JudgeStream

Key = TypeVar("Key", bound=Hashable)
_Job = tuple[int, PromptJob]
"""How many responses there are to choose from, and what is to run."""


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class VerdictJudge:
    """A model that is asked for the number of the best response.

    Attributes:
      grm: The model.
      template: That asks so.
      settings: How it is sampled; the range of scores is that of the responses' numbers.
      probabilities: Whether to find out how likely the named response was to be named.
    """

    grm: GRM
    template: Template
    settings: SamplingSettings
    probabilities: bool = False

    @property
    def config(self) -> DecoderConfig:
        """Of the decoder that costs are counted by."""
        return self.grm.config

    @functools.cached_property
    def _samplers(self) -> dict[int, JudgeSampler]:
        return {}

    def _sampler(self, count: int) -> JudgeSampler:
        """What samples verdicts on so many responses: single scores from 1 to their number."""
        if count not in self._samplers:
            settings = replace(self.settings, low=1, high=count)
            self._samplers[count] = self.grm.sampler(settings)
        return self._samplers[count]

    @functools.cached_property
    def _readers(self) -> dict[int, ScoreReader]:
        return {}

    def _reader(self, count: int) -> ScoreReader:
        if count not in self._readers:
            self._readers[count] = ScoreReader(
                params=self.grm.params,
                config=self.grm.config,
                tokenizer=self.grm.tokenizer,
                low=1,
                high=count,
                mesh=self.grm.mesh,
            )
        return self._readers[count]

    def judge_batch(
        self, comparisons: Iterable[Comparison], *, samples: int, orders: str, seed: int
    ) -> Iterator[Judgement]:
        """One judgement for each comparison, in order; arguments as of `GRM.judge_batch`.

        A sample's scores are 1 for the response that it names and 0 for the others. With
        `probabilities` its expected scores hold the chance of that response in place of the 1.
        """

        def shape(job: _Job) -> tuple[int, JobShape]:
            return job[0], self._sampler(job[0]).shape(job[1])

        plans = (
            plan_record(
                self._sampler(len(comparison.responses)),
                comparison,
                template=self.template,
                samples=samples,
                orders=orders,
                hinted=False,
                seed=seed,
            )
            for comparison in comparisons
        )
        finished = run_in_order(
            plans,
            jobs=_jobs,
            shape=shape,
            open_stream=lambda found: _VerdictStream(self._sampler(found[0]), found[1]),
        )
        for plan, results in finished:
            yield self._judgement(plan, results, seed)

    def _judgement(self, plan: Planned, results: Sequence[PromptResult], seed: int) -> Judgement:
        if plan.comparison is None:
            return Judgement(id=plan.id, error=plan.error)
        drawn: dict[int, Sample] = {}
        for job, places, result in zip(plan.jobs, plan.places, results, strict=True):
            named = [
                job.order[int(score) - 1] if valid else None
                for score, valid in zip(result.scores[:, 0], result.valid, strict=True)
            ]
            chances = self._chances(job, result)
            for index, place in enumerate(places):
                best = named[index]
                drawn[place] = Sample(
                    order=job.order,
                    scores=_marked(best, len(job.order), 1),
                    meta=None,
                    text=self.grm.tokenizer.decode(result.tokens[index].tolist()),
                    finish="stop" if result.stopped[index] else "length",
                    expected=_marked(best, len(job.order), chances[index])
                    if self.probabilities
                    else None,
                )
        prompts = {job.order: len(job.tokens) for job in plan.jobs}
        return concluded(
            plan.comparison,
            [drawn[place] for place in sorted(drawn)],
            seed=seed,
            prompt_tokens=sum(prompts.values()),
            completion_tokens=int(sum(result.lengths.sum() for result in results)),
            seconds=sum(result.seconds for result in results),
        )

    def _chances(self, job: PromptJob, result: PromptResult) -> list[float]:
        """For each sample the chance of what it named; 0 where it named nothing."""
        if not self.probabilities:
            return [0.0] * len(result.tokens)
        texts = [
            tokens.tolist() if valid else None
            for tokens, valid in zip(result.tokens, result.valid, strict=True)
        ]
        found = self._reader(len(job.order)).distributions(job.tokens, texts, 1)
        return [
            0.0 if chance is None else round(float(chance[0, int(score) - 1]), 6)
            for chance, score in zip(found, result.scores[:, 0], strict=True)
        ]


def concluded(
    comparison: Comparison,
    samples: Sequence[Sample],
    *,
    seed: int,
    prompt_tokens: int,
    completion_tokens: int,
    seconds: float,
) -> Judgement:
    """The judgement that samples make of a comparison, by the sum of what they give.

    Args:
      comparison: What they are of.
      samples: All of them.
      seed: Breaks ties.
      prompt_tokens: Read.
      completion_tokens: Written.
      seconds: Taken.
    """
    count = len(comparison.responses)
    votes = [sample.votes for sample in samples if sample.votes is not None]
    judgement = Judgement(
        id=comparison.id,
        valid_samples=len(votes),
        samples=tuple(samples),
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        seconds=seconds,
        error=None if votes else f"none of the {len(samples)} samples is readable",
    )
    if not votes:
        return judgement
    totals: np.ndarray = np.round(np.sum(np.asarray(votes, np.float64), axis=0), 6)
    key = record_key(seed, comparison.id)
    ranking, tied = jax.device_get((rank(totals, count, key), tied_for_best(totals, count)))
    return replace(
        judgement,
        scores=tuple(float(total) for total in np.atleast_1d(totals)),
        ranking=tuple(ranking.tolist()),
        best=int(ranking[0]),
        tied=tuple(np.flatnonzero(tied).tolist()),
    )


@final
class _VerdictStream:
    """A stream of jobs that come with their number of responses."""

    def __init__(self, sampler: JudgeSampler, shape: JobShape) -> None:
        self._stream = JudgeStream(sampler, shape)

    @property
    def room(self) -> int:
        return self._stream.room

    @property
    def running(self) -> int:
        return self._stream.running

    def run(self, jobs: Mapping[Key, _Job], *, steps: int | None = None) -> dict[Key, PromptResult]:
        return self._stream.run({key: job for key, (_, job) in jobs.items()}, steps=steps)

    def drop(self, keys: Set[Hashable]) -> None:
        self._stream.drop(keys)


def _jobs(plan: Planned) -> list[_Job]:
    # One number is asked for, so that to the sampler there is one response.
    return [(len(job.order), replace(job, order=(0,))) for job in plan.jobs]


def _marked(best: int | None, count: int, worth: float) -> tuple[float, ...] | None:
    """Zeros but for the response that is named; None if none is."""
    if best is None:
        return None
    return tuple(worth if index == best else 0 for index in range(count))
