"""One GPU: how near sampling and training come to what the card can do, and to `transformers`.

    python benchmarks/gpu.py --output gpu.json    # about 4 minutes on an H100 or H200
    python benchmarks/gpu.py --table gpu.json     # rewrites gpu.md from what was measured
    JAX_PLATFORMS=cpu python benchmarks/gpu.py --quick --output gpu.json    # that all of it runs

The shapes are those of Gemma-2-2B and Llama-3.1-8B, with random bfloat16 weights; end-of-turn
tokens are switched off, so that all do the same work. What the card can do is measured first: a
copy, bytes read and written, and a product of matrices. The bound on any work is the longer of its
FLOPs at that rate and its bytes at that speed. FLOPs are counted by hand (`grm_jax.plan.work`): two
for each multiply-add of every product, only keys that are seen, once forwards and twice backwards
(once where the weights are frozen), and nothing for what is computed again. The bytes of a step of
decoding are those of all weights, of the cache of each prompt, once, and of each sample's own
cache, half full.

The step of reinforcement learning is that of `configs/gemma2_2b.py`, made smaller: the programs
that `grm_jax.plan` describes are given arrays, and are held against the bounds that it prints for
the card. Results are written after each measurement, so that a run that is cut off keeps them, and
a section that is in the file already is not run again.
"""

import argparse
import dataclasses
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).with_suffix(".md")
GEMMA = {
    "model_type": "gemma2", "vocab_size": 256_000, "num_hidden_layers": 26, "hidden_size": 2304,
    "intermediate_size": 9216, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
    "query_pre_attn_scalar": 256, "max_position_embeddings": 8192, "sliding_window": 4096,
    "rms_norm_eps": 1e-6,
}  # fmt: skip
LLAMA = {
    "model_type": "llama", "vocab_size": 128_256, "num_hidden_layers": 32, "hidden_size": 4096,
    "intermediate_size": 14_336, "num_attention_heads": 32, "num_key_value_heads": 8,
    "head_dim": 128, "max_position_embeddings": 8192, "rope_theta": 500_000.0,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
}  # fmt: skip
TINY = {
    "vocab_size": 512, "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip
SHAPES = {"Gemma-2-2B": GEMMA, "Llama-3.1-8B": LLAMA}
RANK = 16
"""Of the adapters that learn where the whole model would not fit."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much is done.

    Attributes:
      prompts: Comparisons that are sampled at once.
      few: As many as the sampler takes at once unless it is told.
      samples: Of each.
      prompt: Tokens of each.
      new: Tokens of a sample.
      rows: Of a training step.
      length: Tokens of a row.
      rollouts: Of a step of reinforcement learning.
      rollout_new: Tokens of a rollout, behind a prompt.
      peer_prompts: Comparisons that `generate`, whose samples share nothing, has room for at once.
    """

    prompts: int = 64
    few: int = 8
    samples: int = 32
    prompt: int = 512
    new: int = 64
    rows: int = 8
    length: int = 1024
    rollouts: int = 32
    rollout_new: int = 128
    peer_prompts: int = 16


QUICK = Sizes(
    prompts=4, few=2, samples=2, prompt=16, new=4, rows=2, length=16, rollouts=4, rollout_new=4,
    peer_prompts=2,
)  # fmt: skip


class OutOfTimeError(Exception):
    """The seconds are used up."""


class Bench:
    """What sections share: sizes, the time that is left, and the results."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.sizes = QUICK if args.quick else Sizes()
        self.quick: bool = args.quick
        self.profile: Path | None = args.profile
        self.results = load(args.output)
        self._output: Path = args.output
        self._deadline = time.time() + args.seconds

    def shape(self, name: str) -> dict[str, Any]:
        """A model's `config.json`, as far as it matters."""
        return SHAPES[name] | (TINY if self.quick else {})

    def keep(self, section: str, **values: Any) -> None:
        """Adds to a section's results, and writes all there are."""
        self.results.setdefault(section, {}).update(values)
        partial = self._output.with_suffix(".partial")
        partial.write_text(json.dumps(self.results, indent=1))
        partial.replace(self._output)
        print(f"{section}: {json.dumps(values)}", flush=True)

    def check(self) -> None:
        """Stops a section if nothing more can be begun."""
        if time.time() > self._deadline:
            raise OutOfTimeError

    def time(
        self,
        run: Callable[[], object],
        repeats: int = 5,
        *,
        first: Callable[[], object] | None = None,
    ) -> dict[str, float]:
        """Median seconds of `run`, which waits for what it began, after a first call that warms."""
        self.check()
        (first or run)()
        times: list[float] = []
        while len(times) < repeats:
            began = time.perf_counter()
            run()
            times.append(time.perf_counter() - began)
            if time.time() > self._deadline:
                break
        return {"seconds": statistics.median(times), "least": min(times), "repeats": len(times)}

    def bound(self, flops: float, moved: float) -> dict[str, float | str]:
        """The least seconds of work at what the card was seen to do, and what they are due to."""
        top = self.results.get("ceilings", {})
        compute, memory = flops / top.get("flops", 1e15), moved / top.get("speed", 4e12)
        binds = "compute" if compute > memory else "memory"
        return {"flops": flops, "moved": moved, "bound": max(compute, memory), "binds": binds}


def load(path: Path) -> dict[str, Any]:
    """Results so far."""
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


Section = Callable[[Bench, str], None]


def sections(side: str) -> Mapping[str, Section]:
    """What is measured, the most telling first."""
    gemma, llama = SHAPES
    if side == "transformers":

        def peer(bench: Bench, section: str, name: str, lora: int) -> None:
            # It may not be installed.
            from benchmarks.gpu_peer import peer

            peer(bench, section, name, lora=lora)

        return {
            f"transformers, {gemma}": lambda b, s: peer(b, s, gemma, 0),
            f"transformers, {llama}": lambda b, s: peer(b, s, llama, RANK),
        }
    from benchmarks.gpu_ours import ceilings, decoding, reinforcement, training

    return {
        "ceilings": ceilings,
        f"{gemma}, decode": lambda b, s: decoding(b, s, gemma),
        f"{gemma}, train": lambda b, s: training(b, s, gemma, lora=0),
        f"{gemma}, rl": reinforcement,
        f"{llama}, decode": lambda b, s: decoding(b, s, llama),
        f"{llama}, train": lambda b, s: training(b, s, llama, lora=RANK),
        f"{gemma}, decode of few": lambda b, s: decoding(b, s, gemma, few=True),
    }


def measure(args: argparse.Namespace) -> None:
    """Runs the sections of one side that are still to be done."""
    if args.side == "grm_jax":
        import jax

        # Sections have programs in common.
        jax.config.update("jax_compilation_cache_dir", str(args.cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    bench = Bench(args)
    for name, run in sections(args.side).items():
        state = bench.results.get(name, {}).get("state", "")
        if args.only not in name or (state and not state.startswith("skipped")):
            continue
        began = time.perf_counter()
        try:
            bench.check()
            bench.keep(name, state="ended the process")
            run(bench, name)
            bench.keep(name, state="done", section_seconds=time.perf_counter() - began)
        except OutOfTimeError:
            bench.keep(name, state="skipped, out of time")
        except Exception as error:  # what fails must not keep the rest from being measured
            traceback.print_exc()
            bench.keep(name, state=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
        gc.collect()


def table(results: Mapping[str, Any]) -> str:
    """The results, in Markdown."""
    machine, top = results.get("machine", {}), results.get("ceilings", {})
    speed, flops = top.get("speed", 0) / 1e12, top.get("flops", 0) / 1e12
    lines = [
        "# One GPU",
        "",
        f"{machine.get('card')}, driver {machine.get('driver')}, Python {machine.get('python')}, "
        f"JAX {machine.get('jax')}, torch {machine.get('torch')}, transformers "
        f"{machine.get('transformers')}. Printed by `python benchmarks/gpu.py`, whose first lines "
        f"say how bounds are counted. In the same run the card copied {speed:.2f} TB/s and "
        f"multiplied bfloat16 matrices at {flops:.0f} TFLOP/s; bounds of rows with `rl` are the "
        "plan's, from the card's data sheet. Medians, without compilation, which has a column of "
        "its own; memory is a program's with all that it is given, for `transformers` the peak.",
        "",
        "| | work | s (ms a step) | tokens/s | TFLOP/s | TB/s | bound, s | bound / measured | GiB "
        "| compilation, s |",
        "| --- |" + " --- |" * 9,
    ]
    notes = []
    for name, found in results.items():
        if (state := found.get("state", "done")) != "done":
            notes.append(f"- {name}: {state}")
        if not (seconds := found.get("seconds")):
            continue

        def rate(what: str, found: Any = found) -> str:
            return f"{found[what] / found['seconds'] / 1e12:.3g}" if found.get(what) else ""

        bound, steps = found.get("bound"), found.get("steps")
        cells = [
            name,
            found["what"],
            f"{seconds:.3g}" + (f" ({1000 * seconds / steps:.1f})" if steps else ""),
            f"{found['tokens'] / seconds:,.0f}" if "tokens" in found else "",
            rate("flops"),
            rate("moved"),
            f"{bound:.3g} ({found['binds']})" if bound else "",
            f"**{bound / seconds:.0%}**" if bound else "",
            f"{found['gib']:.1f}" if found.get("gib") else "",
            f"{found['compile']:.0f}" if "compile" in found else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *ratios(results), *notes, ""])


def ratios(results: Mapping[str, Any]) -> list[str]:
    """How many times as fast as `transformers`; seconds of samples are with those of prompts."""

    def rate(*names: str) -> float:
        found = [results.get(name, {}) for name in names]
        if not all("seconds" in one for one in found):
            return 0.0
        return float(found[-1]["tokens"] / sum(one["seconds"] for one in found))

    lines = []
    for name in SHAPES:
        ours, theirs = f"{name}, decode", f"transformers, {name}"
        pairs = {
            "prefill": (rate(f"{ours}, prefill"), rate(f"{theirs}, prefill")),
            "samples": (rate(f"{ours}, prefill", ours), rate(f"{theirs}, generate")),
            "training": (rate(f"{name}, train"), rate(f"{theirs}, train")),
        }
        lines += [
            f"- {name}, {what}: {own:,.0f} tokens/s against {other:,.0f} of `transformers`, "
            f"**{own / other:.2f}** times"
            for what, (own, other) in pairs.items()
            if own and other
        ]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny shapes, which say nothing")
    parser.add_argument("--output", type=Path, default=Path("gpu.json"), help="results so far")
    parser.add_argument("--seconds", type=float, default=240, help="after which nothing is begun")
    parser.add_argument("--peer-seconds", type=float, default=60, help="of these, for the peer")
    parser.add_argument("--only", default="", help="sections whose names have this in them")
    cache = Path(tempfile.gettempdir()) / "grm_jax_gpu"
    parser.add_argument("--cache", type=Path, default=cache, help="of compiled programs")
    parser.add_argument("--profile", type=Path, help="folder for traces")
    parser.add_argument("--table", type=Path, help="results to make the table of; runs nothing")
    parser.add_argument("--side", choices=["grm_jax", "transformers"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.table:
        RESULTS.write_text(table(load(args.table)))
        return
    if args.side:
        measure(args)
        return
    end = time.time() + args.seconds
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"PYTHONPATH": path, "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.93"}
    # Each side has the memory for itself, and what ends a process ends one section.
    for side, until in (("grm_jax", end - args.peer_seconds), ("transformers", end)):
        for _ in range(3):
            left = until - time.time()
            command = [
                sys.executable,
                __file__,
                *sys.argv[1:],
                "--side",
                side,
                "--seconds",
                str(left),
            ]
            try:
                done = subprocess.run(command, env=env, timeout=max(left, 0) + 30).returncode
            except subprocess.TimeoutExpired:
                done = -1
            if not done or time.time() > until:
                break
            print(f"{side} ended with {done}", flush=True)
    print(table(load(args.output)), flush=True)


if __name__ == "__main__":
    main()
