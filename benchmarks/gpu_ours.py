"""What `benchmarks/gpu.py` measures of this library."""

import dataclasses
import functools
import platform
import runpy
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from grm_jax.checkpoints.hub_config import config_from_hub
from grm_jax.distributed import make_mesh, on_mesh
from grm_jax.models import DecoderConfig, Segment, abstract_params, cpu_decoder, layer_of
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


class Built(NamedTuple):
    """A program; the seconds that compiling took beside others, and GiB of all that it needs."""

    call: Any
    facts: dict[str, float]


def build(bench: "Bench", *lowered: Any) -> list[Callable[[], Built]]:
    """Compiles programs side by side; each is had, or its error raised, where it is called for."""
    bench.check()

    def one(program: Any) -> Built:
        began = time.perf_counter()
        compiled = program.compile()
        m = compiled.memory_analysis()
        size = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
        gib = (size + m.temp_size_in_bytes) / 2**30
        return Built(compiled, {"compile": time.perf_counter() - began, "gib": gib})

    with ThreadPoolExecutor(len(lowered)) as pool:
        found = [pool.submit(one, program) for program in lowered]
    return [functools.partial(one.result, None) for one in found]


def peak() -> dict[str, float]:
    """GiB of the device that were in use at most since the process began, where it counts them."""
    stats = jax.devices()[0].memory_stats() or {}
    found = stats.get("peak_bytes_in_use")
    return {} if found is None else {"peak_gib": found / 2**30}


def waited(run: Callable[[], object]) -> Callable[[], object]:
    return lambda: jax.block_until_ready(run())


def ceilings(bench: "Bench", section: str) -> None:
    """What the card is, and what it can do."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        driver = "none"
    card, python = jax.devices()[0].device_kind, platform.python_version()
    bench.keep("machine", card=card, driver=driver, python=python, jax=jax.__version__)
    numbers = fill(jax.ShapeDtypeStruct((2**15 if bench.quick else 2**30,), jnp.float32))
    size = 128 if bench.quick else 8192
    pair = fill([jax.ShapeDtypeStruct((size, size), jnp.bfloat16)] * 2)
    programs = jax.jit(jnp.negative).lower(numbers), jax.jit(jnp.matmul).lower(*pair)
    copy, times = (program().call for program in build(bench, *programs))
    taken = bench.time(waited(lambda: [copy(numbers) for _ in range(4)]))
    bench.keep(section, speed=4 * 2 * numbers.nbytes / taken["seconds"])
    taken = bench.time(waited(lambda: [times(*pair) for _ in range(16)]))
    bench.keep(section, flops=16 * 2 * size**3 / taken["seconds"])


def decoding(bench: "Bench", section: str, name: str, *, few: bool = False) -> None:
    """Reading prompts, then all samples in one loop, over stacked layers and with each apart.

    The second form is what `cpu_decoder` makes, but for the order of products.
    """
    s = bench.sizes
    prompts = s.few if few else s.prompts
    config = dataclasses.replace(config_from_hub(bench.shape(name), name), dtype="bfloat16")
    params = fill(abstract_params(config, jnp.bfloat16))
    tokens = jax.random.randint(jax.random.key(1), (prompts, s.prompt), 3, config.vocab_size)
    lengths, last = jnp.full(prompts, s.prompt, jnp.int32), tokens[:, -1]
    keys = jax.random.split(jax.random.key(2), (prompts, s.samples))
    controls = Controls(jnp.float32(1), jnp.float32(1), jnp.int32(s.new))

    def reading(params: Any, tokens: jax.Array, lengths: jax.Array) -> Segment:
        return prefill(params, config, tokens, lengths)

    def unstacked(params: Any, prefix: Segment) -> tuple[Any, Segment]:
        keys, values = (
            tuple(layer_of(stacks, config, layer) for layer in range(config.num_layers))
            for stacks in (prefix.keys, prefix.values)
        )
        return cpu_decoder(config, params)[1], prefix._replace(keys=keys, values=values)

    def writer(loop: DecoderConfig, *model: Any) -> Any:
        def writing(params: Any, prefix: Segment, *rest: Any) -> Any:
            return decode(params, loop, prefix, *rest, eos_ids=(), capacity=s.new)

        return jax.jit(writing).lower(*model, last, keys, controls)

    prefix: Any = jax.eval_shape(reading, params, tokens, lengths)
    read, unstack, *writes = build(
        bench,
        jax.jit(reading).lower(params, tokens, lengths),
        jax.jit(unstacked).lower(params, prefix),
        writer(config, params, prefix),
        writer(
            dataclasses.replace(config, scan_layers=False),
            *jax.eval_shape(unstacked, params, prefix),
        ),
    )
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    held = jnp.dtype(config.dtype).itemsize * config.cache_width
    if not few:
        work = Work((Pass(rows=prompts, length=s.prompt, cached=True),))
        bench.keep(
            f"{section}, prefill",
            what=f"{prompts} prompts of {s.prompt} tokens",
            tokens=tokens.size,
            **read().facts,
            **bench.bound(model_flops(config, work), weights + tokens.size * held),
            **bench.time(waited(lambda: read().call(params, tokens, lengths))),
            **peak(),
        )
    prefix, rows = read().call(params, tokens, lengths), prompts * s.samples
    # The mean step: samples are half as long as they get.
    each = Decoded(prompts=prompts, samples=s.samples, prompt=s.prompt + s.new // 2, tokens=1)
    used = weights if config.tie_embeddings else weights - params["embedding"].nbytes
    moved = used + held * (tokens.size + rows * s.new / 2)
    for form, write in zip(("", ", layers apart"), writes, strict=True):
        if form:
            params, prefix = unstack().call(params, prefix)
        run = functools.partial(write().call, params, prefix, last, keys)
        short = waited(functools.partial(run, controls._replace(max_new_tokens=jnp.int32(4))))
        bench.keep(
            section + form,
            what=f"{prompts} x {s.samples} samples of {s.new} tokens",
            tokens=rows * s.new,
            steps=s.new,
            **write().facts,
            **bench.bound(s.new * flops(config, Work((), each)), s.new * moved),
            **bench.time(waited(functools.partial(run, controls)), repeats=3, first=short),
            **peak(),
        )
        traced(bench, section + form, short)


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
        jitted: Any = learner.step
        (built,) = build(bench, jitted.lower(state, batch))
        step, facts = built()

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
            **facts,
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
    plans = []
    out: dict[str, Any] = {}
    total = {"seconds": 0.0, "bound": 0.0}
    with on_mesh(mesh):
        for step in stage.steps:
            program = step(shapes)
            planned, shapes[program.name] = plan_program(program, stage, topology)
            plans.append((program, planned))
        waiting = build(bench, *(p.function.lower(*p.arguments) for p, _ in plans))
        tasks = place_rows(_tasks(plans[0][0].arguments[1], stage.config.vocab_size), mesh)
        for (program, planned), built in zip(plans, waiting, strict=True):
            if program.name == "rollout":
                lent = Lent(state.model, state.key, state.step)
                given: Any = (lent, tasks, np.int32(0))
            elif program.name == "experience":
                given = (state, out["rollout"], reference)
            else:
                given = (state, out["experience"][0])
            call, facts = built()

            def run(call: Any = call, name: str = program.name) -> Any:
                nonlocal given
                out[name] = call(*given)
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
                **facts,
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
