r"""Expected scores: the mean of each score under the judge's own distribution.

A sampled score is one draw. What the judge thought of the others it might have written is in its
logits, and can be read off at little cost: for the j-th score of a judgement, the model is asked
how likely each allowed integer is at that place, given the prompt, the critique and the scores
before it as they were sampled. So an expected score is conditional on the sampled path through the
box, as the sampled score itself is, and its mean over samples of that path is the same.

The chance of an integer is that of its whole text: of the tokens that spell it, times that of what
must follow, a token that begins with a comma, or with the closing brace after the last score. So
`1` and `10` are told apart whether or not they are tokens of their own. Chances are of the model at
temperature 1, whatever it was sampled at, and are normalised over the allowed integers.

The prompt is read once for all samples of it, a sample's text once for all its scores, and the
integers of all places are tried in parallel behind their common past.
"""

import contextlib
import dataclasses
import functools
import re
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from grm_jax.distributed import batch_parts, split_rows
from grm_jax.models import DecoderConfig, Params, Segment, forward, forward_parallel, unembed
from grm_jax.prompts import Tokenizer
from grm_jax.sampling.batching import PromptJob, PromptResult, on_cpu
from grm_jax.sampling.prefix import prefill
from grm_jax.sampling.scheduling import bucket, power_of_two

ScorePolicy = Literal["sampled", "expected"]
SCORE_POLICIES: tuple[str, ...] = get_args(ScorePolicy)
"""What of a sample votes: the scores that were sampled, or their expectations."""

_BOX = re.compile(rb"\\boxed\{([0-9, \t\n\r\v\f]*)\}")
_NUMBER = re.compile(rb"[0-9]+")
_ACCELERATOR_SAMPLES = 8


class ScorePlace(NamedTuple):
    """Where a score begins.

    Attributes:
      token: Index of the token that holds its first digit.
      lead: What that token holds before the digit.
    """

    token: int
    lead: bytes


def score_places(
    token_bytes: Sequence[bytes], tokens: Sequence[int], count: int
) -> list[ScorePlace] | None:
    """Finds the scores of a readable judgement among its tokens.

    Args:
      token_bytes: Of the vocabulary.
      tokens: What was generated.
      count: Scores that the last complete box must hold.

    Returns:
      A place for each score, in the order of the box; None if there is no such box.
    """
    spelled = [token_bytes[token] for token in tokens]
    text = b"".join(spelled)
    boxes = list(_BOX.finditer(text))
    found = list(_NUMBER.finditer(text, *boxes[-1].span(1))) if boxes else []
    if len(found) != count:
        return None
    begins = np.cumsum([0, *map(len, spelled)])
    places = []
    for number in found:
        token = int(np.searchsorted(begins, number.start(), side="right")) - 1
        places.append(ScorePlace(token, text[begins[token] : number.start()]))
    return places


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ScoreReader:
    """A judge that is asked how likely it found each score that it might have given.

    Attributes:
      params: The decoder's parameters.
      config: Its configuration.
      tokenizer: Its tokenizer.
      low: Least score.
      high: Greatest score.
      mesh: The mesh that the parameters lie on; None for one device.
      at_once: Texts that are read at a time, a multiple of the parts of the mesh; None for what
        suits the devices.
    """

    params: Params
    config: DecoderConfig
    tokenizer: Tokenizer
    low: int
    high: int
    mesh: jax.sharding.Mesh | None = None
    at_once: int | None = None

    def distributions(
        self, prompt: Sequence[int], texts: Sequence[Sequence[int] | None], count: int
    ) -> list[np.ndarray | None]:
        """How likely each score is at each place of each judgement.

        Args:
          prompt: The prompt's tokens; at least two.
          texts: The tokens of judgements sampled from it, without the end of turn; None for one
            that could not be read.
          count: N, scores in each.

        Returns:
          For each judgement `f32[N, high - low + 1]` in the order of its box, each row with sum 1;
          None where there is nothing to read.
        """
        found: list[np.ndarray | None] = [None] * len(texts)
        asked = []
        for index, text in enumerate(texts):
            places = text and score_places(self.tokenizer.token_bytes, text, count)
            if text and places:
                asked.append((index, text, places))
        if not asked:
            return found
        with contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh):
            head = np.zeros((1, bucket(len(prompt) - 1)), np.int32)
            head[0, : len(prompt) - 1] = prompt[:-1]
            length = np.asarray([len(prompt) - 1], np.int32)
            prefix = prefill(self.params, self.config, head, length)
            size = bucket(max(places[-1].token + 1 for _, _, places in asked))
            for first in range(0, len(asked), self._together):
                part = asked[first : first + self._together]
                rows = split_rows(self._rows(prompt[-1], part, count, size), self._split)
                chances = np.asarray(_chances(self.params, self.config, prefix, rows, self._ends))
                for (index, _, _), chance in zip(part, chances, strict=False):
                    found[index] = chance[:count]
        return found

    def expected(
        self, prompt: Sequence[int], texts: Sequence[Sequence[int] | None], count: int
    ) -> list[np.ndarray | None]:
        """The mean of each score, `f32[N]` for each judgement; arguments as of `distributions`."""
        values = np.arange(self.low, self.high + 1, dtype=np.float64)
        return [
            None if chances is None else (chances.astype(np.float64) @ values).astype(np.float32)
            for chances in self.distributions(prompt, texts, count)
        ]

    def add_expected(self, job: PromptJob, result: PromptResult) -> PromptResult:
        """The result of a job with the expected scores of its samples, 0 where unreadable."""
        began = time.perf_counter()
        texts = [
            tokens.tolist() if valid else None
            for tokens, valid in zip(result.tokens, result.valid, strict=True)
        ]
        expected = np.zeros_like(result.scores)
        for row, found in enumerate(self.expected(job.tokens, texts, len(job.order))):
            if found is not None:
                expected[row, list(job.order)] = found
        seconds = result.seconds + time.perf_counter() - began
        return dataclasses.replace(result, expected=expected, seconds=seconds)

    @property
    def _together(self) -> int:
        if self.at_once is not None:
            return self.at_once
        return batch_parts(self._split) * (1 if on_cpu(self.params) else _ACCELERATOR_SAMPLES)

    @property
    def _split(self) -> jax.sharding.Mesh | None:
        """Over what texts are split; those of experts are read in turn, each by all devices."""
        return self.mesh if self.config.experts is None else None

    @functools.cached_property
    def _ends(self) -> jax.Array:
        """`bool[2, V]`, the tokens that end a number which others follow, and the last number."""
        ends = np.zeros((2, self.config.vocab_size), bool)
        for token, spelled in enumerate(self.tokenizer.token_bytes):
            ends[0, token], ends[1, token] = spelled[:1] == b",", spelled[:1] == b"}"
        return jax.device_put(ends)

    @functools.cached_property
    def _spelled(self) -> dict[bytes, list[list[int]]]:
        return {}

    def _spellings(self, lead: bytes) -> list[list[int]]:
        """The tokens of each integer, behind what the first of them has to begin with."""
        if lead not in self._spelled:
            before = lead.decode(errors="replace")
            self._spelled[lead] = [
                self.tokenizer.encode(f"{before}{value}", after_control=True)
                for value in range(self.low, self.high + 1)
            ]
        return self._spelled[lead]

    def _rows(
        self,
        last: int,
        part: Sequence[tuple[int, Sequence[int], list[ScorePlace]]],
        count: int,
        size: int,
    ) -> "_Rows":
        values, width = self.high - self.low + 1, power_of_two(count)
        spelled = [[self._spellings(place.lead) for place in places] for _, _, places in part]
        longest = max(len(ids) for one in spelled for place in one for ids in place)
        lead = (self._together, width)
        rows = _Rows(
            tokens=np.zeros((self._together, 1, size), np.int32),
            length=np.ones((self._together, 1), np.int32),
            # Rows and places that only fill the arrays up stand behind one token.
            seen=np.ones(lead, np.int32),
            last=np.zeros(lead, bool),
            spelled=np.zeros((*lead, values, longest), np.int32),
            sizes=np.ones((*lead, values), np.int32),
        )
        for row, (_, text, places) in enumerate(part):
            read = places[-1].token
            rows.tokens[row, 0, : read + 1] = [last, *text[:read]]
            rows.length[row] = read + 1
            rows.seen[row, :count] = [place.token + 1 for place in places]
            rows.last[row, count - 1] = True
            for column, spellings in enumerate(spelled[row]):
                for value, ids in enumerate(spellings):
                    rows.spelled[row, column, value, : len(ids)] = ids
                    rows.sizes[row, column, value] = len(ids)
        return rows


class _Rows(NamedTuple):
    """Judgements to be asked about; C at a time, N places, M integers of up to S tokens.

    Attributes:
      tokens: `i32[C, 1, T]`, the prompt's last token and the text up to the last score.
      length: `i32[C, 1]`, how many there are.
      seen: `i32[C, N]`, how many of them stand before a score.
      last: `bool[C, N]`, whether it is the last of the box.
      spelled: `i32[C, N, M, S]`, the tokens of each integer.
      sizes: `i32[C, N, M]`, how many those are.
    """

    tokens: np.ndarray
    length: np.ndarray
    seen: np.ndarray
    last: np.ndarray
    spelled: np.ndarray
    sizes: np.ndarray


@functools.partial(jax.jit, static_argnames="config")
def _chances(
    params: Params, config: DecoderConfig, prefix: Segment, rows: _Rows, ends: jax.Array
) -> jax.Array:
    """How likely each integer is at each place, `f32[C, N, M]`, behind a prompt of one row."""

    def of_text(tokens: jax.Array, length: jax.Array, *places: jax.Array) -> jax.Array:
        hidden, text = forward(
            params, config, tokens, length=length, start=prefix.length, past=(prefix,)
        )

        def of_place(
            seen: jax.Array, last: jax.Array, spelled: jax.Array, sizes: jax.Array
        ) -> jax.Array:
            before = text._replace(length=seen[None])
            start = jax.nn.log_softmax(unembed(params, config, hidden[0, seen - 1]))
            ending = jnp.where(last, ends[1], ends[0])
            return jax.nn.softmax(
                _spelling_logprobs(params, config, (prefix, before), start, ending, spelled, sizes)
            )

        return each(config, of_place, *places)

    return each(config, of_text, *map(jnp.asarray, rows))


def each(config: DecoderConfig, function: Callable[..., jax.Array], *arguments: Any) -> jax.Array:
    """Applies a function along the first axis, in parallel where the decoder allows it."""
    if config.experts is None:
        return jax.vmap(function)(*arguments)
    # The grouped product of experts cannot be mapped.
    return jax.lax.map(lambda one: function(*one), arguments)


def _spelling_logprobs(
    params: Params,
    config: DecoderConfig,
    past: tuple[Segment, ...],
    start: jax.Array,
    ending: jax.Array,
    spelled: jax.Array,
    sizes: jax.Array,
) -> jax.Array:
    """Log-probabilities `f32[M]` of texts that are spelled by these tokens and then end.

    Args:
      params: The decoder's parameters.
      config: Its configuration.
      past: What stands before all of them, one row.
      start: `f32[V]`, log-probabilities of their first tokens.
      ending: `bool[V]`, the tokens with which they may end.
      spelled: `i32[M, S]`.
      sizes: `i32[M]`.
    """
    count, longest = spelled.shape
    before = past[-1]
    total = start[spelled[:, 0]]

    def room(cached: jax.Array, axis: int) -> jax.Array:
        lead, (_, heads, *widths) = cached.shape[:-4], cached.shape[-4:]
        widths[axis] = longest
        return jnp.zeros((*lead, 1, count, heads, *widths), cached.dtype)

    at = jnp.broadcast_to(before.start + before.length, (1, count))
    own = Segment(
        jax.tree.map(lambda leaf: room(leaf, 1), before.keys),
        jax.tree.map(lambda leaf: room(leaf, 0), before.values),
        at,
        jnp.zeros_like(at),
    )
    for step in range(longest):
        hidden, (keys, values) = forward_parallel(
            params, config, spelled[None, :, step], past=past, own=own
        )
        own = Segment(
            jax.tree.map(lambda room, new: room.at[..., step].set(new), own.keys, keys),  # noqa: B023
            jax.tree.map(lambda room, new: room.at[..., step, :].set(new), own.values, values),  # noqa: B023
            own.start,
            own.length + 1,
        )
        logprobs = jax.nn.log_softmax(unembed(params, config, hidden[0]))
        ends = jax.nn.logsumexp(jnp.where(ending, logprobs, -jnp.inf), axis=-1)
        following = spelled[:, min(step + 1, longest - 1)]
        on = jnp.take_along_axis(logprobs, following[:, None], axis=-1)[:, 0]
        total += jnp.where(sizes == step + 1, ends, jnp.where(sizes > step + 1, on, 0.0))
    return total
