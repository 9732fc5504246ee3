"""Samples of one comparison: tokens a second against `transformers`, on the same weights.

    python benchmarks/sampling.py             # about 15 minutes on 2 cores; rewrites sampling.md
    python benchmarks/sampling.py --quick     # checks that everything runs, in about a minute

Both sides continue the same prompt of 1,024 tokens by 128, for k = 1, 8 and 32 samples at
temperature 0.5, with end-of-turn tokens switched off so that all do the same work. Each runs in a
process of its own, one after the other, with as many threads as there are cores to it; times are
medians and include the reading of the prompt. `transformers` runs in float32 and in bfloat16, and
the better counts.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

MODEL = "smollm2-135m"
RESULTS = Path(__file__).with_name("sampling.md")


def prompt_tokens(length: int) -> list[int]:
    """A judge prompt of exactly `length` tokens, from the shipped examples."""
    from grm_jax.checkpoints import open_checkpoint
    from grm_jax.data import Comparison, examples_path, read_comparisons
    from grm_jax.prompts import encode_chat, load_template, render, tokenizer_from_gguf

    tokenizer = tokenizer_from_gguf(open_checkpoint(MODEL).metadata or {})
    records = [r for r in read_comparisons(examples_path()) if isinstance(r, Comparison)]
    texts = [text for record in records for text in record.responses]
    chat = render(load_template("paper"), records[0].messages, texts * 8)
    return encode_chat(tokenizer, chat)[:length]


def timed(run: Callable[[int], object], counts: list[int], repeats: int) -> dict[str, Any]:
    """Median seconds of `run(k)` for each k, and how much longer a first call took.

    With no repeats the first call is all there is.
    """
    seconds, first = {}, {}
    for count in counts:
        times = []
        for _ in range(repeats + 1):
            began = time.perf_counter()
            run(count)
            times.append(time.perf_counter() - began)
        seconds[count] = statistics.median(times[1:] or times)
        first[count] = times[0] - seconds[count]
    return {"seconds": seconds, "first": first}


def ours(args: argparse.Namespace) -> dict[str, Any]:
    """This library: one prefill, then all samples in one loop."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from grm_jax import checkpoints
    from grm_jax.models import cpu_decoder
    from grm_jax.sampling import Controls, bucket, decode, empty_prefix, place_prefix, prefill

    config, params = checkpoints.load(MODEL)
    decoder_config, decoder_params = cpu_decoder(config, params)
    prompt = np.asarray([prompt_tokens(args.prompt)], np.int32)
    size = bucket(args.prompt - 1)
    padded = np.pad(prompt[:, :-1], ((0, 0), (0, size - args.prompt + 1)))
    controls = Controls(jnp.float32(0.5), jnp.float32(1), jnp.int32(args.new))

    def run(count: int) -> None:
        length = np.asarray([args.prompt - 1], np.int32)
        room = empty_prefix(decoder_config, rows=1, size=size)
        segment = prefill(params, config, padded, length)
        prefix = place_prefix(
            room, segment, np.zeros(1, np.int32), np.zeros(1, np.int32), 1, decoder_config, config
        )
        keys = jax.random.split(jax.random.key(count), (1, count))
        out = decode(
            decoder_params,
            decoder_config,
            prefix,
            prompt[:, -1],
            keys,
            controls,
            eos_ids=(),
            capacity=bucket(args.new),
        )
        assert (np.asarray(out.length) == args.new).all()

    return timed(run, args.counts, args.repeats)


def transformers(args: argparse.Namespace) -> dict[str, Any]:
    """`generate` on the same GGUF, dequantised, with k sequences returned."""
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    from grm_jax.checkpoints import resolve

    torch.set_num_threads(os.cpu_count() or 1)
    path = resolve(MODEL)
    model = AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        dtype=getattr(torch, args.dtype),
        quantization_config=GgufConfig(dequantize=True),
    ).eval()
    prompt = torch.tensor([prompt_tokens(args.prompt)])

    def run(count: int) -> None:
        out = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=True,
            temperature=0.5,
            top_k=0,
            num_return_sequences=count,
            max_new_tokens=args.new,
            min_new_tokens=args.new,
            pad_token_id=0,
        )
        assert out.shape == (count, args.prompt + args.new)

    with torch.inference_mode():
        return timed(run, args.counts, args.repeats)


def child(args: argparse.Namespace, side: str, dtype: str) -> dict[str, Any]:
    """Runs one side in a fresh process."""
    command = [sys.executable, __file__, "--side", side, f"--dtype={dtype}"]
    command += ["--prompt", str(args.prompt), "--new", str(args.new)]
    repeats = 0 if dtype and dtype == args.brief else args.repeats
    command += ["--repeats", str(repeats), "--counts", *map(str, args.counts)]
    cores = str(os.cpu_count() or 1)
    env = os.environ | {"OMP_NUM_THREADS": cores, "MKL_NUM_THREADS": cores, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(f"{side} {dtype}: {result}", file=sys.stderr, flush=True)
    return result


def machine() -> str:
    """The processor's name and the number of cores."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"


def report(args: argparse.Namespace, sides: dict[str, dict[str, Any]]) -> str:
    """The table, in Markdown."""
    import jax

    counts = [str(count) for count in args.counts]

    def rate(side: str, count: str) -> float:
        return int(count) * args.new / sides[side]["seconds"][count]

    lines = [
        "# Samples of one comparison",
        "",
        f"`{MODEL}`, prompt of {args.prompt} tokens, {args.new} new tokens a sample. "
        f"{machine()}; Python {platform.python_version()}, JAX {jax.__version__}. "
        f"Printed by `python benchmarks/sampling.py`; medians of {args.repeats}"
        + (f" ({args.brief} of the peer: one run)" if args.brief else "")
        + ", seconds include reading the prompt.",
        "",
        "| | " + " | ".join(f"k = {c}: tokens/s (s)" for c in counts) + " | peak memory |",
        "| --- |" + " --- |" * (len(counts) + 1),
    ]
    for side, result in sides.items():
        cells = [f"{rate(side, c):.1f} ({result['seconds'][c]:.1f})" for c in counts]
        lines.append(f"| {side} | " + " | ".join(cells) + f" | {result['peak'] / 2**30:.2f} GiB |")
    peers = [side for side in sides if side != "grm_jax"]
    ratios = [rate("grm_jax", c) / max(rate(peer, c) for peer in peers) for c in counts]
    lines.append("| ratio to the better | " + " | ".join(f"**{r:.2f}**" for r in ratios) + " | |")
    ours = sides["grm_jax"]
    growth = ours["seconds"][counts[-1]] / ours["seconds"][counts[0]]
    compiled = ", ".join(f"{ours['first'][c]:.1f} s (k = {c})" for c in counts)
    lines += [
        "",
        f"{counts[-1]} samples take {growth:.1f} times the seconds of {counts[0]}. "
        f"Compilation, not counted above, adds to the first call {compiled}.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes; writes nothing")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=1024)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--brief", default="", help="a dtype of the peer to run once")
    parser.add_argument("--side", choices=["grm_jax", "transformers"], help=argparse.SUPPRESS)
    parser.add_argument("--dtype", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quick:
        args.repeats, args.prompt, args.new, args.counts = 1, 128, 4, [1, 2]
    if args.side:
        result = (ours if args.side == "grm_jax" else transformers)(args)
        # Linux counts kilobytes, macOS bytes.
        scale = 1 if sys.platform == "darwin" else 1024
        result["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
        print(json.dumps(result))
        return
    sides = {
        "grm_jax": child(args, "grm_jax", ""),
        "transformers, bfloat16": child(args, "transformers", "bfloat16"),
        "transformers, float32": child(args, "transformers", "float32"),
    }
    text = report(args, sides)
    print(text)
    if not args.quick:
        RESULTS.write_text(text)


if __name__ == "__main__":
    main()
