"""The configurations that come with the project."""

import math
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from grm_jax.cli.train import STAGES
from grm_jax.distributed import BATCH_AXES
from grm_jax.training.config import Settings, load_config
from grm_jax.training.learner import check_rows

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda path: path.stem)
def test_a_configuration_is_of_known_stages(path: Path) -> None:
    config = load_config(str(path))
    stages = [config[name] for name in config.order] if config.stage == "spct" else [config]
    assert stages
    for stage in stages:
        assert isinstance(stage, ConfigDict)
        assert stage.stage in STAGES
    # The command, at the least, is told in the file.
    assert f"configs/{path.name}" in path.read_text()


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda path: path.stem)
def test_keys_are_those_of_the_stage(path: Path) -> None:
    """Each stage starts from its own defaults, so a key that they lack is a mistake."""
    config = load_config(str(path))
    stages = [config[name] for name in config.order] if config.stage == "spct" else [config]
    for stage in stages:
        defaults = STAGES[stage.stage].__globals__["default_config"]()
        known = set(Settings(defaults).to_dict())
        # These groups hold what their names say, whatever that is.
        free = ("model.shape.", "models.", "adapters.")
        given = {key for key in Settings(stage).to_dict() if not key.startswith(free)}
        assert given <= known


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda path: path.stem)
def test_rows_can_be_shared_out_on_the_least_mesh(path: Path) -> None:
    config = load_config(str(path))
    stages = [config[name] for name in config.order] if config.stage == "spct" else [config]
    for stage in (stage for stage in stages if "batch" in stage):
        parts = math.prod(max(stage.mesh[axis], 1) for axis in BATCH_AXES)
        check_rows(stage.batch.rows, stage.batch.accumulate, parts)
