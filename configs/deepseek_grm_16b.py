"""SPCT of DeepSeek-V2-Lite (16B, latent attention and experts), as arXiv:2504.02495 states it.

    grm-jax train --config configs/deepseek_grm_16b.py:FOLDER --workdir DIR --distributed

As `deepseek_grm_27b.py`, whose folder of data it takes, but for the base model, the weight of the
divergence, 0.002, and experts in place of some of the parameters' parts. It has not been run by us.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

BASE = "hf:deepseek-ai/DeepSeek-V2-Lite"


def get_config(folder: str = "data") -> ConfigDict:
    """The stages in their order; the folder holds the data."""
    larger = runpy.run_path(str(Path(__file__).with_name("deepseek_grm_27b.py")))
    config: ConfigDict = larger["get_config"](folder)
    config.rft.model.name = BASE
    config.rl.loss.beta = 0.002
    # The meta reward model of the paper is of 27B for either judge.
    for stage in ("rft", "rl"):
        config[stage].mesh.fsdp, config[stage].mesh.expert = 16, 8
    return config
