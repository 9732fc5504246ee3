"""What `benchmarks/gpu.py` measures of this library."""

import dataclasses
import functools
import importlib.metadata
import platform
import runpy
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from grm_jax.checkpoints.hub_config import config_from_hub
from grm_jax.distributed import make_mesh, on_mesh
from grm_jax.models import abstract_params, cpu_decoder, layer_of
from grm_jax.plan import build_stage, parse_topology, stage_configs
from grm_jax.plan.compiling import plan_program
from grm_jax.plan.work import Decoded, Pass, Work, flops, model_flops
from grm_jax.sampling import Controls, decode, prefill
from grm_jax.training import rl
from grm_jax.training.config import Settings
from grm_jax.training.grpo import Lent, place_rows
from grm_jax.training.learner import make_learner
from grm_jax.training.model import next_token_logprobs, place_model
from grm_jax.training.optimizer import make_optimizer
from grm_jax.training.rollouts import Tasks
from grm_jax.training.state import TrainState

if TYPE_CHECKING:
    from benchmarks.gpu import Bench

CONFIG = Path(__file__).parents[1] / "configs" / "gemma2_2b.py"


@functools.partial(jax.jit, static_argnames=("like", "seed"))
def _drawn(like: jax.ShapeDtypeStruct, seed: int) -> jax.Array:
    # A hash of each place: a generator would take longer to compile than all that is measured.
    size = like.size
    bits = jax.lax.iota(jnp.uint32, size) * jnp.uint32(0x9E3779B1) + jnp.uint32(seed * 7919)
    bits = (bits ^ (bits >> 15)) * jnp.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
    uniform = (bits >> 8).astype(jnp.float32) * 2.0**-24 - 0.5
    return (0.07 * uniform).astype(like.dtype).reshape(like.shape)


def fill(shapes: Any, *, zero: bool = False) -> Any:
    """Arrays of a tree's shapes: small random numbers, and zeros where they are integers."""
    leaves, tree = jax.tree.flatten(shapes)
    arrays = []
    for seed, leaf in enumerate(leaves):
        if zero or not jnp.issubdtype(leaf.dtype, jnp.floating):
            array = jnp.zeros(leaf.shape, leaf.dtype)
        else:
            array = _drawn(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), seed)
        arrays.append(array if leaf.sharding is None else jax.device_put(array, leaf.sharding))
    return jax.tree.unflatten(tree, arrays)


def filled(target: TrainState) -> TrainState:
    """A state before its first step, with random parameters."""
    drawn = ("params", "frozen")
    fields = {name: fill(part, zero=name not in drawn) for name, part in target._asdict().items()}
    return TrainState(**fields)


def build(bench: "Bench", function: Any, *args: Any) -> tuple[Any, dict[str, float]]:
    """A jitted function compiled, the seconds that took, and GiB of all that it needs."""
    bench.check()
    began = time.perf_counter()
    compiled = function.lower(*args).compile()
    m = compiled.memory_analysis()
    size = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
    gib = (size + m.temp_size_in_bytes) / 2**30
    return compiled, {"compile": time.perf_counter() - began, "gib": gib}


def peak() -> dict[str, float]:
    """GiB of the device that were in use at most since the process began, where it says so."""
    stats = jax.devices()[0].memory_stats() or {}
    return {k: stats[k] / 2**30 for k in ("peak_bytes_in_use", "bytes_limit") if k in stats}


def waited(run: Callable[[], object]) -> Callable[[], object]:
    return lambda: jax.block_until_ready(run())


def ceilings(bench: "Bench", section: str) -> None:
    """What the card is, and what it can do."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        driver = "none"

    def version(name: str) -> str:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return "none"

    versions = {name: version(name) for name in ("jax", "torch", "transformers")}
    card, python = jax.devices()[0].device_kind, platform.python_version()
    bench.keep("machine", card=card, driver=driver, python=python, **versions)
    numbers = fill(jax.ShapeDtypeStruct((2**15 if bench.quick else 2**30,), jnp.float32))
    copy, _ = build(bench, jax.jit(jnp.negative), numbers)
    taken = bench.time(waited(lambda: [copy(numbers) for _ in range(4)]))
    bench.keep(section, speed=4 * 2 * numbers.nbytes / taken["seconds"])
    size = 128 if bench.quick else 8192
    pair = fill([jax.ShapeDtypeStruct((size, size), jnp.bfloat16)] * 2)
    times, _ = build(bench, jax.jit(jnp.matmul), *pair)
    taken = bench.time(waited(lambda: [times(*pair) for _ in range(16)]))
    bench.keep(section, flops=16 * 2 * size**3 / taken["seconds"])


def decoding(
    bench: "Bench", section: str, name: str, *, few: bool = False, apart: bool = False
) -> None:
    """Reading prompts, then all samples in one loop; `apart`: with each layer written out."""
    s = bench.sizes
    prompts = s.few if few else s.prompts
    config = dataclasses.replace(config_from_hub(bench.shape(name), name), dtype="bfloat16")
    params = fill(abstract_params(config, jnp.bfloat16))
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    tokens = jax.random.randint(jax.random.key(1), (prompts, s.prompt), 3, config.vocab_size)
    lengths = jnp.full(prompts, s.prompt, jnp.int32)
    held = jnp.dtype(jnp.bfloat16).itemsize * config.cache_width

    def reading(params: Any, tokens: jax.Array, lengths: jax.Array) -> Any:
        return prefill(params, config, tokens, lengths)

    read, built = build(bench, jax.jit(reading), params, tokens, lengths)
    if not (few or apart):
        work = Work((Pass(rows=prompts, length=s.prompt, cached=True),))
        bench.keep(
            f"{section}, prefill",
            what=f"{prompts} prompts of {s.prompt} tokens",
            tokens=tokens.size,
            **built,
            **bench.bound(model_flops(config, work), weights + tokens.size * held),
            **bench.time(waited(lambda: read(params, tokens, lengths))),
            **peak(),
        )
    prefix, loop = read(params, tokens, lengths), config
    if apart:
        loop, params = cpu_decoder(config, params)
        loop = dataclasses.replace(loop, weights_first=False)
        layers = range(config.num_layers)
        parts = [[layer_of(kv, config, i) for i in layers] for kv in (prefix.keys, prefix.values)]
        prefix = prefix._replace(keys=tuple(parts[0]), values=tuple(parts[1]))
    keys = jax.random.split(jax.random.key(2), (prompts, s.samples))

    def writing(params: Any, prefix: Any, last: Any, keys: Any, controls: Controls) -> Any:
        return decode(params, loop, prefix, last, keys, controls, eos_ids=(), capacity=s.new)

    given = params, prefix, tokens[:, -1], keys
    controls = Controls(jnp.float32(1), jnp.float32(1), jnp.int32(s.new))
    write, built = build(bench, jax.jit(writing), *given, controls)
    rows = prompts * s.samples
    # The mean step: samples are half as long as they get.
    each = Decoded(prompts=prompts, samples=s.samples, prompt=s.prompt + s.new // 2, tokens=1)
    used = weights if config.tie_embeddings else weights - params["embedding"].nbytes
    moved = used + held * (tokens.size + rows * s.new / 2)
    bench.keep(
        section,
        what=f"{prompts} x {s.samples} samples of {s.new} tokens",
        tokens=rows * s.new,
        steps=s.new,
        **built,
        **bench.bound(s.new * flops(config, Work((), each)), s.new * moved),
        **bench.time(waited(lambda: write(*given, controls)), repeats=3),
        **peak(),
    )
    short = controls._replace(max_new_tokens=jnp.int32(4))
    traced(bench, section, waited(lambda: write(*given, short)))


def training(bench: "Bench", section: str, name: str, *, lora: int) -> None:
    """A step of the learner on full rows; layers are computed again for their gradients."""
    s, defaults = bench.sizes, rl.default_config()
    defaults.model.remat, defaults.model.lora_rank = True, lora
    settings = Settings(defaults)
    mesh = make_mesh(settings.group("mesh"), jax.devices()[:1])
    stored = config_from_hub(bench.shape(name), name)
    config, params, frozen = place_model(settings, mesh, stored, dtype="bfloat16")

    def loss(params: Any, batch: Any, denominator: jax.Array, key: jax.Array) -> Any:
        tokens, lengths = batch
        found, _ = next_token_logprobs(params, config, tokens, lengths=lengths, mesh=mesh)
        return -jnp.sum(found[:, :-1]) / denominator, {}

    learner = make_learner(
        loss,
        lambda batch: jnp.float32(batch[0].size),
        make_optimizer(settings),
        params=params,
        frozen=frozen,
        mesh=mesh,
    )
    tokens = np.random.default_rng(0).integers(3, config.vocab_size, (s.rows, s.length), np.int32)
    batch = learner.place((tokens, np.full(s.rows, s.length, np.int32)))
    state = filled(learner.target)
    with learner.here():
        step, built = build(bench, learner.step, state, batch)

        def run() -> Any:
            nonlocal state
            state, metrics = step(state, batch)
            return metrics

        work = Work((Pass(rows=s.rows, length=s.length, learns=True, logits=True),))
        how = f"adapters of rank {lora}" if lora else "all parameters, kept in float32"
        # Parameters, moments and gradients, read and written.
        moved = 8 * sum(leaf.nbytes for leaf in jax.tree.leaves(state.params))
        bench.keep(
            section,
            what=f"{s.rows} rows of {s.length} tokens, {how}",
            tokens=tokens.size,
            **built,
            **bench.bound(model_flops(config, work), moved),
            **bench.time(waited(run)),
            **peak(),
        )
        traced(bench, section, waited(run))


def reinforcement(bench: "Bench", section: str) -> None:
    """Each program of a step, against the plan's bound on it."""
    s = bench.sizes
    config = runpy.run_path(str(CONFIG))["get_config"]()
    config.batch.rows, config.batch.accumulate = s.rollouts, 1
    config.data.max_prompt, config.rollout.max_new_tokens = s.prompt, s.rollout_new
    if bench.quick:
        tiny = {"num_layers": 2, "width": 64, "num_heads": 4, "num_kv_heads": 2, "mlp_dim": 128}
        config.model.shape.update({"family": "gemma2", "max_context": 256, **tiny})
        config.model.tokenizer, config.model.dtype = "nano", "bfloat16"
    card = "h200" if "H200" in jax.devices()[0].device_kind else "h100"
    topology = parse_topology(f"{card}:1")
    mesh = make_mesh(config.mesh.to_dict(), jax.devices()[:1])
    stage = build_stage("rl", stage_configs(config)["rl"], mesh, platform="gpu")
    state, reference = filled(stage.held[0]), fill(stage.held[1])
    shapes: dict[str, Any] = {}
    out: dict[str, Any] = {}
    total = {"seconds": 0.0, "bound": 0.0}
    for step in stage.steps:
        program = step(shapes)
        with on_mesh(mesh):
            planned, shapes[program.name] = plan_program(program, stage, topology)
            if program.name == "rollout":
                tasks = _tasks(program.arguments[1], stage.config.vocab_size)
                lent = Lent(state.model, state.key, state.step)
                given: Any = (lent, place_rows(tasks, mesh), np.int32(0))
            elif program.name == "experience":
                given = (state, out["rollout"], reference)
            else:
                given = (state, out["experience"][0])
            function, built = build(bench, program.function, *given)

            def run(function: Any = function, name: str = program.name) -> Any:
                nonlocal given
                out[name] = function(*given)
                if name == "update":  # which takes the state's memory
                    given = (out[name][0], given[1])
                return out[name]

            taken = bench.time(waited(run), repeats=3)
            total["seconds"] += program.times * taken["seconds"]
            total["bound"] += program.times * planned.bound.seconds
            bench.keep(
                f"{section}, {program.name}",
                what=f"{s.rollouts} rollouts of {s.prompt} + {s.rollout_new} tokens",
                tokens=program.tokens,
                **built,
                flops=planned.model_flops,
                moved=planned.moved,
                bound=planned.bound.seconds,
                binds=planned.bound.binds,
                planned_gib=planned.total / 2**30,
                **taken,
                **peak(),
            )
            traced(bench, f"{section}, {program.name}", waited(run))
    bench.keep(
        section, what="all of these", tokens=s.rollouts * s.rollout_new, binds="sum", **total
    )


def _tasks(like: Tasks, vocab: int) -> Tasks:
    """Full prompts of two responses."""
    rows, size = like.tokens.shape
    return Tasks(
        tokens=np.random.default_rng(0).integers(3, vocab - 1, (rows, size), np.int32),
        lengths=np.full(rows, size, np.int32),
        order=np.tile(np.arange(like.order.shape[1], dtype=np.int32), (rows, 1)),
        counts=np.full(rows, 2, np.int32),
        answers=np.zeros(rows, np.int32),
    )


def traced(bench: "Bench", section: str, run: Callable[[], object]) -> None:
    """What the device spends a call on: its longest operations, in milliseconds."""
    if bench.profile is None:
        return
    folder = bench.profile / "".join(c if c.isalnum() else "_" for c in section)
    try:
        with jax.profiler.trace(str(folder)):
            run()
        file = max(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
        spent: dict[str, float] = {}
        for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
            lines = [line for line in plane.lines if line.name.startswith("Stream")]
            for event in (event for line in lines for event in line.events):
                spent[event.name] = spent.get(event.name, 0) + event.duration_ns / 1e6
        longest = sorted(spent.items(), key=lambda item: -item[1])[:25]
        bench.keep(section, busy_ms=sum(spent.values()), longest={n[:80]: t for n, t in longest})
    except Exception as error:  # a profiler that is not there must not cost a measurement
        bench.keep(section, no_trace=f"{type(error).__name__}: {error}"[:300])
