"""From prompts to scored samples: batches on the device, results on the host.

Everything between the prompt's tokens and the scores in input order happens on the device; the host
receives tokens (for the critique) and scores together.
"""

import contextlib
import functools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from grm_jax import grammar
from grm_jax.distributed import batch_parts, split_rows
from grm_jax.errors import UsageError
from grm_jax.models import DecoderConfig, Params, Segment, cpu_decoder
from grm_jax.prompts import Tokenizer
from grm_jax.rewards import extract_scores, restore_order
from grm_jax.sampling.layout import Layout, judgement_layout
from grm_jax.sampling.sampler import (
    Controls,
    Rollouts,
    decode,
    empty_prefix,
    place_prefix,
    prefill,
)
from grm_jax.sampling.scheduling import bucket, power_of_two

# Rows of a decoding batch on each device if the caller does not say, always: kernels choose how to
# sum by the size of a product, so that with another number of rows the last bits, and now and then
# a sample, would be others.
_CPU_ROWS = 32
_ACCELERATOR_ROWS = 256
_LEAST_ROOM = 512
# Tokens of prompts that are read at a time, for each row of a decoding batch: about what fills the
# machine.
_READ_TOKENS = 8
_CPU_CACHE_BYTES = 2 << 30
_ACCELERATOR_CACHE_BYTES = 16 << 30


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """How samples are drawn.

    Attributes:
      temperature: 0 takes the likeliest token.
      top_k: Sample among this many likeliest tokens; 0 for all.
      top_p: Sample among the likeliest tokens that make up this probability; 1 for all.
      max_new_tokens: Tokens a sample may take.
      constrain: Whether samples must follow the layout of a judgement.
      low: Least score.
      high: Greatest score.
      batch_rows: Rows of a decoding batch, over all its prompts and devices; None for what suits
        the devices. Small models are faster with more.
    """

    temperature: float = 0.5
    top_k: int = 0
    top_p: float = 1.0
    max_new_tokens: int = 256
    constrain: bool = False
    low: int = grammar.DEFAULT_LOW
    high: int = grammar.DEFAULT_HIGH
    batch_rows: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UsageError(f"temperature is {self.temperature}; it must be 0 or more")
        if self.top_k < 0:
            raise UsageError(f"top_k is {self.top_k}; it must be 0 (all tokens) or more")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if self.max_new_tokens < 1:
            raise UsageError(f"max_new_tokens is {self.max_new_tokens}; it must be 1 or more")
        if self.batch_rows is not None and self.batch_rows < 1:
            raise UsageError(f"batch_rows is {self.batch_rows}; it must be 1 or more")


@dataclass(frozen=True, kw_only=True, eq=False)
class PromptJob:
    """One prompt and the samples wanted of it.

    Attributes:
      tokens: The prompt's token ids; at least two.
      order: Input indices of the responses in the order of the prompt.
      keys: `u32[k, ...]`, the data of a random key for each sample, from `sample_keys`.
      room: Samples that the job's row of a batch has room for, at least k.
    """

    tokens: Sequence[int]
    order: tuple[int, ...]
    keys: np.ndarray
    room: int


@dataclass(frozen=True, kw_only=True, eq=False)
class PromptResult:
    """The samples of one `PromptJob`; all arrays are NumPy's, k samples each.

    Attributes:
      tokens: For each sample its tokens, without the end of turn.
      stopped: `bool[k]`, whether the sample ended by itself.
      lengths: `i32[k]`, tokens sampled, the end of turn included.
      scores: `f32[k, N]`, in input order; 0 where unreadable.
      valid: `bool[k]`, whether the scores were readable.
      logprobs: `f32[k, T]` and `sampled_logprobs`, as in `Rollouts`.
      seconds: Wall time of the batch, divided among its samples.
      expected: `f32[k, N]`, expected scores in input order; None if they were not asked for.
    """

    tokens: list[np.ndarray]
    stopped: np.ndarray
    lengths: np.ndarray
    scores: np.ndarray
    valid: np.ndarray
    logprobs: np.ndarray
    sampled_logprobs: np.ndarray
    seconds: float
    expected: np.ndarray | None = None


def sample_keys(key: jax.Array, samples: int) -> np.ndarray:
    """A random key for each sample, the same for the first ones however many there are.

    Args:
      key: Of the record.
      samples: K.

    Returns:
      `u32[K, ...]`, their data, on the host: where each goes is decided there.
    """
    return np.asarray(_key_data(key, power_of_two(samples)))[:samples]


@functools.partial(jax.jit, static_argnames="count")
def _key_data(key: jax.Array, count: int) -> jax.Array:
    fold = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
    return jax.random.key_data(fold(key, jnp.arange(1, count + 1)))


def loop_decoder(config: DecoderConfig, params: Params) -> tuple[DecoderConfig, Params]:
    """The decoder in the form in which its devices run the loop over tokens fastest."""
    return cpu_decoder(config, params) if on_cpu(params) else (config, params)


def on_cpu(params: Params) -> bool:
    """Whether the parameters lie on CPUs."""
    return all(device.platform == "cpu" for device in jax.tree.leaves(params)[0].devices())


class JobShape(NamedTuple):
    """What the jobs of a batch have in common; a function of each job alone.

    Attributes:
      prompt: Tokens of a prompt that the loop has room for. Coarser than the length it is read at:
        the loop is slow to compile and its cost hardly grows with the room.
      samples: K, padded.
      responses: N, padded.
      states: Padded states of the layout; 0 without one.
    """

    prompt: int
    samples: int
    responses: int
    states: int


@dataclass(frozen=True, kw_only=True, eq=False)
class JudgeSampler:
    """A model, its tokenizer and sampling settings: runs batches of `PromptJob`s.

    Over a mesh, the jobs of a batch are dealt out to its `data` and `fsdp` axes.

    Attributes:
      params: The decoder's parameters, for reading prompts.
      config: Its configuration.
      loop: Configuration and parameters for the loop over tokens, from `loop_decoder`.
      tokenizer: The model's tokenizer.
      table: Its vocabulary as the score automaton reads it.
      settings: How samples are drawn.
      mesh: The mesh that the parameters lie on; None for one device.
    """

    params: Params
    config: DecoderConfig
    loop: tuple[DecoderConfig, Params]
    tokenizer: Tokenizer
    table: grammar.TokenTable
    settings: SamplingSettings
    mesh: jax.sharding.Mesh | None = None

    @property
    def _cpu(self) -> bool:
        return on_cpu(self.params)

    @functools.cached_property
    def _text_mask(self) -> jax.Array:
        mask = np.ones(self.config.vocab_size, bool)
        mask[sorted(self.tokenizer.control_ids)] = False
        return jnp.asarray(mask)

    @functools.cached_property
    def _layouts(self) -> dict[int, Layout]:
        # The sampler's own, since a cache of the class would keep its parameters in memory.
        return {}

    def layout(self, count: int) -> Layout:
        """The layout of a judgement of `count` responses."""
        if count not in self._layouts:
            self._layouts[count] = judgement_layout(
                self.tokenizer,
                count=count,
                max_new_tokens=self.settings.max_new_tokens,
                low=self.settings.low,
                high=self.settings.high,
            )
        return self._layouts[count]

    def room(self, samples: int, num_responses: int) -> int:
        """Samples to ask for in one job, of `samples` over all orders of the responses.

        About half of what an order gets on average: orders that get more have several jobs, and
        the last of each is rarely full. So all records with as many responses run in the same
        program, whatever orders were drawn.
        """
        orders = min(samples, math.factorial(min(num_responses, 12)))
        each = power_of_two(-(-samples // orders))
        return min(self.rows, each if orders == 1 else max(1, each // 2))

    @property
    def _parts(self) -> int:
        return batch_parts(self.mesh)

    @property
    def rows(self) -> int:
        """Rows of a decoding batch, over all devices."""
        if self.settings.batch_rows is not None:
            return self.settings.batch_rows
        return self._parts * (_CPU_ROWS if self._cpu else _ACCELERATOR_ROWS)

    @property
    def _least_room(self) -> int:
        # No prompt is longer than what the model reads.
        return power_of_two(bucket(min(_LEAST_ROOM, self.config.max_context)))

    def shape(self, job: PromptJob) -> JobShape:
        """The shape of the batches that a job can run in."""
        count = len(job.order)
        return JobShape(
            prompt=max(self._least_room, power_of_two(bucket(len(job.tokens) - 1))),
            samples=job.room,
            responses=power_of_two(count),
            states=self.layout(count).free.shape[0] if self.settings.constrain else 0,
        )

    def limit(self, shape: JobShape) -> int:
        """Prompts in a batch of a shape, by rows and by memory for the cache: as many a device."""
        c = self.config
        size = shape.prompt * c.cache_width * jnp.dtype(c.dtype).itemsize
        memory = _CPU_CACHE_BYTES if self._cpu else _ACCELERATOR_CACHE_BYTES
        by_rows = self.rows // shape.samples // self._parts
        return self._parts * max(1, min(by_rows, memory // size))

    def run(self, jobs: Sequence[PromptJob]) -> list[PromptResult]:
        """Samples a batch of jobs of equal shape, at most `limit` of them."""
        began = time.perf_counter()
        shape = self.shape(jobs[0])
        # Which job each row is of; dealt out, so that few jobs keep all devices busy.
        dealt = np.arange(self.limit(shape)).reshape(-1, self._parts).T.ravel()
        # Kernels that the partitioner cannot look into split their work by the mesh that is set.
        with contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh):
            prefix = self._prefill(jobs, shape, dealt)
            out, scores, valid = jax.device_get(self._decode(jobs, shape, dealt, prefix))
        seconds = time.perf_counter() - began
        total = sum(len(job.keys) for job in jobs)
        return [
            self._result(job, row, out, scores, valid, seconds * len(job.keys) / total)
            for job, row in zip(jobs, np.argsort(dealt), strict=False)
        ]

    def _prefill(self, jobs: Sequence[PromptJob], shape: JobShape, dealt: np.ndarray) -> Segment:
        loop, parts = self.loop[0], self._parts
        mesh = self.mesh if parts > 1 else None
        rows = len(dealt) // parts
        prefix = empty_prefix(loop, rows=len(dealt), size=shape.prompt, mesh=mesh)
        # The rows of each prompt, by length and part: what several rows of a part begin with is
        # read once, and as many prompts at a time as the length says, so that no neighbour can
        # change it.
        groups: dict[int, list[dict[tuple[int, ...], list[int]]]] = {}
        for place, index in enumerate(dealt):
            if index < len(jobs):
                prompt = tuple(jobs[index].tokens[:-1])
                part, row = divmod(place, rows)
                group = groups.setdefault(bucket(len(prompt)), [{} for _ in range(parts)])
                group[part].setdefault(prompt, []).append(row)
        for length, group in groups.items():
            at_once = max(1, min(rows, self.rows // parts * _READ_TOKENS // length))
            for first in range(0, max(map(len, group)), at_once):
                tokens = np.zeros((parts, at_once, length), np.int32)
                lengths = np.ones((parts, at_once), np.int32)
                places = np.zeros((2, parts, rows), np.int32)
                counts = np.zeros(parts, np.int32)
                for part, prompts in enumerate(group):
                    for index, prompt in enumerate(list(prompts)[first : first + at_once]):
                        tokens[part, index, : len(prompt)] = prompt
                        lengths[part, index] = len(prompt)
                        for row in prompts[prompt]:
                            places[:, part, counts[part]] = row, index
                            counts[part] += 1
                read = split_rows((tokens.reshape(-1, length), lengths.ravel()), mesh)
                segment = prefill(self.params, self.config, *read)
                to, given = places.reshape(2, -1)
                prefix = place_prefix(
                    prefix, segment, to, given, counts, loop, self.config, mesh=mesh
                )
        return prefix

    def _decode(
        self, jobs: Sequence[PromptJob], shape: JobShape, dealt: np.ndarray, prefix: Segment
    ) -> tuple[Rollouts, jax.Array, jax.Array]:
        settings = self.settings
        # Rows and samples that only fill the batch up repeat real ones; nothing reads them.
        padded = [jobs[index % len(jobs)] for index in dealt]
        rows = len(padded)
        keys = np.stack([job.keys[np.arange(shape.samples) % len(job.keys)] for job in padded])
        order = np.tile(np.arange(shape.responses, dtype=np.int32), (rows, 1))
        for row, job in enumerate(padded):
            order[row, : len(job.order)] = job.order
        counts = np.asarray([len(job.order) for job in padded], np.int32)
        active = np.zeros((rows, shape.samples), bool)
        for row, index in enumerate(dealt):
            if index < len(jobs):
                active[row, : len(jobs[index].keys)] = True
        layout = None
        if settings.constrain:
            layouts = [self.layout(int(count)) for count in counts]
            layout = jax.tree.map(lambda *leaves: np.stack(leaves), *layouts)
        config, params = self.loop
        last = np.asarray([job.tokens[-1] for job in padded], np.int32)
        last, keys, layout, active = split_rows((last, keys, layout, active), self.mesh)
        out = decode(
            params,
            config,
            prefix,
            last,
            jax.random.wrap_key_data(jnp.asarray(keys)),
            Controls(
                temperature=jnp.float32(settings.temperature),
                top_p=jnp.float32(settings.top_p),
                max_new_tokens=jnp.int32(settings.max_new_tokens),
            ),
            layout,
            self._text_mask if settings.constrain else None,
            active,
            eos_ids=self.tokenizer.eos_ids,
            capacity=bucket(settings.max_new_tokens),
            greedy=settings.temperature == 0,
            top_k=settings.top_k,
            nucleus=settings.top_p < 1,
        )
        scores, valid = extract_scores(
            out.tokens,
            out.length - out.stopped,
            self.table,
            counts[:, None],
            max_responses=shape.responses,
            low=settings.low,
            high=settings.high,
        )
        return out, restore_order(scores, np.repeat(order[:, None], shape.samples, 1)), valid

    def _result(
        self,
        job: PromptJob,
        row: int,
        out: Rollouts,
        scores: np.ndarray,
        valid: np.ndarray,
        seconds: float,
    ) -> PromptResult:
        k = len(job.keys)
        lengths = np.asarray(out.length[row, :k])
        stopped = np.asarray(out.stopped[row, :k])
        return PromptResult(
            tokens=[
                np.asarray(out.tokens[row, index, : lengths[index] - stopped[index]])
                for index in range(k)
            ],
            stopped=stopped,
            lengths=lengths,
            scores=scores[row, :k, : len(job.order)],
            valid=valid[row, :k],
            logprobs=np.asarray(out.logprobs[row, :k]),
            sampled_logprobs=np.asarray(out.sampled_logprobs[row, :k]),
            seconds=seconds,
        )
