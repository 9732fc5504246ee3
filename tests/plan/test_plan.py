"""Plans against what was counted by hand, and against the programs that really run."""

import dataclasses
import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from grm_jax.data.packing import PackedRows
from grm_jax.distributed import make_mesh
from grm_jax.errors import UsageError
from grm_jax.plan import (
    Report,
    StageReport,
    build_stage,
    parse_topology,
    plan,
    plan_stage,
    stage_configs,
)
from grm_jax.plan.architectures import KNOWN
from grm_jax.plan.chips import CHIPS, devices_of
from grm_jax.plan.compiling import needed_bytes
from grm_jax.plan.search import candidates, nearest_change
from grm_jax.plan.sizes import held_bytes
from grm_jax.plan.stages import abstract_model
from grm_jax.prompts.nano import nano_tokenizer
from grm_jax.sampling.prefix import empty_prefix
from grm_jax.training import sft, spct
from grm_jax.training.config import Settings
from grm_jax.training.model import open_model
from tests.plan.small import SHAPE, small

ROOT = Path(__file__).parents[2]
HERE = parse_topology("cpu:8")


def planned(config: ConfigDict, **options: Any) -> StageReport:
    """The plan of one stage on the eight devices."""
    (stage,) = plan(config, HERE, search=False, **options).stages
    return stage


@pytest.fixture(scope="module")
def learning() -> StageReport:
    """Fine-tuning, with the parameters in parts on all devices."""
    return planned(small("rft", mesh__fsdp=8, mesh__tensor=1))


@pytest.fixture(scope="module")
def reinforcing() -> StageReport:
    """Reinforcement learning, likewise."""
    return planned(small("rl", mesh__fsdp=8, mesh__tensor=1, batch__rows=32))


def shard(shape: tuple[int, ...], split: tuple[int, ...]) -> int:
    """Numbers of an array in the part of one device."""
    return math.prod(
        size // parts if size % parts == 0 else size
        for size, parts in zip(shape, split, strict=True)
    )


def parameters(vocab: int, fsdp: int, tensor: int) -> int:
    """Numbers of the small decoder's parameters on one device, worked out by hand."""
    layers, width, heads, size, hidden = 2, 64, 4, 16, 128
    return sum(
        (
            shard((vocab, width), (tensor, fsdp)),
            3 * shard((layers, heads, size, width), (1, tensor, 1, fsdp)),  # queries, keys, values
            shard((layers, width, heads, size), (1, fsdp, tensor, 1)),
            2 * shard((layers, hidden, width), (1, tensor, fsdp)),
            shard((layers, width, hidden), (1, fsdp, tensor)),
            2 * shard((layers, width), (1, fsdp)) + shard((width,), (fsdp,)),
        )
    )


def vocabulary() -> int:
    return nano_tokenizer().vocab_size


def test_arguments_of_an_update_are_parameters_moments_counts_and_batch(
    learning: StageReport,
) -> None:
    (update,) = learning.programs
    held = 4 * parameters(vocabulary(), 8, 1)
    # Three counts of the state, its key, and those of Adam and of the schedule. Positions of packed
    # rows are not read: segments tell them.
    counts = 3 * 4 + 8 + 2 * 4
    batch = 16 // 8 * 64 * (4 + 4 + 1)
    assert update.memory.arguments == 3 * held + counts + batch
    assert learning.state == 3 * held + counts
    assert update.memory.beside == 0


@pytest.mark.parametrize("name", ["smollm2-135m", *(name for name in KNOWN if "hf:" in name)])
def test_no_large_array_is_whole_on_a_device(name: str) -> None:
    """Parts of parameters take no more than their share, but for norms and the like."""
    named = {"model__name": name, "model__tokenizer": "", "model__shape": {}}
    mesh = make_mesh({"fsdp": 8}, jax.devices()[:8])
    settings = Settings(small("rft", mesh__fsdp=8, mesh__tensor=1, **named))
    params = abstract_model(settings, mesh, platform="tpu").params
    whole = sum(4 * math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    assert held_bytes(params) < 1.001 * whole / 8


def test_arguments_of_rollouts_are_parameters_and_prompts(reinforcing: StageReport) -> None:
    rollout, experience, update = reinforcing.programs
    held = 4 * parameters(vocabulary(), 8, 1)
    # One prompt of the eight is on each device: tokens, length, order, count and answer. Then the
    # step, the key and the number of the round.
    prompts = 4 * (32 + 1 + 4 + 1 + 1)
    assert rollout.memory.arguments == held + prompts + 4 + 8 + 4
    # The moments, their counts, and the reference lie beside.
    assert reinforcing.state == 4 * held + 28
    assert rollout.memory.beside == reinforcing.state - held - 12
    assert experience.memory.beside == reinforcing.state - held
    assert update.memory.beside == held
    assert update.memory.arguments > 3 * held


def test_a_cache_takes_what_its_shards_take(reinforcing: StageReport) -> None:
    """Of arrays that are there, and inside of rollouts, which make their own."""
    layers, heads, size, prompt, new, samples = 2, 4, 16, 32, 16, 4
    mesh = make_mesh({"fsdp": 8}, jax.devices()[:8])
    settings = Settings(small("rl", mesh__fsdp=8, mesh__tensor=1))
    config = abstract_model(settings, mesh, platform="cpu").config
    prefix = empty_prefix(config, rows=16, size=prompt, mesh=mesh)
    both = 2 * layers * heads * size * 4
    # Two rows a device, with the place of the first token and the number of tokens of each.
    by_hand = 2 * (both * prompt + 2 * 4)
    assert held_bytes(jax.tree.map(shape_of, prefix)) == by_hand
    first = jax.devices()[0]
    shards = [part for leaf in jax.tree.leaves(prefix) for part in leaf.addressable_shards]
    assert sum(part.data.nbytes for part in shards if part.device == first) == by_hand
    # One of eight prompts is on each device, with its samples.
    rollout = reinforcing.programs[0]
    assert rollout.memory.temporaries > both * (prompt + samples * new)
    longer = small(
        "rl", mesh__fsdp=8, mesh__tensor=1, batch__rows=32, rollout__max_new_tokens=10 * new
    )
    mesh = make_mesh({"fsdp": 8}, jax.devices()[:8])
    stage = build_stage("rl", longer, mesh, platform="cpu")
    (more,) = plan_stage(stage, HERE, only=("rollout",))
    added = more.memory.temporaries - rollout.memory.temporaries
    assert added == pytest.approx(both * samples * 9 * new, rel=0.1)


def shape_of(leaf: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def test_peak_is_that_of_the_program_that_runs(learning: StageReport) -> None:
    """The update of a run, with arrays, compiled by the run's own call."""
    settings = Settings(small("rft", mesh__fsdp=8, mesh__tensor=1))
    mesh = make_mesh(settings.group("mesh"), jax.devices()[:8])
    model = open_model(settings, mesh)
    learner = sft.make_sft_learner(settings, mesh, model)
    state = learner.begin(model.load_params(), model.load_frozen(), 0)
    rows = np.ones((16, 64), np.int32)
    batch = learner.place(PackedRows(rows, rows, rows, rows > 0))
    with learner.here():
        found = learner.step.lower(state, batch).compile().memory_analysis()  # type: ignore[attr-defined]
    memory = learning.programs[0].memory
    assert memory.arguments == found.argument_size_in_bytes
    assert memory.temporaries == found.temp_size_in_bytes
    inside = found.argument_size_in_bytes + found.output_size_in_bytes
    inside += found.temp_size_in_bytes - found.alias_size_in_bytes
    assert memory.peak == inside + found.generated_code_size_in_bytes


def test_flops_are_those_counted_on_paper(learning: StageReport, reinforcing: StageReport) -> None:
    for stage in (learning, reinforcing):
        for program in stage.programs:
            assert program.flops == pytest.approx(program.analytic_flops, rel=0.02), program.name


def test_flops_of_remat_adapters_and_windows() -> None:
    shape = {
        **SHAPE,
        "family": "gemma2",
        "num_kv_heads": 2,
        "windows": (16, 2**30),
        "logit_softcap": 30.0,
        "attention_softcap": 50.0,
    }
    config = small("rft", model__remat=True, model__shape=shape, mesh__fsdp=8, mesh__tensor=1)
    (update,) = planned(config).programs
    assert update.flops == pytest.approx(update.analytic_flops, rel=0.02)


def test_training_gathers_each_layer_by_itself(learning: StageReport) -> None:
    (update,) = learning.programs
    embedding = 4 * vocabulary() * 64
    layers = 4 * parameters(vocabulary(), 1, 1) - embedding
    gathers = [one for one in update.traffic if one.kind == "all-gather"]
    assert {one.chips for one in gathers} == {8}
    # In each of two micro-batches: layers forwards and backwards, the embedding once.
    payload = sum(one.payload for one in gathers)
    assert payload == pytest.approx(2 * (2 * layers + embedding), rel=0.01)
    assert max(one.largest for one in gathers) == embedding
    # Gradients meet once in each.
    sums = [one for one in update.traffic if one.kind in ("all-reduce", "reduce-scatter")]
    assert sum(one.payload for one in sums) == pytest.approx(2 * (layers + embedding), rel=0.01)
    rest = sum(one.payload for one in update.traffic if one not in gathers + sums)
    assert rest < 0.05 * payload


def even(folder: Path, **changes: Any) -> ConfigDict:
    """Reinforcement learning of a model whose vocabulary and heads can be dealt out to eight."""
    shape = {
        "model_type": "llama",
        "vocab_size": 4096,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(shape))
    named = {"model__name": str(folder), "model__tokenizer": "", "model__shape": {}}
    return small("rl", **named, **changes)


def test_learning_from_shared_prompts_sends_what_one_would_by_hand(tmp_path: Path) -> None:
    """On parts of parameters and of heads at once: two groups of four a device."""
    config = even(tmp_path, mesh__fsdp=4, mesh__tensor=2, batch__rows=32, batch__accumulate=1)
    *_, experience, update = planned(config).programs
    for program in (experience, update):
        assert program.flops == pytest.approx(program.analytic_flops, rel=0.02)
    vocab, width, layers, hidden = 4096, 64, 2, 128
    kernels = layers * (4 * width * width + 3 * width * hidden) // 2
    held = 4 * (kernels + vocab * width // 2)
    by_axis = {
        (kind, chips): [one for one in update.traffic if (one.kind, one.chips) == (kind, chips)]
        for kind in ("all-gather", "all-reduce", "reduce-scatter", "all-to-all")
        for chips in (2, 4, 8)
    }

    def payload(*names: tuple[str, int]) -> float:
        return sum(one.payload for name in names for one in by_axis[name])

    # Over `fsdp`, a device's part of heads and vocabulary comes together forwards and backwards,
    # and its gradients are summed once.
    assert payload(("all-gather", 4)) == pytest.approx(2 * held, rel=0.01)
    sums = payload(("all-reduce", 4), ("reduce-scatter", 4))
    assert sums == pytest.approx(held, rel=0.01)
    # Over `tensor`, tokens meet behind attention and the MLP of each layer, and their gradients
    # before queries, before keys and values, and before the MLP; behind the embedding; and targets
    # before the logits. Each prompt of 32 is there once for its four completions of 16.
    tokens, targets = 2 * (32 + 4 * 16), 2 * 4 * 16
    met = 4 * width * (tokens * (5 * layers + 1) + targets)
    assert payload(("all-reduce", 2), ("reduce-scatter", 2)) == pytest.approx(met, rel=0.02)
    assert payload(("all-gather", 2)) < 0.02 * met
    assert payload(("all-gather", 8), ("all-reduce", 8)) == 0
    # Rows of the embedding change places, since its columns are dealt out and tokens too.
    assert payload(("all-to-all", 2), ("all-to-all", 4)) <= 2 * 4 * tokens * width


def test_decoding_gathers_neither_parameters_nor_logits(tmp_path: Path) -> None:
    """With heads, hidden units and vocabulary in parts on eight devices."""
    vocab, width, layers, tokens, rows = 4096, 64, 2, 16, 16
    config = even(tmp_path, mesh__fsdp=1, mesh__tensor=8)
    mesh = make_mesh(config.mesh.to_dict(), devices_of(HERE))
    stage = build_stage("rl", config, mesh, platform="cpu")
    (rollout,) = plan_stage(stage, HERE, only=("rollout",))
    # The largest thing that is exchanged is a prefill's keys and values; logits are far larger, and
    # so are each kernel and the embedding over all steps.
    both = 2 * 4 * (rows // 4) * 32 * width
    assert max(one.largest for one in rollout.traffic) <= both < 4 * rows * vocab / 2
    gathered = sum(one.payload for one in rollout.traffic if one.kind == "all-gather")
    assert gathered < tokens * 4 * (layers * width * width)
    # Behind attention and behind the MLP of each layer, rows meet in a sum.
    sums = sum(one.count for one in rollout.traffic if one.kind == "all-reduce")
    assert sums >= tokens * layers * 2


def test_rollouts_on_another_mesh() -> None:
    """Parameters in parts while it learns; heads and hidden units in parts to sample."""
    mesh = {"data": 2, "fsdp": 1, "tensor": 4, "expert": 1}
    changes = {f"rollout__mesh__{axis}": size for axis, size in mesh.items()}
    config = small("rl", mesh__fsdp=8, mesh__tensor=1, batch__rows=32, **changes)
    stage = planned(config)
    reshard, rollout, experience, _ = stage.programs
    assert [program.name for program in stage.programs[:2]] == ["reshard", "rollout"]
    lent = 4 * parameters(vocabulary(), 1, 4)
    assert reshard.memory.arguments == 4 * parameters(vocabulary(), 8, 1) + 8 + 4
    # With the addresses of its eleven arrays.
    assert reshard.memory.outputs == lent + 8 + 4 + 11 * 8
    # Dealt out among four, then joined by twos: no array is gathered whole but one of a vocabulary
    # that four do not divide.
    assert {(one.kind, one.chips) for one in reshard.traffic} == {
        ("all-to-all", 4), ("all-gather", 4), ("all-gather", 2),
    }  # fmt: skip
    assert sum(one.wire for one in reshard.traffic) < lent
    # Four of the eight prompts are on each device, and so is the number of the round.
    assert rollout.memory.arguments == lent + 8 + 4 + 4 * 4 * (32 + 1 + 4 + 1 + 1) + 4
    # The state lies beside; what is lent is gone when it is learnt from.
    assert rollout.memory.beside == stage.state
    assert experience.memory.beside < stage.state
    on_paper = plan(config, parse_topology("h100:8"), search=False).stages[0].programs[0]
    assert on_paper.name == "reshard"
    assert on_paper.memory.outputs == lent // 2 + 8 + 4


def test_a_plan_of_stages_that_build_on_each_other() -> None:
    stages = {name: small(name) for name in ("rft", "rl")}
    stages["rl"].model.name = "{workdir}/rft/model"
    stages["rl"].model.shape = ConfigDict()
    stages["rl"].model.tokenizer = ""
    found = stage_configs(spct.default_config(**stages))
    assert found["rl"].model.shape.to_dict() == SHAPE
    assert found["rl"].model.tokenizer == "nano"
    stages["rl"].model.name = "{workdir}/other/model"
    with pytest.raises(UsageError, match="no stage of the configuration leaves"):
        stage_configs(spct.default_config(**stages))


def test_gpus_are_planned_on_paper() -> None:
    report = plan(small("rl"), parse_topology("h100:8"), search=False)
    assert report.fits
    (stage,) = report.stages
    for program in stage.programs:
        assert program.method == "analytic"
        assert program.flops == program.analytic_flops
        assert program.bound.seconds > 0
    held = 4 * parameters(vocabulary(), 4, 2)
    # Beside a reference in bfloat16; products too are of two bytes there.
    assert stage.state == 3 * held + held // 2 + 28


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v5x:4x4x8", "no chip 'v5x' among v4, v5e, .*; did you mean"),
        ("v5p:4x4", "v5p has 3 axes of at least 1, as in v5p:4x4x8"),
        ("v5p", "write v5p:AxBxC as in v5p:4x4x8"),
        ("v5e:16x32", "a slice of v5e has at most 256 chips"),
        ("h100:8*2", "only TPUs have slices"),
        ("cpu:0", "cpu has 1 axes of at least 1"),
    ],
)
def test_topologies_that_are_wrong(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        parse_topology(text)
    assert "\n" not in str(caught.value)


def test_topologies() -> None:
    slices = parse_topology("v5e:16x16*2")
    assert (slices.chips, slices.slices, slices.reach) == (512, 2, 256)
    assert parse_topology("h100:64").reach == 8
    assert {"v4", "v5e", "v5p", "v6e", "a100", "h100", "h200", "b200"} < set(CHIPS)
    with pytest.raises(UsageError, match="JAX was started with 8 devices"):
        devices_of(parse_topology("cpu:9"))


def test_what_compilers_complain_of() -> None:
    said = "Ran out of memory in memory space hbm. Used 105.52G of 95.74G hbm. Exceeded by 9.78G."
    assert needed_bytes(said) == int(105.52 * 2**30)
    said = (
        "Ran out of memory on HBM, the total memory required for HLO temporaries (102.51G) exceeds "
        "available HBM (95.74G)."
    )
    assert needed_bytes(said) == int(102.51 * 2**30)
    assert needed_bytes("INTERNAL: something else") is None


def test_changes_from_the_nearest_on() -> None:
    config = small("rl", batch__rows=64, batch__accumulate=4)
    found = list(candidates(config, held_fits=True))
    assert found[0] == {"batch.accumulate": 8}
    assert {"model.remat": True} in found
    assert found[-1]["mesh.tensor"] == 16
    # What is in memory throughout follows from the mesh alone.
    assert all("mesh.tensor" in change for change in candidates(config, held_fits=False))


@pytest.mark.slow
def test_a_change_that_fits_is_found() -> None:
    """On chips whose memory is a byte too small for one micro-batch."""
    config = small("rft", batch__accumulate=1)
    total = planned(config).programs[0].total
    chip = dataclasses.replace(HERE.chip, memory=total - 1)
    report: Report = plan(config, dataclasses.replace(HERE, chip=chip))
    assert not report.fits
    (stage,) = report.stages
    assert stage.change is not None
    assert stage.change.overrides == ("--config.batch.accumulate=2",)
    assert stage.change.total < total
    # With less than its parameters take, nothing helps, and the least number of chips is named.
    poor = dataclasses.replace(HERE.chip, memory=stage.state / 4)
    change, note = nearest_change(
        "rft",
        config,
        dataclasses.replace(HERE, chip=poor),
        devices_of(HERE),
        stage.programs,
        stage.state,
        prefix="",
        say=lambda _: None,
    )
    assert change is None
    assert "need more than 32 chips" in note


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_a_slice_of_tpus(tmp_path: Path) -> None:
    """In a process of its own, as libtpu reads its environment once."""
    program = (
        "from grm_jax.plan import plan, parse_topology\n"
        "from tests.plan.small import small\n"
        "import json\n"
        "report = plan(small('rl'), parse_topology('v5p:2x2x2'), search=False)\n"
        "print(json.dumps(report.to_dict()))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["fits"] is True
    assert report["chips"] == 8
    programs = report["stages"][0]["programs"]
    assert [program["method"] for program in programs] == ["compiled"] * 3
    assert all(jnp.isfinite(program["bound"]["seconds"]) for program in programs)
