"""Judges whose scores are drawn, for benchmarks written down here in the official layouts."""

import json
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from grm_jax.data import Comparison, Judgement, Sample
from grm_jax.evaluation.benchmarks import find_benchmark, load_benchmark
from grm_jax.evaluation.browsing import browsable, left_out
from grm_jax.evaluation.cost import ModelCost
from grm_jax.evaluation.evaluate import Evaluation, compare, evaluate
from grm_jax.evaluation.judged import Judged, judged_from_records
from grm_jax.evaluation.metrics import right_responses
from grm_jax.evaluation.report import write_report

COST = ModelCost(per_token=1e9, per_output=1e8, per_context=1e4)


def fake_judgement(
    comparison: Comparison,
    draw: Callable[[Comparison, np.random.Generator], Sequence[int] | None],
    *,
    samples: int,
    rng: np.random.Generator,
    meta: Callable[[Comparison, Sequence[int] | None], float] | None = None,
) -> Judgement:
    """A judgement whose samples have drawn scores and orders."""
    drawn = []
    for _ in range(samples):
        scores = draw(comparison, rng)
        drawn.append(
            Sample(
                order=tuple(rng.permutation(len(comparison.responses)).tolist()),
                scores=None if scores is None else tuple(scores),
                meta=None if meta is None else meta(comparison, scores),
                text="Analysis: <b>both</b> are & short. </script>",
                finish="stop",
            )
        )
    valid = [sample.scores for sample in drawn if sample.scores is not None]
    return Judgement(
        id=comparison.id,
        scores=tuple(np.sum(valid, axis=0).tolist()) if valid else None,
        valid_samples=len(valid),
        samples=tuple(drawn),
        prompt_tokens=100,
        completion_tokens=10 * samples,
        seconds=0.5,
        error=None if valid else "none of the samples has readable scores",
    )


def skewed(comparison: Comparison, rng: np.random.Generator) -> list[int] | None:
    """Scores that favour the right response, and a text in twenty that cannot be read."""
    if rng.random() < 0.05:
        return None
    width = len(comparison.responses)
    best = right_mask(comparison)
    return np.clip(np.round(rng.normal(5 + 1.5 * best, 2.0, width)), 1, 10).astype(int).tolist()


def right_mask(comparison: Comparison) -> np.ndarray:
    """Which responses the label favours."""
    record = comparison.label
    match record:
        case None:
            return np.zeros(len(comparison.responses))
        case _ if "index" in record.__dataclass_fields__:
            return right_responses([record.index], len(comparison.responses))[0] * 1.0
        case _ if "values" in record.__dataclass_fields__:
            return np.asarray(record.values, float)
        case _:
            return np.array([float(record.correct)])


def fake_judged(
    comparisons: Sequence[Comparison], *, samples: int = 4, seed: int = 0, meta: bool = False
) -> tuple[Judged, list[dict[str, Any]]]:
    """Judgements by the skewed judge, as arrays and as records."""
    rng = np.random.default_rng(seed)

    def trust(comparison: Comparison, scores: Sequence[int] | None) -> float:
        won = scores is not None and right_mask(comparison)[int(np.argmax(scores))]
        return round(float(won + rng.normal(0, 0.7)), 3)

    records = [
        fake_judgement(
            comparison, skewed, samples=samples, rng=rng, meta=trust if meta else None
        ).to_record()
        for comparison in comparisons
    ]
    return judged_from_records(comparisons, records, samples), records


def write_parquet(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Writes rows as Parquet."""
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    return path


def write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Writes rows as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rewardbench_rows(subsets: Sequence[str], each: int) -> list[dict[str, Any]]:
    """Rows of RewardBench's official columns."""
    return [
        {
            "prompt": f"What is {number} + 1?",
            "chosen": f"It is {number + 1}.",
            "chosen_model": "a",
            "rejected": f"Perhaps {number + 2}, or more?",
            "rejected_model": "b",
            "subset": subset,
            "id": number,
        }
        for subset in subsets
        for number in range(each)
    ]


def rmb_folder(folder: Path) -> Path:
    """A few files of RMB in its official folders."""
    turns = [{"content": "Name a colour.", "language": "English", "role": "user"}]

    def answer(text: str) -> dict[str, str]:
        return {"llm_name": "m", "answer": text}

    for kind in ("BoN_set", "Pairwise_set"):
        for goal in ("Helpfulness/Chat", "Harmlessness/S1"):
            rows = []
            for number in range(3):
                row: dict[str, Any] = {
                    "conversation_input": turns,
                    "category_path": f"{kind}/{goal}",
                }
                if kind == "BoN_set":
                    losers = [answer(f"no {number}"), answer("mud"), answer("42")]
                    row |= {"bon_uid": str(number), "bon_best": answer("red"), "loser_list": losers}
                else:
                    row |= {"pair_uid": str(number), "chosen": answer("red")}
                    row |= {"reject": answer(f"no {number}")}
                rows.append(row)
            path = folder / kind / f"{goal}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(rows))
    return folder


def realmistake_zip(path: Path) -> Path:
    """A zip in ReaLMistake's layout, though without a password, which Python cannot write."""

    def line(task: str, number: int, label: str) -> str:
        meta = {"id": f"{task}_{number}", "task_name": task, "llm_response_model": "m"}
        row = {
            "input": f"Secret question {number}",
            "llm_response": f"Secret answer {number}",
            "error_label": label,
            "metadata": meta,
        }
        return json.dumps(row) + "\n"

    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data/README.md", "about")
        archive.writestr("data/example.jsonl", line("math_problem_generation", 99, "error"))
        for task in (
            "math_problem_generation",
            "finegrained_fact_verification",
            "answerability_classification",
        ):
            lines = [line(task, n, "error" if n % 2 else "no_error") for n in range(4)]
            folder = task.replace("math_problem", "math_word_problem")
            archive.writestr(f"data/{folder}/m.jsonl", "".join(lines))
    return path


def made(
    name: str, data: Path, folder: Path, *, samples: int = 8
) -> tuple[Evaluation, dict[str, Any]]:
    """Writes a report on drawn judgements; returns the evaluation and `results.json`."""
    benchmark = find_benchmark(name)
    comparisons = load_benchmark(name, data)
    judged, records = fake_judged(comparisons, samples=samples, meta=True)
    found = evaluate(
        benchmark,
        judged,
        name="tiny",
        ks=sorted({1, 2, samples}),
        model=COST,
        k_metas=[1],
        resamples=60,
    )
    results = {
        "benchmark": name,
        "data": data.name,
        "limit": None,
        "ties": benchmark.ties,
        "models": [found.results],
        "comparisons": [
            compare((found, "vote", 1), (found, "guided, half", samples), resamples=60)
        ],
    }
    shown = browsable(benchmark, judged, records, judge="tiny")
    write_report(folder, benchmark, results, shown, left_out=left_out(benchmark, judged))
    return found, json.loads((folder / "results.json").read_text())
