"""The layout constraint: a small automaton over tokens that a sample is made to follow.

An untuned model hardly ever writes a readable score. Masking its logits by the layout of a
judgement (criteria, analysis, scores in a box) makes every sample readable and keeps its length
within a budget, while the text in between stays the model's own. The automaton is built on the host
for one tokenizer and number of responses, and stepped inside the jitted decoding loop.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from grm_jax import grammar
from grm_jax.errors import UsageError
from grm_jax.prompts import Tokenizer

_STATE_BUCKET = 64
_EDGE_BUCKET = 16  # eleven are needed where digits are tokens: they and what follows a number
_CRITERIA_SHARE = 0.4


class Layout(NamedTuple):
    """The automaton as arrays over its S states, A edges each.

    In a *free* state any text token may be sampled while the section's budget lasts, after that
    only the first edge; in any other state only tokens on edges may.

    Attributes:
      tokens: `i32[S, A]`, the tokens singled out; -1 where there is none.
      targets: `i32[S, A]`, the state each leads to.
      free: `bool[S]`.
      other: `i32[S]`, where a token that is on no edge leads (free states only).
      section: `i32[S]`, the section a state belongs to; the count of tokens starts again with it.
      budget: `i32[S]`, free tokens that the section may take.
    """

    tokens: jax.Array
    targets: jax.Array
    free: jax.Array
    other: jax.Array
    section: jax.Array
    budget: jax.Array


@dataclasses.dataclass(kw_only=True)
class _Builder:
    tokens: list[list[int]] = dataclasses.field(default_factory=list)
    targets: list[list[int]] = dataclasses.field(default_factory=list)
    free: list[bool] = dataclasses.field(default_factory=list)
    other: list[int] = dataclasses.field(default_factory=list)
    section: list[int] = dataclasses.field(default_factory=list)
    budget: list[int] = dataclasses.field(default_factory=list)

    @property
    def next(self) -> int:
        return len(self.tokens)

    def add(self, edges: Sequence[tuple[int, int]], section: int) -> None:
        self.tokens.append([token for token, _ in edges])
        self.targets.append([target for _, target in edges])
        self.free.append(False)
        self.other.append(0)
        self.section.append(section)
        self.budget.append(0)

    def forced(self, ids: Sequence[int], section: int) -> None:
        for token in ids:
            self.add([(token, self.next + 1)], section)

    def text(self, closing: Sequence[int], budget: int, section: int) -> None:
        """Free text, ended by the budget or by the model itself writing `closing`."""
        first = self.next
        for matched, token in enumerate(closing):
            edges = [(token, first + matched + 1)]
            for other in dict.fromkeys(closing):
                back = _longest_start(closing, [*closing[:matched], other])
                if other != token and back:
                    edges.append((other, first + back))
            self.add(edges, section)
            self.free[-1] = True
            self.other[-1] = first
            self.budget[-1] = budget

    def number(self, after: Mapping[tuple[int, ...], tuple[int, int]], section: int) -> None:
        """One of the spellings (token sequences), then the token that leads on from it.

        Args:
          after: For each spelling, that token and the state it leads to.
          section: Of all its states.
        """
        prefixes = _prefixes(after)
        state = {prefix: self.next + i for i, prefix in enumerate(prefixes)}
        for prefix in prefixes:
            edges = [
                (longer[-1], state[longer])
                for longer in prefixes
                if len(longer) == len(prefix) + 1 and longer[:-1] == prefix
            ]
            if prefix in after:
                edges.append(after[prefix])
            self.add(edges, section)


def _prefixes(spellings: Iterable[tuple[int, ...]]) -> list[tuple[int, ...]]:
    return sorted({one[:size] for one in spellings for size in range(len(one) + 1)}, key=len)


def _longest_start(whole: Sequence[int], written: Sequence[int]) -> int:
    """How much of the beginning of `whole` the end of `written` is."""
    return next(
        size
        for size in range(min(len(whole), len(written)), -1, -1)
        if list(whole[:size]) == list(written[len(written) - size :])
    )


def judgement_layout(
    tokenizer: Tokenizer,
    *,
    count: int,
    max_new_tokens: int,
    low: int = grammar.DEFAULT_LOW,
    high: int = grammar.DEFAULT_HIGH,
    answer: int | None = None,
) -> Layout:
    """The layout of a judgement with `count` scores from `low` to `high`.

    What the markers and scores leave of `max_new_tokens` is divided between criteria (two fifths)
    and analysis. With an answer, only right scores are allowed: what is sampled then are scores
    that a judge gives after what it wrote, if it gives right ones.

    Args:
      tokenizer: Of the model that is sampled.
      count: Scores in the box.
      max_new_tokens: Tokens that a sample may take, its end-of-turn token included.
      low: Least score.
      high: Greatest score.
      answer: The place of the response whose score must be above all others, or the score itself if
        there is one response; None for any scores.

    Returns:
      The automaton; samples start in state 0.

    Raises:
      UsageError: If the markers and scores alone take more than `max_new_tokens`.
    """
    opening = tokenizer.encode(grammar.CRITERIA)
    analysis = tokenizer.encode("\n\n" + grammar.ANALYSIS)
    scores = tokenizer.encode(f"\n\n{grammar.SCORES} {grammar.BOX_OPEN}")
    comma, *gap = tokenizer.encode(", ")
    (close,) = tokenizer.encode(grammar.BOX_CLOSE)
    spellings = {value: tuple(tokenizer.encode(str(value))) for value in range(low, high + 1)}
    longest = max(map(len, spellings.values()))
    fixed = len(opening) + len(analysis) + len(scores) + 1
    fixed += count * (longest + 1) + (count - 1) * len(gap)
    spare = max_new_tokens - fixed
    if spare < 2:
        raise UsageError(
            f"{count} scores and their headings take {fixed} tokens: raise max_new_tokens from "
            f"{max_new_tokens} to at least {fixed + 2} (a few hundred leave room for a critique)"
        )
    criteria_budget = max(1, int(spare * _CRITERIA_SHARE))
    b = _Builder()
    b.forced(opening, section=0)
    b.text(analysis, budget=criteria_budget, section=1)
    b.text(scores, budget=spare - criteria_budget, section=2)
    places = _score_places(count, low, high, answer)
    # Where each begins, behind the gap that leads to it.
    begins: dict[tuple[int, int], int] = {}
    free = b.next
    for place, bounds in places.items():
        begins[place] = free
        free += len(gap) * bool(place[0]) + len(_prefixes(spellings[value] for value in bounds))
    for (index, _), bounds in places.items():
        b.forced(gap if index else (), section=3)
        last = index == count - 1
        after = {
            spellings[value]: (close, free) if last else (comma, begins[index + 1, bound])
            for value, bound in bounds.items()
        }
        b.number(after, section=3)
    b.forced(tokenizer.eos_ids[:1], section=3)
    states = b.next
    size = -(-states // _STATE_BUCKET) * _STATE_BUCKET
    width = -(-max(map(len, b.tokens)) // _EDGE_BUCKET) * _EDGE_BUCKET

    def table(rows: Sequence[Sequence[int]], fill: int) -> jax.Array:
        out = np.full((size, width), fill, np.int32)
        for i, row in enumerate(rows):
            out[i, : len(row)] = row
        return jnp.asarray(out)

    def column(values: Sequence[int]) -> jax.Array:
        return jnp.asarray(np.pad(np.asarray(values, np.int32), (0, size - states)))

    return Layout(
        tokens=table(b.tokens, -1),
        targets=table(b.targets, 0),
        free=column(b.free).astype(bool),
        other=column(b.other),
        section=column(b.section),
        budget=column(b.budget),
    )


def _score_places(
    count: int, low: int, high: int, answer: int | None
) -> dict[tuple[int, int], dict[int, int]]:
    """Which scores may stand where, and the bound that each sets for those behind it.

    A place is an index and the bound that earlier scores set.
    """
    found: dict[tuple[int, int], dict[int, int]] = {}
    reached = {low - 1}
    for index in range(count):
        for bound in sorted(reached):
            found[index, bound] = _scores_at(index, bound, count, low, high, answer)
        reached = {b for bound in reached for b in found[index, bound].values()}
    return found


def _scores_at(
    index: int, bound: int, count: int, low: int, high: int, answer: int | None
) -> dict[int, int]:
    """The scores of a place with their bounds: the best score's, or the highest before it."""
    if answer is None:
        return dict.fromkeys(range(low, high + 1), bound)
    if count == 1:
        return {answer: bound}
    if index < answer:
        return {value: max(bound, value) for value in range(low, high)}
    if index > answer:
        return dict.fromkeys(range(low, bound), bound)
    # Below it there must be room for those that follow.
    least = max(bound, low - (index == count - 1)) + 1
    return {value: value for value in range(least, high + 1)}


class LayoutState(NamedTuple):
    """Where one sample stands: its state and the free tokens spent in its section."""

    state: jax.Array
    used: jax.Array


def allowed_edges(layout: Layout, at: LayoutState) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What may be sampled next.

    Returns:
      `free bool[]`: whether any text token may; else only `tokens i32[A]` where `open bool[A]`.
    """
    spent = at.used >= layout.budget[at.state]
    free = layout.free[at.state] & ~spent
    tokens = layout.tokens[at.state]
    first = jnp.arange(tokens.shape[0]) == 0
    open_ = (tokens >= 0) & (first | ~layout.free[at.state])
    return free, tokens, open_


def advance(layout: Layout, at: LayoutState, token: jax.Array) -> LayoutState:
    """The state after `token`."""
    hit = layout.tokens[at.state] == token
    on_edge = hit.any()
    target = jnp.where(on_edge, layout.targets[at.state][hit.argmax()], layout.other[at.state])
    same = layout.section[target] == layout.section[at.state]
    return LayoutState(target, jnp.where(same, at.used + 1, 0))
