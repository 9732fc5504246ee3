"""What stages of scalars share, and the stages from their data to a model that can be asked."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from grm_jax import GRM, checkpoints
from grm_jax.distributed import make_mesh
from grm_jax.errors import UsageError
from grm_jax.models import reward, split_lora
from grm_jax.prompts import load_template
from grm_jax.sampling import MetaModel
from grm_jax.training import bt, cloud, meta, pairs, pairwise
from grm_jax.training.classifiers import (
    Group,
    HeldOut,
    Objective,
    labelled,
    make_group,
    make_loss,
    pad_groups,
    preferred,
    row_length,
)
from grm_jax.training.heldout import auc, is_held_out
from grm_jax.training.learner import Learner, make_learner
from grm_jax.training.losses import bradley_terry_loss, loss_denominator
from grm_jax.training.optimizer import make_optimizer
from tests.training import scalar, tiny

CONFIG = dataclasses.replace(tiny.CONFIG, num_labels=1, max_context=512)


# --- groups ---


def test_groups_and_their_problems() -> None:
    found = make_group(lambda: [[1, 2], [3]], (1.0, 0.0), length=2)
    assert [ids.tolist() for ids in found.sequences] == [[1, 2], [3]]
    assert (found.labels, found.problem) == ((1.0, 0.0), None)
    assert make_group(lambda: [[1, 2], [3]], (1, 0), length=1).problem == "too_long"
    assert make_group(lambda: [[1], []], (1, 0), length=1).problem == "unreadable"

    def refuse() -> list[list[int]]:
        raise UsageError("the template refuses")

    assert make_group(refuse, (1.0,), length=1) == Group((), (1.0,), "unreadable")


def test_rows_are_as_long_as_the_bucket_of_the_longest() -> None:
    groups = [
        group(3, 5),
        Group((), (1.0, 0.0), "too_long"),
        group(2, 140),
    ]
    found = pad_groups(groups, rows=4, sequences=2)
    assert found.tokens.shape == (4, 2, 192)
    # What has a problem is as if it were not there.
    assert found.lengths.tolist() == [[3, 5], [2, 140], [1, 1], [1, 1]]
    assert found.mask.tolist() == [True, True, False, False]
    assert found.labels.tolist() == [[1, 0], [1, 0], [0, 0], [0, 0]]
    np.testing.assert_array_equal(found.tokens[1, 1, :140], groups[2].sequences[1])
    assert not found.tokens[1, 1, 140:].any()
    assert pad_groups([], rows=2, sequences=1).tokens.shape == (2, 1, 32)


def test_rows_that_the_model_cannot_read() -> None:
    config = dataclasses.replace(CONFIG, max_context=100)
    made = bt.default_config()
    made.data.length = 101
    with pytest.raises(UsageError, match=r"data\.length is 101, but the model reads 100"):
        row_length(scalar.Settings(made), config)


# --- objectives ---


def test_objectives_by_hand() -> None:
    values = jnp.asarray([[2.0, 1.0], [0.0, 3.0], [jnp.nan, jnp.nan]])
    labels, mask = jnp.asarray([[1.0, 0.0]] * 3), jnp.asarray([True, True, False])
    loss, metrics = preferred().loss(values, labels, mask, jnp.float32(2))
    assert float(loss) == pytest.approx((np.log1p(np.exp(-1)) + np.log1p(np.exp(3))) / 2)
    assert (float(metrics["accuracy"]), float(metrics["rows"])) == (0.5, 2)
    loss, metrics = labelled(2).loss(values, labels, mask, jnp.float32(2))
    terms = [np.log1p(np.exp(value)) for value in (-2.0, 1.0, 0.0, 3.0)]
    assert float(loss) == pytest.approx(np.mean(terms))
    assert (float(metrics["accuracy"]), float(metrics["positives"])) == (0.25, 0.5)
    centred, _ = preferred(0.1).loss(values, labels, mask, jnp.float32(2))
    plain, _ = bradley_terry_loss(chosen=values[:2, 0], rejected=values[:2, 1])
    assert float(centred) == pytest.approx(float(plain) + 0.1 * 9)


# --- the learner ---


def group(*lengths: int) -> Group:
    """Sequences of which the first has higher tokens."""
    rng = np.random.default_rng(lengths)
    half = CONFIG.vocab_size // 2
    sequences = tuple(
        rng.integers(0, half, length).astype(np.int32) + (half if place == 0 else 0)
        for place, length in enumerate(lengths)
    )
    return Group(sequences, tuple(float(place == 0) for place in range(len(lengths))))


def groups(step: int, *, longest: int, count: int = 8) -> list[Group]:
    rng = np.random.default_rng(step)
    return [group(*rng.integers(3, longest + 1, 2).tolist()) for _ in range(count)]


def learner(mesh: Mesh, objective: Objective, *, accumulate: int = 1) -> Learner:
    params = tiny.placed(CONFIG, mesh)
    return make_learner(
        make_loss(CONFIG, objective),
        lambda batch: loss_denominator(batch.mask, aggregate="token"),
        make_optimizer(tiny.settings()),
        params=params,
        frozen={},
        mesh=mesh,
        accumulate=accumulate,
    )


def course(one: Learner, longest: list[int]) -> list[float]:
    """The losses of a few steps."""
    state, losses = tiny.begin(one, CONFIG), []
    for step, length in enumerate(longest):
        batch = groups(step, longest=length)
        # One pair of each batch is not to be learnt from.
        batch[step] = Group((), (1.0, 0.0), "too_long")
        state, metrics = one(state, pad_groups(batch, rows=8, sequences=2))
        assert float(metrics["rows"]) == 7
        losses.append(float(metrics["loss"]))
    return losses


@pytest.mark.slow
def test_eight_devices_learn_what_one_does_and_buckets_are_programs() -> None:
    lengths = [100, 110, 110, 160]
    one = learner(make_mesh({}, jax.devices()[:1]), preferred())
    losses = course(one, lengths)
    # Of 128 and of 192 tokens.
    assert one.step._cache_size() == 2
    eight = learner(make_mesh({"fsdp": 4, "tensor": 2}), preferred(), accumulate=2)
    found = course(eight, lengths[:3])
    np.testing.assert_allclose(found, losses[:3], rtol=2e-4)
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_what_is_measured_does_not_depend_on_the_mesh_nor_on_rows_that_are_filled_up() -> None:
    meshes = make_mesh({}, jax.devices()[:1]), make_mesh({"fsdp": 4, "tensor": 2})
    measured = []
    for mesh, rows in zip(meshes, (16, 8), strict=True):
        one = learner(mesh, labelled(2))
        state = tiny.begin(one, CONFIG)
        heldout = HeldOut(
            groups(99, longest=120, count=11),
            objective=labelled(2),
            config=CONFIG,
            learner=one,
            rows=rows,
        )
        assert len(heldout) == 11
        measured.append(heldout.measure(state))
    assert measured[0]["rows"] == 22
    assert measured[0] == pytest.approx(measured[1], rel=1e-3, abs=1e-4)


# --- stages ---


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = scalar.write_folder(tmp_path_factory.mktemp("scalar") / "folder")
    records = [json.loads(line) for line in (made / "c.jsonl").read_text().splitlines()]
    scalar.write_lines(
        made / "critiques.jsonl",
        [
            {"id": one["id"], "critiques": [f"it says {text}" for text in one["responses"]]}
            for one in records[2:]
        ],
    )
    scalar.write_lines(made / "t.jsonl", trajectories(records))
    return made


def trajectories(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Two judgements of every comparison, of which the one that is sure of itself is right."""
    made = []
    for record in records:
        if record["id"] in ("alone", "tied", "unknown"):
            continue
        best, count = record["label"]["index"], len(record["responses"])
        for number in range(2):
            right = (number + len(record["id"]) + best) % 2 == 0
            top = best if right else (best + 1) % count
            scores = ", ".join("9" if place == top else "3" for place in range(count))
            text = f"{'yes yes' if right else 'perhaps'} \\boxed{{{scores}}}"
            made.append({"id": record["id"], "text": text})
    return made


Run = Callable[..., Path]


@pytest.fixture
def run(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a stage on one device, and returns its working directory."""

    def call(stage: ModuleType, *, name: str = "w", **changes: Any) -> Path:
        one = make_mesh({}, jax.devices()[:1])
        for module in (pairs, meta):
            monkeypatch.setattr(module, "make_mesh", lambda shape: one if shape else None)
        if "template" in stage.default_config().data:
            changes.setdefault("data__template", str(folder / "short.jinja"))
        stage.run(scalar.settings(stage.default_config, folder, **changes), tmp_path / name)
        return tmp_path / name

    return call


def loaded(workdir: Path, folder: Path) -> MetaModel:
    return GRM.meta_model(
        str(workdir / "model"), template=load_template(str(folder / "short.jinja"))
    )


def test_a_reward_model_ranks_and_goes_on_where_it_stood(run: Run, folder: Path) -> None:
    workdir = run(bt)
    found, report = scalar.lines(workdir), scalar.report(workdir)
    assert found[-1]["loss"] < 0.3 * found[0]["loss"]
    assert (found[0]["too_long"], found[0]["unreadable"], found[0]["rows"]) == (0, 0, 16)
    assert report["heldout"]["accuracy"] == 1
    assert found[-1]["heldout_accuracy"] == 1
    assert report["comparisons_left_out"] == {"single_response": 1, "no_single_best": 2}
    held = [one for one in scalar.comparisons() if is_held_out(one["id"], 0.25)]
    assert report["heldout_pairs"] == sum(len(one["responses"]) - 1 for one in held)
    assert report["train_pairs"] + report["heldout_pairs"] == 24 + 48
    # Two halves make the same whole.
    half = run(bt, name="half", steps=scalar.STEPS // 2)
    assert scalar.lines(half) == found[: scalar.STEPS // 2]
    assert run(bt, name="half") == half
    assert scalar.lines(half) == found
    assert scalar.report(half) == report
    models = [checkpoints.load(str(where / "model"))[1] for where in (workdir, half)]
    jax.tree.map(np.testing.assert_array_equal, *models)
    # What it leaves can be asked.
    model = loaded(workdir, folder)
    turns = [{"role": "user", "content": "Q3"}]
    read = [bt.response_tokens(model.tokenizer, turns, text) for text in ("!!!!!!", "??????")]
    good, bad = model.rewards(read)
    assert good > bad + 1


def test_long_rows_and_unread_keys(run: Run, folder: Path) -> None:
    workdir = run(bt, steps=1, data__length=8, heldout__every=1)
    (line,) = scalar.lines(workdir)
    assert (line["too_long"], line["rows"], line["loss"], line["tokens"]) == (16, 0, 0, 0)
    assert scalar.report(workdir)["heldout"] == {"too_long": 14}
    made = scalar.config(bt.default_config, folder)
    made.unlock()
    made.momentum = 0.9
    with pytest.raises(UsageError, match="nothing reads the configuration's momentum, stage"):
        bt.run(scalar.Settings(made), workdir / "w")
    with pytest.raises(UsageError, match=r"heldout\.every is 3; make it a multiple of log\.every"):
        run(bt, heldout__every=3, log__every=2)


def test_a_meta_model_knows_right_from_wrong(run: Run, folder: Path) -> None:
    files = (str(folder / "t.jsonl"),)
    workdir = run(meta, data__trajectories=files)
    report = scalar.report(workdir)
    assert 0.3 < report["train_positives"] < 0.7
    assert report["judgements_left_out"] == {}
    assert report["train_judgements"] + report["heldout_judgements"] == 96
    assert report["heldout"]["accuracy"] > 0.9
    assert report["heldout"]["auc"] > 0.95
    assert report["heldout"]["positives"] == pytest.approx(report["heldout_positives"])
    assert scalar.lines(workdir)[-1]["heldout_auc"] == pytest.approx(report["heldout"]["auc"])
    # Asked as a judge asks it, it says the same.
    model = loaded(workdir, folder)
    comparisons = {one["id"]: one for one in scalar.comparisons()}
    judged = [one for one in trajectories(list(comparisons.values())) if held(one["id"])]
    read = [
        model.tokens(comparisons[one["id"]]["messages"], comparisons[one["id"]]["responses"], text)
        for one in judged
        for text in [one["text"]]
    ]
    right = [one["text"].startswith("yes") for one in judged]
    assert auc(model.rewards(read), right) == pytest.approx(report["heldout"]["auc"])


def held(name: str) -> bool:
    return is_held_out(name, 0.25)


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Keeps a stage from training, and holds the texts of the groups that it would measure on."""
    texts: list[list[str]] = []

    def read(*arguments: Any) -> bool:
        _, _, _, model, data, objective = arguments
        assert objective.sequences == 2
        for group in data.heldout:
            assert group.labels == (1.0, 0.0)
            texts.append([model.tokenizer.decode(ids.tolist()) for ids in group.sequences])
        return False

    monkeypatch.setattr(pairs, "train_classifier", read)
    return texts


def test_pairs_are_shown_in_both_orders(run: Run, shown: list[list[str]]) -> None:
    run(pairwise)
    assert len(shown) == 14
    for best_first, best_last in shown:
        assert "|!!!!!!|??????" in best_first
        assert best_first.replace("|!!!!!!|??????", "|??????|!!!!!!") == best_last


def test_responses_are_shown_with_their_critiques(
    run: Run, folder: Path, shown: list[list[str]]
) -> None:
    run(cloud, data__critiques=(str(folder / "critiques.jsonl"),))
    assert shown
    for best, other in shown:
        for text, response in ((best, "!!!!!!"), (other, "??????")):
            asked, answered = text.split("assistant")
            assert f"|{response}" in asked
            assert f"it says {response}" in answered


@pytest.mark.slow
def test_a_pairwise_model_learns_both_orders(run: Run, folder: Path) -> None:
    workdir = run(pairwise)
    report = scalar.report(workdir)
    assert report["heldout"]["positives"] == 0.5
    assert report["heldout"]["accuracy"] > 0.9
    model = loaded(workdir, folder)
    turns = [{"role": "user", "content": "Q3"}]
    for first, second, sign in (("!!!!!!", "??????", 1), ("??????", "!!!!!!", -1)):
        ids = pairwise.pair_tokens(model.tokenizer, model.template, turns, first, second)
        assert sign * model.rewards([ids])[0] > 0


@pytest.mark.slow
def test_a_model_that_reads_critiques(run: Run, folder: Path) -> None:
    workdir = run(cloud, data__critiques=(str(folder / "critiques.jsonl"),))
    report = scalar.report(workdir)
    assert report["comparisons_left_out"]["no_critiques"] == 2
    assert report["heldout"]["accuracy"] == 1
    model = loaded(workdir, folder)
    turns = [{"role": "user", "content": "Q3"}]
    read = [model.tokens(turns, [text], f"it says {text}") for text in ("!!!!!!", "??????")]
    good, bad = model.rewards(read)
    assert good > bad


@pytest.mark.slow
def test_adapters_learn_beside_their_head(run: Run, folder: Path) -> None:
    workdir = run(bt, model__lora_rank=2, steps=4, heldout__every=2)
    assert np.isfinite(scalar.report(workdir)["heldout"]["loss"])
    # A PEFT folder, which names its base from wherever it is read.
    config, params = checkpoints.load(str(workdir / "model"))
    assert (config.num_labels, config.lora and config.lora.rank) == (1, 2)
    assert np.abs(params["score"]).max() > 1e-3
    written = json.loads((workdir / "model" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == str(folder / "base")
    model = loaded(workdir, folder)
    assert (model.config.lora, split_lora(model.params)[0]) == (None, {})
    ids = [5, 6, 7]
    apart = reward(params, config, jnp.asarray([ids]), jnp.asarray([3]))
    assert model.rewards([ids]) == pytest.approx(np.asarray(apart), abs=1e-5)
    # What has adapters is not trained as a whole.
    with pytest.raises(UsageError, match="has adapters; merge them"):
        run(bt, name="whole", model__name=str(workdir / "model"))
