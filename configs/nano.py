"""The whole method from nothing, on a laptop: SPCT of a small decoder in minutes.

    grm-jax train --config configs/nano.py --workdir runs/nano

A judge checks answers to small sums (`grm_jax.data.nano`): which of two or three responses lists
the right digits. It learns from an imperfect teacher that mostly looks at one or two of six
places (rejective fine-tuning), then from its own judgements by the outcome rule alone, where
looking at more places pays (reinforcement learning). A meta reward model learns which judgements
are right. The last stage compares them on a thousand comparisons whose problems none has seen,
greedily and by votes of up to 32 samples. Chance is near 42 %. `python benchmarks/nano.py` repeats
it over seeds and writes down what they reach and how long they take.
"""

from ml_collections import ConfigDict

from grm_jax.data.nano import MAX_RESPONSES
from grm_jax.evaluation import stage as evaluation
from grm_jax.training import meta, rft, rl, spct

# Tokens of the longest prompt, and of a judgement that looks at every place.
PROMPT, JUDGEMENT = 36, 44


def get_config() -> ConfigDict:
    """The stages in their order, each with the whole configuration of its kind."""
    config = spct.default_config(rft=_rft(), rl=_rl(), meta=_meta(), eval=_eval())
    config.cpu_devices = 2
    for stage in (config.rft, config.rl, config.meta):
        # So small a model is not worth keeping in parts.
        stage.mesh.data, stage.mesh.fsdp = -1, 1
    return config


def _rft() -> ConfigDict:
    config = rft.default_config()
    config.model.name = "nano"
    config.model.tokenizer = "nano"
    config.model.shape = {
        "family": "qwen3",
        "num_layers": 3,
        "width": 128,
        "num_heads": 4,
        "num_kv_heads": 4,
        "mlp_dim": 256,
        "max_context": 128,
        "tie_embeddings": True,
        # A few layers compile fast enough apart, and CPUs run them faster so.
        "scan_layers": False,
    }
    config.data.comparisons = ("nano:train:34000",)
    # About two comparisons with their judgements.
    config.data.length = 128
    # It has no other text to learn the language of these prompts from.
    config.data.learn_prompts = True
    config.prompt.template = "nano"
    config.prompt.single = ""
    config.sampler.files = (rft.TEACHER,)
    config.sampler.hinted = "off"
    config.batch.rows = 8
    config.steps = 1500
    config.optimizer.learning_rate = 3e-3
    config.optimizer.warmup_steps = 100
    config.optimizer.final_share = 0.05
    config.optimizer.b2 = 0.98
    config.optimizer.weight_decay = 0.01
    config.checkpoint.every = 750
    config.log.every = 50
    return config


def _rl() -> ConfigDict:
    config = rl.default_config()
    config.model.name = "{workdir}/rft/model"
    config.data.comparisons = ("nano:train:20000:1",)
    config.data.max_prompt = PROMPT
    config.data.max_responses = MAX_RESPONSES
    config.prompt.template = "nano"
    config.prompt.single = ""
    config.rollout.max_new_tokens = JUDGEMENT
    config.rollout.group = 8
    config.batch.rows = 160
    config.steps = 30
    config.loss.beta = 0.02
    config.optimizer.learning_rate = 5e-4
    config.optimizer.warmup_steps = 5
    config.checkpoint.every = 10
    return config


def _meta() -> ConfigDict:
    config = meta.default_config()
    config.model.name = "{workdir}/rl/model"
    config.data.comparisons = ("nano:train:2400:2",)
    config.data.template = "nano"
    config.data.length = PROMPT + JUDGEMENT
    config.prompt.template = "nano"
    config.prompt.single = ""
    config.sampler.model = "{workdir}/rl/model"
    config.sampler.samples = 5
    config.sampler.temperature = 1.0
    config.sampler.max_new_tokens = JUDGEMENT
    config.sampler.batch_rows = 512
    config.batch.rows = 32
    config.steps = 400
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 20
    config.checkpoint.every = 200
    return config


def _eval() -> ConfigDict:
    config = evaluation.default_config()
    config.data.comparisons = ("nano:test:1000",)
    config.models = {"rft": "{workdir}/rft/model", "rl": "{workdir}/rl/model"}
    config.scaled = "rl"
    config.meta_model = "{workdir}/meta/model"
    config.meta_template = "nano"
    config.meta_shares = (0.5, 0.75)
    config.template = "nano"
    config.max_new_tokens = JUDGEMENT
    config.batch_rows = 512
    return config
