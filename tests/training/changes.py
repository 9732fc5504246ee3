"""Configurations for tests, changed by dotted key."""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict


def changed(
    config: ConfigDict, values: Mapping[str, Any], changes: Mapping[str, Any]
) -> ConfigDict:
    """A configuration with other values.

    Args:
      config: It is changed itself.
      values: By dotted key.
      changes: Over these, by keyword, with `__` for dots.
    """
    flat = {key.replace("__", "."): value for key, value in changes.items()}
    config.update_from_flattened_dict({**values, **flat})
    return config
