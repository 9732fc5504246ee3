"""Adapters that come with the package: what they are called, and what their files must be.

They lie in `grm_jax/weights/`, one PEFT folder each, and are checked against the checksum that is
noted here whenever they are opened.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from grm_jax.errors import UsageError

FOLDER = Path(__file__).parents[1] / "weights"
FILE = "adapter_model.safetensors"


@dataclass(frozen=True, kw_only=True)
class Shipped:
    """An adapter that comes with the package.

    Attributes:
      name: What users call it; its folder has underscores for the hyphens.
      base: The built-in model that it belongs to, which its `adapter_config.json` names too.
      role: A `"judge"`, by which its base judges on the command line unless told otherwise, or a
        `"meta"` reward model, with a classifier's head.
      template: The prompt that it was trained with.
      sha256: Checksum of its weights.
    """

    name: str
    base: str
    role: Literal["judge", "meta"]
    template: str
    sha256: str

    @property
    def folder(self) -> Path:
        """Where it lies."""
        return FOLDER / self.name.replace("-", "_")


_ALL: tuple[Shipped, ...] = ()
# None so far: what `configs/smollm2_135m.py` trains is to come here.

SHIPPED: Mapping[str, Shipped] = MappingProxyType({one.name: one for one in _ALL})
"""The adapters by name."""


def shipped_folder(name: str | Path) -> Path | None:
    """The folder of an adapter that comes with the package; None if there is none of that name.

    A name wins over a folder that is called the same; write `./name` for the folder.

    Raises:
      UsageError: If its weights are missing or not those that were noted.
    """
    one = SHIPPED.get(name) if isinstance(name, str) else None
    if one is None:
        return None
    path = one.folder / FILE
    if not path.is_file():
        raise UsageError(f"this installation lacks {one.name}: there is no {path}")
    found = file_sha256(path)
    if found != one.sha256:
        raise UsageError(
            f"{path} is not what {one.name} was published as: its sha256 is {found}, expected "
            f"{one.sha256}; install the package anew"
        )
    return one.folder


def default_adapter(model: str) -> str | None:
    """The name of the adapter that a model judges with on the command line, if it is there."""
    for one in SHIPPED.values():
        if (one.base, one.role) == (model, "judge") and (one.folder / FILE).is_file():
            return one.name
    return None


def file_sha256(path: Path) -> str:
    """Returns the SHA-256 of a file as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
