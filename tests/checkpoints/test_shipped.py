"""Adapters that come with the package: those that do, and two that pretend to."""

import dataclasses
import inspect
from pathlib import Path

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from grm_jax import GRM, checkpoints
from grm_jax.checkpoints import peft, shipped
from grm_jax.checkpoints.safetensors import open_tensors
from grm_jax.checkpoints.shipped import FILE, Shipped, file_sha256, shipped_folder
from grm_jax.errors import UsageError
from grm_jax.judge import DEFAULT_TEMPLATE
from grm_jax.models import Lora, merge_lora, split_lora
from grm_jax.training.config import load_config
from tests.checkpoints.shipping import LORA, ROLES, ship

ROOT = Path(__file__).parents[2]
MOST_BYTES = 12_000_000
DEFAULTS = {
    "judge": DEFAULT_TEMPLATE,
    "meta": inspect.signature(GRM.meta_model).parameters["template"].default,
}


def check(one: Shipped, *, lora: Lora) -> None:
    """Holds an adapter to what it must be."""
    files = {path.name: path for path in one.folder.iterdir()}
    assert files.keys() == {peft.CONFIG, FILE}
    assert all(path.stat().st_size < MOST_BYTES for path in files.values())
    assert file_sha256(files[FILE]) == one.sha256
    assert {tensor.kind for tensor in open_tensors(files[FILE]).values()} == {"BF16"}
    # What is asked by default is what it was trained on.
    assert one.template == DEFAULTS[one.role]
    assert peft.base_name(one.folder) == one.base
    base = checkpoints.open_checkpoint(one.base).config
    config, params = checkpoints.load_adapter(one.name, base, {})
    assert config == checkpoints.open_checkpoint(one.name).config
    assert config.lora == lora
    assert config.num_labels == (one.role == "meta")
    for path, leaf in flatten_dict(params).items():
        assert np.isfinite(leaf).all(), path
        assert np.any(leaf), path


def smollm2_lora() -> Lora:
    """What `configs/smollm2_135m.py` trains, and can train further by naming an adapter."""
    path, further = str(ROOT / "configs" / "smollm2_135m.py"), "smollm2-135m-spct"
    model = load_config(path, [f"--config.rl.model.adapter={further}"]).rl.model
    assert (model.name, model.adapter) == ("smollm2-135m", further)
    return Lora(rank=model.lora_rank, alpha=model.lora_alpha, targets=tuple(model.lora_targets))


@pytest.mark.parametrize("name", list(shipped.SHIPPED))
def test_what_comes_with_the_package(name: str) -> None:
    one = shipped.SHIPPED[name]
    assert one.base == "smollm2-135m"
    check(one, lora=smollm2_lora())


def test_nothing_else_comes_with_it() -> None:
    folders = {path.parent for path in shipped.FOLDER.glob(f"*/{FILE}")}
    assert folders == {one.folder for one in shipped.SHIPPED.values()}
    # One judge at most for a model, or the default would be a matter of order.
    judges = [one.base for one in shipped.SHIPPED.values() if one.role == "judge"]
    assert len(judges) == len(set(judges))


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return ship(tmp_path, monkeypatch)


def test_the_check_itself(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ROLES:
        check(shipped.SHIPPED[name], lora=LORA)
    one = shipped.SHIPPED["tiny-spct"]
    for field, value in (("template", "paper"), ("role", "meta"), ("base", "other")):
        with pytest.raises(AssertionError):
            check(dataclasses.replace(one, **{field: value}), lora=LORA)
    with monkeypatch.context() as patch:
        patch.setattr(f"{__name__}.MOST_BYTES", 1000)
        with pytest.raises(AssertionError):
            check(one, lora=LORA)
    with (one.folder / FILE).open("ab") as file:
        file.write(b"!")
    with pytest.raises(AssertionError):
        check(one, lora=LORA)


def test_a_judge_is_had_by_name(base: Path) -> None:
    bare, named, alone = (
        GRM.from_pretrained(str(base)),
        GRM.from_pretrained(str(base), adapter="tiny-spct"),
        GRM.from_pretrained("tiny-spct"),
    )
    wanted = merge_lora(*checkpoints.load_adapter("tiny-spct", bare.config, bare.params))
    for grm in (named, alone):
        assert grm.config == wanted[0]
        jax.tree.map(np.testing.assert_array_equal, grm.params, wanted[1])
    # From Python, a name alone is the bare model.
    jax.tree.map(np.testing.assert_array_equal, bare.params, checkpoints.load(str(base))[1])
    kernel = ("layers", "attention", "q", "kernel")
    one, other = (flatten_dict(grm.params)[kernel] for grm in (bare, named))
    assert np.abs(np.asarray(one) - other).max() > 0.01
    # An adapter over another is one over a model with the first one in it.
    twice = GRM.from_pretrained("tiny-spct", adapter="tiny-spct")
    added = jax.tree.map(lambda a, b: 2 * np.asarray(a) - b, named.params, bare.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), twice.params, added)


def test_a_meta_model_is_had_by_name(base: Path) -> None:
    meta = GRM.meta_model("tiny-meta")
    assert (meta.name, meta.config.num_labels, meta.config.lora) == ("tiny-meta", 1, None)
    assert not split_lora(meta.params)[0]
    assert meta.rewards([[1, 2, 3]]) != meta.rewards([[1, 2, 4]])
    with pytest.raises(UsageError, match="tiny-spct is no meta reward model"):
        GRM.meta_model("tiny-spct")
    with pytest.raises(UsageError, match="tiny-meta is a classifier; a judge must write text"):
        GRM.from_pretrained("tiny-meta")


def test_a_folder_of_the_same_name_is_had_by_its_path(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny-spct").mkdir()
    assert shipped_folder("tiny-spct") == tmp_path / "weights" / "tiny_spct"
    config = checkpoints.open_checkpoint(str(base)).config
    for name in ("./tiny-spct", Path("tiny-spct")):
        with pytest.raises(UsageError, match=r"tiny-spct has no adapter_config\.json"):
            checkpoints.load_adapter(name, config, {})


def test_weights_that_are_not_those_that_were_noted(base: Path) -> None:
    file = shipped.SHIPPED["tiny-spct"].folder / FILE
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    for load in (
        lambda: GRM.from_pretrained(str(base), adapter="tiny-spct"),
        lambda: checkpoints.open_checkpoint("tiny-spct"),
    ):
        with pytest.raises(UsageError, match="not what tiny-spct was published as: its sha256"):
            load()
    assert checkpoints.default_adapter(str(base)) == "tiny-spct"
    file.unlink()
    with pytest.raises(UsageError, match="this installation lacks tiny-spct"):
        checkpoints.open_checkpoint("tiny-spct")
    # Nobody who does not ask for it is bothered.
    assert checkpoints.default_adapter(str(base)) is None
