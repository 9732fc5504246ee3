"""All stages of SPCT in turn, each in a folder of the working directory.

    grm-jax train --config configs/nano.py --workdir DIR

The configuration has a group for each stage, which is that stage's whole configuration, and says in
which order they run. A stage names what an earlier one left by `{workdir}`, as in
`{workdir}/rft/model`. Stages that are done are not run again; the one that was interrupted goes on.
"""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from grm_jax.errors import UsageError
from grm_jax.training.config import Settings

_OWN_KEYS = ("stage", "seed", "order", "cpu_devices")

Stage = Callable[[Settings, Path], bool]
"""Runs a stage in a working directory; returns whether all of it is done."""


def default_config(**stages: ConfigDict) -> ConfigDict:
    """A configuration of stages that run in the order in which they are given.

    Args:
      **stages: The configuration of each, by the name of its folder.
    """
    config = ConfigDict(
        {
            "stage": "spct",
            "seed": 0,
            "order": tuple(stages),
            # How many devices CPUs are to look like; 0 for one. Small models run faster on one
            # device a core than on one device whose threads share out each small product.
            "cpu_devices": 0,
        }
    )
    for name, stage in stages.items():
        config[name] = stage
    return config


def run(config: ConfigDict, workdir: Path, stages: Mapping[str, Stage]) -> bool:
    """Runs the stages.

    Args:
      config: Of `default_config`; its seed is that of every stage.
      workdir: Each stage has the folder of its name in it.
      stages: What each kind of stage does.

    Returns:
      Whether all stages are done; False if one was asked to stop.

    Raises:
      UsageError: A stage does not exist, or what it raises.
    """
    order = [str(name) for name in config.order]
    if not order:
        raise UsageError("order is empty; name at least one stage")
    for name in order:
        group = config.get(name)
        if not isinstance(group, ConfigDict):
            raise UsageError(f"order names {name!r}, which has no group in the configuration")
        if group.stage not in stages:
            raise UsageError(
                f"{name}.stage is {group.stage!r}; it must be one of {', '.join(stages)}"
            )
    unused = sorted(set(config) - {*order, *_OWN_KEYS})
    if unused:
        raise UsageError(f"order leaves out {', '.join(unused)}; add it, or leave out the group")
    for number, name in enumerate(order, 1):
        group = ConfigDict(_filled(config[name].to_dict(), str(workdir)))
        group.seed = config.seed
        print(f"grm-jax: stage {number} of {len(order)}: {name}", file=sys.stderr)
        settings = Settings(group)
        if not stages[settings["stage"]](settings, workdir / name):
            return False
    return True


def _filled(value: Any, workdir: str) -> Any:
    """The value with the working directory's name in all its text."""
    match value:
        case str():
            return value.replace("{workdir}", workdir)
        case dict():
            return {key: _filled(one, workdir) for key, one in value.items()}
        case tuple() | list():
            return tuple(_filled(one, workdir) for one in value)
        case _:
            return value
