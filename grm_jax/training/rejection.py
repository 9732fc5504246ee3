"""Rejection: which trajectories are worth learning from (section 3.2 of arXiv:2504.02495)."""

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Any

from grm_jax.data import Comparison, best_index
from grm_jax.data.comparison import PointwiseLabel
from grm_jax.data.trajectories import Trajectory
from grm_jax.training.heldout import evenly

HINTED = ("off", "failed", "all")
"""Of which comparisons hinted trajectories are used: of none, of those that no other trajectory
judged right, or of all."""

Counts = Mapping[str, int]


class Verdict(StrEnum):
    """What becomes of a trajectory."""

    KEPT = "kept"
    WRONG = "wrong"
    UNREADABLE = "unreadable"
    # Right, like all others without a hint: nothing is left to learn there.
    TOO_EASY = "too easy"
    # Right before it was cut off; it would teach to end in the middle.
    CUT_OFF = "cut off"
    # Of a kind that is not wanted.
    UNUSED = "unused"
    # More than its share of those that show the best response at this place.
    UNBALANCED = "unbalanced"


def reject(
    trajectories: Sequence[Trajectory],
    *,
    non_hinted: bool = True,
    hinted: str = "failed",
    too_easy: bool = True,
) -> list[Verdict]:
    """Judges the judgements.

    Without a hint, what is wrong is rejected, and so is all of a comparison whose trajectories are
    all right, of which there must be two or more, since one says little. With a hint, only what is
    wrong is rejected.

    Args:
      trajectories: Those of all comparisons, in any order.
      non_hinted: Whether to use trajectories without a hint.
      hinted: One of `HINTED`.
      too_easy: Whether to reject what is too easy.

    Returns:
      A verdict for each trajectory.
    """
    tries: Counter[str] = Counter()
    right: Counter[str] = Counter()
    for trajectory in trajectories:
        if not trajectory.hinted:
            tries[trajectory.id] += 1
            right[trajectory.id] += trajectory.correct

    def verdict(trajectory: Trajectory) -> Verdict:
        name = trajectory.id
        wanted = non_hinted
        if trajectory.hinted:
            wanted = hinted == "all" or (hinted == "failed" and not right[name])
        if not wanted:
            return Verdict.UNUSED
        if trajectory.scores is None:
            return Verdict.UNREADABLE
        if not trajectory.correct:
            return Verdict.WRONG
        if too_easy and not trajectory.hinted and right[name] == tries[name] > 1:
            return Verdict.TOO_EASY
        return Verdict.CUT_OFF if trajectory.finish == "length" else Verdict.KEPT

    return [verdict(trajectory) for trajectory in trajectories]


def balance_places(
    trajectories: Sequence[Trajectory],
    verdicts: Sequence[Verdict],
    comparisons: Mapping[str, Comparison],
) -> list[Verdict]:
    """Keeps as many trajectories for each place at which the best response is shown.

    A judge that likes the first response whatever it says is right where the best one comes first,
    so what is kept of its judgements would teach to like the first response. Those that go are
    spread over all that were kept; single responses have no place and stay.

    Args:
      trajectories: As for `reject`.
      verdicts: Its verdicts.
      comparisons: What was judged, by id.

    Returns:
      A verdict for each trajectory.
    """
    places: dict[int, dict[int, list[int]]] = {}
    for index, (trajectory, verdict) in enumerate(zip(trajectories, verdicts, strict=True)):
        best = best_index(comparisons[trajectory.id])
        count = len(trajectory.order)
        if verdict is Verdict.KEPT and count > 1 and best is not None:
            empty: dict[int, list[int]] = {place: [] for place in range(count)}
            places.setdefault(count, empty)[trajectory.order.index(best)].append(index)
    balanced = list(verdicts)
    for groups in places.values():
        share = min(map(len, groups.values()))
        for kept in groups.values():
            for index in set(kept) - set(evenly(kept, share) if share else []):
                balanced[index] = Verdict.UNBALANCED
    return balanced


def count_verdicts(
    trajectories: Sequence[Trajectory],
    verdicts: Sequence[Verdict],
    comparisons: Mapping[str, Comparison],
) -> dict[str, dict[str, Counts]]:
    """Counts verdicts in groups.

    Args:
      trajectories: As for `reject`.
      verdicts: Its verdicts.
      comparisons: What was judged, by id.

    Returns:
      By aspect and by group, how often there was each verdict: of `all`, by `hint`, by `source` and
      subset, and by the `position` of the best response in the order that was shown.
    """
    counts: dict[str, dict[str, Counter[str]]] = {}
    for trajectory, verdict in zip(trajectories, verdicts, strict=True):
        comparison = comparisons[trajectory.id]
        groups = {
            "all": "all",
            "hint": "hinted" if trajectory.hinted else "not hinted",
            "source": _source(comparison),
            "position": _position(comparison, trajectory),
        }
        for aspect, group in groups.items():
            counts.setdefault(aspect, {}).setdefault(group, Counter())[verdict] += 1
    return {
        aspect: {
            group: {str(verdict): found[verdict] for verdict in Verdict}
            for group, found in sorted(groups.items())
        }
        for aspect, groups in counts.items()
    }


def verdict_table(counts: Mapping[str, Mapping[str, Counts]]) -> str:
    """The counts of `count_verdicts` as lines of text; verdicts that never occur are left out."""
    groups = [group for aspect in counts.values() for group in aspect.items()]
    columns = [name for name in Verdict if any(found[name] for _, found in groups)]
    rows = [["trajectories", *columns]]
    rows += [[name, *(str(found[column]) for column in columns)] for name, found in groups]
    widths = [max(map(len, cells)) for cells in itertools.zip_longest(*rows, fillvalue="")]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    )


def _source(comparison: Comparison) -> str:
    named = [name for name in (comparison.source, comparison.subset) if name]
    return " / ".join(named) or "no source"


def _position(comparison: Comparison, trajectory: Trajectory) -> str:
    if isinstance(comparison.label, PointwiseLabel):
        return "single, correct" if comparison.label.correct else "single, not correct"
    best: Any = best_index(comparison)
    return f"best shown as {trajectory.order.index(best) + 1}"
