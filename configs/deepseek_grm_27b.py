"""SPCT of Gemma-2-27B with every setting that arXiv:2504.02495 states.

    grm-jax train --config configs/deepseek_grm_27b.py:FOLDER --workdir DIR --distributed

FOLDER holds `comparisons.jsonl` (what judgements are about), `teacher.jsonl` (three judgements of
each by a stronger model, with and without a hint) and `general.jsonl` (general instructions, 85 %
of what the paper fine-tunes on). The authors trained on 128 A100s: 19.2 hours of rejective
fine-tuning and 15.6 of reinforcement learning. What they do not state is set here and marked so. It
has not been run by us: that takes a pod.
"""

from ml_collections import ConfigDict

from grm_jax.training import meta, rft, rl, spct

BASE = "hf:google/gemma-2-27b"
# Not stated: tokens of the longest prompt and judgement.
PROMPT, JUDGEMENT = 4096, 1024


def get_config(folder: str = "data") -> ConfigDict:
    """The stages in their order; the folder holds the data."""
    comparisons = (f"{folder}/comparisons.jsonl",)
    config = spct.default_config(
        rft=_rft(folder), rl=rl_config("{workdir}/rft/model"), meta=_meta(folder)
    )
    for stage in ("rft", "rl", "meta"):
        config[stage].data.comparisons = comparisons
        config[stage].model.remat = True
        # Parts of 4,608 / 32 = 144 rows: TPUs keep bfloat16 in tiles of 16, and parts that do not
        # fill them are not gathered but summed, at twice the traffic.
        config[stage].mesh.data = -1
        config[stage].mesh.fsdp = 32
    # For each token all parameters are read: an eighth of them from a chip's own memory.
    config.rl.rollout.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 8, "expert": 1})
    return config


def _rft(folder: str) -> ConfigDict:
    config = rft.default_config()
    # From pretrained and not from instructed weights.
    config.model.name = BASE
    config.prompt.template = "paper"
    config.sampler.files = (f"{folder}/teacher.jsonl",)
    config.sampler.samples = 3
    config.sampler.hinted = "all"
    config.data.general = (f"{folder}/general.jsonl",)
    config.data.general_share = 1070 / 1256
    config.data.length = PROMPT + JUDGEMENT
    config.data.too_long = "keep_end"
    # Rows of a step hold more than one example; the paper's batch is 1,024 examples.
    config.batch.rows = 1024
    config.batch.accumulate = 8
    config.steps = 900
    config.optimizer.learning_rate = 5e-6
    return config


def rl_config(model: str) -> ConfigDict:
    """The paper's GRPO, from a model."""
    config = rl.default_config()
    config.model.name = model
    config.prompt.template = "paper"
    config.data.max_prompt = PROMPT
    config.data.max_responses = 8
    config.rollout.group = 4
    config.rollout.max_new_tokens = JUDGEMENT
    # Whether the paper counts prompts or rollouts is not stated. In one micro-batch, so that each
    # of 128 chips has a whole group, whose prompt it computes once.
    config.batch.rows = 512
    config.batch.accumulate = 1
    config.steps = 900
    config.loss.beta = 0.08
    config.optimizer.learning_rate = 4e-7
    return config


def _meta(folder: str) -> ConfigDict:
    config = meta.default_config()
    config.model.name = BASE
    config.data.trajectories = (f"{folder}/teacher.jsonl",)
    config.data.length = PROMPT + JUDGEMENT
    config.prompt.template = "paper"
    config.sampler.model = "{workdir}/rl/model"
    config.sampler.samples = 3
    config.sampler.temperature = 0.5
    config.sampler.max_new_tokens = JUDGEMENT
    config.batch.rows = 512
    config.batch.accumulate = 4
    # Not stated.
    config.steps = 900
    config.optimizer.learning_rate = 1e-5
    return config
