"""Prompts with the completions to be learnt: records in files, and the tokens made of them.

A record is a JSON object with `prompt`, the user's message as a string or a list of
`{role, content}` turns, and `completion`, what the model should have answered.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, final

import numpy as np

from grm_jax.data.packing import TokenSequence
from grm_jax.errors import UsageError
from grm_jax.prompts import Tokenizer, encode_chat


class Example(NamedTuple):
    """A prompt and its completion.

    Attributes:
      prompt: The turns that the model is shown.
      completion: What it should answer.
    """

    prompt: tuple[Mapping[str, str], ...]
    completion: str


@final
class ExampleFile:
    """The examples of a file, read when they are asked for, from any thread."""

    def __init__(self, path: Path) -> None:
        """Finds the lines of the file, of which blank ones do not count.

        Raises:
          UsageError: The file cannot be read or has no line.
        """
        self._path = path
        starts, numbers, position = [], [], 0
        try:
            with path.open("rb") as file:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        starts.append((position, position + len(line)))
                        numbers.append(number)
                    position += len(line)
            self._file = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise UsageError(f"cannot read {path}: {error.strerror}") from error
        if not starts:
            raise UsageError(f"{path} has no examples")
        # As arrays, because millions of lines are nothing special.
        self._spans, self._numbers = np.asarray(starts), np.asarray(numbers)

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int, /) -> Example:
        begin, end = self._spans[index]
        line = os.pread(self._file, int(end - begin), int(begin))
        where = f"{self._path}, line {self._numbers[index]}"
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UsageError(f"{where}, is not JSON: {error}") from error
        return read_example(record, where)

    def close(self) -> None:
        """Closes the file."""
        os.close(self._file)


def read_example(record: object, where: str) -> Example:
    """Checks a record.

    Args:
      record: The parsed JSON.
      where: Where it is from, for messages.

    Raises:
      UsageError: It is not an example; the message says what to change.
    """
    if not isinstance(record, dict):
        raise UsageError(f"{where}, is no object; give one with prompt and completion")
    prompt, completion = record.get("prompt"), record.get("completion")
    if not isinstance(completion, str) or not completion:
        raise UsageError(f"{where}, has no completion; give a string that is not empty")
    if isinstance(prompt, str):
        return Example(({"role": "user", "content": prompt},), completion)
    if not isinstance(prompt, list) or not prompt:
        raise UsageError(f"{where}, has no prompt; give a string, or a list of role and content")
    return Example(tuple(_message(turn, where) for turn in prompt), completion)


def example_tokens(tokenizer: Tokenizer, example: Example) -> TokenSequence:
    """Encodes an example as the model would have met it, had it written the completion.

    The prompt is laid out by the chat template up to where an answer begins; the completion is
    encoded alone behind it, since a sampler hands over its own tokens there; and a token that ends
    an answer follows. The completion and that token are what is learnt.

    Args:
      tokenizer: The model's.
      example: The example.

    Returns:
      The tokens, and which of them are learnt.
    """
    prompt = encode_chat(tokenizer, example.prompt)
    completion = tokenizer.encode(example.completion, after_control=True)
    completion.append(end_of_answer(tokenizer))
    mask = np.arange(len(prompt) + len(completion)) >= len(prompt)
    return TokenSequence(tokens=np.asarray(prompt + completion, np.int32), loss_mask=mask)


def end_of_answer(tokenizer: Tokenizer) -> int:
    """The token with which the chat template ends an assistant's turn.

    A tokenizer may name several tokens that end an answer; the one that its template writes is the
    one to teach. Without a template it is the first.

    Raises:
      UsageError: The tokenizer names none.
    """
    if not tokenizer.eos_ids:
        raise UsageError("the tokenizer has no token that ends an answer, so none can be learnt")
    if tokenizer.chat_template is not None:
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        ids = encode_chat(tokenizer, turns, add_generation_prompt=False)
        ends = [index for index in ids if index in tokenizer.eos_ids]
        if ends:
            return ends[-1]
    return tokenizer.eos_ids[0]


def _message(turn: Any, where: str) -> dict[str, str]:
    match turn:
        case {"role": str(role), "content": str(content)}:
            return {"role": role, "content": content}
        case _:
            raise UsageError(f"{where}, has a turn in its prompt without role and content")
