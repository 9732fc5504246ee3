"""The comparisons of the reference run: short pairs of real data, split by question.

    python -m benchmarks.reference_run prepare --data FOLDER --workdir DIR

Reads the files of comparisons in FOLDER, makes pairs of those with more responses, keeps what a
prompt of the run has room for, and writes `train.jsonl`, `meta.jsonl` and `heldout.jsonl`. What is
asked decides where a pair goes, so that no question is in two of them.
"""

import hashlib
import itertools
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from grm_jax.checkpoints import open_checkpoint
from grm_jax.data import (
    BestLabel,
    Comparison,
    ScoresLabel,
    best_index,
    read_comparisons,
    to_line,
    to_record,
    turns,
)
from grm_jax.prompts import Tokenizer, encode_chat, load_template, render, tokenizer_from_gguf

KINDS = (
    "truthfulqa",
    "hh_harmless",
    "alpaca_eval",
    "zeroeval_pairs",
    "mmlu_pro_pairs",
    "shepherd",
    "ultrafeedback_1k",
    "dpo_demo",
    "judgement_bias",
    "ilf_mbpp",
    "mbpp_reflexion",
)
SHARES = {"heldout": 0.17, "meta": 0.12}
"""Of the questions; the rest are trained on."""

MOST_HELD_OUT = 250
"""Of a kind, so that none outweighs the others."""

PAIRS = 3
"""Of one record with more than two responses."""


def prepare(data: Path, workdir: Path, *, longest: int) -> None:
    """Writes the three files into `workdir/data`, unless they are there.

    Args:
      data: The folder with `KIND.jsonl.gz`.
      workdir: Of the run.
      longest: Tokens of the longest prompt.
    """
    folder = workdir / "data"
    if (folder / "train.jsonl").exists():
        return
    opened = open_checkpoint("smollm2-135m")
    if opened.metadata is None:
        raise RuntimeError("the model is no GGUF file any more")
    tokenizer = tokenizer_from_gguf(opened.metadata)
    parts: dict[str, list[Comparison]] = {"heldout": [], "meta": [], "train": []}
    for kind in KINDS:
        held = 0
        for pair in _pairs(data / f"{kind}.jsonl.gz", kind):
            part = _part(pair)
            if part == "heldout" and held == MOST_HELD_OUT:
                continue
            if _tokens(tokenizer, pair) <= longest:
                parts[part].append(pair)
                held += part == "heldout"
    folder.mkdir(parents=True, exist_ok=True)
    for name, pairs in parts.items():
        # Mixed, so that the first so many are of all kinds.
        pairs.sort(key=lambda pair: hashlib.blake2b(pair.id.encode()).digest())
        lines = "".join(to_line(to_record(pair)) + "\n" for pair in pairs)
        (folder / f"{name}.jsonl").write_text(lines)
        counts = Counter(pair.source for pair in pairs)
        print(f"{name}: {len(pairs)} pairs:", ", ".join(f"{k} {n}" for k, n in counts.items()))


def _pairs(path: Path, kind: str) -> Iterator[Comparison]:
    """The pairs of a file, each of which has one better response."""
    for record in read_comparisons(path):
        if not isinstance(record, Comparison) or len(record.responses) < 2:
            continue
        if len(record.responses) == 2:
            best = best_index(record)
            chosen = [] if best is None else [(best, 1 - best)]
        else:
            chosen = _some(record)
        for number, (best, other) in enumerate(chosen):
            draw = random.Random(f"{kind}/{record.id}/{number}")
            shown = [best, other]
            draw.shuffle(shown)
            yield Comparison(
                id=f"{kind}/{record.id}/{number}",
                messages=record.messages,
                responses=tuple(record.responses[index] for index in shown),
                label=BestLabel(shown.index(best)),
                source=kind,
            )


def _some(record: Comparison) -> list[tuple[int, int]]:
    """A few pairs of one of the best responses and one that is not among them."""
    if not isinstance(record.label, ScoresLabel):
        return []
    values = record.label.values
    best = [index for index, value in enumerate(values) if value == max(values)]
    rest = [index for index, value in enumerate(values) if value < max(values)]
    pairs = list(itertools.product(best, rest))
    random.Random(record.id).shuffle(pairs)
    return pairs[:PAIRS]


def _part(pair: Comparison) -> str:
    asked = repr([(turn["role"], turn["content"]) for turn in turns(pair)])
    digest = hashlib.blake2b(asked.encode(errors="surrogatepass"), digest_size=8).digest()
    place = int.from_bytes(digest) / 2**64
    for name, share in SHARES.items():
        if place < share:
            return name
        place -= share
    return "train"


def _tokens(tokenizer: Tokenizer, pair: Comparison) -> int:
    chat = render(load_template("compact"), turns(pair), list(pair.responses))
    return len(encode_chat(tokenizer, chat))
