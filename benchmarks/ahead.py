"""Reinforcement learning with sampling and learning in turn, and at the same time on other devices.

    python benchmarks/ahead.py --devices 2 --apart 1

Each way takes the same steps of `configs/nano.py`'s stage from the same untrained parameters, and
prints the median seconds of a step once its programs are compiled. With `--devices` CPUs are
simulated; without, it takes the devices that are there. Sampling ahead pays where sampling and
learning take about as long, and a part of the devices does either as fast as all of them.
"""

import argparse
import json
import os
import runpy
import statistics
import tempfile
from pathlib import Path

import jax

from grm_jax.training import rl
from grm_jax.training.config import Settings

ROOT = Path(__file__).parents[1]
WARM = 3


def seconds(folder: Path, steps: int, apart: int, rows: int) -> list[float]:
    """Seconds of each step behind the first few."""
    nano = runpy.run_path(str(ROOT / "configs" / "nano.py"))["get_config"]()
    config = nano.rl
    config.model.name, config.model.tokenizer = "nano", "nano"
    config.model.shape = nano.rft.model.shape
    config.batch.rows = rows
    config.steps = WARM + steps
    config.optimizer.schedule = "constant"
    config.loss.importance_cap = 2.0
    config.rollout.devices = apart
    config.checkpoint.every = config.steps
    settings = Settings(config)
    settings.choice("stage", ("rl",))
    rl.run(settings, folder)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["seconds"] for line in lines][WARM:]


def main() -> None:
    """Runs both ways in turn and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", type=int, default=0, help="CPUs to simulate; 0 for none")
    parser.add_argument("--apart", type=int, default=1, help="devices that only sample")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rows", type=int, default=160, help="rollouts of a step")
    args = parser.parse_args()
    if args.devices:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", args.devices)
    print(f"{len(jax.devices())} devices of {jax.devices()[0].device_kind}, {os.cpu_count()} CPUs")
    print("| rollouts of a step | sampling and learning | median seconds of a step |")
    print("| --- | --- | --- |")
    for apart in (0, args.apart, 0, args.apart):
        with tempfile.TemporaryDirectory() as folder:
            found = seconds(Path(folder), args.steps, apart, args.rows)
        way = f"at once, {apart} apart" if apart else "in turn"
        print(f"| {args.rows} | {way} | {statistics.median(found):.2f} |", flush=True)


if __name__ == "__main__":
    main()
