"""Each trainer's contract, called as that trainer calls it."""

import asyncio
import inspect
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pytest

from grm_jax.adapters import Columns, Scorer, easydel, openrlhf, trl, tunix, verl
from grm_jax.errors import UsageError
from tests.adapters.stub import StubJudge

PROMPTS = ["a?", "a?", "b?", "b?"]
COMPLETIONS = ["3", "8", "?", "5"]


def scorer(**settings: Any) -> Scorer:
    return Scorer(judge=StubJudge(), **settings)


def asked(chosen: Scorer) -> list[tuple[str, ...]]:
    """The responses of each judgement."""
    assert isinstance(chosen.judge, StubJudge)
    return [comparison.responses for call, _ in chosen.judge.calls for comparison in call]


# --- TRL ---


def test_trl_with_text_columns_and_logs() -> None:
    chosen = scorer(unreadable="none")
    extra: dict[str, list[str]] = {}
    metrics: dict[str, float] = {}
    reward = trl.reward_func(chosen, columns=Columns(reference="answer"))
    found = reward(
        prompts=["a?", "a?", "b?"],
        completions=["3", "8", "?"],
        completion_ids=[[1], [2], [3]],
        trainer_state=object(),
        log_extra=extra.__setitem__,
        log_metric=metrics.__setitem__,
        answer=["x", "x", None],
        unrelated=[1, 2, 3],
    )
    assert found == [3, 8, None]
    assert asked(chosen) == [("3", "8"), ("?",)]
    assert extra == {"grm_critique": ["critique of 2", "critique of 2", ""]}
    assert metrics == {"grm/readable": pytest.approx(2 / 3)}
    assert reward.__name__ == "grm"


def test_trl_with_conversations() -> None:
    chosen = scorer()
    prompt = [{"role": "user", "content": "a?"}]
    completions = [[{"role": "assistant", "content": text}] for text in ("3", "8")]
    assert trl.reward_func(chosen)(prompts=[prompt, prompt], completions=completions) == [3, 8]
    assert asked(chosen) == [("3", "8")]


def test_columns_must_fit() -> None:
    reward = trl.reward_func(scorer())
    with pytest.raises(UsageError, match="1 values for 2 completions"):
        reward(prompts=["a?"] * 2, completions=["1", "2"], reference=["x"])
    with pytest.raises(UsageError, match="holds a int"):
        reward(prompts=["a?"], completions=["1"], rubric=[3])


# --- Tunix, MaxText, EasyDeL ---


@dataclass
class AlgoConfig:
    num_generations: int = 2
    beta: float = 0.04


def as_tunix_calls(function: Callable[..., Any], **columns: Any) -> np.ndarray:
    """What Tunix does: parameters that its configuration has by name are added."""
    config = asdict(AlgoConfig())
    extra = {
        name: config[name] for name in inspect.signature(function).parameters if name in config
    }
    found = function(prompts=PROMPTS, completions=COMPLETIONS, **columns, **extra)
    assert len(found) == len(PROMPTS)
    rewards = np.zeros((len(PROMPTS), 1))
    rewards[:, 0] = np.array(found)
    return np.nansum(rewards, axis=1)


@pytest.mark.parametrize("make", [tunix.reward_fn, easydel.reward_func])
def test_tunix_and_easydel(make: Callable[..., Callable[..., list[float]]]) -> None:
    chosen = scorer()
    np.testing.assert_array_equal(
        as_tunix_calls(make(chosen, name="judge"), reference=np.array(["x", "x", "y", "y"])),
        [3, 8, 1, 1],
    )
    assert make(chosen, name="judge").__name__ == "judge"


def test_maxtext() -> None:
    found = tunix.maxtext_reward(scorer())(PROMPTS, COMPLETIONS, object(), question=PROMPTS)
    assert found == [3, 8, 1, 1]


@pytest.mark.parametrize(
    "make",
    [
        tunix.reward_fn, tunix.maxtext_reward, easydel.reward_func, openrlhf.reward_func,
        verl.compute_score, verl.compute_score_async, verl.compute_scores,
    ],
)  # fmt: skip
def test_trainers_that_would_take_none_for_zero_are_not_given_it(
    make: Callable[..., object],
) -> None:
    with pytest.raises(UsageError, match="would count them as zero"):
        make(scorer(unreadable="none"))


# --- verl ---

PARAMETERS = ["data_source", "solution_str", "ground_truth", "extra_info"]


def test_verl_one_by_one_from_threads() -> None:
    chosen = scorer()
    compute = verl.compute_score(chosen, wait=0.3)
    assert not inspect.iscoroutinefunction(compute)
    assert list(inspect.signature(compute).parameters)[:4] == PARAMETERS

    def call(index: int) -> dict[str, float]:
        return compute(
            data_source="openai/gsm8k",
            solution_str=COMPLETIONS[index],
            ground_truth="x",
            extra_info={"prompt": PROMPTS[index], "num_turns": 2},
        )

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(call, range(4)))
    assert [record["score"] for record in found] == [3, 8, 1, 1]
    assert [record["readable"] for record in found] == [1, 1, 0, 0]
    assert json.loads(json.dumps(found)) == found
    assert {tuple(sorted(group)) for group in asked(chosen)} == {("3", "8"), ("5", "?")}


def test_verl_in_its_reward_loop() -> None:
    chosen = scorer(scale="unit")
    compute = verl.compute_score_async(chosen, prompt="question", wait=0.05)
    assert inspect.iscoroutinefunction(compute)
    assert list(inspect.signature(compute).parameters)[:6] == [
        *PARAMETERS, "reward_router_address", "reward_model_tokenizer",
    ]  # fmt: skip

    async def group() -> list[dict[str, float]]:
        calls = (
            compute(
                data_source="d",
                solution_str=text,
                ground_truth=7,
                extra_info={"question": [{"role": "user", "content": "a?"}]},
                reward_router_address="127.0.0.1:1",
                reward_model_tokenizer=None,
            )
            for text in ("1", "10")
        )
        return await asyncio.gather(*calls)

    assert [record["score"] for record in asyncio.run(group())] == [0, 1]
    assert asked(chosen) == [("1", "10")]


def test_verl_in_batches() -> None:
    chosen = scorer()
    extras = [{"prompt": prompt} for prompt in PROMPTS]
    compute = verl.compute_scores(chosen)
    found = compute(
        data_sources=["d"] * 4, solution_strs=COMPLETIONS, ground_truths=["x"] * 4,
        extra_infos=extras,
    )  # fmt: skip
    assert [record["score"] for record in found] == [3, 8, 1, 1]


def test_verl_needs_the_prompt() -> None:
    with pytest.raises(UsageError, match="extra_info has no 'prompt'"):
        verl.compute_score(scorer())("d", "3", "x")


# --- OpenRLHF ---


def chat(prompt: str) -> str:
    return f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"


def test_openrlhf_with_whole_batches() -> None:
    chosen = scorer()
    prompts = [chat(prompt) for prompt in PROMPTS]
    queries = [p + said + "<|im_end|>" for p, said in zip(prompts, COMPLETIONS, strict=True)]
    reward = openrlhf.reward_func(chosen, wait=0.0)
    found = reward(queries, prompts, ["x"] * 4)
    assert found["rewards"] == [3, 8, 1, 1]
    assert found["scores"] == [pytest.approx((value - 1) / 9) for value in found["rewards"]]
    assert found["extra_logs"] == {"readable": [1, 1, 0, 0]}
    assert asked(chosen) == [("3", "8"), ("?", "5")]


def test_openrlhf_one_by_one_from_threads() -> None:
    chosen = scorer()
    reward = openrlhf.reward_func(chosen, reference=True, wait=0.3)
    with ThreadPoolExecutor(4) as pool:
        calls = [
            pool.submit(reward, [chat("a?") + text], [chat("a?")], ["x"])
            for text in ("3", "8", "9")
        ]
        assert [call.result()["rewards"] for call in calls] == [[3], [8], [9]]
    assert len(asked(chosen)) == 1
    assert isinstance(chosen.judge, StubJudge)
    assert chosen.judge.calls[0][0][0].messages[0]["content"].endswith("x")


def test_openrlhf_queries_without_their_prompt() -> None:
    tasks, answers = openrlhf.read_queries([chat("a?") + "3<|im_end|>", "bare"], None)
    assert answers == ["3", "bare"]
    assert tasks[0].messages == ({"role": "user", "content": "a?"},)
    with pytest.raises(UsageError, match="1 prompts for 2 queries"):
        openrlhf.read_queries(["a", "b"], ["a"])


@pytest.mark.parametrize(
    ("query", "prompt", "asked", "answer"),
    [
        ("q? 3", "q? ", "q? ", "3"),
        ("<|begin_of_text|>q? 3", "q? ", "q? ", "3"),
        ("<s>" + chat("a?") + "3<|im_end|>", chat("a?"), "a?", "3"),
        # The policy saw the end of its prompt alone.
        (chat("a?")[-30:] + "3<|im_end|>", chat("a?"), "a?", "3"),
        (chat("b?")[14:] + "3", chat("long " * 9 + "b?"), "long " * 9 + "b?", "3"),
        ("", "", "", ""),
    ],
)
def test_openrlhf_queries_are_parted_at_their_prompt(
    query: str, prompt: str, asked: str, answer: str
) -> None:
    (task,), (found,) = openrlhf.read_queries([query], [prompt])
    assert task.messages == ({"role": "user", "content": asked},)
    assert found == answer
