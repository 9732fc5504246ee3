"""Configurations of runs: files, overrides, and a record of which keys were read.

A configuration is an `ml_collections.ConfigDict` that a Python file's `get_config()` returns. Such
a file starts from the defaults of its stage and changes what it is about, so that every key exists
and a misspelt one is found. The other half of that promise is kept by `Settings`: a key that no
code reads stops a run before its first step.
"""

import difflib
import runpy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, final

from absl import flags
from ml_collections import ConfigDict, config_flags

from grm_jax.errors import UsageError

_FLAG = "--config."


def base_config(stage: str) -> ConfigDict:
    """The keys that all stages share, with their defaults.

    Args:
      stage: Its name.

    Returns:
      A configuration to which the stage adds its own keys.
    """
    return ConfigDict(
        {
            "stage": stage,
            "seed": 0,
            # Steps of the whole run, over which the learning rate is scheduled.
            "steps": 100,
            "model": {
                # A built-in name, a folder, a GGUF file, or hf:owner/name.
                "name": "smollm2-135m",
                # Take the shape and the tokenizer only, and begin with random parameters.
                "random": False,
                # To begin from nothing: a decoder's `family` and fields, and whose tokenizer it
                # has, a folder's or "nano".
                "shape": {},
                "tokenizer": "",
                # float32, bfloat16, or auto: float32 on CPUs and bfloat16 elsewhere. Parameters
                # that learn are float32 always.
                "dtype": "auto",
                # Rank of adapters; 0 trains all parameters.
                "lora_rank": 0,
                "lora_alpha": 16.0,
                "lora_targets": ("q", "k", "v", "out", "gate", "up", "down"),
                # A PEFT folder, or the name of one that comes with the package, whose adapters are
                # trained further.
                "adapter": "",
                # Compute each layer again for its gradient instead of keeping what it computed.
                "remat": False,
            },
            "mesh": {"data": 1, "fsdp": -1, "tensor": 1, "expert": 1},
            "batch": {
                # Rows of a step over all devices, and in how many parts they are learnt from.
                "rows": 8,
                "accumulate": 1,
            },
            "optimizer": {
                "learning_rate": 1e-5,
                # constant, warmup_cosine or warmup_linear; each begins with the warm-up.
                "schedule": "warmup_cosine",
                "warmup_steps": 0,
                # Share of the learning rate that is left at the end of a decay.
                "final_share": 0.1,
                "b1": 0.9,
                "b2": 0.95,
                "eps": 1e-8,
                # Of kernels and embeddings; norms and biases do not decay.
                "weight_decay": 0.0,
                # Longest gradient, as one vector over all parameters; 0 for any length.
                "clip_norm": 1.0,
            },
            "checkpoint": {
                # Steps between checkpoints, how many of the latest are kept, and of which step
                # numbers (multiples of this; 0 for none) they are kept for good.
                "every": 100,
                "keep": 2,
                "keep_every": 0,
            },
            "log": {
                # Steps between lines of metrics.
                "every": 1,
                "tensorboard": False,
                # The project's name; empty for no W&B.
                "wandb": "",
            },
        }
    )


def load_config(path: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """Runs a configuration file and applies overrides.

    Args:
      path: The file; `file.py:text` hands the text to its `get_config`.
      overrides: Each `--config.a.b=value`; the value is read as the type that the key has.

    Returns:
      The configuration.

    Raises:
      UsageError: The file does not exist or has no `get_config`, an override names a key that does
        not exist, or its value has another type.
    """
    config = _run(path)
    known = sorted(_flatten(config))
    for override in overrides:
        name, equals, _ = override.partition("=")
        if not name.startswith(_FLAG) or not equals:
            raise UsageError(f"{override!r} is no override; write {_FLAG}key=value")
        _check_known(name.removeprefix(_FLAG), known)
    _override(config, overrides)
    return config


@final
class Settings:
    """A configuration by dotted key, which remembers what was read of it."""

    def __init__(self, config: ConfigDict) -> None:
        """Takes the configuration as it is now."""
        self._values = dict(_flatten(config))
        self._read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        """The value of a key such as `"optimizer.b1"`.

        Raises:
          UsageError: The configuration has no such key.
        """
        _check_known(key, sorted(self._values))
        self._read.add(key)
        return self._values[key]

    def group(self, prefix: str) -> dict[str, Any]:
        """All keys below a prefix, without it, and their values.

        Raises:
          UsageError: There are none.
        """
        found = [key for key in self._values if key.startswith(f"{prefix}.")]
        if not found:
            _check_known(f"{prefix}.", sorted(self._values))
        return {key.removeprefix(f"{prefix}."): self[key] for key in found}

    def group_or_empty(self, prefix: str) -> dict[str, Any]:
        """As `group`, of a group that may have no keys."""
        empty = not any(key.startswith(f"{prefix}.") for key in self._values)
        return {} if empty else self.group(prefix)

    def choice(self, key: str, options: Sequence[str]) -> str:
        """The value of a key that must be one of a few words.

        Raises:
          UsageError: It is another.
        """
        value = self[key]
        if value not in options:
            raise UsageError(f"{key} is {value!r}; it must be one of {', '.join(options)}")
        return str(value)

    def at_least(self, key: str, low: int) -> int:
        """The value of a key that must be a whole number, and not below another.

        Raises:
          UsageError: It is.
        """
        value = self[key]
        if not isinstance(value, int) or value < low:
            raise UsageError(f"{key} is {value!r}; it must be a whole number from {low} up")
        return value

    def to_dict(self) -> dict[str, Any]:
        """Every key with its value, ready for JSON."""
        return dict(self._values)

    def check_all_read(self) -> None:
        """Makes sure that every key means something.

        Raises:
          UsageError: A key was never read.
        """
        unread = sorted(set(self._values) - self._read)
        if unread:
            raise UsageError(
                f"nothing reads the configuration's {', '.join(unread)} in this stage; "
                "leave it out of the file"
            )


def changed_key(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """The first key that differs in a way that makes another run of it.

    Where arrays live, how often something is saved or logged, and in how many parts a batch is
    learnt from may change; so may the number of steps while the learning rate does not follow it.

    Args:
      before: The configuration that a run was begun with, from `Settings.to_dict` or its JSON.
      now: Today's.

    Returns:
      The key, or None if the run may go on.
    """
    free = ["mesh.", "rollout.mesh.", "checkpoint.", "log.", "batch.accumulate", "model.remat"]
    free.append("data.threads")
    if now.get("optimizer.schedule") == "constant":
        free.append("steps")
    for key in sorted({*before, *now}):
        one, other = (
            list(value) if isinstance(value, tuple) else value
            for value in (before.get(key), now.get(key))
        )
        if one != other and not key.startswith(tuple(free)):
            return key
    return None


def _flatten(config: ConfigDict) -> dict[str, Any]:
    def walk(prefix: str, node: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        for name, value in node.items():
            if isinstance(value, Mapping):
                yield from walk(f"{prefix}{name}.", value)
            else:
                yield f"{prefix}{name}", value

    return dict(walk("", config.to_dict()))


def _check_known(key: str, known: Sequence[str]) -> None:
    if key in known:
        return
    below = [name for name in known if name.startswith(f"{key}.")]
    if below:
        raise UsageError(f"configuration key {key!r} is a group; name one such as {below[0]!r}")
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
    hint = f"; the nearest is {near[0]!r}" if near else ""
    raise UsageError(f"the configuration has no key {key!r}{hint}")


def _run(path: str) -> ConfigDict:
    file, _, argument = path.partition(":")
    if not Path(file).is_file():
        raise UsageError(f"there is no configuration {file}")
    get_config = runpy.run_path(file).get("get_config")
    if get_config is None:
        raise UsageError(f"{file} has no get_config(), which a configuration must have")
    config = get_config(argument) if argument else get_config()
    if not isinstance(config, ConfigDict):
        raise UsageError(f"get_config() of {file} returns no ConfigDict")
    return config


def _override(config: ConfigDict, overrides: Sequence[str]) -> None:
    # Flags of our own, since those of the process are for programs that are started by absl.
    values = flags.FlagValues()
    arguments = ["grm-jax", *overrides]
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=arguments)
    try:
        values(arguments)
    except (flags.Error, TypeError, ValueError) as error:
        raise UsageError(f"an override does not fit: {' '.join(str(error).split())}") from error
