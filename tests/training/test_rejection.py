"""Rejection, with cases worked out by hand."""

from typing import Any

import pytest

from grm_jax.data import Comparison, from_record
from grm_jax.data.trajectories import Trajectory
from grm_jax.training.rejection import (
    Verdict,
    balance_places,
    count_verdicts,
    reject,
    verdict_table,
)


def made(kinds: str, name: str = "c") -> list[Trajectory]:
    """Trajectories by letter: right, wrong, unreadable, cut off; capitals have seen a hint."""
    scores: dict[str, Any] = {"r": (9, 1), "w": (1, 9), "u": None, "c": (9, 1)}
    return [
        Trajectory(
            id=name,
            order=(1, 0) if kind.isupper() else (0, 1),
            hinted=kind.isupper(),
            text=kind,
            scores=scores[kind.lower()],
            finish="length" if kind in "cC" else "stop",
            correct=kind.lower() in "rc",
        )
        for kind in kinds
    ]


def letters(verdicts: list[Verdict]) -> str:
    names = {
        Verdict.KEPT: "k",
        Verdict.WRONG: "w",
        Verdict.UNREADABLE: "u",
        Verdict.TOO_EASY: "e",
        Verdict.CUT_OFF: "c",
        Verdict.UNUSED: "-",
        Verdict.UNBALANCED: "b",
    }
    return "".join(names[verdict] for verdict in verdicts)


@pytest.mark.parametrize(
    ("kinds", "settings", "verdicts"),
    [
        ("rwr", {}, "kwk"),
        ("rrr", {}, "eee"),
        ("rrr", {"too_easy": False}, "kkk"),
        ("rru", {}, "kku"),
        # One try that is right says nothing about how easy it was.
        ("r", {}, "k"),
        ("rcw", {}, "kcw"),
        ("rcc", {}, "eee"),
        # A hint helps where all tries failed, whatever it was that failed.
        ("wuwR", {}, "wuwk"),
        ("wwwW", {}, "wwww"),
        ("wwwU", {}, "wwwu"),
        ("wwwC", {}, "wwwc"),
        ("wwrR", {}, "wwk-"),
        ("R", {}, "k"),
        ("wwrR", {"hinted": "all"}, "wwkk"),
        # What is too easy without a hint does not touch what was written with one.
        ("rrrR", {"hinted": "all"}, "eeek"),
        ("rrrR", {"hinted": "failed"}, "eee-"),
        ("wwwR", {"hinted": "off"}, "www-"),
        ("rwrRW", {"hinted": "all", "non_hinted": False}, "---kw"),
        ("", {}, ""),
    ],
)
def test_verdicts(kinds: str, settings: dict[str, Any], verdicts: str) -> None:
    assert letters(reject(made(kinds), **settings)) == verdicts


def test_comparisons_do_not_touch_each_other() -> None:
    easy, hard, failed = made("rr", "a"), made("rw", "b"), made("wwR", "c")
    assert letters(reject([*easy, *hard, *failed])) == "eekwwwk"
    mixed = [failed[2], easy[0], hard[1], failed[0], easy[1], hard[0], failed[1]]
    assert letters(reject(mixed)) == "kewwekw"


def known() -> dict[str, Comparison]:
    turns = {"messages": [{"role": "user", "content": "2 + 2?"}]}
    records = [
        {
            "id": "a",
            "responses": ["4", "5"],
            "source": "sums",
            "subset": "easy",
            "label": {"kind": "best", "index": 0},
        },
        {"id": "b", "responses": ["4"], "label": {"kind": "pointwise", "correct": True}},
    ]
    return {record["id"]: from_record(turns | record) for record in records}


def test_counts_by_hand() -> None:
    trajectories = [*made("wwR", "a"), *made("u", "b")]
    counts = count_verdicts(trajectories, reject(trajectories), known())

    def some(**found: int) -> dict[str, int]:
        return {str(verdict): 0 for verdict in Verdict} | found

    assert counts == {
        "all": {"all": some(kept=1, wrong=2, unreadable=1)},
        "hint": {"hinted": some(kept=1), "not hinted": some(wrong=2, unreadable=1)},
        "source": {"no source": some(unreadable=1), "sums / easy": some(kept=1, wrong=2)},
        # The hinted one saw the responses in the reverse order.
        "position": {
            "best shown as 1": some(wrong=2),
            "best shown as 2": some(kept=1),
            "single, correct": some(unreadable=1),
        },
    }
    assert verdict_table({aspect: counts[aspect] for aspect in ("all", "hint")}) == (
        "trajectories  kept  wrong  unreadable\n"
        "all              1      2           1\n"
        "hinted           1      0           0\n"
        "not hinted       0      2           1"
    )


def test_places_are_balanced_by_what_is_kept_alone() -> None:
    # Hinted ones show the best response second, the others first; the single response has no place.
    trajectories = [*made("rrwrrrR", "a"), *made("WRr", "a"), *made("r", "b")]
    verdicts = reject(trajectories, hinted="all")
    assert letters(verdicts) == "kkwkkkkwkkk"
    balanced = balance_places(trajectories, verdicts, known())
    # Of six that show it first, two are left as far apart as can be.
    assert letters(balanced) == "kbwbkbkwkbk"
    # Nothing is left where a place has none.
    alone = made("rr", "a")
    settings = {"too_easy": False}
    assert letters(balance_places(alone, reject(alone, **settings), known())) == "bb"
