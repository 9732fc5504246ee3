"""The facade: a model that judges, as one object without hidden state."""

import functools
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from grm_jax import checkpoints, grammar
from grm_jax.data import (
    BadRecord,
    Comparison,
    Judgement,
    PointwiseLabel,
    Sample,
    best_index,
    from_record,
)
from grm_jax.errors import UsageError
from grm_jax.models import DecoderConfig, Params, merge_lora
from grm_jax.prompts import (
    Template,
    Tokenizer,
    encode_chat,
    load_template,
    render,
    tokenizer_from_folder,
    tokenizer_from_gguf,
)
from grm_jax.rewards import guided_vote, rank, tied_for_best
from grm_jax.sampling import MetaModel, power_of_two, response_orders, run_in_order
from grm_jax.sampling.batching import (
    JudgeSampler,
    PromptJob,
    PromptResult,
    SamplingSettings,
    loop_decoder,
    sample_keys,
)
from grm_jax.sampling.orders import ORDER_POLICIES

DEFAULT_TEMPLATE = "compact"
"""Short enough for the built-in models; released 16B and 27B judges expect `paper`'s structure."""


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """A record on its way through the sampler: its jobs, or what is wrong with it."""

    id: str
    comparison: Comparison | None = None
    jobs: tuple[PromptJob, ...] = ()
    # For each job, which samples it draws.
    places: tuple[tuple[int, ...], ...] = ()
    error: str | None = None


def load_model(
    opened: checkpoints.Checkpoint,
    *,
    dtype: DTypeLike,
    adapter: Path | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> tuple[DecoderConfig, Params, Tokenizer]:
    """Loads an opened checkpoint and its tokenizer.

    Args:
      opened: From `checkpoints.open_checkpoint`.
      dtype: Type of parameters and computation.
      adapter: A PEFT folder whose adapters are merged into the model.
      mesh: Where to place the parameters; the default device if None.

    Raises:
      UsageError: If a file of the model, the tokenizer or the adapter cannot be read.
    """
    if opened.metadata is not None:
        tokenizer = tokenizer_from_gguf(opened.metadata)
    else:
        tokenizer = tokenizer_from_folder(opened.path, vocab_size=opened.config.vocab_size)
    config, params = checkpoints.load(opened, dtype, mesh)
    if adapter is not None:
        config, params = merge_lora(*checkpoints.load_adapter(adapter, config, params, mesh))
    return config, params, tokenizer


@dataclass(frozen=True, kw_only=True, eq=False)
class GRM:
    """A generative reward model.

    Attributes:
      name: What it was loaded by.
      config: The decoder's configuration.
      params: The decoder's parameters.
      tokenizer: Its tokenizer.
      table: The tokenizer's vocabulary as the score automaton reads it.
      mesh: The mesh that the parameters lie on; None for one device.
    """

    name: str
    config: DecoderConfig
    params: Params
    tokenizer: Tokenizer
    table: grammar.TokenTable
    mesh: jax.sharding.Mesh | None = None

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str,
        *,
        adapter: str | None = None,
        mesh: jax.sharding.Mesh | None = None,
        dtype: DTypeLike | None = None,
    ) -> "GRM":
        """Loads a model and its tokenizer.

        Args:
          name_or_path: A built-in name (fetched on first use), `hf:owner/name[@revision]`, a folder
            of safetensors or of an Orbax checkpoint, or a GGUF file.
          adapter: A PEFT folder with LoRA adapters, which are merged into the model.
          mesh: Where to place the parameters; the default device if None.
          dtype: Type of parameters and computation: by default float32 on CPUs, else bfloat16.

        Raises:
          UsageError: If there is no such model, or its files cannot be read.
        """
        opened = checkpoints.open_checkpoint(name_or_path)
        folder = None if adapter is None else Path(adapter)
        config, params, tokenizer = load_model(
            opened, adapter=folder, dtype=_dtype(dtype), mesh=mesh
        )
        if config.lora is not None:
            config, params = merge_lora(config, params)
        if config.num_labels:
            raise UsageError(f"{name_or_path} is a classifier; a judge must write text")
        table = jax.device_put(grammar.token_table(tokenizer.token_bytes))
        return cls(
            name=name_or_path,
            config=config,
            params=params,
            tokenizer=tokenizer,
            table=table,
            mesh=mesh,
        )

    @classmethod
    def meta_model(
        cls,
        name_or_path: str,
        *,
        mesh: jax.sharding.Mesh | None = None,
        dtype: DTypeLike | None = None,
        template: str | Template = "meta",
    ) -> MetaModel:
        """Loads a meta reward model, for `judge_batch`.

        Args:
          name_or_path: Of a sequence classifier of one output, as in `from_pretrained`.
          mesh: As in `from_pretrained`.
          dtype: As in `from_pretrained`.
          template: How it is shown what was judged.

        Raises:
          UsageError: If there is no such model, its files cannot be read, or it is no classifier.
        """
        opened = checkpoints.open_checkpoint(name_or_path)
        config, params, tokenizer = load_model(opened, dtype=_dtype(dtype), mesh=mesh)
        if not isinstance(template, Template):
            template = load_template(template)
        return MetaModel(
            name=name_or_path,
            config=config,
            params=params,
            tokenizer=tokenizer,
            template=template,
            mesh=mesh,
        )

    @functools.cached_property
    def _loop(self) -> tuple[DecoderConfig, Params]:
        return loop_decoder(self.config, self.params)

    def sampler(self, settings: SamplingSettings) -> JudgeSampler:
        """What draws samples from the model, for callers that form batches themselves."""
        return JudgeSampler(
            params=self.params,
            config=self.config,
            loop=self._loop,
            tokenizer=self.tokenizer,
            table=self.table,
            settings=settings,
            mesh=self.mesh,
        )

    def judge(
        self,
        messages: Sequence[Mapping[str, str]],
        responses: Sequence[str],
        **settings: Any,
    ) -> Judgement:
        """Judges the responses to one conversation.

        Args:
          messages: `{role, content}` turns up to the user's last.
          responses: One or more candidates.
          **settings: As in `judge_batch`.

        Returns:
          The judgement; its `error` is set if the comparison is too long for the model or no
          sample was readable.

        Raises:
          UsageError: If the comparison is malformed or a setting is wrong.
        """
        comparison = from_record({"id": "0", "messages": messages, "responses": responses})
        return next(self.judge_batch([comparison], **settings))

    def judge_batch(
        self,
        comparisons: Iterable[Comparison | BadRecord],
        *,
        samples: int = 8,
        temperature: float = 0.5,
        top_k: int = 0,
        top_p: float = 1.0,
        max_new_tokens: int = 256,
        constrain: bool = False,
        orders: str = "shuffle",
        template: str | Template = DEFAULT_TEMPLATE,
        meta_model: MetaModel | None = None,
        k_meta: int | None = None,
        hinted: bool = False,
        batch_rows: int | None = None,
        seed: int = 0,
    ) -> Iterator[Judgement]:
        """Judges many comparisons, in order, reading only a little ahead.

        With the same settings, a sample depends on its record, the seed and its number, and on
        nothing else: the same record gives the same judgement alone and among others, to the last
        character.

        Args:
          comparisons: The records; a `BadRecord` becomes a judgement with its error.
          samples: K, judgements sampled for each record.
          temperature: 0 takes the likeliest token.
          top_k: Sample among this many likeliest tokens; 0 for all.
          top_p: Sample among the likeliest tokens that make up this probability; 1 for all.
          max_new_tokens: Tokens a judgement may take.
          constrain: Make samples follow the layout of a judgement, so that all are readable.
          orders: How responses are ordered from sample to sample: `"shuffle"`, `"balanced"` or
            `"fixed"`.
          template: A built-in template, a file, or a loaded template.
          meta_model: Says which samples to trust, so that only those vote; all do if None.
          k_meta: How many vote; half of the samples if None.
          hinted: Tell the judge what the label says, which makes samples to be learnt from, never
            evidence. A record that names no best response gets an error.
          batch_rows: Samples that are decoded at a time; None for what suits the device. Small
            models are faster with more. It is one of the settings that a sample depends on.
          seed: Of the samples, their orders and the breaking of ties.

        Yields:
          One judgement for each record.

        Raises:
          UsageError: If a setting is wrong.
        """
        if not 0 <= seed < 2**32:
            raise UsageError(f"seed is {seed}; it must be from 0 to {2**32 - 1}")
        if samples < 1:
            raise UsageError(f"samples is {samples}; it must be 1 or more")
        if k_meta is None:
            k_meta = max(1, samples // 2)
        elif meta_model is None:
            raise UsageError("k_meta says how many samples a meta model chooses; name the model")
        if not 1 <= k_meta <= samples:
            raise UsageError(f"k_meta is {k_meta}; it must be from 1 to samples, {samples}")
        if orders not in ORDER_POLICIES:
            raise UsageError(f"orders is {orders!r}; it must be one of {', '.join(ORDER_POLICIES)}")
        if not isinstance(template, Template):
            template = load_template(template)
        if hinted and "hint" not in template.source:
            raise UsageError(f"template {template.name} has no place for a hint")
        sampler = self.sampler(
            SamplingSettings(
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                max_new_tokens=max_new_tokens,
                constrain=constrain,
                low=template.low,
                high=template.high,
                batch_rows=batch_rows,
            )
        )
        plan = functools.partial(
            self._plan,
            sampler,
            template=template,
            samples=samples,
            orders=orders,
            hinted=hinted,
            seed=seed,
        )
        finished = run_in_order(
            (plan(comparison) for comparison in comparisons),
            jobs=lambda record: record.jobs,
            shape=sampler.shape,
            limit=sampler.limit,
            run=sampler.run,
            # Enough to fill a batch even if every record is shown in one order only.
            lookahead=max(64, sampler.rows),
        )
        voters = samples if meta_model is None else k_meta
        return (
            self._judgement(record, results, samples, seed, meta_model, voters)
            for record, results in finished
        )

    def _plan(
        self,
        sampler: JudgeSampler,
        comparison: Comparison | BadRecord,
        *,
        template: Template,
        samples: int,
        orders: str,
        hinted: bool,
        seed: int,
    ) -> _Plan:
        if isinstance(comparison, BadRecord):
            return _Plan(id=comparison.id, error=comparison.error)
        count = len(comparison.responses)
        places: dict[tuple[int, ...], list[int]] = {}
        shown = response_orders(
            orders, record_id=comparison.id, num_responses=count, samples=samples, seed=seed
        )
        for sample, order in enumerate(shown):
            places.setdefault(order, []).append(sample)
        keys = sample_keys(_record_key(seed, comparison.id), samples)
        messages = [
            {"role": turn["role"], "content": turn["content"]} for turn in comparison.messages
        ]
        longest = self.config.max_context - sampler.settings.max_new_tokens
        room = sampler.room(samples, 1 if orders == "fixed" else count)
        jobs, chosen = [], []
        try:
            if sampler.settings.constrain:
                sampler.layout(count)
            for order, numbers in places.items():
                chat = render(
                    template,
                    messages,
                    [comparison.responses[i] for i in order],
                    hint=_hint(comparison, order) if hinted else None,
                )
                tokens = encode_chat(self.tokenizer, chat)
                if len(tokens) > longest:
                    raise UsageError(
                        f"the prompt takes {len(tokens)} tokens and the answer up to "
                        f"{sampler.settings.max_new_tokens}, but the model reads "
                        f"{self.config.max_context}; shorten the record"
                    )
                for first in range(0, len(numbers), room):
                    part = numbers[first : first + room]
                    jobs.append(
                        PromptJob(tokens=tokens, order=order, keys=keys[list(part)], room=room)
                    )
                    chosen.append(tuple(part))
        except UsageError as error:
            return _Plan(id=comparison.id, error=str(error))
        return _Plan(
            id=comparison.id, comparison=comparison, jobs=tuple(jobs), places=tuple(chosen)
        )

    def _judgement(
        self,
        record: _Plan,
        results: Sequence[PromptResult],
        samples: int,
        seed: int,
        meta_model: MetaModel | None,
        voters: int,
    ) -> Judgement:
        if record.error is not None or record.comparison is None:
            return Judgement(id=record.id, error=record.error)
        count = len(record.comparison.responses)
        rows = np.zeros((power_of_two(samples), power_of_two(count)), np.float32)
        valid = np.zeros(len(rows), bool)
        drawn: dict[int, Sample] = {}
        for job, places, result in zip(record.jobs, record.places, results, strict=True):
            for index, place in enumerate(places):
                rows[place, :count] = result.scores[index]
                valid[place] = result.valid[index]
                scores = tuple(int(score) for score in result.scores[index])
                drawn[place] = Sample(
                    order=job.order,
                    scores=scores if valid[place] else None,
                    meta=None,
                    text=self.tokenizer.decode(result.tokens[index].tolist()),
                    finish="stop" if result.stopped[index] else "length",
                )
        meta = np.zeros(len(rows), np.float32)
        if meta_model is not None:
            try:
                found = _meta_rewards(meta_model, record.comparison, drawn)
            except UsageError as error:
                return Judgement(id=record.id, error=str(error))
            for place, value in found.items():
                meta[place] = value
                drawn[place] = replace(drawn[place], meta=round(float(value), 4))
        totals, ranking, tied = jax.device_get(
            _vote(rows, valid, meta, voters, count, _record_key(seed, record.id))
        )
        readable = int(valid.sum())
        prompts = {job.order: len(job.tokens) for job in record.jobs}
        judgement = Judgement(
            id=record.id,
            valid_samples=readable,
            samples=tuple(drawn[place] for place in range(samples)),
            prompt_tokens=sum(prompts.values()),
            completion_tokens=int(sum(result.lengths.sum() for result in results)),
            seconds=sum(result.seconds for result in results),
            error=None
            if readable
            else f"none of the {samples} samples has readable scores; constrain them to the "
            "layout of a judgement, or give them more tokens",
        )
        if not readable:
            return judgement
        return replace(
            judgement,
            scores=tuple(int(total) for total in totals[:count]),
            ranking=tuple(int(index) for index in ranking[:count]),
            best=int(ranking[0]),
            tied=tuple(int(index) for index in np.flatnonzero(tied)),
        )


@jax.jit
def _vote(
    scores: jax.Array,
    valid: jax.Array,
    meta: jax.Array,
    voters: jax.Array,
    num_responses: jax.Array,
    key: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    totals = guided_vote(scores, valid, meta, voters)
    return totals, rank(totals, num_responses, key), tied_for_best(totals, num_responses)


def _meta_rewards(
    model: MetaModel, comparison: Comparison, drawn: Mapping[int, Sample]
) -> dict[int, float]:
    """The meta reward of each sample of a record, by the sample's number."""
    messages = [{"role": turn["role"], "content": turn["content"]} for turn in comparison.messages]
    read = [
        model.tokens(messages, [comparison.responses[i] for i in sample.order], sample.text)
        for sample in drawn.values()
    ]
    return dict(zip(drawn, model.rewards(read).tolist(), strict=True))


def _hint(comparison: Comparison, order: Sequence[int]) -> int:
    """What `render` tells of a record's label, whose responses are shown in an order."""
    if isinstance(comparison.label, PointwiseLabel):
        return int(comparison.label.correct)
    best = best_index(comparison)
    if best is None or len(order) == 1:
        raise UsageError("there is nothing to hint at: the label names no best response")
    return list(order).index(best)


def _dtype(dtype: DTypeLike | None) -> DTypeLike:
    """The type asked for: by default float32 on CPUs, else bfloat16."""
    if dtype is not None:
        return dtype
    return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16


def _record_key(seed: int, record_id: str) -> jax.Array:
    """The random key of a record, from the seed and the record's id."""
    digest = hashlib.blake2b(record_id.encode(errors="surrogatepass"), digest_size=8).digest()
    return _fold_in(np.uint32(seed), np.frombuffer(digest, "<u4"))


@jax.jit
def _fold_in(seed: jax.Array, halves: jax.Array) -> jax.Array:
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), halves[0]), halves[1])
