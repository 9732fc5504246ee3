import json
from pathlib import Path

import pytest

from grm_jax.data import LineWriter, provenance, to_line
from grm_jax.errors import UsageError
from grm_jax.version import __version__

SETTINGS = {"model": "m", "samples": 8, "temperature": 0.5}


def write(path: Path, *records: dict[str, object]) -> None:
    with LineWriter.open(path, SETTINGS) as writer:
        for record in records:
            writer.write(record)


def beside(path: Path) -> Path:
    return path.with_name(path.name + ".run.json")


# --- one line ---


def test_a_record_is_one_line_of_plain_text() -> None:
    line = to_line({"id": "é", "text": "two\nlines, “quoted”\u2028"})
    assert "\n" not in line
    assert "“quoted”" in line
    assert json.loads(line) == {"id": "é", "text": "two\nlines, “quoted”\u2028"}


def test_half_a_surrogate_pair_becomes_an_escape() -> None:
    record = {"id": "é", "text": "\ud83d"}
    line = to_line(record)
    assert line.isascii()
    assert json.loads(line) == record


# --- a new file ---


def test_a_new_file_holds_what_is_written(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "out.jsonl"
    with LineWriter.open(path, SETTINGS) as writer:
        assert (writer.done, writer.failed) == ([], 0)
        writer.write({"id": "a", "text": "é"})
        # Nothing waits in a buffer: a kill at this moment loses no finished line.
        assert path.read_text(encoding="utf-8") == '{"id": "a", "text": "é"}\n'
        writer.write({"id": "b", "text": "\udc00"})
    assert path.read_bytes().splitlines()[1] == rb'{"id": "b", "text": "\udc00"}'


def test_what_a_run_needs_to_be_repeated_lies_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    write(path, {"id": "a"})
    content = json.loads(beside(path).read_text())
    assert content["settings"] == SETTINGS
    assert content == provenance(SETTINGS)
    assert content["versions"]["grm_jax"] == __version__
    assert {"python", "jax", "numpy"} <= content["versions"].keys()
    commit = content["commit"]
    assert commit is None or len(commit.rstrip("+")) == 40
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.jsonl", "out.jsonl.run.json"]


def test_a_file_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file" / "out.jsonl"):
        with pytest.raises(UsageError, match="cannot write"):
            LineWriter.open(path, SETTINGS)


# --- a file that an earlier run has left ---


def test_a_run_goes_on_behind_the_last_whole_line(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    records: list[dict[str, object]] = [{"id": name, "text": "é" * 5} for name in "abc"]
    write(path, *records)
    whole = path.read_bytes()
    starts = [0, *(place + 1 for place, byte in enumerate(whole) if byte == ord("\n"))]
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        with LineWriter.open(path, SETTINGS) as writer:
            finished = sum(start <= cut for start in starts) - 1
            assert writer.done == list("abc"[:finished])
            for record in records[finished:]:
                writer.write(record)
        assert path.read_bytes() == whole


def test_failed_records_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    write(path, {"id": "a"}, {"id": "b", "error": "too long"}, {"id": "c", "error": "bad"})
    with LineWriter.open(path, SETTINGS) as writer:
        assert (writer.done, writer.failed) == (["a", "b", "c"], 2)


@pytest.mark.parametrize(
    ("other", "names"),
    [
        ({**SETTINGS, "samples": 32}, ["samples 8", "32"]),
        ({**SETTINGS, "seed": 1}, ["seed None", "1"]),
        ({"model": "m", "samples": 8}, ["temperature 0.5", "None"]),
    ],
)
def test_other_settings_are_refused(
    tmp_path: Path, other: dict[str, object], names: list[str]
) -> None:
    path = tmp_path / "out.jsonl"
    write(path, {"id": "a"})
    before = path.read_bytes(), beside(path).read_bytes()
    with pytest.raises(UsageError) as caught:
        LineWriter.open(path, other)
    assert all(name in str(caught.value) for name in names)
    assert (path.read_bytes(), beside(path).read_bytes()) == before
    # The refusal leaves no lock behind.
    write(path, {"id": "b"})
    assert path.read_text() == '{"id": "a"}\n{"id": "b"}\n'


def test_other_settings_may_begin_a_file_that_holds_nothing_yet(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    write(path)
    with LineWriter.open(path, {"samples": 1}) as writer:
        writer.write({"id": "a"})
    assert json.loads(beside(path).read_text())["settings"] == {"samples": 1}


@pytest.mark.parametrize(
    "content", ["Dear diary\n", "[1]\n", '{"name": "x"}\n', "\n", "3\n", "\ud800\n", "Dear diary"]
)
def test_a_file_of_something_else_is_refused_and_left_alone(tmp_path: Path, content: str) -> None:
    path = tmp_path / "notes.txt"
    data = content.encode(errors="surrogatepass")
    path.write_bytes(data)
    with pytest.raises(UsageError, match="give another --output"):
        LineWriter.open(path, SETTINGS)
    assert path.read_bytes() == data
    assert not beside(path).exists()


def test_a_second_run_on_one_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with LineWriter.open(path, SETTINGS) as first:
        first.write({"id": "a"})
        with pytest.raises(UsageError, match="being written by another run"):
            LineWriter.open(path, SETTINGS)
        first.write({"id": "b"})
    with LineWriter.open(path, SETTINGS) as later:
        assert later.done == ["a", "b"]
