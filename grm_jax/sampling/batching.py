"""What is to be sampled and how: jobs, settings, and the shapes of the batches that jobs run in.

A batch runs in `grm_jax.sampling.stream`.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from grm_jax import grammar
from grm_jax.distributed import batch_parts
from grm_jax.errors import UsageError
from grm_jax.models import DecoderConfig, Params, cpu_decoder
from grm_jax.prompts import Tokenizer
from grm_jax.sampling.drawing import Controls
from grm_jax.sampling.layout import Layout, judgement_layout
from grm_jax.sampling.scheduling import bucket, power_of_two

# Rows of a decoding batch on each device if the caller does not say, always: kernels choose how to
# sum by the size of a product, so that with another number of rows the last bits, and now and then
# a sample, would be others.
_CPU_ROWS = 32
_ACCELERATOR_ROWS = 256
_LEAST_ROOM = 256
# Tokens of prompts that are read at a time, for each row of a decoding batch: about what fills the
# machine.
_READ_TOKENS = 8
# One in so many rows of a batch is to have ended before they are filled again: with more, ended
# rows wait for slow ones; with fewer, prompts are read one by one.
_REFILL = 4
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
      answer: What samples that are held to the layout must say, as of `judgement_layout`.
    """

    tokens: Sequence[int]
    order: tuple[int, ...]
    keys: np.ndarray
    room: int
    answer: int | None = None


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
    """A model, its tokenizer and sampling settings: what a batch of `PromptJob`s is run with.

    Over a mesh, the jobs of a batch are dealt out to its batch axes.

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
    def text_mask(self) -> jax.Array:
        """`bool[V]`, the tokens that free text of a layout may have."""
        mask = np.ones(self.config.vocab_size, bool)
        mask[sorted(self.tokenizer.control_ids)] = False
        return jnp.asarray(mask)

    @functools.cached_property
    def _layouts(self) -> dict[tuple[int, int | None], Layout]:
        # The sampler's own, since a cache of the class would keep its parameters in memory.
        return {}

    def layout(self, count: int, answer: int | None = None) -> Layout:
        """The layout of a judgement of `count` responses, as of `judgement_layout`."""
        if (count, answer) not in self._layouts:
            self._layouts[count, answer] = judgement_layout(
                self.tokenizer,
                count=count,
                max_new_tokens=self.settings.max_new_tokens,
                low=self.settings.low,
                high=self.settings.high,
                answer=answer,
            )
        return self._layouts[count, answer]

    def room(self, samples: int, num_responses: int, *, balanced: bool = False) -> int:
        """Samples to ask for in one job, of `samples` over all orders of the responses.

        As many as an order gets where orders are balanced, and else about half of what one gets on
        average: orders that get more have several jobs, and the last of each is rarely full. So all
        records with as many responses run in the same program, whatever orders were drawn.
        """
        orders = min(samples, math.factorial(min(num_responses, 12)))
        each = power_of_two(-(-samples // orders))
        return min(self.rows, each if orders == 1 or balanced else max(1, each // 2))

    @property
    def parts(self) -> int:
        """In how many parts the devices split a batch."""
        return batch_parts(self.mesh)

    @property
    def rows(self) -> int:
        """Rows of a decoding batch, over all devices."""
        if self.settings.batch_rows is not None:
            return self.settings.batch_rows
        return self.parts * (_CPU_ROWS if self._cpu else _ACCELERATOR_ROWS)

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
            states=self.layout(count, job.answer).free.shape[0] if self.settings.constrain else 0,
        )

    def limit(self, shape: JobShape) -> int:
        """Prompts in a batch of a shape, by rows and by memory for the cache: as many a device."""
        c = self.config
        size = shape.prompt * c.cache_width * jnp.dtype(c.dtype).itemsize
        memory = _CPU_CACHE_BYTES if self._cpu else _ACCELERATOR_CACHE_BYTES
        by_rows = self.rows // shape.samples // self.parts
        return self.parts * max(1, min(by_rows, memory // size))

    def read_at_once(self, shape: JobShape, length: int) -> int:
        """Prompts of a padded length that each device reads at a time, of a batch of a shape."""
        each = self.limit(shape) // self.parts
        tokens = self.rows // self.parts * _READ_TOKENS
        return max(1, min(each // _REFILL, tokens // length))

    def refill(self, shape: JobShape) -> int:
        """Rows of a batch of a shape that are to have ended before others are put there."""
        return max(1, self.limit(shape) // _REFILL)

    @functools.cached_property
    def controls(self) -> Controls:
        """The settings that the loop takes as arrays."""
        return Controls(
            temperature=jnp.float32(self.settings.temperature),
            top_p=jnp.float32(self.settings.top_p),
            max_new_tokens=jnp.int32(self.settings.max_new_tokens),
        )
