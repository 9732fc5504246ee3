"""The stage that ends an experiment."""

import json
from pathlib import Path
from typing import Any

import pytest

from grm_jax.errors import UsageError
from grm_jax.evaluation import stage
from grm_jax.training.config import Settings
from tests.training.folder import write_comparisons, write_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that knows nothing, and comparisons."""
    folder = tmp_path_factory.mktemp("eval")
    write_model(folder / "model")
    write_comparisons(folder / "comparisons.jsonl", 4)
    (folder / "short.jinja").write_text("{{ conversation }}{{ responses | join('|') }}")
    return folder


def settings(folder: Path, **changes: Any) -> Settings:
    config = stage.default_config()
    config.models = {"small": str(folder / "model")}
    config.update_from_flattened_dict(
        {
            "data.comparisons": (str(folder / "comparisons.jsonl"),),
            "scaled": "small",
            "samples": 2,
            "ks": (1, 2),
            "max_new_tokens": 4,
            "template": str(folder / "short.jinja"),
            **changes,
        }
    )
    made = Settings(config)
    assert made["stage"] == "eval"
    return made


def test_what_it_leaves(folder: Path, tmp_path: Path) -> None:
    assert stage.run(settings(folder), tmp_path)
    found = json.loads((tmp_path / stage.RESULTS).read_text())
    assert found["chance"] == pytest.approx((1 / 2 + 1 / 3) / 2)
    # Of a model that writes nothing readable all responses tie.
    assert found["greedy"]["small"]["value"] == pytest.approx(found["chance"])
    assert found["greedy"]["small"]["unreadable"] == 1.0
    assert found["greedy"]["small"]["strict"] == 0.0
    assert [point["k"] for point in found["curves"]["vote"]] == [1, 2]
    # Two samples are fewer than are drawn before the first look.
    assert {early["mean_samples"] for early in found["adaptive"]} == {2.0}
    assert {early["token_share"] for early in found["adaptive"]} == {1.0}
    assert {early["difference"]["value"] for early in found["adaptive"]} == {0.0}
    assert (tmp_path / stage.PLOT).read_bytes().startswith(b"\x89PNG")
    before = (tmp_path / "sampled.jsonl").read_bytes()
    assert before.count(b"\n") == 4
    # What is judged is not judged again, and a line that was cut off is.
    (tmp_path / "sampled.jsonl").write_bytes(before[:-20])
    assert stage.run(settings(folder), tmp_path)
    after = [json.loads(line) for line in (tmp_path / "sampled.jsonl").read_text().splitlines()]
    wanted = [json.loads(line) for line in before.splitlines()]
    assert [one["samples"] for one in after] == [one["samples"] for one in wanted]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scaled": "other"}, "must be one of small"),
        ({"ks": (1, 4)}, "none above samples, 2"),
        ({"data.comparisons": ()}, "data.comparisons is empty"),
        ({"adapters": {"other": "x"}}, "adapters names other, no model"),
        ({"meta_shares": (0.0,)}, "give shares above 0"),
        ({"constrained": ("other",)}, "constrained names other, no model"),
    ],
)
def test_settings_that_do_not_fit(
    folder: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        stage.run(settings(folder, **changes), tmp_path)
