import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from grm_jax import GRM
from grm_jax.cli.main import main

Call = Callable[..., Any]

KEYS = {"id", "scores", "ranking", "best", "tied", "valid_samples", "samples", "usage"}
FAILED_KEYS = {"id", "error", "valid_samples", "samples", "usage"}
SAMPLE_KEYS = {"order", "scores", "meta", "text", "finish"}
USAGE_KEYS = {"prompt_tokens", "completion_tokens", "seconds"}


def record(name: str, *responses: str) -> dict[str, object]:
    return {
        "id": name,
        "messages": [{"role": "user", "content": f"Question {name}?"}],
        "responses": list(responses or ("yes", "no")),
    }


def write(path: Path, *lines: object) -> Path:
    texts = (line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_text("".join(text + "\n" for text in texts))
    return path


@pytest.fixture
def three(tmp_path: Path) -> Path:
    return write(tmp_path / "in.jsonl", *(record(name) for name in "abc"))


def without_times(outcome: Any) -> list[dict[str, Any]]:
    records = outcome.records
    for item in records:
        del item["usage"]["seconds"]
    return records


# --- what is written ---


def test_judgements_are_json_lines_in_order(judge: Call, three: Path) -> None:
    outcome = judge(three)
    assert outcome.status == 0
    assert outcome.err == ""
    assert [item["id"] for item in outcome.records] == ["a", "b", "c"]
    for item in outcome.records:
        assert item.keys() == KEYS
        assert item["valid_samples"] == len(item["samples"]) == 2
        assert item["usage"].keys() == USAGE_KEYS
        assert item["usage"]["seconds"] >= 0
        assert 0 < item["usage"]["completion_tokens"] <= 2 * 80
        for sample in item["samples"]:
            assert sample.keys() == SAMPLE_KEYS
            assert sample["order"] == [0, 1]
            assert sample["meta"] is None
            assert sample["finish"] == "stop"
            first, second = sample["scores"]
            assert sample["text"].endswith(f"Scores: \\boxed{{{first}, {second}}}")
        votes = zip(*(sample["scores"] for sample in item["samples"]), strict=True)
        assert item["scores"] == [sum(column) for column in votes]
        assert sorted(item["ranking"]) == [0, 1]
        assert item["best"] == item["ranking"][0]
        top = max(item["scores"])
        assert item["tied"] == [i for i, score in enumerate(item["scores"]) if score == top]
        assert item["best"] in item["tied"]


def test_a_dash_reads_standard_input(
    judge: Call, three: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(three.read_bytes())))
    piped = judge("-")
    assert piped.status == 0
    assert without_times(piped) == without_times(judge(three))


def test_the_seed_decides(judge: Call, three: Path) -> None:
    first = without_times(judge(three, "--seed", "3"))
    assert without_times(judge(three, "--seed", "3")) == first
    other = without_times(judge(three, "--seed", "4"))
    assert all(a["samples"] != b["samples"] for a, b in zip(first, other, strict=True))


def test_a_record_is_judged_alone_as_among_others(judge: Call, three: Path, tmp_path: Path) -> None:
    alone = judge(write(tmp_path / "one.jsonl", record("b")))
    assert without_times(alone) == without_times(judge(three))[1:2]


def test_orders_are_mapped_back_to_the_input(judge: Call, tmp_path: Path) -> None:
    file = write(tmp_path / "in.jsonl", record("a"))
    (item,) = judge(file, "--orders", "balanced").records
    assert sorted(sample["order"] for sample in item["samples"]) == [[0, 1], [1, 0]]
    for sample in item["samples"]:
        shown = [str(sample["scores"][index]) for index in sample["order"]]
        assert sample["text"].endswith(f"\\boxed{{{', '.join(shown)}}}")


def test_expected_scores_vote_and_stand_beside_the_sampled(judge: Call, three: Path) -> None:
    plain = judge(three).records
    found = judge(three, "--scores", "expected").records
    for item, usual in zip(found, plain, strict=True):
        samples, others = item["samples"], usual["samples"]
        assert [one["scores"] for one in samples] == [one["scores"] for one in others]
        assert all(one.keys() == SAMPLE_KEYS | {"expected"} for one in samples)
        columns = zip(*(one["expected"] for one in samples), strict=True)
        assert item["scores"] == pytest.approx([sum(column) for column in columns], abs=1e-4)
        assert len(item["tied"]) == 1


def test_sampling_stops_early(judge: Call, three: Path) -> None:
    whole = judge(three, "--samples", "6").records
    early = judge(three, "--samples", "6", "--adaptive", "--adaptive-error", "0.45").records
    for item, usual in zip(early, whole, strict=True):
        assert len(item["samples"]) in (4, 6)
        assert item["samples"] == usual["samples"][: len(item["samples"])]
    assert any(len(item["samples"]) == 4 for item in early)


def test_samples_without_readable_scores_fail_the_record(judge: Call, three: Path) -> None:
    outcome = judge(three, "--no-constrain")
    assert outcome.status == 1
    for item in outcome.records:
        assert item.keys() == FAILED_KEYS
        assert "none of the 2 samples has readable scores" in item["error"]
        assert [sample["scores"] for sample in item["samples"]] == [None, None]


# --- bad records ---


def test_a_bad_record_is_reported_in_its_place_and_the_rest_is_judged(
    judge: Call, tmp_path: Path
) -> None:
    long = record("long", "yes", "no " * 2000)
    empty = {**record("empty"), "responses": []}
    file = write(tmp_path / "in.jsonl", record("a"), "{oops", long, empty, record("b"))
    outcome = judge(file)
    assert outcome.status == 1
    items = {item["id"]: item for item in outcome.records}
    assert list(items) == ["a", "line-2", "long", "empty", "b"]
    assert items["a"].keys() == items["b"].keys() == KEYS
    for name, reason in (
        ("line-2", "line 2 is not JSON"),
        ("long", "the model reads 4096"),
        ("empty", "`responses` is empty"),
    ):
        assert items[name].keys() == FAILED_KEYS
        assert reason in items[name]["error"]
        assert "\n" not in items[name]["error"]
        assert items[name]["samples"] == []


# --- wrong calls ---


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--samples", "0"], "samples is 0"),
        (["--temperature", "-1"], "temperature is -1.0"),
        (["--temperature", "nan"], "temperature is nan"),
        (["--top-p", "0"], "top_p is 0.0"),
        (["--top-k", "-1"], "top_k is -1"),
        (["--max-new-tokens", "0"], "max_new_tokens is 0"),
        (["--template", "nosuch"], "no template 'nosuch'"),
        (["--adaptive", "--adaptive-error", "1"], "adaptive is 1.0"),
        (["--adaptive-error", "0.1"], "give --adaptive"),
        (["--mesh", "data"], "--mesh is 'data'; write sizes of axes"),
        (["--mesh", "tensor=3"], "mesh tensor=3 needs 3 devices, but there are 8"),
        (["--mesh", "row=2"], "mesh axis 'row' does not exist"),
    ],
)
def test_a_wrong_setting_is_one_line_and_status_2(
    judge: Call, three: Path, flags: list[str], reason: str
) -> None:
    outcome = judge(three, *flags)
    assert outcome.status == 2
    assert outcome.out == ""
    assert outcome.err.startswith("grm-jax: ")
    assert outcome.err.count("\n") == 1
    assert reason in outcome.err


def test_a_missing_file_is_a_wrong_call_and_begins_no_output(judge: Call, tmp_path: Path) -> None:
    outcome = judge(tmp_path / "nosuch.jsonl", "--output", tmp_path / "out.jsonl")
    assert outcome.status == 2
    assert outcome.err.count("\n") == 1
    assert "nosuch.jsonl: No such file" in outcome.err
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_model_is_a_wrong_call(call: Call, three: Path) -> None:
    outcome = call("judge", three, "--model", "smollm2-135")
    assert outcome.status == 2
    assert outcome.err.count("\n") == 1
    assert "no model 'smollm2-135'; did you mean smollm2-135m?" in outcome.err


@pytest.mark.parametrize(
    "arguments",
    [[], ["nosuch"], ["judge"], ["judge", "x", "--samples", "many"], ["judge", "x", "--orders=up"]],
)
def test_a_call_that_cannot_be_parsed_exits_with_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "error: " in capsys.readouterr().err


def test_an_interrupt_is_told_apart(
    judge: Call, three: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(GRM, "judge_batch", interrupted)
    outcome = judge(three)
    assert outcome.status == 130
    assert outcome.err.count("\n") == 1


# --- files of results ---


def test_output_holds_what_would_be_printed_without_times(
    judge: Call, three: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    outcome = judge(three, "--output", output)
    assert (outcome.status, outcome.out) == (0, "")
    written = [json.loads(line) for line in output.read_text().splitlines()]
    assert {item["usage"].pop("seconds") for item in written} == {None}
    assert written == without_times(judge(three))


@pytest.mark.parametrize("part", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_a_run_that_was_cut_off_goes_on_to_the_same_file(
    judge: Call, three: Path, tmp_path: Path, part: float
) -> None:
    output = tmp_path / "out.jsonl"
    assert judge(three, "--output", output).status == 0
    whole = output.read_bytes()
    output.write_bytes(whole[: int(len(whole) * part)])
    assert judge(three, "--output", output).status == 0
    assert output.read_bytes() == whole


def test_finished_records_are_not_judged_again(judge: Call, three: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    judge(three, "--output", output)
    first, second, _ = output.read_text().splitlines(keepends=True)
    marked = first.replace("Specific", "Marked")
    output.write_text(marked + second[:30])
    judge(three, "--output", output)
    lines = output.read_text().splitlines(keepends=True)
    assert lines[:2] == [marked, second]
    assert len(lines) == 3


def test_records_that_failed_before_still_count(judge: Call, tmp_path: Path) -> None:
    file = write(tmp_path / "in.jsonl", "{oops", record("a"))
    output = tmp_path / "out.jsonl"
    assert judge(file, "--output", output).status == 1
    whole = output.read_bytes()
    assert judge(file, "--output", output).status == 1
    assert output.read_bytes() == whole


@pytest.mark.parametrize("flags", [["--seed", "1"], ["--model", "other"], ["--no-constrain"]])
def test_an_output_of_other_settings_is_refused(
    judge: Call, three: Path, tmp_path: Path, flags: list[str]
) -> None:
    output = tmp_path / "out.jsonl"
    judge(three, "--output", output)
    whole = output.read_bytes()
    outcome = judge(three, "--output", output, *flags)
    assert outcome.status == 2
    assert outcome.err.count("\n") == 1
    assert flags[0].removeprefix("--no-").removeprefix("--") in outcome.err
    assert output.read_bytes() == whole


def test_an_output_of_another_input_is_refused(judge: Call, three: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    judge(three, "--output", output)
    outcome = judge(write(tmp_path / "other.jsonl", record("z")), "--output", output)
    assert outcome.status == 2
    assert "it has 'a' where this one has 'z'" in outcome.err


FAULTS = """
import ctypes, resource, threading
from grm_jax.cli.main import keep_freed_memory

library = ctypes.CDLL(None)
library.malloc.restype = ctypes.c_void_p
library.malloc.argtypes = [ctypes.c_size_t]
library.free.argtypes = [ctypes.c_void_p]

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(2):
        block = library.malloc(96 << 20)
        ctypes.memset(block, 1, 96 << 20)
        library.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = faults()
kept = keep_freed_memory()
faults()
after = []
elsewhere = threading.Thread(target=lambda: after.append(faults()))
elsewhere.start()
elsewhere.join()
print(int(kept), before, max(faults(), *after))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="about the C library of Linux")
def test_memory_that_was_freed_is_not_fetched_anew() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True
    )
    kept, before, after = map(int, done.stdout.split())
    if kept:  # Other C libraries than glibc have no such setting.
        assert after < before / 10
