"""Rejective fine-tuning of a tiny model, from comparisons to a model."""

import gc
import json
import os
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from grm_jax import GRM, checkpoints, rounds
from grm_jax.errors import UsageError
from grm_jax.prompts import parse_scores, tokenizer_from_folder
from grm_jax.training import rft, trajectories
from grm_jax.training.config import Settings
from grm_jax.training.examples import ExampleFile, example_tokens
from grm_jax.training.trajectories import load_templates, load_trajectories
from tests.training.changes import changed
from tests.training.folder import write_examples, write_model, write_templates

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, templates, general instructions, and comparisons that it judges at random."""
    folder = tmp_path_factory.mktemp("rft")
    write_model(folder / "base")
    write_templates(folder)
    write_examples(folder / "general.jsonl")
    records: list[dict[str, Any]] = [
        {"label": {"kind": "best", "index": number % 2}, "responses": ["4", "5"]}
        for number in range(9)
    ]
    records.append({"responses": ["4", "5"]})
    for number, record in enumerate(records):
        record["id"] = f"c{number}"
        record["messages"] = [{"role": "user", "content": f"Which? {number}"}]
    text = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "comparisons.jsonl").write_text(text)
    return folder


def best_of(prompt: str) -> str:
    """The best response, by the number of the question in a prompt."""
    return "45"[int(prompt.partition("Which? ")[2].partition("\n")[0]) % 2]


def settings(folder: Path, **changes: Any) -> Settings:
    config = changed(
        rft.default_config(),
        {
            "model.name": str(folder / "base"),
            "data.comparisons": (str(folder / "comparisons.jsonl"),),
            "data.length": 256,
            "prompt.template": str(folder / "several.jinja"),
            "prompt.single": str(folder / "single.jinja"),
            "sampler.constrain": True,
            "sampler.temperature": 1.0,
            "sampler.max_new_tokens": 64,
            "sampler.samples": 2,
            "sampler.hinted": "all",
            "sampler.batch_rows": 16,
            "steps": 2,
            "optimizer.learning_rate": 3e-3,
        },
        changes,
    )
    found = Settings(config)
    # As the command does, to know whom to call.
    assert found["stage"] == "rft"
    return found


Shown = tuple[tuple[str, ...], int | None, list[int]]


@pytest.fixture(scope="module")
def finished(folder: Path) -> tuple[Path, list[Shown], str]:
    """A run from end to end: its folder, what the judge was shown, and what it said."""
    shown: list[Shown] = []
    prompts: list[Any] = []
    judges: list[weakref.ref[GRM]] = []
    render, encode, open_judge = rounds.render, rounds.encode_chat, GRM.from_pretrained

    def seen_render(template: Any, turns: Any, responses: Any, *, hint: int | None) -> Any:
        prompts.append((tuple(responses), hint))
        return render(template, turns, responses, hint=hint)

    def seen_encode(tokenizer: Any, chat: Any) -> list[int]:
        tokens = encode(tokenizer, chat)
        shown.append((*prompts[-1], tokens))
        return tokens

    def seen_judge(*args: Any, **kwargs: Any) -> GRM:
        judge = open_judge(*args, **kwargs)
        judges.append(weakref.ref(judge))
        return judge

    def train(*args: Any) -> bool:
        gc.collect()
        # The judge's memory is free before training takes it.
        assert judges
        assert all(judge() is None for judge in judges)
        return learn(*args)

    learn = rft.sft.train_on_sequences
    said = folder / "said"
    with pytest.MonkeyPatch.context() as patch, said.open("w") as file:
        patch.setattr(trajectories, "local_mesh", lambda shape: None)
        patch.setattr(rounds, "render", seen_render)
        patch.setattr(rounds, "encode_chat", seen_encode)
        patch.setattr(GRM, "from_pretrained", seen_judge)
        patch.setattr(rft.sft, "train_on_sequences", train)
        patch.setattr(sys, "stderr", file)
        workdir = folder / "finished"
        general = {"data__general": (str(folder / "general.jsonl"),), "data__general_share": 0.5}
        assert rft.run(settings(folder, **general), workdir)
    return workdir, shown, said.read_text()


Finished = tuple[Path, list[Shown], str]


def test_what_is_left_behind(folder: Path, finished: Finished) -> None:
    workdir, _, said = finished
    report = json.loads((workdir / "rejection.json").read_text())
    examples = (workdir / "examples.jsonl").read_text().splitlines()
    assert report["all"]["all"]["kept"] == report["examples"] == len(examples) > 0
    assert sum(report["all"]["all"].values()) == 9 * 3
    assert report["hint"]["hinted"]["kept"] > 0
    assert report["hint"]["not hinted"]["kept"] > 0
    assert (report["comparisons"], report["without_truth"], report["bad_lines"]) == (10, 1, 0)
    assert "1 comparisons are left out" in said
    assert "best shown as 2" in said
    base, learnt = (checkpoints.load(str(f))[1] for f in (folder / "base", workdir / "model"))
    assert np.abs(base["embedding"] - learnt["embedding"]).max() > 1e-4


def test_the_hint_is_told_and_never_learnt(folder: Path, finished: Finished) -> None:
    workdir, shown, _ = finished
    tokenizer = tokenizer_from_folder(folder / "base", vocab_size=260)
    hinted = [(responses, hint, tokens) for responses, hint, tokens in shown if hint is not None]
    assert len(hinted) == 9
    for responses, hint, tokens in hinted:
        text = tokenizer.decode(tokens)
        assert responses[hint] == best_of(text)
        assert f"HINT {hint + 1}\n" in text
    plain = [tokens for _, hint, tokens in shown if hint is None]
    # What is learnt begins with the very tokens that the judge saw without a hint.
    for index in range(len(file := ExampleFile(workdir / "examples.jsonl"))):
        sequence = example_tokens(tokenizer, file[index])
        assert sequence.loss_mask is not None
        prompt = sequence.tokens[~sequence.loss_mask].tolist()
        assert "HINT" not in tokenizer.decode(sequence.tokens.tolist())
        assert prompt in plain


def test_examples_are_right_in_the_order_of_their_prompt(finished: Finished) -> None:
    """Read as somebody would who knows nothing of orders."""
    for line in (finished[0] / "examples.jsonl").read_text().splitlines():
        record = json.loads(line)
        prompt = record["prompt"][0]["content"]
        scores = parse_scores(record["completion"], 2)
        assert scores is not None
        first = f"1: {best_of(prompt)}\n" in prompt
        assert (scores[0] > scores[1]) if first else (scores[1] > scores[0])


def test_what_is_finished_is_not_done_again(
    folder: Path, finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("this was done before")

    for name in ("sample_trajectories", "load_trajectories", "write_lines"):
        monkeypatch.setattr(rft, name, refuse)
    monkeypatch.setattr(GRM, "from_pretrained", refuse)
    rft.make_examples(settings(folder), finished[0])
    with pytest.raises(UsageError, match=r"was made with reject\.too_easy True and this run has F"):
        rft.make_examples(settings(folder, reject__too_easy=False), finished[0])


def test_processes_share_the_work(
    folder: Path, finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two that each sample their part write, together, what one does."""
    changed = settings(folder)
    sampler = rft._sampler_settings(changed)
    templates = load_templates(changed["prompt.template"], changed["prompt.single"])
    found = rft.all_comparisons(rft.comparison_sources(changed, tmp_path))
    usable = [item for item in found if templates.of(item) is not None]
    monkeypatch.setattr(trajectories, "local_mesh", lambda shape: None)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for process in (0, 1):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        paths = rft._write_trajectories(sampler, templates, usable, tmp_path)
    assert [path.name for path in paths] == [
        "non-hinted-1-of-2.jsonl",
        "non-hinted-2-of-2.jsonl",
        "hinted-1-of-2.jsonl",
        "hinted-2-of-2.jsonl",
    ]
    by_id = {item.id: item for item in usable}
    alone = finished[0] / "trajectories"
    wanted = [alone / "non-hinted-1-of-1.jsonl", alone / "hinted-1-of-1.jsonl"]
    both, one = (
        rft._sorted(load_trajectories(p, by_id, templates), by_id) for p in (paths, wanted)
    )
    assert both == one
    assert len(both[0]) == 27


def test_hints_for_what_failed(folder: Path, tmp_path: Path) -> None:
    files = tmp_path / "theirs.jsonl"
    right, wrong = (rf"Scores: \boxed{{{scores}}}" for scores in ("9, 1", "1, 9"))
    records = [
        {"id": "c0", "text": right},
        {"id": "c0", "text": wrong},
        {"id": "c0", "text": right + "!", "hinted": True},
        {"id": "c2", "text": wrong},
        {"id": "c2", "text": right + "?", "hinted": True},
        {"id": "c4", "text": "no idea"},
        {"id": "elsewhere", "text": right},
    ]
    files.write_text("".join(json.dumps(record) + "\n" for record in records))
    changes = {"sampler__files": (str(files),), "sampler__hinted": "failed"}
    rft.make_examples(settings(folder, **changes), tmp_path)
    lines = (tmp_path / "examples.jsonl").read_text().splitlines()
    assert [json.loads(line)["completion"] for line in lines] == [right, right + "?"]
    report = json.loads((tmp_path / "rejection.json").read_text())
    assert report["bad_line_errors"] == ["there is no comparison 'elsewhere'"]
    # Before anything is learnt, other rules may be tried on what was sampled.
    rft.make_examples(settings(folder, **changes | {"sampler__hinted": "off"}), tmp_path)
    assert len((tmp_path / "examples.jsonl").read_text().splitlines()) == 1


def test_the_teacher_of_the_small_comparisons(folder: Path, tmp_path: Path) -> None:
    changes = {
        "data__comparisons": ("nano:train:40",),
        "sampler__files": ("nano-teacher",),
        "sampler__hinted": "off",
        "sampler__samples": 3,
        "prompt__template": "nano",
    }
    changed = settings(folder, **changes)
    rft.make_examples(changed, tmp_path)
    report = json.loads((tmp_path / "rejection.json").read_text())
    assert sum(report["all"]["all"].values()) == 120
    assert report["all"]["all"]["too easy"] > 0
    kept = report["all"]["all"]["kept"]
    assert len(ExampleFile(tmp_path / "examples.jsonl")) == kept > 10
    (source,) = rft._training_sources(
        changed, tmp_path, tokenizer_from_folder(folder / "base", vocab_size=260)
    )
    assert (source.name, source.weight, len(source.records)) == ("examples.jsonl", None, kept)


def test_shares_of_general_examples(folder: Path, finished: Finished) -> None:
    other = write_examples(folder / "more.jsonl", 10)
    general = (str(folder / "general.jsonl"), str(other))
    changed = settings(folder, data__general=general, data__general_share=0.8)
    tokenizer = tokenizer_from_folder(folder / "base", vocab_size=260)
    sources = rft._training_sources(changed, finished[0], tokenizer)
    assert [source.weight for source in sources] == pytest.approx([0.2, 0.64, 0.16])
    with pytest.raises(UsageError, match=r"data\.general_share is 0\.5"):
        rft._training_sources(settings(folder, data__general_share=0.5), finished[0], tokenizer)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampler.non_hinted": False, "sampler.hinted": "failed"}, "set sampler.hinted to 'all'"),
        ({"sampler.hinted": "some"}, "sampler.hinted is 'some'; it must be one of off, failed"),
        ({"sampler.model": "a", "sampler.files": ("b",)}, "leave sampler.model empty"),
        ({"sampler.adapter": "a"}, "sampler.adapter belongs to sampler.model"),
        ({"model.random": True}, "random parameters writes nothing to learn from"),
        ({"model.shape": {"family": "llama"}}, "random parameters writes nothing to learn from"),
        ({"data.weights": (1.0,)}, "leave data.weights empty"),
        ({"prompt.template": "none"}, "no template 'none'"),
        ({"sampler.files": ("/none",)}, "cannot read /none"),
    ],
)
def test_settings_that_are_wrong(
    changes: dict[str, Any], message: str, folder: Path, tmp_path: Path
) -> None:
    flat = {key.replace(".", "__"): value for key, value in changes.items()}
    with pytest.raises(UsageError) as caught:
        rft.make_examples(settings(folder, **flat), tmp_path)
    assert message in str(caught.value)


def test_nothing_left_to_learn(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"id": "c0", "text": "no idea"}\n')
    with pytest.raises(UsageError, match="no trajectory is left to learn from"):
        rft.run(settings(folder, sampler__files=(str(tmp_path / "a.jsonl"),)), tmp_path)


@pytest.mark.slow
def test_a_killed_program_goes_on(folder: Path, finished: Finished, tmp_path: Path) -> None:
    changed = settings(folder).to_dict()
    (tmp_path / "c.py").write_text(
        "from grm_jax.training import rft\n\n\n"
        "def get_config():\n"
        "    config = rft.default_config()\n"
        f"    config.update_from_flattened_dict({changed!r})\n"
        "    return config\n"
    )
    program = (
        "import sys; from pathlib import Path\n"
        "from grm_jax.training import config, rft\n"
        "settings = config.Settings(config.load_config(sys.argv[1]))\n"
        "rft.make_examples(settings, Path(sys.argv[2]))\n"
    )

    def start() -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-c", program, str(tmp_path / "c.py"), str(tmp_path)]
        variables = {
            "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
            "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"),
            # As here, since other programs draw other samples.
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        }
        return subprocess.Popen(command, cwd=ROOT, env={**os.environ, **variables})

    process = start()
    written = tmp_path / "trajectories" / "non-hinted-1-of-1.jsonl"
    while process.poll() is None and not (written.exists() and written.read_text().count("\n") > 2):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "examples.jsonl").exists()
    assert start().wait() == 0
    for name in ("trajectories/non-hinted-1-of-1.jsonl", "trajectories/hinted-1-of-1.jsonl"):
        assert (tmp_path / name).read_bytes() == (finished[0] / name).read_bytes()
    assert (tmp_path / "examples.jsonl").read_bytes() == (
        finished[0] / "examples.jsonl"
    ).read_bytes()


def test_a_judge_of_its_own(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Another checkpoint than the one that is trained, in its own compute type."""
    asked: list[Any] = []

    def load(name: str, *, adapter: Any, mesh: Any, dtype: Any) -> GRM:
        asked.append((name, adapter, None if mesh is None else mesh.shape["data"], dtype))
        raise UsageError("seen")

    monkeypatch.setattr(GRM, "from_pretrained", load)
    for changes in ({"sampler__model": "judge"}, {"model__dtype": "bfloat16"}):
        with pytest.raises(UsageError, match="seen"):
            rft.make_examples(settings(folder, **changes), tmp_path / str(len(asked)))
    copies = jax.local_device_count() if jax.local_device_count() > 1 else None
    base = str(folder / "base")
    assert asked == [("judge", None, copies, None), (base, None, copies, "bfloat16")]
