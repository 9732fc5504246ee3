"""What a judge says of a comparison: its samples and their vote."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One sampled judgement.

    Attributes:
      order: Input indices of the responses in the order in which this sample saw them.
      scores: One score a response, in input order, as sampled; None if unreadable.
      meta: The meta reward model's reward; None without one.
      text: What the model wrote; it speaks of the responses in its own order.
      finish: `"stop"` if the model ended its turn, `"length"` if its tokens ran out.
      expected: The mean of each score under the judge's own distribution, given what it had written
        before it, in input order; where it is there, it votes in place of the scores.
      logprob: The mean log-probability of the tokens that the model wrote, at the temperature at
        which they were sampled; None if it was not asked for.
    """

    order: tuple[int, ...]
    scores: tuple[float, ...] | None
    meta: float | None
    text: str
    finish: str
    expected: tuple[float, ...] | None = None
    logprob: float | None = None

    @property
    def votes(self) -> tuple[float, ...] | None:
        """What the sample gives each response: expected scores if it has them; None without any."""
        return self.scores if self.expected is None else self.expected

    def to_record(self) -> dict[str, Any]:
        """The sample as a JSON-ready object; what was not asked for has no key."""
        record: dict[str, Any] = {
            "order": list(self.order),
            "scores": None if self.scores is None else list(self.scores),
            "meta": self.meta,
            "text": self.text,
            "finish": self.finish,
        }
        if self.expected is not None:
            record["expected"] = list(self.expected)
        if self.logprob is not None:
            record["logprob"] = self.logprob
        return record


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """The vote on one comparison, or why there is none.

    Attributes:
      id: The record's name.
      scores: The vote: the sum over readable samples, or over those of them that the meta reward
        model trusts most, one number a response, in input order (eq 14, arXiv:2504.02495). None
        if the record could not be judged.
      ranking: Indices of the responses, best first; ties are broken at random from the seed.
      best: The first of them.
      tied: Indices of all responses with the top score.
      valid_samples: How many samples had readable scores.
      samples: The samples; fewer than were asked for where they stopped early.
      prompt_tokens: Tokens of the distinct prompts; each is read once for all its samples.
      completion_tokens: Tokens sampled.
      seconds: Wall time, shared among what ran together.
      error: One line saying why the record could not be judged; None if it was.
    """

    id: str
    scores: tuple[float, ...] | None = None
    ranking: tuple[int, ...] = ()
    best: int | None = None
    tied: tuple[int, ...] = ()
    valid_samples: int = 0
    samples: tuple[Sample, ...] = ()
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    error: str | None = None

    def winning_sample(self) -> Sample | None:
        """The readable sample that most prefers the winner, in points; the first of equals."""
        if self.best is None:
            return None
        best = self.best

        def margin(sample: Sample) -> float:
            scores = sample.votes or ()
            rest = [score for index, score in enumerate(scores) if index != best]
            return scores[best] - max(rest) if rest else scores[best]

        return max((s for s in self.samples if s.scores is not None), key=margin)

    def to_record(self) -> dict[str, Any]:
        """The judgement as a JSON-ready object; `error` takes the place of the vote."""
        outcome: dict[str, Any] = {"error": self.error}
        if self.error is None:
            outcome = {
                "scores": list(self.scores or ()),
                "ranking": list(self.ranking),
                "best": self.best,
                "tied": list(self.tied),
            }
        return {
            "id": self.id,
            **outcome,
            "valid_samples": self.valid_samples,
            "samples": [sample.to_record() for sample in self.samples],
            "usage": {
                "prompt_tokens": self.prompt_tokens,
                "completion_tokens": self.completion_tokens,
                "seconds": round(self.seconds, 3),
            },
        }
