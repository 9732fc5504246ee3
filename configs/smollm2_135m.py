"""SPCT of the embedded default model on real comparisons: adapters for judging.

    python -m benchmarks.reference_run prepare --data FOLDER --workdir runs/smollm2
    grm-jax train --config configs/smollm2_135m.py:runs/smollm2/data --workdir runs/smollm2/main

The first command picks pairs of at most 512 tokens from a folder of comparisons and splits them.
The untuned model never writes a readable score, so its own judgements are held to the layout while
it is sampled (the cold start without a teacher), and adapters learn those that were right.
Reinforcement learning goes on from there, unconstrained; a meta reward model learns from what
comes out, on comparisons of its own; and the last stage judges those that none has seen.

For one GPU of 80 GB, where it has not been run yet. Written as `FOLDER,cpu` it is what two cores do
in two hours, of pairs of at most 256 tokens: enough to be readable without a constraint, and too
little to judge (`benchmarks/reference_run_cpu.md`). `FOLDER,short` is a few steps of everything.
"""

from ml_collections import ConfigDict

from grm_jax.evaluation import stage as evaluation
from grm_jax.training import meta, rft, rl, spct

NAME = "smollm2-135m"
# Tokens of the longest prompt and of a judgement.
PROMPT, JUDGEMENT = 512, 64
CPU_JUDGEMENT, CPU_ROWS = 40, 128
# Logits of so many entries of the vocabulary at a time, a third of them.
CHUNK = 16_384


def get_config(argument: str = "data") -> ConfigDict:
    """The stages in their order.

    Args:
      argument: The folder with `train.jsonl`, `meta.jsonl` and `heldout.jsonl`; behind it, each
        after a comma, `cpu` or `short`, and the stages to run if not all.
    """
    folder, *options = argument.split(",")
    stages = {"rft": _rft, "rl": _rl, "meta": _meta, "eval": _eval}
    wanted = [option for option in options if option not in ("cpu", "short")] or list(stages)
    if not stages.keys() >= set(wanted):
        raise ValueError(f"{argument!r} names no stage; write FOLDER,cpu,{','.join(stages)}")
    config = spct.default_config(**{name: stages[name](folder) for name in wanted})
    if "cpu" in options:
        _for_cpu(config, folder)
    elif "short" in options:
        _shorten(config, folder)
    return config


def _adapters(config: ConfigDict) -> None:
    config.model.name = NAME
    config.model.lora_rank = 16
    config.model.lora_alpha = 32.0
    config.mesh.data, config.mesh.fsdp = -1, 1


def _rft(folder: str) -> ConfigDict:
    config = rft.default_config()
    _adapters(config)
    config.data.comparisons = (f"{folder}/train.jsonl",)
    config.data.length = 768
    config.sampler.constrain = True
    config.sampler.samples = 4
    config.sampler.max_new_tokens = JUDGEMENT
    config.sampler.temperature = 1.0
    config.sampler.batch_rows = 2048
    # The untuned model likes the first response.
    config.reject.balance_places = True
    config.batch.rows, config.batch.accumulate = 64, 2
    config.vocab_chunk = CHUNK
    config.steps = 300
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 20
    config.checkpoint.every = 300
    config.log.every = 10
    return config


def _rl(folder: str) -> ConfigDict:
    config = rl.default_config()
    _adapters(config)
    config.model.adapter = "{workdir}/rft/model"
    config.data.comparisons = (f"{folder}/train.jsonl",)
    config.data.max_prompt = PROMPT
    config.data.max_responses = 2
    config.rollout.max_new_tokens = JUDGEMENT
    config.rollout.group = 8
    config.batch.rows, config.batch.accumulate = 512, 2
    config.vocab_chunk = CHUNK
    config.steps = 150
    config.loss.beta = 0.01
    config.optimizer.learning_rate = 2e-4
    config.optimizer.warmup_steps = 10
    config.checkpoint.every = 50
    config.log.every = 5
    return config


def _meta(folder: str) -> ConfigDict:
    config = meta.default_config()
    _adapters(config)
    config.data.comparisons = (f"{folder}/meta.jsonl",)
    config.data.length = 768
    config.sampler.model = NAME
    config.sampler.adapter = "{workdir}/rl/model"
    config.sampler.samples = 8
    config.sampler.temperature = 1.0
    config.sampler.max_new_tokens = JUDGEMENT
    config.sampler.batch_rows = 2048
    config.batch.rows, config.batch.accumulate = 128, 4
    config.steps = 150
    config.optimizer.learning_rate = 5e-4
    config.optimizer.warmup_steps = 10
    config.checkpoint.every = 150
    config.log.every = 10
    return config


def _eval(folder: str) -> ConfigDict:
    config = evaluation.default_config()
    config.data.comparisons = (f"{folder}/heldout.jsonl",)
    config.models = {"base": NAME, "base_constrained": NAME, "rft": NAME, "rl": NAME}
    config.constrained = ("base_constrained",)
    config.adapters = {"rft": "{workdir}/rft/model", "rl": "{workdir}/rl/model"}
    config.scaled = "rl"
    config.meta_model = "{workdir}/meta/model"
    config.max_new_tokens = JUDGEMENT
    config.batch_rows = 2048
    return config


def _for_cpu(config: ConfigDict, folder: str) -> None:
    """What two cores do in two hours, of pairs of at most 256 tokens."""
    for name in config.order:
        part = config[name]
        if name != "eval":
            part.checkpoint.every, part.log.every = 10, 1
        where = part.rollout if name == "rl" else part if name == "eval" else part.sampler
        where.max_new_tokens = CPU_JUDGEMENT
        if "sampler" in part:
            part.sampler.batch_rows, part.sampler.orders = CPU_ROWS, "balanced"
        if "vocab_chunk" in part:
            part.vocab_chunk = 4096
    if "rft" in config:
        config.rft.data.comparisons = (f"{folder}/train.jsonl#0:1600",)
        # Each is judged once, cold, and held to right scores.
        config.rft.sampler.non_hinted, config.rft.sampler.hinted = False, "all"
        config.rft.sampler.temperature = 0.3
        # A judgement a row: attention to a long row costs CPUs more than what fills up a short one.
        config.rft.data.length = 256 + CPU_JUDGEMENT
        config.rft.batch.rows, config.rft.batch.accumulate = 16, 1
        config.rft.steps, config.rft.optimizer.warmup_steps = 100, 5
    if "rl" in config:
        config.rl.data.max_prompt = 256
        config.rl.batch.rows, config.rl.batch.accumulate = 128, 8
        config.rl.steps, config.rl.optimizer.warmup_steps = 45, 3
        config.rl.loss.beta = 0.0
        config.rl.optimizer.learning_rate = 3e-4
    if "meta" in config:
        config.meta.data.comparisons = (f"{folder}/meta.jsonl#0:200",)
        config.meta.batch.rows, config.meta.batch.accumulate = 8, 1
        config.meta.steps = 60
    if "eval" in config:
        config.eval.batch_rows = CPU_ROWS


def _shorten(config: ConfigDict, folder: str) -> None:
    """A few steps of each stage."""
    for name, part in ((name, config[name]) for name in config.order if name != "eval"):
        file, first, end = _PARTS[name]
        part.data.comparisons = (f"{folder}/{file}.jsonl#{first}:{end}",)
        part.steps, part.batch.rows, part.checkpoint.every = _STEPS[name]
        part.batch.accumulate = 1
        part.optimizer.warmup_steps, part.log.every = 1, 1
        for key in {"vocab_chunk", "sampler"} & set(part):
            if key == "sampler":
                part.sampler.batch_rows, part.sampler.samples = 0, 2
            else:
                part.vocab_chunk = 4096
    if "eval" in config:
        config.eval.data.comparisons = (f"{folder}/heldout.jsonl#0:40",)
        config.eval.samples, config.eval.ks = 8, (1, 2, 4, 8)
        config.eval.batch_rows = 0


# Of a short run: which comparisons; and steps, rows of each and steps between checkpoints.
_PARTS = {"rft": ("train", 0, 60), "rl": ("train", 60, 300), "meta": ("meta", 0, 40)}
_STEPS = {"rft": (12, 4, 4), "rl": (4, 16, 2), "meta": (6, 4, 3)}
