"""SPCT of the embedded default model on real comparisons, as far as a CPU gets in half an hour.

    grm-jax train --config configs/smollm2_135m.py:FOLDER --workdir runs/smollm2

FOLDER holds a file of comparisons, `hh_harmless.jsonl.gz`: pairs of answers, of which people found
one less harmful. The untuned model never writes a readable score, so its own judgements are held to
the layout while it is sampled (the cold start without a teacher), and adapters learn those that
were right. Reinforcement learning goes on from there, unconstrained, and the last stage judges
comparisons that neither has seen. The steps are few: they show that the way works, not how far it
leads.
"""

from ml_collections import ConfigDict

from grm_jax.evaluation import stage as evaluation
from grm_jax.training import rft, rl, spct

NAME = "smollm2-135m"
FILE = "hh_harmless.jsonl.gz"
# Tokens of the longest prompt and of a judgement.
PROMPT, JUDGEMENT = 384, 64


def get_config(folder: str = "data") -> ConfigDict:
    """The stages in their order; the folder holds the comparisons."""
    path = f"{folder}/{FILE}"
    return spct.default_config(rft=_rft(path), rl=_rl(path), eval=_eval(path))


def _adapters(config: ConfigDict) -> None:
    config.model.name = NAME
    config.model.lora_rank = 16
    config.model.lora_alpha = 32.0


def _rft(path: str) -> ConfigDict:
    config = rft.default_config()
    _adapters(config)
    config.data.comparisons = (f"{path}#0:60",)
    config.data.length = 512
    # A few have more; what they lose is the beginning of the instructions.
    config.data.too_long = "keep_end"
    config.sampler.constrain = True
    config.sampler.samples = 3
    config.sampler.max_new_tokens = JUDGEMENT
    config.sampler.temperature = 0.7
    config.batch.rows = 4
    config.steps = 12
    config.optimizer.learning_rate = 5e-4
    config.optimizer.warmup_steps = 3
    config.checkpoint.every = 4
    return config


def _rl(path: str) -> ConfigDict:
    config = rl.default_config()
    _adapters(config)
    config.model.adapter = "{workdir}/rft/model"
    config.data.comparisons = (f"{path}#60:300",)
    config.data.max_prompt = PROMPT
    config.rollout.max_new_tokens = JUDGEMENT
    config.batch.rows = 16
    config.batch.accumulate = 4
    config.steps = 4
    config.loss.beta = 0.01
    config.optimizer.learning_rate = 1e-4
    config.checkpoint.every = 2
    return config


def _eval(path: str) -> ConfigDict:
    config = evaluation.default_config()
    config.data.comparisons = (f"{path}#1000:1040",)
    config.models = {"base": NAME, "base_constrained": NAME, "rft": NAME, "rl": NAME}
    config.constrained = ("base_constrained",)
    config.adapters = {"rft": "{workdir}/rft/model", "rl": "{workdir}/rl/model"}
    config.scaled = "rl"
    config.samples = 8
    config.ks = (1, 2, 4, 8)
    config.max_new_tokens = JUDGEMENT
    return config
