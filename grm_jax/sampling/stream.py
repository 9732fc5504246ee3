"""A batch that goes on while jobs leave and enter it: continuous batching on the device.

A row of the batch is one prompt with its samples. When the last of a row's samples has ended, its
results are fetched and another job takes the row, in the same program and in place. What a job
gives does not depend on when it entered, on which row it got or on what ran beside it.
"""

import contextlib
import functools
import time
from collections.abc import Callable, Hashable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, TypeVar, final

import jax
import jax.numpy as jnp
import numpy as np

from grm_jax import grammar
from grm_jax.distributed import split_rows
from grm_jax.rewards import extract_scores, restore_order
from grm_jax.sampling.batching import JobShape, JudgeSampler, PromptJob, PromptResult
from grm_jax.sampling.layout import Layout
from grm_jax.sampling.prefix import empty_prefix, place_prefix, prefill
from grm_jax.sampling.sampler import Rollouts, admit, begin, decode_until, finished
from grm_jax.sampling.scheduling import bucket

Key = TypeVar("Key", bound=Hashable)


@dataclass(kw_only=True, eq=False)
class _Running:
    """A job in a row, what its caller calls it, and the seconds it took so far."""

    key: Hashable
    job: PromptJob
    seconds: float = 0.0


@final
class JudgeStream:
    """A batch of jobs of one shape; a `grm_jax.sampling.scheduling.Stream`.

    It always has the rows of `JudgeSampler.limit`, so that all it runs is compiled once.

    Args:
      sampler: Whose jobs run.
      shape: Of every job.
      finish: Makes the result of a job from the job and what was sampled.
    """

    def __init__(
        self,
        sampler: JudgeSampler,
        shape: JobShape,
        finish: Callable[[PromptJob, PromptResult], PromptResult] = lambda job, result: result,
    ) -> None:
        self._sampler = sampler
        self._shape = shape
        self._finish = finish
        # Rows that are free but still run on the device.
        self._dropped: set[int] = set()
        size = sampler.limit(shape)
        self._rows: list[_Running | None] = [None] * size
        # What each row is run with. Rows that were never filled have ended; nothing reads theirs.
        key = np.asarray(jax.random.key_data(jax.random.key(0)))
        self._keys = np.tile(key, (size, shape.samples, *(1 for _ in key.shape)))
        self._order = np.tile(np.arange(shape.responses, dtype=np.int32), (size, 1))
        self._counts = np.ones(size, np.int32)
        self._layout: list[np.ndarray] | None = None
        loop, mesh = sampler.loop[0], sampler.mesh
        with self._on_mesh():
            self._prefix = empty_prefix(loop, rows=size, size=shape.prompt, mesh=mesh)
            self._batch = begin(
                self._prefix,
                loop,
                samples=shape.samples,
                capacity=bucket(sampler.settings.max_new_tokens),
                mesh=mesh,
            )

    @property
    def running(self) -> int:
        """Jobs in the batch."""
        return sum(row is not None for row in self._rows)

    @property
    def room(self) -> int:
        """Jobs that may be added."""
        return len(self._rows) - self.running

    def run(
        self, jobs: Mapping[Key, PromptJob], *, steps: int | None = None
    ) -> dict[Key, PromptResult]:
        """Adds jobs and samples on until a quarter of the rows, or all jobs, have ended.

        Args:
          jobs: At most `room`, by names of their own.
          steps: The most tokens to sample before returning, with results or without.

        Returns:
          The results of the jobs that have ended, whenever they were added, by their names.
        """
        if len(jobs) > self.room:
            raise ValueError(f"{len(jobs)} jobs for {self.room} free rows")
        began = time.perf_counter()
        # Kernels that the partitioner cannot look into split their work by the mesh that is set.
        with self._on_mesh():
            self._admit(jobs)
            at_work = [row for row in self._rows if row is not None]
            if not at_work:
                return {}
            out, scores, valid, ended = self._decode(steps)
        each = (time.perf_counter() - began) / sum(len(row.job.keys) for row in at_work)
        for row in at_work:
            row.seconds += each * len(row.job.keys)
        found: dict[Any, PromptResult] = {}
        for place, running in enumerate(self._rows):
            if running is not None and ended[place]:
                self._rows[place] = None
                result = _result(running, place, out, scores, valid)
                found[running.key] = self._finish(running.job, result)
        return found

    def drop(self, keys: Set[Hashable]) -> None:
        """Gives up jobs that are running, by the names they were added with; their rows are free.

        Args:
          keys: Names; those of no running job change nothing.
        """
        for place, row in enumerate(self._rows):
            if row is not None and row.key in keys:
                self._rows[place] = None
                self._dropped.add(place)

    def _on_mesh(self) -> contextlib.AbstractContextManager[object]:
        mesh = self._sampler.mesh
        return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)

    def _admit(self, jobs: Mapping[Key, PromptJob]) -> None:
        """Puts jobs into free rows, dealt out so that a few keep all devices busy."""
        if not jobs and not self._dropped:
            return
        sampler, size = self._sampler, len(self._rows)
        each = size // sampler.parts
        free = [place for place, row in enumerate(self._rows) if row is None]
        free.sort(key=lambda place: (place % each, place))
        # A row that begins with no sample that is wanted has ended.
        fresh = np.isin(np.arange(size), list(self._dropped))
        self._dropped.clear()
        active = np.zeros((size, self._shape.samples), bool)
        last = np.zeros(size, np.int32)
        prompts: dict[int, Sequence[int]] = {}
        for place, (key, job) in zip(free, jobs.items(), strict=False):
            self._rows[place] = _Running(key=key, job=job)
            prompts[place] = job.tokens[:-1]
            fresh[place], last[place] = True, job.tokens[-1]
            active[place, : len(job.keys)] = True
            # Samples that only fill the row up repeat real ones.
            self._keys[place] = job.keys[np.arange(self._shape.samples) % len(job.keys)]
            self._order[place] = np.arange(self._shape.responses)
            self._order[place, : len(job.order)] = job.order
            self._counts[place] = len(job.order)
            if sampler.settings.constrain:
                layout = sampler.layout(len(job.order), job.answer)
                if self._layout is None:
                    self._layout = [np.stack([leaf] * size) for leaf in layout]
                for rows, leaf in zip(self._layout, layout, strict=True):
                    rows[place] = leaf
        self._read(prompts)
        loop, mesh = sampler.loop[0], sampler.mesh
        given = split_rows((last, fresh, active), mesh)
        self._batch = admit(self._batch, self._prefix, *given, loop, mesh)

    def _read(self, prompts: Mapping[int, Sequence[int]]) -> None:
        """Reads the prompts of rows into the prefix.

        Those of a length are read so many at a time as the length says, so that no neighbour can
        change one; a prompt that several rows of a device have is read once.
        """
        sampler = self._sampler
        loop, parts = sampler.loop[0], sampler.parts
        rows = len(self._rows) // parts
        groups: dict[int, list[dict[tuple[int, ...], list[int]]]] = {}
        for place, prompt in prompts.items():
            part, row = divmod(place, rows)
            group = groups.setdefault(bucket(len(prompt)), [{} for _ in range(parts)])
            group[part].setdefault(tuple(prompt), []).append(row)
        for length, group in groups.items():
            at_once = sampler.read_at_once(self._shape, length)
            for first in range(0, max(map(len, group)), at_once):
                tokens = np.zeros((parts, at_once, length), np.int32)
                lengths = np.ones((parts, at_once), np.int32)
                places = np.zeros((2, parts, rows), np.int32)
                counts = np.zeros(parts, np.int32)
                for part, asked in enumerate(group):
                    for index, prompt in enumerate(list(asked)[first : first + at_once]):
                        tokens[part, index, : len(prompt)] = prompt
                        lengths[part, index] = len(prompt)
                        for row in asked[prompt]:
                            places[:, part, counts[part]] = row, index
                            counts[part] += 1
                read = split_rows((tokens.reshape(-1, length), lengths.ravel()), sampler.mesh)
                segment = prefill(sampler.params, sampler.config, *read)
                to, given = places.reshape(2, -1)
                mesh = sampler.mesh
                self._prefix = place_prefix(
                    self._prefix, segment, to, given, counts, loop, sampler.config, mesh=mesh
                )

    def _decode(self, steps: int | None) -> tuple[Rollouts, np.ndarray, np.ndarray, np.ndarray]:
        """Samples on; what has been sampled, scores and validity, and which rows have ended."""
        sampler, settings, running = self._sampler, self._sampler.settings, self.running
        config, params = sampler.loop
        keys, layout = split_rows(
            (self._keys, None if self._layout is None else Layout(*map(jnp.asarray, self._layout))),
            sampler.mesh,
        )
        self._batch = decode_until(
            params,
            config,
            self._prefix,
            self._batch,
            jax.random.wrap_key_data(jnp.asarray(keys)),
            sampler.controls,
            self.room + min(running, sampler.refill(self._shape)),
            settings.max_new_tokens if steps is None else steps,
            layout,
            sampler.text_mask if settings.constrain else None,
            eos_ids=sampler.tokenizer.eos_ids,
            greedy=settings.temperature == 0,
            top_k=settings.top_k,
            nucleus=settings.top_p < 1,
            mesh=sampler.mesh,
        )
        out = self._batch.out
        read = _scores(
            out,
            sampler.table,
            self._order,
            self._counts,
            settings.max_new_tokens,
            low=settings.low,
            high=settings.high,
        )
        found: tuple[Rollouts, np.ndarray, np.ndarray, np.ndarray] = jax.device_get((out, *read))
        return found


@functools.partial(jax.jit, static_argnames=("low", "high"))
def _scores(
    out: Rollouts,
    table: grammar.TokenTable,
    order: jax.Array | np.ndarray,
    counts: jax.Array | np.ndarray,
    max_new_tokens: jax.Array | int,
    *,
    low: int,
    high: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Scores `f32[B, K, N]` in input order, validity `bool[B, K]`, which rows ended `bool[B]`."""
    scores, valid = extract_scores(
        out.tokens,
        out.length - out.stopped,
        table,
        jnp.asarray(counts)[:, None],
        max_responses=order.shape[-1],
        low=low,
        high=high,
    )
    ended = finished(out, max_new_tokens).all(axis=-1)
    return restore_order(scores, jnp.broadcast_to(order[:, None], scores.shape)), valid, ended


def _result(
    row: _Running, place: int, out: Rollouts, scores: np.ndarray, valid: np.ndarray
) -> PromptResult:
    k = len(row.job.keys)
    lengths = np.asarray(out.length[place, :k])
    stopped = np.asarray(out.stopped[place, :k])
    return PromptResult(
        tokens=[
            np.array(out.tokens[place, index, : lengths[index] - stopped[index]])
            for index in range(k)
        ],
        stopped=stopped,
        lengths=lengths,
        scores=scores[place, :k, : len(row.job.order)],
        valid=valid[place, :k],
        logprobs=np.array(out.logprobs[place, :k]),
        sampled_logprobs=np.array(out.sampled_logprobs[place, :k]),
        seconds=row.seconds,
    )
