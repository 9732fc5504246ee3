"""`grm-jax train`: runs a configuration's stage, and goes on with what an earlier call began."""

import argparse
import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import jax

from grm_jax.distributed import ending_together, join
from grm_jax.errors import UsageError
from grm_jax.evaluation import stage as evaluation
from grm_jax.training import bt, cloud, meta, pairwise, rft, rl, sft, spct
from grm_jax.training.config import Settings, load_config

STAGES: Mapping[str, spct.Stage] = MappingProxyType(
    {
        "sft": sft.run,
        "rft": rft.run,
        "rl": rl.run,
        "meta": meta.run,
        "bt": bt.run,
        "pairwise": pairwise.run,
        "cloud": cloud.run,
        "eval": evaluation.run,
    }
)


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds `train` to the subcommands."""
    parser = commands.add_parser(
        "train",
        help="train a model",
        description="Runs the stage that a configuration describes. A run that was stopped or "
        "killed goes on where it stood when the same command is given again.",
        epilog="Any key of the configuration can be set: --config.optimizer.learning_rate=1e-5",
    )
    add = parser.add_argument
    add("--config", required=True, metavar="FILE.py", help="a file with get_config()")
    add("--workdir", required=True, type=Path, metavar="DIR", help="where everything goes")
    add(
        "--distributed",
        action="store_true",
        help="be one process of several, started on each host of a TPU pod, by srun or mpirun, or "
        "with JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID set",
    )
    parser.set_defaults(run=run, overrides=[])


def _split_cpus(devices: int) -> None:
    """Has JAX show so many devices where it runs on CPUs, unless the environment says how many."""
    if devices < 0:
        raise UsageError(f"cpu_devices is {devices}; it must be 0 (for one) or more")
    said = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if devices and not said and "JAX_NUM_CPU_DEVICES" not in os.environ:
        # Too late if this process has used JAX; meshes then take the devices that there are.
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", devices)


def run(args: argparse.Namespace) -> bool:
    """Runs the stage; returns True, or raises what is wrong."""
    config = load_config(args.config, args.overrides)
    kind = config.get("stage")
    if kind not in (*STAGES, "spct"):
        raise UsageError(f"stage is {kind!r}; it must be one of {', '.join(STAGES)}, spct")
    _split_cpus(int(config.get("cpu_devices", 0)))
    if args.distributed:
        join()
    with ending_together():
        if kind == "spct":
            spct.run(config, args.workdir, STAGES)
            return True
        settings = Settings(config)
        STAGES[settings["stage"]](settings, args.workdir)
    return True
