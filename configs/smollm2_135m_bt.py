"""A Bradley-Terry reward model on the comparisons of `smollm2_135m.py`: the scalar baseline.

    grm-jax train --config configs/smollm2_135m_bt.py:FOLDER --workdir DIR

Prepare FOLDER as for that configuration. For one GPU of 80 GB, where it has not been run yet;
`FOLDER,short` is a few steps for a CPU.
"""

from ml_collections import ConfigDict

from grm_jax.training import bt


def get_config(argument: str = "data") -> ConfigDict:
    """The stage; the folder holds `train.jsonl`."""
    folder, _, size = argument.partition(",")
    config = bt.default_config()
    config.model.name = "smollm2-135m"
    config.mesh.data, config.mesh.fsdp = -1, 1
    config.data.comparisons = (f"{folder}/train.jsonl",)
    config.data.length = 512
    config.batch.rows, config.batch.accumulate = 64, 2
    config.steps = 260
    config.optimizer.learning_rate = 2e-5
    config.optimizer.warmup_steps = 20
    config.checkpoint.every = 260
    config.log.every = 10
    if size == "short":
        config.data.comparisons = (f"{folder}/train.jsonl#0:60",)
        config.batch.rows, config.batch.accumulate, config.steps = 4, 1, 4
        config.optimizer.warmup_steps = 1
        config.checkpoint.every = 4
        config.log.every = 1
    elif size:
        raise ValueError(f"{size!r} is no size; write FOLDER or FOLDER,short")
    return config
