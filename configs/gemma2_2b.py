"""Reinforcement learning of Gemma-2-2B from its instructed weights, without the cold start.

    grm-jax train --config configs/gemma2_2b.py:FILE.jsonl --workdir DIR

For one accelerator of 40 GB or more: the base stays frozen in bfloat16 and adapters of rank 32
learn. The paper finds that reinforcement learning alone, without rejective fine-tuning, brings most
of the gain (arXiv:2504.02495, table 4). It has not been run by us.
"""

from ml_collections import ConfigDict

from grm_jax.training import rl


def get_config(file: str = "comparisons.jsonl") -> ConfigDict:
    """The stage, on a file of comparisons."""
    config = rl.default_config()
    config.model.name = "hf:google/gemma-2-2b-it"
    config.model.lora_rank = 32
    config.model.lora_alpha = 64.0
    config.model.remat = True
    config.data.comparisons = (file,)
    config.data.max_prompt = 2048
    config.prompt.template = "paper"
    config.rollout.max_new_tokens = 512
    # Each device samples with parameters of its own: parts would be gathered for every token.
    config.rollout.mesh.data, config.rollout.mesh.fsdp = -1, 1
    config.batch.rows = 64
    config.batch.accumulate = 4
    config.steps = 300
    # Adapters take larger steps than the 4e-7 of full fine-tuning.
    config.optimizer.learning_rate = 1e-5
    config.optimizer.warmup_steps = 10
    config.checkpoint.every = 50
    return config
