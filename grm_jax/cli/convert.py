"""`grm-jax convert`: a model from one format to another."""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from grm_jax import checkpoints
from grm_jax.errors import UsageError
from grm_jax.judge import load_model
from grm_jax.models import merge_lora
from grm_jax.prompts import Tokenizer, save_tokenizer

FORMATS = ("safetensors", "orbax", "peft")


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds `convert` to the subcommands."""
    parser = commands.add_parser(
        "convert",
        help="convert a model between formats",
        description="Reads a model (a built-in name, hf:owner/name, a folder, a GGUF file) and "
        "writes it as safetensors that transformers and vLLM load, as an Orbax checkpoint, or "
        "its adapters alone (and a classifier's head) as a PEFT folder.",
    )
    add = parser.add_argument
    add("source", metavar="SRC", help="the model")
    add("target", metavar="DST", type=Path, help="a folder that does not exist yet")
    add("--adapter", metavar="NAME", help="a PEFT folder to merge into the model")
    add("--to", choices=FORMATS, default="safetensors", help="default safetensors")
    add("--dtype", choices=("float32", "bfloat16"), help="default: as the source has it")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> bool:
    """Converts the model; returns True, or raises what is wrong."""
    if args.target.exists() and (not args.target.is_dir() or any(args.target.iterdir())):
        raise UsageError(f"{args.target} exists already; name a folder that does not")
    if args.to == "peft" and args.adapter is not None:
        raise UsageError("--adapter is merged into the model, and --to peft writes adapters apart")
    opened = checkpoints.open_checkpoint(args.source)
    dtype = args.dtype or opened.dtype
    config, params, tokenizer = load_model(opened, adapter=args.adapter, dtype=dtype)
    args.target.parent.mkdir(parents=True, exist_ok=True)
    # The folder appears whole or not at all.
    with tempfile.TemporaryDirectory(
        dir=args.target.parent, prefix=f".{args.target.name}-"
    ) as folder:
        made = Path(folder) / "model"
        if args.to == "orbax":
            checkpoints.save_orbax(made, config, params)
        elif args.to == "peft":
            base = opened.base or args.source
            checkpoints.save_adapter(made, config, params, base=base, dtype=args.dtype)
        else:
            config, params = merge_lora(config, params)
            checkpoints.save_folder(made, config, params, extra=_special_ids(tokenizer))
        if args.to != "peft":
            save_tokenizer(tokenizer, made)
        if args.target.exists():
            args.target.rmdir()
        shutil.move(made, args.target)
    print(f"wrote {args.target} ({config.family}, {dtype})", file=sys.stderr)
    return True


def _special_ids(tokenizer: Tokenizer) -> dict[str, Any]:
    """What `config.json` says of the tokens that begin and end a text."""
    ends = list(tokenizer.eos_ids)
    return {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
    }
