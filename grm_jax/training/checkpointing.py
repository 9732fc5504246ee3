"""Checkpoints of a run: state, data position and configuration, verified when they are read.

Orbax writes them in the background, and a checkpoint appears whole or not at all. What its files
hold may still be damaged later, and a damaged number is as good a number as any other. So beside
the state lies a fingerprint of every array, taken on the devices from the arrays themselves. It
does not depend on how they were split or written: what is restored, on whatever mesh, has the same
one or is refused, and the checkpoint before it is used.
"""

import hashlib
import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, final

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from grm_jax.errors import UsageError
from grm_jax.models import Params
from grm_jax.training.config import changed_key
from grm_jax.training.state import TrainState

STATE, META = "state", "meta"
_REFUSED = "refused"


class Restored(NamedTuple):
    """What a run goes on from.

    Attributes:
      state: On the mesh of the target that was asked for.
      position: Of the data, for `Batches.set_state`.
      step: Steps done.
    """

    state: TrainState
    position: dict[str, Any]
    step: int


@final
class Checkpoints:
    """The checkpoints of one run. Every process of a group must make the same calls."""

    def __init__(
        self,
        folder: Path,
        *,
        keep: int,
        keep_every: int,
        config: Mapping[str, Any],
        provenance: Mapping[str, Any],
    ) -> None:
        """Opens the folder, which is made if it does not exist.

        Args:
          folder: Where checkpoints are, one folder a step.
          keep: How many of the latest are kept; at least 2, so that a damaged one has one before.
          keep_every: Steps that are a multiple of this are kept for good; 0 for none.
          config: The run's configuration, from `Settings.to_dict`.
          provenance: Package versions and the commit, to be found beside the state.

        Raises:
          UsageError: Fewer than 2 would be kept.
        """
        if keep < 2:
            raise UsageError(
                f"checkpoint.keep is {keep}; keep at least 2, so that a damaged one has one before"
            )
        self.folder = folder.absolute()
        self._config = json.loads(json.dumps(dict(config)))
        self._provenance = json.loads(json.dumps(dict(provenance)))
        self._frozen: dict[str, int] | None = None
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep, keep_period=keep_every or None, cleanup_tmp_directories=True
            ),
        )

    def save(self, state: TrainState, position: Mapping[str, Any]) -> None:
        """Saves a state under its step, in the background.

        The frozen parameters are not saved, as they can be loaded again; their fingerprint is.

        Args:
          state: The state; it may be donated to the next step at once.
          position: Where the data stands after that step.
        """
        arrays = _named(state._replace(frozen={}))
        if self._frozen is None:
            self._frozen = fingerprints(_named(state.frozen))
        meta = {
            "step": int(jax.device_get(state.step)),
            "config": self._config,
            "position": dict(position),
            "fingerprints": fingerprints(arrays),
            "frozen": self._frozen,
            **self._provenance,
        }
        if jax.default_backend() == "cpu":
            # There Orbax writes from the arrays' own memory, which a donated state reuses while
            # it writes; on accelerators it copies to the host before it returns.
            arrays = _copy(arrays)
        self._manager.save(
            meta["step"],
            args=ocp.args.Composite(
                **{STATE: ocp.args.StandardSave(arrays), META: ocp.args.JsonSave(_sealed(meta))}
            ),
            force=True,
        )

    def restore(self, target: TrainState, load_frozen: Callable[[], Params]) -> Restored | None:
        """Restores the latest checkpoint that is whole, and says which were not.

        Args:
          target: The state's shapes and shardings.
          load_frozen: Loads the frozen parameters, which the restored state takes; called if there
            are any.

        Returns:
          What the run goes on from; None if there is no checkpoint at all.

        Raises:
          UsageError: The run was begun with another configuration or base model, or none of its
            checkpoints is whole.
        """
        refused: list[tuple[Path, str]] = []
        frozen: Params | None = None
        for step in sorted(self._manager.all_steps(), reverse=True):
            path = self.folder / str(step)
            try:
                meta = self._read_meta(step)
                self._check_config(meta["config"])
                if frozen is None:
                    frozen = load_frozen() if jax.tree.leaves(target.frozen) else {}
                state = self._read_state(step, target, frozen, meta)
            except _Damaged as error:
                refused.append((path, str(error)))
                continue
            self._set_aside(refused)
            return Restored(state=state, position=meta["position"], step=step)
        if refused:
            path, reason = refused[0]
            raise UsageError(
                f"none of the {len(refused)} checkpoints in {self.folder} is whole (of {path.name}:"
                f" {reason}); name another --workdir, or remove that folder to begin again"
            )
        return None

    def wait(self) -> None:
        """Returns when everything saved is in its place."""
        self._manager.wait_until_finished()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._manager.close()

    def _read_meta(self, step: int) -> dict[str, Any]:
        def read() -> Any:
            args = ocp.args.Composite(**{META: ocp.args.JsonRestore()})
            return self._manager.restore(step, args=args)[META]

        sealed = _attempt(read)
        content = sealed.get("content") if isinstance(sealed, dict) else None
        if not isinstance(content, dict) or sealed != _sealed(content):
            raise _Damaged(f"its {META} was altered")
        if content["step"] != step:
            raise _Damaged(f"it is of step {content['step']}")
        return content

    def _check_config(self, before: Mapping[str, Any]) -> None:
        key = changed_key(before, self._config)
        if key is not None:
            raise UsageError(
                f"{self.folder.parent} was begun with {key} {before.get(key)!r} and this run has "
                f"{self._config.get(key)!r}; use the same, or name another --workdir"
            )

    def _read_state(
        self, step: int, target: TrainState, frozen: Params, meta: Mapping[str, Any]
    ) -> TrainState:
        if self._frozen is None:
            self._frozen = fingerprints(_named(frozen))
        if self._frozen != meta["frozen"]:
            raise UsageError(
                f"{self.folder.parent} was begun on another base model than this one; give "
                "model.name the weights it had"
            )
        wanted = _named(target._replace(frozen={}))
        if set(wanted) != set(meta["fingerprints"]):
            names = ", ".join(sorted(set(wanted) ^ set(meta["fingerprints"]))[:3])
            raise UsageError(
                f"{self.folder.parent} was written by another version of this program (the state "
                f"differs in {names}); use that one, or name another --workdir"
            )

        def read() -> Any:
            args = ocp.args.Composite(**{STATE: ocp.args.StandardRestore(wanted)})
            return self._manager.restore(step, args=args)[STATE]

        arrays = _attempt(read)
        found = fingerprints(arrays)
        altered = [name for name, value in meta["fingerprints"].items() if found[name] != value]
        if altered:
            raise _Damaged(f"{altered[0]} was altered")
        leaves = [arrays[name] for name in wanted]
        structure = jax.tree.structure(target._replace(frozen={}))
        state: TrainState = jax.tree.unflatten(structure, leaves)
        return state._replace(frozen=frozen)

    def _set_aside(self, refused: list[tuple[Path, str]]) -> None:
        """Moves damaged checkpoints out of the way, so that their steps can be saved again."""
        for path, reason in refused:
            aside = self.folder.parent / _REFUSED / path.name
            if jax.process_index() == 0:
                shutil.rmtree(aside, ignore_errors=True)
                aside.parent.mkdir(exist_ok=True)
                path.rename(aside)
                print(
                    f"checkpoint {path} is refused: {reason}; moved to {aside}, and the one before "
                    "it is used",
                    file=sys.stderr,
                )
        if refused:
            _barrier("refused checkpoints")
            self._manager.reload()


def fingerprints(arrays: Mapping[str, jax.Array]) -> dict[str, int]:
    """A number for each array that changes with any bit of it, and not with how it is split.

    The bits of every element and its place are mixed, one to one, and added up modulo 2**32. So a
    single wrong element never goes unseen, and other damage does with a probability of 2**-32.

    Args:
      arrays: Arrays by name; elements of at most 32 bits.

    Returns:
      The numbers by name.
    """
    found = jax.device_get(_fingerprints(dict(arrays)))
    return {name: int(value) for name, value in found.items()}


@jax.jit
def _fingerprints(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: _fingerprint(array) for name, array in arrays.items()}


def _fingerprint(array: jax.Array) -> jax.Array:
    if array.dtype == bool:
        array = array.astype(jnp.uint8)
    size = array.dtype.itemsize
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[size]
    bits = jax.lax.bitcast_convert_type(array, unsigned).astype(jnp.uint32)
    # The place in the whole array, from one counter an axis, so that nothing is ever gathered.
    place = jnp.zeros(array.shape, jnp.uint32)
    for axis in range(array.ndim):
        stride = math.prod(array.shape[axis + 1 :]) % 2**32
        place += jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis) * np.uint32(stride)
    return jnp.sum(_mixed(bits ^ _mixed(place)), dtype=jnp.uint32)


def _mixed(x: jax.Array) -> jax.Array:
    """A permutation of the numbers of 32 bits without any pattern."""
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
    return x ^ (x >> 16)


@jax.jit
def _copy(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return jax.tree.map(jnp.copy, arrays)


class _Damaged(Exception):
    """A checkpoint cannot be used; the message says why."""


def _attempt(read: Any) -> Any:
    """What `read` returns, or a `_Damaged` on every process if it fails on any."""
    reason, found = "", None
    try:
        found = read()
    except Exception as error:  # files may be damaged in any way, and Orbax says so in any way
        reason = " ".join(str(error).split())[:200] or type(error).__name__
    failed = bool(reason)
    if jax.process_count() > 1:
        failed = bool(np.any(multihost_utils.process_allgather(np.asarray(failed))))
    if failed:
        raise _Damaged(reason or "another process cannot read it")
    return found


def _named(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by their path."""
    found = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in found}


def _sealed(content: dict[str, Any]) -> dict[str, Any]:
    text = json.dumps(content, sort_keys=True)
    return {"content": content, "sha256": hashlib.sha256(text.encode()).hexdigest()}


def _barrier(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def write_atomically(path: Path, text: str) -> None:
    """Writes a file that is there whole or as it was before."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
