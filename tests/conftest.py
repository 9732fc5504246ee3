"""Fixtures for all tests, and a machine of eight simulated devices to run them on."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

# JAX reads these when it is first imported, which the test modules do after this file.
DEVICES = "--xla_force_host_platform_device_count"
if DEVICES not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DEVICES}=8".strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")

settings.register_profile("default", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The SmolLM2-135M file, downloaded into the user's cache on first use."""
    from grm_jax.checkpoints.sources import fetch

    return fetch("smollm2-135m")


@pytest.fixture(scope="session")
def gemma3_gguf() -> Path:
    """The Gemma-3-270M file, downloaded into the user's cache on first use."""
    from grm_jax.checkpoints.sources import fetch

    return fetch("gemma3-270m")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Benchmark files that lie beside the repository and, for their licences, not in it."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"there is no {folder}")
    return folder
