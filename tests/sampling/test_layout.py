import itertools
import re
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grm_jax.errors import UsageError
from grm_jax.prompts import Tokenizer, parse_scores
from grm_jax.sampling import Layout, judgement_layout
from grm_jax.sampling.layout import LayoutState, advance, allowed_edges

EOS = 257
TEXT = set(range(256))

_allowed = jax.jit(allowed_edges)
_advance = jax.jit(advance)


class Walk:
    """A sample on its way through a layout, one token at a time."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.at = LayoutState(jnp.int32(0), jnp.int32(0))
        self.tokens: list[int] = []

    def allowed(self) -> set[int]:
        free, tokens, open_ = jax.device_get(_allowed(self.layout, self.at))
        return TEXT if free else {int(token) for token in tokens[open_]}

    def step(self, token: int) -> None:
        assert token in self.allowed(), (self.text(), token)
        self.tokens.append(token)
        self.at = _advance(self.layout, self.at, np.int32(token))

    def write(self, text: str) -> None:
        for byte in text.encode():
            self.step(byte)

    def finish(self, choose: Callable[[set[int]], int], limit: int = 1000) -> None:
        """Goes on until the end of turn."""
        while EOS not in self.tokens:
            assert len(self.tokens) < limit, self.text()
            self.step(choose(self.allowed()))

    def text(self) -> str:
        return bytes(token for token in self.tokens if token < 256).decode(errors="replace")


def least_tokens(tokenizer: Tokenizer, **settings: Any) -> int:
    """The least `max_new_tokens`, as the error names it."""
    with pytest.raises(UsageError) as caught:
        judgement_layout(tokenizer, max_new_tokens=1, **settings)
    match = re.search(r"from 1 to at least (\d+)", str(caught.value))
    assert match is not None
    return int(match[1])


def chooser(seed: int) -> Callable[[Iterable[int]], int]:
    """Draws one of the tokens; in free text often one that a heading begins with."""
    rng = np.random.default_rng(seed)

    def choose(tokens: Iterable[int]) -> int:
        if tokens is TEXT and rng.random() < 0.5:
            return int(rng.choice(list(b"\nAS\\{},")))
        return int(rng.choice(sorted(tokens)))

    return choose


@pytest.mark.parametrize(("low", "high"), [(1, 10), (0, 1)])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_every_walk_ends_within_the_budget_and_is_readable(
    byte_tokenizer: Tokenizer, count: int, low: int, high: int
) -> None:
    least = least_tokens(byte_tokenizer, count=count, low=low, high=high)
    for seed, budget in enumerate((least, least + 1, least + 37, 200)):
        layout = judgement_layout(
            byte_tokenizer, count=count, max_new_tokens=budget, low=low, high=high
        )
        walk = Walk(layout)
        walk.finish(chooser(seed))
        assert len(walk.tokens) <= budget
        assert walk.tokens.index(EOS) == len(walk.tokens) - 1
        assert walk.text().startswith("Specific Criteria:")
        scores = parse_scores(walk.text(), count, low, high)
        assert scores is not None
        assert len(scores) == count
        assert all(low <= score <= high for score in scores)


@pytest.mark.parametrize("value", range(1, 11))
def test_every_score_can_be_written(byte_tokenizer: Tokenizer, value: int) -> None:
    walk = Walk(judgement_layout(byte_tokenizer, count=2, max_new_tokens=256))
    text = f"Specific Criteria: c\n\nAnalysis: a\n\nScores: \\boxed{{{value}, {11 - value}}}"
    walk.write(text)
    assert walk.allowed() == {EOS}
    assert parse_scores(walk.text(), 2) == [value, 11 - value]


def test_no_other_score_can_be_written(byte_tokenizer: Tokenizer) -> None:
    walk = Walk(judgement_layout(byte_tokenizer, count=2, max_new_tokens=256))
    walk.write("Specific Criteria:\n\nAnalysis:\n\nScores: \\boxed{")
    assert walk.allowed() == set(b"123456789")
    walk.write("1")
    assert walk.allowed() == set(b"0,")
    walk.write("0")
    assert walk.allowed() == set(b",")
    walk.write(", ")
    assert walk.allowed() == set(b"123456789")
    walk.write("9")
    assert walk.allowed() == set(b"}")


def follows(layout: Layout, tokens: list[int]) -> bool:
    """Whether a layout lets tokens be written, budgets aside."""
    edges, targets, free, other = (np.asarray(leaf) for leaf in layout[:4])
    state = 0
    for token in tokens:
        hit = np.flatnonzero(edges[state] == token)
        if not len(hit) and not free[state]:
            return False
        state = targets[state][hit[0]] if len(hit) else other[state]
    return True


@pytest.mark.parametrize("high", [4, 11])
@pytest.mark.parametrize(
    ("count", "answer"), [(2, None), (2, 0), (2, 1), (3, 0), (3, 1), (3, 2), (1, 3)]
)
def test_with_an_answer_all_right_scores_and_no_others_can_be_written(
    byte_tokenizer: Tokenizer, count: int, answer: int | None, high: int
) -> None:
    layout = judgement_layout(
        byte_tokenizer, count=count, max_new_tokens=200, high=high, answer=answer
    )
    for scores in itertools.product(range(1, high + 1), repeat=count):
        box = ", ".join(map(str, scores))
        text = f"Specific Criteria: a\n\nAnalysis: b\n\nScores: \\boxed{{{box}}}"
        if answer is None:
            right = True
        elif count == 1:
            right = scores[0] == answer
        else:
            rest = [score for place, score in enumerate(scores) if place != answer]
            right = scores[answer] > max(rest)
        assert follows(layout, [*text.encode(), EOS]) == right, scores


def test_scores_from_0_to_1(byte_tokenizer: Tokenizer) -> None:
    walk = Walk(judgement_layout(byte_tokenizer, count=1, max_new_tokens=128, low=0, high=1))
    walk.write("Specific Criteria:\n\nAnalysis:\n\nScores: \\boxed{")
    assert walk.allowed() == set(b"01")


def test_the_text_may_be_cut_short_by_writing_the_next_heading(byte_tokenizer: Tokenizer) -> None:
    walk = Walk(judgement_layout(byte_tokenizer, count=1, max_new_tokens=1000))
    walk.write("Specific Criteria: clear\n\nAnalysis:")
    assert walk.allowed() is TEXT
    walk.write(" fine\n\nAna \n\nScores: \\boxed{")
    assert walk.allowed() == set(b"123456789")


@pytest.mark.parametrize("before", ["\n", "\n\nA", "\n\nAnalysis", "\n\nAnalysis\n", "\n\n\n\nA"])
def test_a_heading_is_known_after_a_false_start(byte_tokenizer: Tokenizer, before: str) -> None:
    walk = Walk(judgement_layout(byte_tokenizer, count=1, max_new_tokens=1000))
    walk.write(f"Specific Criteria: c{before}\n\nAnalysis:")
    # Were it not known, this would be the criteria's text still, and the box could not open.
    walk.write("\n\nScores: \\boxed{")
    assert walk.allowed() == set(b"123456789")


def test_a_spent_budget_forces_the_next_heading(byte_tokenizer: Tokenizer) -> None:
    budget = 180
    walk = Walk(judgement_layout(byte_tokenizer, count=2, max_new_tokens=budget))

    def longest(tokens: set[int]) -> int:
        """Free text that is all "x", and scores as long as they can be."""
        if tokens is TEXT:
            return ord("x")
        return next((token for token in b"10" if token in tokens), min(tokens))

    walk.finish(longest)
    match = re.fullmatch(
        r"Specific Criteria:(x+)\n\nAnalysis:(x+)\n\nScores: \\boxed\{10, 10\}", walk.text()
    )
    assert match is not None
    assert len(walk.tokens) == budget
    assert len(match[1]) / len(match[1] + match[2]) == pytest.approx(0.4, abs=0.02)


def test_a_heading_that_the_budget_cuts_into_is_completed(byte_tokenizer: Tokenizer) -> None:
    budget = least_tokens(byte_tokenizer, count=1) + 8
    walk = Walk(judgement_layout(byte_tokenizer, count=1, max_new_tokens=budget))
    walk.write("Specific Criteria:x\n\nA")
    walk.finish(chooser(0))
    assert walk.text().startswith("Specific Criteria:x\n\nAnalysis:")
    assert len(walk.tokens) <= budget


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize(("low", "high"), [(1, 10), (0, 1), (0, 100)])
def test_the_least_budget_is_named_and_works(
    byte_tokenizer: Tokenizer, count: int, low: int, high: int
) -> None:
    settings = {"count": count, "low": low, "high": high}
    least = least_tokens(byte_tokenizer, **settings)
    with pytest.raises(UsageError, match=f"{least - 1} to at least {least} "):
        judgement_layout(byte_tokenizer, max_new_tokens=least - 1, **settings)
    walk = Walk(judgement_layout(byte_tokenizer, max_new_tokens=least, **settings))
    walk.finish(chooser(1))
    assert len(walk.tokens) <= least
    assert parse_scores(walk.text(), count, low, high) is not None
