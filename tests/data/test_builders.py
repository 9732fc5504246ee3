import gzip
import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import tensorflow_datasets as tfds

from grm_jax.data import Comparison, builders, examples_path, read_comparisons
from grm_jax.data.builders import (
    PreparedComparisons,
    SkippedLine,
    open_comparisons,
    prepare_comparisons,
)
from grm_jax.errors import UsageError

RECORDS: list[dict[str, object]] = [
    {
        "id": "best\0",
        "source": "home",
        "subset": "easy",
        "meta": {"a": [1, None, 2.5], "b": {"c": "d"}},
        "label": {"kind": "best", "index": 1},
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "¿Qué? \ud800 \0"},
        ],
        "responses": ["", "trailing zero\0"],
        "annotator": 7,
    },
    {
        "id": "scores",
        "label": {"kind": "scores", "values": [0.1, 1e-300, 2**60 + 1]},
        "messages": [{"role": "user", "content": "x"}],
        "responses": ["a", "b", "c"],
    },
    {
        "label": {"kind": "pointwise", "correct": False},
        "messages": [{"role": "user", "content": "x"}],
        "responses": ["a"],
    },
    {"id": "bare", "messages": [{"role": "user", "content": "x"}], "responses": ["a"]},
]


def record(name: object) -> dict[str, object]:
    return {"id": name, "messages": [{"role": "user", "content": "x"}], "responses": ["a", "b"]}


def write(path: Path, *lines: object) -> Path:
    text = "".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


def read(*paths: Path) -> list[Comparison]:
    return [
        item for path in paths for item in read_comparisons(path) if isinstance(item, Comparison)
    ]


def shards(prepared: PreparedComparisons) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in prepared.path.iterdir()}


# --- what comes back ---


def test_every_field_comes_back(tmp_path: Path) -> None:
    plain = write(tmp_path / "a.jsonl", *RECORDS)
    zipped = write(tmp_path / "b.jsonl.gz", *map(record, range(3)))
    prepared = prepare_comparisons({"train": [plain, zipped], "test": zipped}, tmp_path / "sets")
    assert list(prepared.splits) == ["train", "test"]
    assert list(prepared.splits["train"]) == read(plain, zipped)
    assert list(prepared.splits["test"]) == read(zipped)
    assert prepared.skipped == ()


def test_access_by_index_over_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builders, "SHARD", 3)
    monkeypatch.setattr(builders, "_CHUNK", 4)
    file = write(tmp_path / "a.jsonl", *map(record, range(11)))
    prepared = prepare_comparisons({"train": file}, tmp_path / "sets")
    split, expected = prepared.splits["train"], read(file)
    assert sum("array_record" in name for name in shards(prepared)) == 4
    assert len(split) == 11
    assert [split[index] for index in (10, 0, 7, -1)] == [expected[i] for i in (10, 0, 7, 10)]
    assert split[2:9:3] == expected[2:9:3]
    with pytest.raises(IndexError):
        split[11]


def test_tfds_alone_can_open_it(tmp_path: Path) -> None:
    prepared = prepare_comparisons({"train": examples_path()}, tmp_path)
    source = tfds.builder_from_directory(prepared.path).as_data_source("train")
    first = json.loads(source[0]["record"])
    assert first["id"] == read(examples_path())[0].id


def test_nothing_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare_comparisons({"train": examples_path()}, tmp_path)
    assert capsys.readouterr().out == ""


def test_real_files(shared_data: Path, tmp_path: Path) -> None:
    names = ("eval/mr_math", "eval/llmbar_processed", "train/judgement_bias", "train/gsm8k_groups")
    files = [shared_data / f"{name}.jsonl.gz" for name in names]
    prepared = prepare_comparisons({"train": files[2:], "test": files[:2]}, tmp_path)
    assert list(prepared.splits["train"]) == read(*files[2:])
    assert list(prepared.splits["test"]) == read(*files[:2])
    assert prepared.skipped == ()


# --- bad lines ---


def test_bad_lines_are_left_out_and_listed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = write(tmp_path / "a.jsonl", record(1), "no JSON", record(2), record(1), {"id": "z"})
    for _ in range(2):  # the second time nothing is prepared, but still reported
        caplog.clear()
        prepared = prepare_comparisons({"train": file}, tmp_path / "sets")
        assert [item.id for item in prepared.splits["train"]] == ["1", "2"]
        assert [(line.line, line.id) for line in prepared.skipped] == [
            (2, "line-2"),
            (4, "1"),
            (5, "z"),
        ]
        assert prepared.skipped[0] == SkippedLine(
            split="train",
            file=str(file),
            line=2,
            id="line-2",
            error="line 2 is not JSON: Expecting value at column 1",
        )
        [warning] = [item for item in caplog.records if item.name == builders.__name__]
        assert warning.levelno == logging.WARNING
        assert "3 lines were no comparisons" in warning.getMessage()


def test_split_without_a_comparison(tmp_path: Path) -> None:
    good = write(tmp_path / "good.jsonl", record(1))
    file = write(tmp_path / "bad.jsonl", "no JSON")
    files = {"train": good, "test": file}
    with pytest.raises(UsageError, match="split test has no comparison; 1 lines are none, the fir"):
        prepare_comparisons(files, tmp_path / "sets")
    assert not list((tmp_path / "sets").rglob("*.json"))
    write(file, record(1))
    assert len(prepare_comparisons(files, tmp_path / "sets").splits["test"]) == 1
    write(file)
    with pytest.raises(UsageError, match="split test has no comparison; its files are empty"):
        prepare_comparisons(files, tmp_path / "sets")


# --- preparing once ---


def test_same_content_is_prepared_once(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", record(1))
    first = prepare_comparisons({"train": file}, tmp_path / "sets")
    before = shards(first)
    moved = file.rename(tmp_path / "b.jsonl")
    second = prepare_comparisons({"train": [moved]}, tmp_path / "sets")
    assert second.path == first.path
    assert second.splits["train"].name == first.splits["train"].name
    assert shards(second) == before


def test_changed_content_is_prepared_anew(tmp_path: Path) -> None:
    files = [write(tmp_path / f"{name}.jsonl", record(name)) for name in "ab"]
    variants: list[builders.Files] = [
        {"train": files},
        {"train": files[::-1]},
        {"train": files[0], "test": files[1]},
        {"test": files[0], "train": files[1]},
    ]
    seen = [prepare_comparisons(variant, tmp_path / "sets") for variant in variants]
    write(files[0], record("c"))
    seen.append(prepare_comparisons({"train": files}, tmp_path / "sets"))
    assert len({prepared.path for prepared in seen}) == 5
    assert [item.id for item in seen[0].splits["train"]] == ["a", "b"]
    assert [item.id for item in seen[1].splits["train"]] == ["b", "a"]
    assert [item.id for item in seen[-1].splits["train"]] == ["c", "b"]


def test_another_process_finishes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "a.jsonl", record(1))
    close_all = tfds.core.SequentialWriter.close_all
    paths = []

    def overtaken(writer: tfds.core.SequentialWriter) -> None:
        monkeypatch.setattr(tfds.core.SequentialWriter, "close_all", close_all)
        paths.append(prepare_comparisons({"train": file}, tmp_path / "sets").path)
        close_all(writer)

    monkeypatch.setattr(tfds.core.SequentialWriter, "close_all", overtaken)
    prepared = prepare_comparisons({"train": file}, tmp_path / "sets")
    assert [prepared.path] == paths
    assert list(prepared.splits["train"]) == read(file)
    assert [path.name for path in prepared.path.parent.iterdir()] == [builders.VERSION]


# --- mistakes ---


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "there is nothing to prepare"),
        ({"train": []}, "split train has no files; name at least one"),
        ({"train": "/nowhere/a.jsonl"}, "cannot read /nowhere/a.jsonl: No such file"),
        ({"train": "-"}, "cannot read -: No such file"),
        ({"train-1": examples_path()}, "'train-1' cannot name a dataset or split"),
        ({"all": examples_path()}, "'all' cannot name a dataset or split"),
    ],
)
def test_wrong_files(files: builders.Files, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        prepare_comparisons(files, tmp_path)


def test_file_that_is_no_text(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b"\xff\xfe\n")
    with pytest.raises(UsageError, match="is not UTF-8 text"):
        prepare_comparisons({"train": file}, tmp_path / "sets")


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    folder = write(tmp_path / "file", "")
    with pytest.raises(UsageError, match=r"cannot write the dataset to .*file"):
        prepare_comparisons({"train": examples_path()}, folder)


def test_folder_without_a_dataset(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no prepared dataset"):
        open_comparisons(tmp_path)


def test_as_dataset_says_what_to_use(tmp_path: Path) -> None:
    prepare_comparisons({"train": examples_path()}, tmp_path)
    builder = builders.ComparisonBuilder(files={"train": examples_path()}, data_dir=tmp_path)
    with pytest.raises(UsageError, match="read by `as_data_source`"):
        builder.as_dataset(split="train")


def test_tensorflow_is_never_imported(tmp_path: Path) -> None:
    """Not even where it seems to be installed."""
    program = """
import importlib.abc, importlib.machinery, sys

class Guard(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "tensorflow":
            return importlib.machinery.ModuleSpec(name, self)
    def create_module(self, spec):
        sys.exit(f"{spec.name} is imported")
    def exec_module(self, module):
        pass

sys.meta_path.insert(0, Guard())

from grm_jax.data import examples_path
from grm_jax.data.builders import prepare_comparisons
from grm_jax.data.pipeline import Source, batches

for _ in range(2):
    train = prepare_comparisons({"train": examples_path()}, sys.argv[1]).splits["train"]
    taken = next(batches([Source(name=train.name, records=train)], batch_size=2, seed=0))
    assert all(item in list(train) for item in taken)
assert "tensorflow" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True)
