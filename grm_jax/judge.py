"""The facade: a model that judges, as one object without hidden state."""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
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
    Sample,
    from_record,
    turns,
)
from grm_jax.errors import UsageError
from grm_jax.models import DecoderConfig, Params, merge_lora
from grm_jax.prompts import (
    Template,
    Tokenizer,
    load_template,
    tokenizer_from_folder,
    tokenizer_from_gguf,
)
from grm_jax.rewards import (
    STATED_ERROR,
    guided_vote,
    rank,
    tied_for_best,
)
from grm_jax.rounds import Planned, next_round, plan_record, record_key
from grm_jax.sampling import (
    SCORE_POLICIES,
    MetaModel,
    ScoreReader,
    Stream,
    power_of_two,
    run_in_order,
)
from grm_jax.sampling.batching import (
    JobShape,
    JudgeSampler,
    PromptJob,
    PromptResult,
    SamplingSettings,
    loop_decoder,
)
from grm_jax.sampling.orders import ORDER_POLICIES
from grm_jax.sampling.stream import JudgeStream

DEFAULT_TEMPLATE = "compact"
"""Short enough for the built-in models; released 16B and 27B judges expect `paper`'s structure."""


Opener = Callable[[JobShape], Stream[PromptJob, PromptResult]]
"""Opens the stream in which jobs of a shape run."""


def load_model(
    opened: checkpoints.Checkpoint,
    *,
    dtype: DTypeLike,
    adapter: str | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> tuple[DecoderConfig, Params, Tokenizer]:
    """Loads an opened checkpoint and its tokenizer.

    Args:
      opened: From `checkpoints.open_checkpoint`.
      dtype: Type of parameters and computation.
      adapter: A PEFT folder, or the name of one that comes with the package, whose adapters are
        merged into the model.
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
        config, params = merge_lora(config, params)
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
            of safetensors or of an Orbax checkpoint, a GGUF file, or a PEFT folder that names its
            base model.
          adapter: A PEFT folder with LoRA adapters, or the name of one that comes with the package,
            which are merged into the model. None is the bare model, of built-in names too: only the
            command line has a default.
          mesh: Where to place the parameters; the default device if None.
          dtype: Type of parameters and computation: by default float32 on CPUs, else bfloat16.

        Raises:
          UsageError: If there is no such model, or its files cannot be read.
        """
        opened = checkpoints.open_checkpoint(name_or_path)
        config, params, tokenizer = load_model(
            opened, adapter=adapter, dtype=_dtype(dtype), mesh=mesh
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
          name_or_path: Of a sequence classifier of one output, as in `from_pretrained`: whole, or
            adapters with a head in a PEFT folder.
          mesh: As in `from_pretrained`.
          dtype: As in `from_pretrained`.
          template: How it is shown what was judged.

        Raises:
          UsageError: If there is no such model, its files cannot be read, or it is no classifier.
        """
        opened = checkpoints.open_checkpoint(name_or_path)
        config, params, tokenizer = load_model(opened, dtype=_dtype(dtype), mesh=mesh)
        config, params = merge_lora(config, params)
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
        scores: str = "sampled",
        template: str | Template = DEFAULT_TEMPLATE,
        meta_model: MetaModel | None = None,
        k_meta: int | None = None,
        adaptive: bool | float = False,
        logprobs: bool = False,
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
          scores: What a sample gives to the vote: its scores as `"sampled"`, or as `"expected"`,
            the mean of each under the model's own distribution given what the sample says before
            it (`grm_jax.sampling.expected`). Expected scores hardly ever tie, and cost about one
            more reading of the prompt and the text.
          template: A built-in template, a file, or a loaded template.
          meta_model: Says which samples to trust, so that only those vote; all do if None.
          k_meta: How many vote; half of the samples if None.
          adaptive: Draw samples in rounds, and no more of a record's once the rest could not change
            its winner, or would not but for this chance (`grm_jax.rewards.flip_chance`); True for
            2 %. What is drawn are the first of the samples that would have been drawn without it,
            but for a text here and there: the number of rows decides how products are summed.
          logprobs: Keep how likely each sample was to the judge, the mean log-probability of its
            tokens under the whole vocabulary at the sampling temperature.
          hinted: Tell the judge what the label says, and with `constrain` allow no scores that
            contradict it. It makes samples to be learnt from, never evidence. A record that names
            no best response gets an error.
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
        if scores not in SCORE_POLICIES:
            raise UsageError(f"scores is {scores!r}; it must be one of {', '.join(SCORE_POLICIES)}")
        error = None if adaptive is False else STATED_ERROR if adaptive is True else adaptive
        if error is not None and not 0 <= error < 1:
            raise UsageError(f"adaptive is {error}; it must be a chance, from 0 to below 1")
        if error is not None and meta_model is not None:
            raise UsageError("adaptive looks at plain votes; leave out the meta model")
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
            plan_record,
            sampler,
            template=template,
            samples=samples,
            orders=orders,
            hinted=hinted,
            seed=seed,
            adaptive=error is not None,
        )
        more = functools.partial(
            next_round,
            samples=samples,
            span=template.high - template.low,
            error=0.0 if error is None else error,
        )
        finished = run_in_order(
            (plan(comparison) for comparison in comparisons),
            jobs=lambda record: record.first_round,
            shape=sampler.shape,
            open_stream=self.opener(sampler, scores),
            more=more,
            # Enough to fill a batch even if every record is shown in one order only.
            lookahead=max(64, sampler.rows),
        )
        voters = samples if meta_model is None else k_meta
        return (
            self._judgement(record, results, samples, seed, meta_model, voters, logprobs)
            for record, results in finished
        )

    def opener(self, sampler: JudgeSampler, scores: str) -> Opener:
        """What opens the streams that a sampler's jobs run in, with what expected scores need.

        Args:
          sampler: Of this judge's model.
          scores: `"sampled"` or `"expected"`.
        """
        if scores == "sampled":
            return functools.partial(JudgeStream, sampler)
        reader = ScoreReader(
            params=self.params,
            config=self.config,
            tokenizer=self.tokenizer,
            low=sampler.settings.low,
            high=sampler.settings.high,
            mesh=self.mesh,
        )
        return functools.partial(JudgeStream, sampler, finish=reader.add_expected)

    def _judgement(
        self,
        record: Planned,
        results: Sequence[PromptResult],
        samples: int,
        seed: int,
        meta_model: MetaModel | None,
        voters: int,
        logprobs: bool = False,
    ) -> Judgement:
        if record.error is not None or record.comparison is None:
            return Judgement(id=record.id, error=record.error)
        count = len(record.comparison.responses)
        rows = np.zeros((power_of_two(samples), power_of_two(count)), np.float32)
        valid = np.zeros(len(rows), bool)
        drawn: dict[int, Sample] = {}
        # Of a record that was settled early, the last rounds are missing.
        for job, places, result in zip(record.jobs, record.places, results, strict=False):
            for index, place in enumerate(places):
                valid[place] = result.valid[index]
                sampled = tuple(int(score) for score in result.scores[index])
                expected = None
                rows[place, :count] = result.scores[index]
                if result.expected is not None and valid[place]:
                    # As written down, so that a vote can be checked.
                    expected = tuple(round(float(mean), 6) for mean in result.expected[index])
                    rows[place, :count] = expected
                drawn[place] = Sample(
                    order=job.order,
                    scores=sampled if valid[place] else None,
                    meta=None,
                    text=self.tokenizer.decode(result.tokens[index].tolist()),
                    finish="stop" if result.stopped[index] else "length",
                    expected=expected,
                    logprob=_mean_logprob(result, index) if logprobs else None,
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
            _vote(rows, valid, meta, voters, count, record_key(seed, record.id))
        )
        readable = int(valid.sum())
        prompts = {job.order: len(job.tokens) for job in record.jobs[: len(results)]}
        judgement = Judgement(
            id=record.id,
            valid_samples=readable,
            samples=tuple(drawn[place] for place in sorted(drawn)),
            prompt_tokens=sum(prompts.values()),
            completion_tokens=int(sum(result.lengths.sum() for result in results)),
            seconds=sum(result.seconds for result in results),
            error=None
            if readable
            else f"none of the {len(drawn)} samples has readable scores; constrain them to the "
            "layout of a judgement, or give them more tokens",
        )
        if not readable:
            return judgement
        return replace(
            judgement,
            scores=tuple(_plain(total) for total in totals[:count]),
            ranking=tuple(int(index) for index in ranking[:count]),
            best=int(ranking[0]),
            tied=tuple(int(index) for index in np.flatnonzero(tied)),
        )


def _mean_logprob(result: PromptResult, index: int) -> float:
    """The mean log-probability of the tokens of a sample."""
    written = result.logprobs[index, : result.lengths[index]]
    return round(float(written.mean(dtype=np.float64)), 4)


def _plain(total: float) -> float:
    """A total as a person would write it: a sum of integers as an integer."""
    return int(total) if total == int(total) else round(float(total), 4)


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
    messages = turns(comparison)
    read = [
        model.tokens(messages, [comparison.responses[i] for i in sample.order], sample.text)
        for sample in drawn.values()
    ]
    rewards = model.rewards(read, alike=[sample.order for sample in drawn.values()])
    return dict(zip(drawn, rewards.tolist(), strict=True))


def _dtype(dtype: DTypeLike | None) -> DTypeLike:
    """The type asked for: by default float32 on CPUs, else bfloat16."""
    if dtype is not None:
        return dtype
    return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
