"""The host parser alone: its defaults, and inputs that only it can meet.

The grammar it follows is tested case by case, for both readers, in `tests/test_grammar.py`.
"""

import pytest

from grm_jax.grammar import ANALYSIS, BOX_CLOSE, BOX_OPEN, CRITERIA, SCORES
from grm_jax.prompts.scores import parse_scores


def test_a_whole_judgement():
    text = (
        f"**{CRITERIA}** 1. Accuracy (60%): \\boxed{{9}}.\n"
        f"### {ANALYSIS} Response 1 is exact; Response 2 is [sic] vague.\n"
        f"{SCORES} {BOX_OPEN}9, 4{BOX_CLOSE}\n\n[3, 7] is not an answer."
    )
    assert parse_scores(text, 2) == [9, 4]
    assert parse_scores(text, 1) is None


def test_scores_are_plain_integers_from_1_to_10_unless_said_otherwise():
    scores = parse_scores(r"\boxed{1, 10}", 2)
    assert scores is not None
    assert all(type(score) is int for score in scores)
    assert parse_scores(r"\boxed{0, 10}", 2) is None
    assert parse_scores(r"\boxed{1, 11}", 2) is None
    assert parse_scores(r"\boxed{0}", 1, low=0, high=1) == [0]


def test_many_responses():
    numbers = [1 + index % 10 for index in range(1000)]
    text = "\\boxed{" + ", ".join(map(str, numbers)) + "}"
    assert parse_scores(text, 1000) == numbers
    assert parse_scores(text, 999) is None


@pytest.mark.parametrize(
    "content", ["9" * 100_000, "0" * 100_000, "1," * 100_000, "{" * 100_000, "\\boxed{" * 20_000]
)
def test_long_texts_neither_fail_nor_pass(content):
    assert parse_scores("\\boxed{" + content + "}", 2) is None


def test_zeros_may_lead_without_end():
    assert parse_scores("\\boxed{" + "0" * 100_000 + "9}", 1) == [9]


@pytest.mark.parametrize("character", ["\ud800", "\x00", "\u200b", "\ufeff"])
def test_odd_characters_are_unreadable_inside_and_harmless_outside(character):
    assert parse_scores(character + r"\boxed{8, 5}" + character, 2) == [8, 5]
    assert parse_scores(r"\boxed{8," + character + "5}", 2) is None
