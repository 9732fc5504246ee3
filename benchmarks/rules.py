"""Scores, rewards and votes of many samples: one program on the device against a loop on the host.

    python benchmarks/rules.py [--samples 100000] [--tokens 256]

Both begin with token ids, as they come from a sampler, and end with a reward for each sample and
the totals of each comparison, 32 samples to one; they are compared before they are timed. The host
decodes each sample and reads it with `parse_scores`, which is one regular expression. Writes
`benchmarks/rules.md`.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from grm_jax import __version__
from grm_jax.checkpoints import open_checkpoint
from grm_jax.grammar import TokenTable, token_table
from grm_jax.prompts import Tokenizer, tokenizer_from_gguf
from grm_jax.prompts.scores import parse_scores
from grm_jax.rewards import extract_scores, outcome_reward, vote

RESULTS = Path(__file__).with_suffix(".md")
SAMPLES_EACH, RUNS = 32, 5
WORDS = (
    "The first response answers what was asked and gives a reason for it. ",
    "The second one is shorter, and leaves out the step on which all else depends. ",
    "Accuracy weighs most here, then clarity, then length. ",
    "Neither says where its numbers are from; one of them is wrong by a factor of 10. ",
)
FORMULA = r"It writes \frac{1}{2} where \text{one third} is right. "
CASES = {
    "all end in a box": (0.0, 0.0),
    "2 % have none": (0.02, 0.0),
    "2 % have none, half of all quote a formula": (0.02, 0.5),
}


def make_texts(
    tokenizer: Tokenizer, count: int, longest: int, missing: float, formulas: float
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids `i32[count, longest]` of judgements of two responses, and their lengths."""
    rng = np.random.default_rng(0)
    pieces = [np.asarray(tokenizer.encode(text), np.int32) for text in WORDS]
    formula = np.asarray(tokenizer.encode(FORMULA), np.int32)
    boxes = {
        (a, b): np.asarray(tokenizer.encode(f"\nScores: \\boxed{{{a}, {b}}}"), np.int32)
        for a in range(1, 11)
        for b in range(1, 11)
    }
    body = np.concatenate([pieces[index] for index in rng.integers(0, len(pieces), longest)])
    tokens = np.zeros((count, longest), np.int32)
    lengths = rng.integers(longest * 3 // 4, longest + 1, count)
    for row, length in enumerate(lengths):
        start = int(rng.integers(0, len(body) - length))
        tokens[row, :length] = body[start : start + length]
        if rng.random() < formulas:
            at = int(rng.integers(0, length // 2))
            tokens[row, at : at + len(formula)] = formula
        if rng.random() >= missing:
            box = boxes[int(rng.integers(1, 11)), int(rng.integers(1, 11))]
            tokens[row, length - len(box) : length] = box
    return tokens, lengths.astype(np.int32)


def on_host(tokenizer: Tokenizer, tokens: np.ndarray, lengths: np.ndarray, best: np.ndarray) -> Any:
    """Rewards `[count]` and totals `[count / 32, 2]`."""
    rewards, totals = [], []
    for first in range(0, len(tokens), SAMPLES_EACH):
        total = [0, 0]
        for row in range(first, first + SAMPLES_EACH):
            scores = parse_scores(tokenizer.decode(tokens[row, : lengths[row]]), 2)
            right = False
            if scores is not None:
                total = [old + new for old, new in zip(total, scores, strict=True)]
                right = scores[best[row]] > scores[1 - best[row]]
            rewards.append(1.0 if right else -1.0)
        totals.append(total)
    return np.asarray(rewards), np.asarray(totals, float)


@jax.jit
def on_device(tokens: jax.Array, lengths: jax.Array, best: jax.Array, table: TokenTable) -> Any:
    """The same, in one program."""
    scores, valid = extract_scores(tokens, lengths, table, 2, max_responses=2)
    rewards = outcome_reward(scores, valid, best, 2)
    totals = vote(scores.reshape(-1, SAMPLES_EACH, 2), valid.reshape(-1, SAMPLES_EACH))
    return rewards, totals


def seconds(run: Callable[[], Any]) -> float:
    """The median of a few runs, after one that does not count."""
    jax.block_until_ready(run())
    times = []
    for _ in range(RUNS):
        began = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def main() -> None:
    """Measures, and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    metadata = open_checkpoint("smollm2-135m").metadata
    if metadata is None:
        raise RuntimeError("the model is no GGUF file any more")
    tokenizer = tokenizer_from_gguf(metadata)
    table = TokenTable(*map(jnp.asarray, token_table(tokenizer.token_bytes)))
    count = args.samples // SAMPLES_EACH * SAMPLES_EACH
    device = jax.devices()[0]
    lines = [
        "# Scores, rewards and votes",
        "",
        f"`python benchmarks/rules.py`: {count:,} samples of at most {args.tokens} tokens, "
        f"{SAMPLES_EACH} of each comparison. grm_jax {__version__}, JAX {jax.__version__}, on "
        f"{device.device_kind}. Medians of {RUNS} runs; the host decodes and reads one sample "
        "after another, with one thread.",
        "",
        "| samples | host, s | device, s | ratio |",
        "| --- | --- | --- | --- |",
    ]
    for name, (missing, formulas) in CASES.items():
        tokens, lengths = make_texts(tokenizer, count, args.tokens, missing, formulas)
        best = np.random.default_rng(1).integers(0, 2, count)
        placed = [jnp.asarray(array) for array in (tokens, lengths, best)]
        host = partial(on_host, tokenizer, tokens, lengths, best)
        ours = partial(on_device, *placed, table)
        for one, other in zip(host(), ours(), strict=True):
            np.testing.assert_array_equal(one, other)
        slow, fast = seconds(host), seconds(ours)
        lines.append(f"| {name} | {slow:.2f} | {fast:.3f} | {slow / fast:.0f} |")
        print(lines[-1], flush=True)
    args.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
