"""Fixtures for the tests of training."""

from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache


@pytest.fixture(scope="session")
def compiled_programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where compiled programs are kept for as long as tests run."""
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def hasty(compiled_programs: Path) -> Iterator[None]:
    """Compiles in haste, and no program twice, where that takes longer than what it computes."""
    changes = {
        "jax_compilation_cache_dir": str(compiled_programs),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_disable_most_optimizations": True,
    }
    before = {name: jax.config.values[name] for name in changes}
    for name, value in changes.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
