"""Random adapters of a tiny model, as if they came with the package."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import pytest

from grm_jax import checkpoints
from grm_jax.checkpoints import shipped
from grm_jax.checkpoints.shipped import FILE, Shipped, file_sha256
from grm_jax.models import Lora
from tests.training import folder, tiny

LORA = Lora(rank=2, alpha=4.0, targets=("q", "v", "up"))
ROLES: Mapping[str, Literal["judge", "meta"]] = {"tiny-spct": "judge", "tiny-meta": "meta"}
TEMPLATES = {"judge": "compact", "meta": "meta"}


def ship(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Puts them on the list and nothing else.

    Args:
      root: Where they and their base model are written.
      monkeypatch: Takes them off the list again.

    Returns:
      The base model's folder.
    """
    base = folder.write_model(root / "base")
    monkeypatch.setattr(shipped, "FOLDER", root / "weights")
    entries = {}
    for name, role in ROLES.items():
        config = dataclasses.replace(folder.CONFIG, lora=LORA, num_labels=int(role == "meta"))
        target = root / "weights" / name.replace("-", "_")
        params = tiny.random_params(config, seed=1)
        checkpoints.save_adapter(target, config, params, base=str(base), dtype="bfloat16")
        entries[name] = Shipped(
            name=name,
            base=str(base),
            role=role,
            template=TEMPLATES[role],
            sha256=file_sha256(target / FILE),
        )
    monkeypatch.setattr(shipped, "SHIPPED", entries)
    return base
