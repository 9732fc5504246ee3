"""`grm-jax`: finds the subcommand and turns mistakes into one line and an exit status."""

import argparse
import ctypes
import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import jax

from grm_jax.checkpoints.sources import cache_folder
from grm_jax.errors import UsageError
from grm_jax.version import __version__

COMMANDS: Mapping[str, str] = MappingProxyType(
    {
        "judge": "grm_jax.cli.judge",
        "convert": "grm_jax.cli.convert",
        "train": "grm_jax.cli.train",
        "eval": "grm_jax.cli.evaluate",
        "plan": "grm_jax.cli.plan",
        "serve": "grm_jax.cli.serve",
    }
)
"""The module of each subcommand."""

OK, SOME_FAILED, WRONG_CALL, INTERRUPTED = 0, 1, 2, 130


def keep_freed_memory() -> bool:
    """Has the C library keep what is freed instead of giving it back to the system.

    XLA on CPUs takes room for its intermediate results at every step and frees it after; by default
    glibc returns such blocks at once and gets them anew, page by page, which can take more than a
    third of a step. Up to 1 GiB in one piece is kept, in one arena for all threads, as those that
    threads have of their own hold no piece of 64 MiB.

    Returns:
      Whether this C library can; elsewhere nothing changes.
    """
    if sys.platform != "linux":
        return False
    # Numbers from malloc.h.
    trim_threshold, top_pad, mmap_threshold, arena_max = -1, -2, -3, -8
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    changes = {mmap_threshold: 1 << 30, trim_threshold: 1 << 30, top_pad: 64 << 20, arena_max: 1}
    return all(mallopt(name, value) for name, value in changes.items())


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Returns:
      The exit status: 0 if all is done, 1 if some records failed, 2 if the call was wrong, 130 if
      it was interrupted.
    """
    parser = argparse.ArgumentParser(
        prog="grm-jax", description="Generative reward models: judge, train and scale."
    )
    parser.add_argument("--version", action="version", version=f"grm_jax {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    given = sys.argv[1:] if argv is None else argv
    # One that is called is the only one to be imported: others take seconds for what it needs not.
    for name in given[:1] if given and given[0] in COMMANDS else COMMANDS:
        importlib.import_module(COMMANDS[name]).add_parser(commands)
    args, overrides = parser.parse_known_args(argv)
    if overrides and args.command not in ("train", "plan"):
        parser.error(f"unrecognized arguments: {' '.join(overrides)}")
    args.overrides = overrides
    keep_freed_memory()
    _keep_compiled_programs()
    try:
        return OK if args.run(args) else SOME_FAILED
    except UsageError as error:
        print(f"grm-jax: {error}", file=sys.stderr)
        return WRONG_CALL
    except KeyboardInterrupt:
        print("grm-jax: interrupted; what was written is complete", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has gone; there is nobody left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return SOME_FAILED


def _keep_compiled_programs() -> None:
    """Lets the next run find the programs that this one compiles."""
    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder().parent / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
