"""The reference run's data and tables, on records written here."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import reference_data, reference_report, reference_run
from grm_jax.data import Comparison, best_index, from_record, read_comparisons
from grm_jax.training.config import load_config


def record(number: int, **more: Any) -> dict[str, Any]:
    asked = [{"role": "user", "content": f"Is {number} even?"}]
    answers = ["Yes.", "No."] if number % 2 == 0 else ["No.", "Yes."]
    label = {"kind": "best", "index": 0}
    return {"id": str(number), "messages": asked, "responses": answers, "label": label} | more


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A file of each kind, of which one has records with several responses."""
    for kind in reference_data.KINDS:
        lines = [json.dumps(record(number)) for number in range(40)]
        if kind == "truthfulqa":
            several = {"kind": "scores", "values": [1, 0, 1, 0]}
            answers = ["It is.", "Never.", "Yes.", "No."]
            lines = [
                json.dumps(record(number, responses=answers, label=several))
                for number in range(0, 80, 2)
            ]
            lines.append(json.dumps(record(1, responses=["a", "b " * 2000])))
        (tmp_path / f"{kind}.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    return tmp_path


def test_pairs_are_split_by_question(folder: Path, smollm2_gguf: Path) -> None:
    workdir = folder / "run"
    reference_data.prepare(folder, workdir, longest=512)
    parts = {
        name: [
            found
            for found in read_comparisons(workdir / f"data/{name}.jsonl")
            if isinstance(found, Comparison)
        ]
        for name in ("train", "meta", "heldout")
    }
    asked = {name: {found.messages[0]["content"] for found in part} for name, part in parts.items()}
    assert not asked["train"] & asked["heldout"]
    assert not asked["train"] & asked["meta"] and not asked["meta"] & asked["heldout"]
    assert all(asked.values())
    everything = [found for part in parts.values() for found in part]
    assert len({found.id for found in everything}) == len(everything)
    assert all(len(found.responses) == 2 for found in everything)
    # Of four responses, two of them true, at most three pairs are made.
    several = [found for found in everything if found.source == "truthfulqa"]
    assert len(several) == 3 * 40
    for found in several:
        best = best_index(found)
        assert best is not None and found.responses[best] in ("It is.", "Yes.")
    places = [best_index(found) for found in everything]
    assert 0.4 < sum(place == 0 for place in places) / len(places) < 0.6


def test_tables_are_of_what_is_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, smollm2_gguf: Path
) -> None:
    monkeypatch.setattr(reference_report, "STORED", tmp_path / "stored")
    monkeypatch.setattr(reference_run, "STORED", tmp_path / "stored")
    comparisons = [from_record(record(number)) for number in range(8)]
    usage = {"prompt_tokens": 20, "completion_tokens": 10, "seconds": 0.1}

    def write(judge: str, how: str, right: list[list[bool | None]]) -> None:
        path = tmp_path / f"judged/heldout/{judge}.{how}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = []
        for item, row in zip(comparisons, right, strict=True):
            samples = [
                {
                    "order": [0, 1],
                    "scores": None if one is None else [7, 3] if one else [3, 7],
                    "meta": None if how == "greedy" else float(one is True),
                    "text": "secret",
                    "finish": "stop",
                }
                for one in row
            ]
            lines.append(json.dumps({"id": item.id, "samples": samples, "usage": usage}))
        path.write_text("\n".join(lines) + "\n")

    write("base", "greedy", [[True]] * 4 + [[False]] * 4)
    write("spct", "greedy", [[True]] * 6 + [[False]] + [[None]])
    write("spct", "sampled", [[True, True, False, True]] * 8)
    reference_run.store(tmp_path)
    stored = b"".join(
        gzip.decompress(path.read_bytes()) for path in (tmp_path / "stored").iterdir()
    )
    assert b"secret" not in stored and b"even" not in stored
    text = reference_report.report({"heldout": comparisons})
    rows = {line.split(" | ")[0].strip("| "): line.split(" | ") for line in text.splitlines()}
    assert rows["untuned, held to the layout"][1].startswith("50.0 (")
    # Unreadable is a tie of all: half a point.
    greedy = rows[reference_report.TITLES["spct"]]
    assert greedy[1].startswith("81.2 (") and greedy[2] == "75.0" and greedy[3] == "12.5"
    assert rows["vote"][-1].startswith("100.0")
    assert "AUC of the meta reward model: 1.000." in text


@pytest.mark.parametrize("size", ["", ",short"])
@pytest.mark.parametrize("name", ["smollm2_135m", "smollm2_135m_bt"])
def test_options_of_the_configurations(name: str, size: str) -> None:
    path = Path(__file__).parents[2] / f"configs/{name}.py"
    config = load_config(f"{path}:folder{size}")
    first = config.rft if name == "smollm2_135m" else config
    assert first.data.comparisons[0].startswith("folder/train.jsonl")
    assert ("#" in first.data.comparisons[0]) == bool(size)
    with pytest.raises(ValueError, match="FOLDER"):
        load_config(f"{path}:folder,long")


def test_a_run_for_cpus_asks_for_judgements_as_short_as_it_learns() -> None:
    config = load_config(f"{Path(__file__).parents[2]}/configs/smollm2_135m.py:folder,cpu")
    size = reference_run.SIZES["cpu"]
    lengths = {
        config.rft.sampler.max_new_tokens,
        config.rl.rollout.max_new_tokens,
        config.meta.sampler.max_new_tokens,
        config.eval.max_new_tokens,
    }
    assert lengths == {size.judgement}
    assert config.rl.data.max_prompt == size.longest
    assert config.rft.data.length == size.longest + size.judgement
