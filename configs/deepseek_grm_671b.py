"""Rejective fine-tuning of DeepSeek-V3, which has no reinforcement learning in arXiv:2504.02495.

    grm-jax train --config configs/deepseek_grm_671b.py:FOLDER --workdir DIR --distributed

As the first stage of `deepseek_grm_27b.py`, whose folder of data it takes, from 50,000 rejected
samples. It has not been run by us.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config(folder: str = "data") -> ConfigDict:
    """The stage; the folder holds the data."""
    smaller = runpy.run_path(str(Path(__file__).with_name("deepseek_grm_27b.py")))
    config: ConfigDict = smaller["get_config"](folder).rft
    config.model.name = "hf:deepseek-ai/DeepSeek-V3"
    # A row of a step for each of 1,024 chips.
    config.mesh.fsdp, config.mesh.expert = 64, 16
    config.batch.accumulate = 1
    # Of a file in which judgements were rejected until so many are left.
    config.data.comparisons = (f"{folder}/comparisons.jsonl#0:50000",)
    return config
