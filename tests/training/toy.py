"""A run that costs nothing to compile, through the real loop; also as a program to be killed.

    python -m tests.training.toy WORKDIR [MOMENT]

MOMENT is `step:N`, to die of SIGKILL at the beginning of step N, or `save:N:S`, to die S seconds
after the saving of step N began.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

# Before JAX is imported, when this is a program.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from grm_jax.data.pipeline import Source, batches
from grm_jax.distributed import make_mesh
from grm_jax.training.checkpointing import Checkpoints
from grm_jax.training.config import Settings, base_config
from grm_jax.training.learner import Learner, make_learner
from grm_jax.training.loop import Advanced, Outcome, Run, train
from grm_jax.training.optimizer import make_optimizer
from grm_jax.training.state import TrainState
from tests.training.changes import changed

SIZE = 64
RECORDS = 36


def config(**changes: Any) -> ConfigDict:
    """Twenty steps with a checkpoint every six."""
    made = base_config("toy")
    made.data = ConfigDict({"epochs": 0, "bad": ()})
    return changed(
        made,
        {
            "steps": 20,
            "batch.rows": 4,
            "checkpoint.every": 6,
            "optimizer.learning_rate": 0.2,
            "optimizer.weight_decay": 0.01,
        },
        changes,
    )


def loss(
    params: Any, batch: Any, denominator: jax.Array, key: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """A straight line through points that the key moves about."""
    x = batch["x"] + 0.01 * jax.random.normal(key, batch["x"].shape)
    errors = jnp.square(x * params["slope"] + params["shift"]["bias"] - batch["y"])
    total = jnp.sum(jnp.mean(errors, axis=1)) / denominator
    return total, {"rows": jnp.float32(len(x)), "tokens": jnp.float32(x.size)}


def make(settings: Settings, mesh: Mesh) -> Learner:
    """The learner; the slope is split over `fsdp`."""
    settings.group("model")
    split = NamedSharding(mesh, PartitionSpec("fsdp"))
    shape = jax.ShapeDtypeStruct((SIZE,), jnp.float32, sharding=split)
    return make_learner(
        loss,
        lambda batch: jnp.float32(batch["x"].shape[0] * batch["x"].shape[1]),
        make_optimizer(settings),
        params={"slope": shape, "shift": {"bias": shape}},
        frozen={},
        mesh=mesh,
        accumulate=settings["batch.accumulate"],
    )


def load(learner: Learner) -> Any:
    """The first parameters."""
    values = {
        "slope": np.linspace(-1, 1, SIZE, dtype=np.float32),
        "shift": {"bias": np.zeros(SIZE, np.float32)},
    }
    return jax.tree.map(lambda v, t: jax.device_put(v, t.sharding), values, learner.target.params)


def points(records: list[int], bad: tuple[int, ...] = ()) -> dict[str, np.ndarray]:
    """Rows `[B, SIZE]`, a function of the records; those that are `bad` are NaN."""
    x = np.stack([np.sin(np.arange(SIZE) * (1 + record)) for record in records])
    y = 3 * x + 0.5
    x[[record in bad for record in records]] = np.nan
    return {"x": x.astype(np.float32), "y": y.astype(np.float32)}


def run(
    workdir: Path,
    made: ConfigDict | None = None,
    *,
    mesh: Mapping[str, int] | None = None,
    before: Callable[[int], None] = lambda step: None,
) -> Outcome:
    """Runs or resumes; `before` is called with the number of every step that begins."""
    settings = Settings(made if made is not None else config())
    settings.group("mesh")
    assert settings["stage"] == "toy"
    learner = make(settings, make_mesh(mesh if mesh is not None else {"fsdp": 2, "tensor": 4}))
    source = Source(name="numbers", records=range(RECORDS))
    data = batches(
        [source],
        batch_size=settings["batch.rows"],
        seed=settings["seed"],
        epochs=settings["data.epochs"] or None,
        threads=1,
    )
    bad = settings["data.bad"]

    def advance(state: TrainState, records: list[int]) -> Advanced:
        before(int(state.step) + 1)
        batch = points(records, bad)
        after, metrics = learner(state, batch)
        return Advanced(state=after, metrics=metrics, learnt=batch)

    return train(
        Run(
            settings=settings,
            workdir=workdir,
            learner=learner,
            load_params=lambda: load(learner),
            load_frozen=dict,
            batches=data,
            advance=advance,
        )
    )


def die() -> None:
    """As if the machine had lost its power."""
    os.kill(os.getpid(), signal.SIGKILL)


def main(workdir: str, moment: str = "") -> None:
    """Runs as a program that may die."""
    kind, _, rest = moment.partition(":")
    fatal = -1
    if kind == "step":
        fatal = int(rest)
    if kind == "save":
        step, _, seconds = rest.partition(":")
        save = Checkpoints.save

        def fragile(self: Checkpoints, state: TrainState, position: Mapping[str, Any]) -> None:
            if int(state.step) == int(step):
                threading.Thread(target=lambda: (time.sleep(float(seconds)), die())).start()
            save(self, state, position)
            if int(state.step) == int(step) and not float(seconds):
                die()

        Checkpoints.save = fragile  # type: ignore[method-assign]
    run(Path(workdir), before=lambda step: die() if step == fatal else None)


if __name__ == "__main__":
    main(*sys.argv[1:])
