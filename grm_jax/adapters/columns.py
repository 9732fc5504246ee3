"""Which columns of a trainer's data set say more about a prompt, and a reward that reads them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from grm_jax.adapters.scoring import Scorer, require_floor
from grm_jax.adapters.tasks import ChatPrompt, Task, read_completion, read_prompt
from grm_jax.errors import UsageError

RewardFunc = Callable[..., list[float]]
"""`reward(prompts, completions, *anything, **columns)`: a reward for each completion."""


@final
@dataclass(frozen=True, kw_only=True)
class Columns:
    """Names of columns, each read where the data set has it; None reads it nowhere.

    Attributes:
      reference: A right answer.
      rubric: What an answer should do.
      principles: Criteria to judge by.
    """

    reference: str | None = "reference"
    rubric: str | None = "rubric"
    principles: str | None = "principles"


def column_reward(
    scorer: Scorer, trainer: str, *, columns: Columns | None, name: str
) -> RewardFunc:
    """The reward function of trainers that call it with whole batches and the data's columns.

    Args:
      scorer: Rates the completions.
      trainer: Who will call it.
      columns: Which columns of the data set say more about a prompt.
      name: What the reward is called in logs.

    Raises:
      UsageError: If the scorer may return None, for which the trainer has no meaning.
    """
    require_floor(scorer, trainer)
    names = columns or Columns()

    def reward(
        prompts: Sequence[ChatPrompt],
        completions: Sequence[ChatPrompt],
        *_: object,
        **data: Any,
    ) -> list[float]:
        tasks = read_tasks(prompts, data, names)
        rewards = scorer.rewards(tasks, [read_completion(said) for said in completions])
        return [float(reward) for reward in rewards if reward is not None]

    reward.__name__ = name
    return reward


def read_tasks(
    prompts: Sequence[ChatPrompt], columns: Mapping[str, Any], names: Columns
) -> list[Task]:
    """The tasks of a batch.

    Args:
      prompts: One for each completion.
      columns: The trainer's columns by name, each with a value for each completion.
      names: Which of them to read.

    Raises:
      UsageError: If a column is not as long as the batch or holds something else than text.
    """
    read = {
        field: _column(columns.get(name), name, len(prompts))
        for field, name in (
            ("reference", names.reference),
            ("rubric", names.rubric),
            ("principles", names.principles),
        )
        if name is not None
    }
    # A prompt is repeated for each of its completions; it is read once.
    known: dict[str, tuple[Any, ...]] = {}
    messages = []
    for prompt in prompts:
        key = repr(prompt)
        if key not in known:
            known[key] = read_prompt(prompt)
        messages.append(known[key])
    return [
        Task(messages=said, **{field: values[index] for field, values in read.items()})
        for index, said in enumerate(messages)
    ]


def _column(values: Iterable[Any] | None, name: str, length: int) -> list[str | None]:
    if values is None:
        return [None] * length
    listed = [values] * length if isinstance(values, str) else list(values)
    if len(listed) != length:
        raise UsageError(f"column {name!r} has {len(listed)} values for {length} completions")
    for value in listed:
        if value is not None and not isinstance(value, str):
            raise UsageError(
                f"column {name!r} holds a {type(value).__name__}; make it text, or name another "
                "column in Columns"
            )
    return [value or None for value in listed]
