"""The judge as OpenRLHF's reward: a Python function, or a service at a URL.

Write a file that makes the function, and give the file as the remote reward's URL:

    from grm_jax import GRM
    from grm_jax.adapters import Scorer, openrlhf
    reward_func = openrlhf.reward_func(Scorer(judge=GRM.from_pretrained("smollm2-135m")))

With the judge on another machine, run `grm-jax serve` there and give OpenRLHF its `/get_reward`.
OpenRLHF asks about each completion apart, from several threads; calls that come close together are
judged together (`Gatherer`).
"""

from collections.abc import Callable, Sequence
from typing import Any

from grm_jax.adapters.gathering import Gatherer
from grm_jax.adapters.scoring import Rating, Scorer, require_floor
from grm_jax.adapters.tasks import Task, read_chat_text, read_completion, split_answer
from grm_jax.data import Message
from grm_jax.errors import UsageError

Rewards = dict[str, Any]

# Characters of a control token, such as `<|begin_of_text|>`.
_LONGEST_TOKEN = 32


def reward_func(
    scorer: Scorer, *, reference: bool = False, wait: float = 0.05
) -> Callable[..., Rewards]:
    """OpenRLHF's `reward_func(queries, prompts, labels)`.

    It returns `rewards`; `scores`, which are from 0 to 1 and choose what dynamic filtering keeps;
    and `extra_logs`.

    Args:
      scorer: Rates the completions.
      reference: Whether the judge sees the label, where it is text, as a right answer.
      wait: Seconds that a call waits for others, to be judged with them.

    Raises:
      UsageError: If the scorer may return None.
    """
    require_floor(scorer, "OpenRLHF")
    gatherer = Gatherer(scorer, wait=wait)

    def reward(
        queries: Sequence[str],
        prompts: Sequence[str],
        labels: Sequence[object] | None = None,
        **_: Any,
    ) -> Rewards:
        tasks, answers = read_queries(queries, prompts, labels if reference else None)
        return rewards_record(gatherer.rate(tasks, answers), scorer)

    return reward


def read_queries(
    queries: Sequence[str],
    prompts: Sequence[str] | None,
    labels: Sequence[object] | None = None,
) -> tuple[list[Task], list[str]]:
    """Tasks and answers of OpenRLHF's queries, which are a prompt and its answer in one text.

    Args:
      queries: The texts, with the policy's control tokens.
      prompts: The prompt that each begins with, but for a token that begins all text. Where one
        does not, as where it was cut, or there are none, the last assistant turn is the answer.
      labels: What the judge sees as right answers, where they are text.

    Raises:
      UsageError: If there are not as many prompts or labels as queries.
    """
    for name, values in (("prompts", prompts), ("labels", labels)):
        if values and len(values) != len(queries):
            raise UsageError(f"there are {len(values)} {name} for {len(queries)} queries")
    tasks, answers = [], []
    for index, query in enumerate(queries):
        messages, answer = _split(query, prompts[index] if prompts else None)
        label = labels[index] if labels else None
        reference = label if isinstance(label, str) and label else None
        tasks.append(Task(messages=messages, reference=reference))
        answers.append(answer)
    return tasks, answers


def _split(query: str, prompt: str | None) -> tuple[tuple[Message, ...], str]:
    if prompt is None:
        return split_answer(query)
    place = query.find(prompt)
    if 0 <= place <= _LONGEST_TOKEN:
        return read_chat_text(prompt), read_completion(query[place + len(prompt) :])
    # The trainer has the whole prompt even where the policy saw its end alone.
    return read_chat_text(prompt), split_answer(query)[1]


def rewards_record(ratings: Sequence[Rating], scorer: Scorer) -> Rewards:
    """Ratings, from a scorer with a floor, as OpenRLHF reads them."""
    rewards = [rating.reward for rating in ratings if rating.reward is not None]
    low, high = scorer.bounds if scorer.scale == "points" else (0, 1)
    return {
        "rewards": rewards,
        "scores": [min(1.0, max(0.0, (reward - low) / (high - low))) for reward in rewards],
        "extra_logs": {"readable": [float(rating.readable) for rating in ratings]},
    }
