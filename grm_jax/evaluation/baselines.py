"""Judges that are no generative reward models, asked so that all are measured alike.

Each turns comparisons into judgements whose samples hold one number a response, and whose vote is
their sum; so every tie policy, curve and interval applies to them as well. They are the baselines
of arXiv:2504.02495, section 5 and appendix C.2:

| kind | trained by | a sample's numbers |
| --- | --- | --- |
| `bt` | `bt` | the scalar of each response; there is one sample |
| `pairwise` | `pairwise` | the mean chance of each response to beat another, by both orders |
| `cloud` | `cloud` | the scalar of each response behind a critique of it, which a critic samples |
| `verdict` | any | 1 for the response that the judge names and 0 for the others (eq 13) |
"""

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import final

import numpy as np

from grm_jax.completion import complete
from grm_jax.data import Comparison, Judgement, Sample, turns
from grm_jax.errors import UsageError
from grm_jax.evaluation.verdicts import concluded
from grm_jax.judge import GRM
from grm_jax.models import DecoderConfig
from grm_jax.prompts import render
from grm_jax.sampling import MetaModel
from grm_jax.training.bt import response_tokens
from grm_jax.training.pairwise import pair_tokens


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class ClassifierJudge:
    """A reward model that gives numbers and no critique, of the stage `bt` or `pairwise`.

    Attributes:
      model: The classifier.
      score: A number for each response, and how many tokens were read: `scalar_scores` or
        `pairwise_scores`.
    """

    model: MetaModel
    score: Callable[[MetaModel, Comparison], tuple[np.ndarray, int]]

    @property
    def config(self) -> DecoderConfig:
        """Of the decoder that costs are counted by."""
        return self.model.config

    def judge_batch(self, comparisons: Iterable[Comparison], *, seed: int) -> Iterator[Judgement]:
        """One judgement of one sample for each comparison, in order."""
        for comparison in comparisons:
            yield _scored(self._judge, comparison, seed)

    def _judge(self, comparison: Comparison) -> "_Found":
        scores, tokens = self.score(self.model, comparison)
        return _Found(samples=[_sample(scores)], prompts=tokens)


def scalar_scores(model: MetaModel, comparison: Comparison) -> tuple[np.ndarray, int]:
    """The scalar of each response, by a model of the stage `bt`; its template is not used.

    Returns:
      The scores, float64 of shape [responses], and the number of tokens that were read.
    """
    read = [
        response_tokens(model.tokenizer, turns(comparison), response)
        for response in comparison.responses
    ]
    return _rewards(model, read), sum(map(len, read))


def pairwise_scores(model: MetaModel, comparison: Comparison) -> tuple[np.ndarray, int]:
    """The mean chance of each response to beat another, by a model of the stage `pairwise`.

    Its template shows it two responses, in both orders.

    Returns:
      The scores, float64 of shape [responses], and the number of tokens that were read.

    Raises:
      UsageError: There is only one response.
    """
    count = len(comparison.responses)
    if count < 2:
        raise UsageError("a pairwise judge compares, and there is only one response")
    pairs = list(itertools.permutations(range(count), 2))
    read = [
        pair_tokens(
            model.tokenizer,
            model.template,
            turns(comparison),
            comparison.responses[first],
            comparison.responses[second],
        )
        for first, second in pairs
    ]
    chances = 0.5 * (1 + np.tanh(_rewards(model, read) / 2))
    wins = np.zeros((count, count))
    for (first, second), chance in zip(pairs, chances, strict=True):
        wins[first, second] += chance / 2
        wins[second, first] += (1 - chance) / 2
    return wins.sum(axis=1) / (count - 1), sum(map(len, read))


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class CriticJudge:
    """A reward model that reads a critique before it gives a number, of the stage `cloud`.

    Attributes:
      model: The classifier, with the template that shows it a response.
      critic: Writes the critiques; it is shown the same prompt.
      temperature: At which it does.
      max_new_tokens: Of a critique.
    """

    model: MetaModel
    critic: GRM
    temperature: float
    max_new_tokens: int

    @property
    def config(self) -> DecoderConfig:
        """Of the decoder that costs are counted by: the critic, which writes."""
        return self.critic.config

    def judge_batch(
        self, comparisons: Iterable[Comparison], *, samples: int, seed: int
    ) -> Iterator[Judgement]:
        """One judgement for each comparison, in order, of as many samples: critiques of each."""
        for comparison in comparisons:
            yield _scored(lambda one: self._judge(one, samples, seed), comparison, seed)

    def _judge(self, comparison: Comparison, samples: int, seed: int) -> "_Found":
        messages = turns(comparison)
        chats = [
            render(self.model.template, messages, [response]) for response in comparison.responses
        ]
        written = complete(
            self.critic,
            chats,
            samples=samples,
            temperature=self.temperature,
            max_new_tokens=self.max_new_tokens,
            seed=seed,
        )
        drawn, prompts = [], 0
        for critiques in zip(*written, strict=True):
            read = [
                self.model.tokens(messages, [response], critique.text)
                for response, critique in zip(comparison.responses, critiques, strict=True)
            ]
            prompts += sum(map(len, read))
            text = "\n\n".join(
                f"[Response {number}]\n{critique.text}"
                for number, critique in enumerate(critiques, 1)
            )
            finish = "stop" if all(one.finish == "stop" for one in critiques) else "length"
            drawn.append(replace(_sample(_rewards(self.model, read)), text=text, finish=finish))
        tokens = sum(one.tokens for critiques in written for one in critiques)
        return _Found(samples=drawn, prompts=prompts, completions=tokens)


@dataclass(frozen=True, kw_only=True)
class _Found:
    """The samples of a comparison and the tokens that they took."""

    samples: Sequence[Sample]
    prompts: int
    completions: int = 0


def _scored(judge: Callable[[Comparison], _Found], comparison: Comparison, seed: int) -> Judgement:
    """The judgement of a comparison, or why there is none."""
    began = time.perf_counter()
    try:
        found = judge(comparison)
    except UsageError as error:
        return Judgement(id=comparison.id, error=str(error))
    return concluded(
        comparison,
        found.samples,
        seed=seed,
        prompt_tokens=found.prompts,
        completion_tokens=found.completions,
        seconds=time.perf_counter() - began,
    )


def _sample(scores: np.ndarray) -> Sample:
    """A sample that saw each response by itself."""
    return Sample(
        order=(),
        scores=tuple(round(float(score), 6) for score in scores),
        meta=None,
        text="",
        finish="stop",
    )


def _rewards(model: MetaModel, sequences: Sequence[Sequence[int]]) -> np.ndarray:
    longest, context = max(map(len, sequences)), model.config.max_context
    if longest > context:
        raise UsageError(
            f"a response and what it answers take {longest} tokens, but the model reads {context}; "
            "shorten the record"
        )
    return model.rewards(sequences).astype(np.float64)
