"""Judgements of a benchmark as arrays: what all numbers of a report are computed from."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, assert_never

import numpy as np

from grm_jax.data import BestLabel, Comparison, PointwiseLabel, ScoresLabel
from grm_jax.errors import UsageError


@dataclass(frozen=True, kw_only=True, eq=False)
class Judged:
    """`C` comparisons with `K` samples each, of `N` responses at most.

    Attributes:
      comparisons: What was judged.
      scores: `f64[C, K, N]`, as sampled, in input order; 0 where unreadable.
      expected: `f64[C, K, N]`, expected scores; None if none were recorded.
      drawn: `bool[C, K]`, which samples there are: not all, where sampling stopped early or a
        comparison could not be judged.
      valid: `bool[C, K]`, which samples could be read.
      meta: `f64[C, K]`, meta rewards; None without a meta model.
      logprob: `f64[C, K]`, mean log-probabilities of what the judge wrote; None if not recorded.
      orders: `i32[C, K, N]`, input index of the response at each place; -1 beyond the responses,
        and throughout where responses were not shown together.
      right: `bool[C, N]`, the responses that the label calls best.
      counts: `i32[C]`, responses of each comparison.
      lengths: `i64[C, N]`, characters of each response.
      decidable: `bool[C]`, whether there are two or more responses and not all are equally good.
      pointwise: `bool[C]`, whether there is one response that is correct or not.
      positive: `bool[C]`, whether it is correct.
      errors: For each comparison why it could not be judged, or None.
      prompt_tokens: `i64[C]`, of all distinct prompts.
      completion_tokens: `i64[C]`, of all samples.
      seconds: `f64[C]`, wall time.
    """

    comparisons: tuple[Comparison, ...]
    scores: np.ndarray
    expected: np.ndarray | None
    drawn: np.ndarray
    valid: np.ndarray
    meta: np.ndarray | None
    logprob: np.ndarray | None
    orders: np.ndarray
    right: np.ndarray
    counts: np.ndarray
    lengths: np.ndarray
    decidable: np.ndarray
    pointwise: np.ndarray
    positive: np.ndarray
    errors: tuple[str | None, ...]
    prompt_tokens: np.ndarray
    completion_tokens: np.ndarray
    seconds: np.ndarray

    @property
    def samples(self) -> int:
        """K."""
        return self.scores.shape[1]

    @property
    def stopped_early(self) -> bool:
        """Whether some comparison has only a part of its K samples."""
        drawn = self.drawn.sum(axis=1)
        return bool(np.any((drawn > 0) & (drawn < self.samples)))

    def distinct_prompts(self) -> list[np.ndarray]:
        """For each comparison how many samples saw each distinct order of its responses."""
        return [
            np.unique(rows[drawn] if drawn.any() else rows, axis=0, return_counts=True)[1]
            for rows, drawn in zip(self.orders, self.drawn, strict=True)
        ]


def judged_from_records(
    comparisons: Sequence[Comparison], records: Iterable[Mapping[str, Any]], samples: int
) -> Judged:
    """Arrays of judgement records, as `Judgement.to_record` writes them.

    Args:
      comparisons: What was judged.
      records: The judgement of each.
      samples: K.

    Raises:
      UsageError: If a record is of another comparison, or malformed.
    """
    size, width = len(comparisons), max(len(c.responses) for c in comparisons)
    scores = np.zeros((size, samples, width))
    expected = np.full((size, samples, width), np.nan)
    meta, logprob = np.full((2, size, samples), np.nan)
    drawn, valid = np.zeros((2, size, samples), bool)
    orders = np.full((size, samples, width), -1, np.int32)
    prompt, completion, seconds = np.zeros((3, size))
    errors: list[str | None] = []
    for row, (comparison, record) in enumerate(zip(comparisons, records, strict=True)):
        if record["id"] != comparison.id:
            raise UsageError(
                f"the judgement of {record['id']!r} stands where that of {comparison.id!r} should"
            )
        errors.append(record.get("error"))
        for place, sample in enumerate(record["samples"][:samples]):
            drawn[row, place] = True
            count = len(comparison.responses)
            if sample["order"]:
                orders[row, place, :count] = sample["order"]
            if sample["scores"] is not None:
                scores[row, place, :count] = sample["scores"]
                expected[row, place, :count] = sample.get("expected", np.nan)
                valid[row, place] = True
            meta[row, place] = _number(sample["meta"])
            logprob[row, place] = _number(sample.get("logprob"))
        usage = record["usage"]
        prompt[row], completion[row] = usage["prompt_tokens"], usage["completion_tokens"]
        seconds[row] = usage["seconds"] or 0.0
    counts = np.array([len(comparison.responses) for comparison in comparisons])
    right = np.array([_right(comparison, width) for comparison in comparisons])
    lengths = np.zeros((size, width), np.int64)
    for row, comparison in enumerate(comparisons):
        lengths[row, : counts[row]] = [len(text) for text in comparison.responses]
    labels = [comparison.label for comparison in comparisons]
    marked = right.sum(axis=1)
    return Judged(
        comparisons=tuple(comparisons),
        scores=scores,
        expected=None if np.isnan(expected).all() else np.nan_to_num(expected),
        drawn=drawn,
        valid=valid,
        meta=None if np.isnan(meta).all() else meta,
        logprob=None if np.isnan(logprob).all() else logprob,
        orders=orders,
        right=right,
        counts=counts,
        lengths=lengths,
        decidable=(counts > 1) & (marked > 0) & (marked < counts),
        pointwise=np.array([isinstance(label, PointwiseLabel) for label in labels]),
        positive=np.array([isinstance(x, PointwiseLabel) and x.correct for x in labels]),
        errors=tuple(errors),
        prompt_tokens=prompt.astype(np.int64),
        completion_tokens=completion.astype(np.int64),
        seconds=seconds,
    )


def read_judgements(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a file of judgements, one by one."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def _number(value: float | None) -> float:
    return np.nan if value is None else value


def _right(comparison: Comparison, width: int) -> np.ndarray:
    marks = np.zeros(width, bool)
    match comparison.label:
        case BestLabel(index):
            marks[index] = True
        case ScoresLabel(values):
            marks[: len(values)] = np.asarray(values) == max(values)
        case PointwiseLabel() | None:
            pass
        case label:
            assert_never(label)
    return marks
