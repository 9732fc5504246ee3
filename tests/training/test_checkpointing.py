"""Checkpoints: whole, verified, and independent of the mesh."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from grm_jax.distributed import make_mesh
from grm_jax.errors import UsageError
from grm_jax.training.checkpointing import Checkpoints, fingerprints
from grm_jax.training.config import Settings
from grm_jax.training.learner import Learner
from grm_jax.training.state import TrainState
from tests.training import toy

POSITION = {"consumed": 7, "order": {"seed": 0}}


def learner(mesh: dict[str, int] | None = None) -> Learner:
    return toy.make(Settings(toy.config()), make_mesh(mesh or {"fsdp": 8}))


def opened(folder: Path, **changes: Any) -> Checkpoints:
    settings: dict[str, Any] = {"keep": 2, "keep_every": 0, "config": {"a.b": 1}, "provenance": {}}
    return Checkpoints(folder, **(settings | changes))


def course(one: Learner, steps: int) -> Iterator[TrainState]:
    state = one.begin(toy.load(one), {}, seed=0)
    for step in range(steps):
        state, _ = one(state, toy.points(list(range(8 * step, 8 * step + 8))))
        yield state


def on_host(state: TrainState) -> Any:
    # Copies, as the arrays' own memory is donated to the next step.
    return jax.tree.map(lambda leaf: np.array(leaf, copy=True), state)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, Any]]:
    """The checkpoints of steps 1 and 2, each written while the state went on to step 3."""
    folder, states = tmp_path_factory.mktemp("saved") / "checkpoints", {}
    with opened(folder) as checkpoints:
        for step, state in enumerate(course(learner(), 3), 1):
            if step < 3:
                states[step] = on_host(state)
                checkpoints.save(state, POSITION)
    return folder, states


def same(found: TrainState, wanted: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, on_host(found), wanted)


@pytest.mark.parametrize("mesh", [{"fsdp": 8}, {"data": 2, "fsdp": 4}, {"tensor": 8}])
def test_restored_onto_any_mesh(mesh: dict[str, int], saved: tuple[Path, dict[int, Any]]) -> None:
    one = learner(mesh)
    with opened(saved[0]) as checkpoints:
        restored = checkpoints.restore(one.target, dict)
    assert restored is not None
    assert (restored.step, restored.position) == (2, POSITION)
    same(restored.state, saved[1][2])
    wanted = jax.tree.map(lambda leaf: leaf.sharding, one.target)
    assert jax.tree.map(lambda leaf: leaf.sharding, restored.state) == wanted
    # And it is a state that the step takes as it is.
    one(restored.state, toy.points(list(range(8))))


def test_large_states_are_saved_as_they_were(tmp_path: Path) -> None:
    """Steps that follow at once must not write into what is still being saved."""
    mesh = make_mesh({}, jax.devices()[:1])
    here = NamedSharding(mesh, PartitionSpec())
    size = 1 << 22
    add = jax.jit(
        lambda state: state._replace(step=state.step + 1, params=state.params + 1),
        donate_argnums=0,
    )
    zero = jnp.zeros((), jnp.int32)
    state = TrainState(
        params=jnp.zeros(size, jnp.float32),
        frozen={},
        opt_state=(),
        step=zero,
        key=jax.random.key_data(jax.random.key(0)),
        skipped=zero + 0,
        bad_streak=zero + 0,
    )
    state = jax.device_put(state, here)
    target = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), state
    )
    with opened(tmp_path) as checkpoints:
        for _ in range(3):
            checkpoints.save(state, POSITION)
            for _ in range(10):
                state = add(state)
        checkpoints.wait()
        restored = checkpoints.restore(target, dict)
    assert restored is not None
    assert restored.step == 20
    np.testing.assert_array_equal(restored.state.params, np.full(size, 20, np.float32))


def copied(saved: tuple[Path, dict[int, Any]], tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoints"
    shutil.copytree(saved[0], folder)
    return folder


def restore(folder: Path) -> Any:
    with opened(folder) as checkpoints:
        return checkpoints.restore(learner().target, dict)


def data_files(folder: Path) -> list[Path]:
    """Files with numbers of the state."""
    return sorted(path for path in (folder / "state").rglob("*") if path.parent.name == "d")


def flip(path: Path, place: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 16
    path.write_bytes(bytes(content))


def test_truncated(
    saved: tuple[Path, dict[int, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied(saved, tmp_path)
    for path in data_files(folder / "2"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    found = restore(folder)
    assert found.step == 1
    same(found.state, saved[1][1])
    said = capsys.readouterr().err
    assert f"checkpoint {folder / '2'} is refused: " in said
    assert said.count("\n") == 1
    # It is out of the way: the step can be saved again, and is not refused again.
    assert (tmp_path / "refused" / "2" / "state").is_dir()
    assert restore(folder).step == 1
    assert capsys.readouterr().err == ""


def test_a_flipped_bit(
    saved: tuple[Path, dict[int, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the largest file, which holds parameters; and in the record of what was saved."""
    folder = copied(saved, tmp_path)
    flip(max(data_files(folder / "2"), key=lambda path: path.stat().st_size), 0.5)
    assert restore(folder).step == 1
    assert "2 is refused: " in capsys.readouterr().err
    shutil.rmtree(folder)
    folder = copied(saved, tmp_path)
    meta = next(
        path for path in (folder / "2" / "meta").rglob("*") if b"consumed" in path.read_bytes()
    )
    meta.write_bytes(meta.read_bytes().replace(b'"consumed": 7', b'"consumed": 6'))
    meta.write_bytes(meta.read_bytes().replace(b'"consumed":7', b'"consumed":6'))
    assert restore(folder).step == 1
    assert "2 is refused: its meta was altered" in capsys.readouterr().err


@pytest.mark.slow
def test_damage_anywhere_is_refused_or_harmless(
    saved: tuple[Path, dict[int, Any]], tmp_path: Path
) -> None:
    """Every file, flipped in three places, cut and missing: never a state that was not saved."""
    files = [path for path in (saved[0] / "2").rglob("*") if path.is_file()]
    for path in files:
        for harm in (0.1, 0.5, 0.9, "cut", "gone"):
            folder = copied(saved, tmp_path)
            victim = folder / path.relative_to(saved[0])
            if not victim.stat().st_size:
                continue
            match harm:
                case float(place):
                    flip(victim, place)
                case "cut":
                    victim.write_bytes(victim.read_bytes()[: victim.stat().st_size // 2])
                case _:
                    victim.unlink()
            found = restore(folder)
            assert found.position == POSITION
            same(found.state, saved[1][found.step])
            shutil.rmtree(folder)


def test_nothing_whole_is_left(saved: tuple[Path, dict[int, Any]], tmp_path: Path) -> None:
    folder = copied(saved, tmp_path)
    for step in (1, 2):
        for path in data_files(folder / str(step)):
            path.unlink()
    with pytest.raises(UsageError, match=r"none of the 2 checkpoints .* is whole \(of 2: "):
        restore(folder)
    assert not (tmp_path / "refused").exists()


def test_nothing_there(tmp_path: Path) -> None:
    assert restore(tmp_path / "checkpoints") is None


def test_another_base_model(tmp_path: Path) -> None:
    one = learner()
    state = next(course(one, 1))
    with opened(tmp_path / "c") as checkpoints:
        checkpoints.save(state._replace(frozen={"base": jnp.arange(3.0)}), POSITION)
    target = one.target._replace(frozen={"base": jax.ShapeDtypeStruct((3,), jnp.float32)})
    for values, fits in (((0.0, 1.0, 2.0), True), ((0.0, 1.0, 2.5), False)):
        with opened(tmp_path / "c") as checkpoints:
            frozen = {"base": jnp.asarray(values)}
            if fits:
                restored = checkpoints.restore(target, lambda: frozen)  # noqa: B023
                assert restored is not None
                assert restored.state.frozen is frozen
            else:
                with pytest.raises(UsageError, match="was begun on another base model"):
                    checkpoints.restore(target, lambda: frozen)  # noqa: B023


def test_what_is_kept(tmp_path: Path) -> None:
    with opened(tmp_path / "c", keep_every=3) as checkpoints:
        for state in course(learner(), 7):
            checkpoints.save(state, POSITION)
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["3", "6", "7"]
    with pytest.raises(UsageError, match=r"checkpoint\.keep is 1; keep at least 2"):
        opened(tmp_path / "c", keep=1)


def test_the_whole_configuration_lies_beside(saved: tuple[Path, dict[int, Any]]) -> None:
    found = json.loads((saved[0] / "2" / "meta" / "metadata").read_text())
    assert found["content"]["config"] == {"a.b": 1}


# --- fingerprints ---


def one(array: Any) -> int:
    return fingerprints({"a": jnp.asarray(array)})["a"]


def test_fingerprints_change_with_every_bit() -> None:
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    seen = {one(values)}
    for place in range(6):
        for bit in range(32):
            flipped = values.copy()
            flipped.view(np.uint32).flat[place] ^= np.uint32(1 << bit)
            seen.add(one(flipped))
    assert len(seen) == 1 + 6 * 32


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "uint8", "int32", "bool"])
def test_fingerprints_of_all_types(dtype: str) -> None:
    values = jnp.arange(6).astype(dtype)
    assert one(values) != one(values[::-1])
    assert one(values) == one(values + jnp.zeros((), dtype) if dtype != "bool" else values)


def test_fingerprints_do_not_depend_on_the_mesh() -> None:
    values = np.random.default_rng(0).standard_normal((8, 4, 16)).astype(np.float32)
    mesh = make_mesh({"data": 2, "fsdp": 4})
    for spec in (
        PartitionSpec(),
        PartitionSpec("data", "fsdp"),
        PartitionSpec("fsdp", None, "data"),
    ):
        placed = jax.device_put(values, NamedSharding(mesh, spec))
        assert fingerprints({"a": placed})["a"] == one(values)
    assert one(values) != one(values.transpose(1, 0, 2).reshape(values.shape))
    assert one(values) != one(values[::-1])
