"""What a policy was asked, in the form in which its answers are judged.

Trainers hand over prompts as messages or as text, often with the chat markup of the policy's own
tokenizer. A judge reads messages, so the common markups are taken apart again; what is in none of
them is one user turn.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, final

from grm_jax.data import Message
from grm_jax.errors import UsageError

ChatPrompt = str | Sequence[Mapping[str, Any]]
"""A prompt as trainers have it: text, or `{role, content}` messages."""


class _Markup(NamedTuple):
    """How a family of chat templates writes a turn: a header with a group `role`, and an end."""

    header: re.Pattern[str]
    end: str


_ROLE = "(?P<role>system|developer|user|assistant|model|tool|ipython)"
_MARKUPS = (
    _Markup(re.compile(rf"<\|im_start\|>\s*{_ROLE}[ \t]*\n?"), "<|im_end|>"),
    _Markup(re.compile(rf"<start_of_turn>\s*{_ROLE}[ \t]*\n?"), "<end_of_turn>"),
    _Markup(re.compile(rf"<\|start_header_id\|>\s*{_ROLE}\s*<\|end_header_id\|>\s*"), "<|eot_id|>"),
    _Markup(re.compile(r"<｜(?P<role>User|Assistant)｜>"), "<｜end▁of▁sentence｜>"),
)
_ROLES = {"model": "assistant", "developer": "system", "ipython": "tool"}
_ENDS = (*(markup.end for markup in _MARKUPS), "<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")


@final
@dataclass(frozen=True, kw_only=True)
class Task:
    """One prompt of the policy, with what its caller tells the judge about it.

    Attributes:
      messages: The conversation up to the user's last turn.
      reference: A right answer, which the judge sees and the policy does not.
      rubric: What an answer to this prompt should do.
      principles: Criteria to judge by, in place of the judge's own.
    """

    messages: tuple[Message, ...]
    reference: str | None = None
    rubric: str | None = None
    principles: str | None = None

    @property
    def key(self) -> str:
        """Equal for equal tasks."""
        told = (self.reference, self.rubric, self.principles)
        return json.dumps([[dict(turn) for turn in self.messages], *told])

    def shown(self) -> list[Message]:
        """The conversation as the judge reads it: with what it is told as a first system turn."""
        parts = (
            ("A correct answer to the last turn, for comparison", self.reference),
            ("What an answer to the last turn has to do", self.rubric),
            ("The criteria to score by, each as it stands and no others", self.principles),
        )
        notes = [f"{title}:\n{text.strip()}" for title, text in parts if text is not None]
        if not notes:
            return list(self.messages)
        opening = "Notes for the judge alone; whoever answered has not seen them."
        note = Message(role="system", content="\n\n".join([opening, *notes]))
        return [note, *self.messages]

    def told(self, principles: str) -> "Task":
        """The task with criteria to judge by."""
        return replace(self, principles=principles)


def read_prompt(prompt: ChatPrompt) -> tuple[Message, ...]:
    """A trainer's prompt as messages up to the user's last turn.

    Args:
      prompt: Messages, whose contents may be lists of text parts, or text.

    Raises:
      UsageError: If it is neither.
    """
    if isinstance(prompt, str):
        return read_chat_text(prompt)
    messages = [
        Message(role=str(turn.get("role")), content=read_content(turn.get("content")))
        for turn in prompt
    ]
    # A generation may have been begun for the policy; it is part of no question.
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not messages:
        raise UsageError("a prompt has no user turn; give messages that end with one")
    return tuple(messages)


def read_completion(completion: ChatPrompt) -> str:
    """A trainer's completion as plain text: without the end of its turn.

    Args:
      completion: Text, or messages, of which the assistant's are joined.
    """
    if isinstance(completion, str):
        return _without_ends(completion)
    said = (
        read_content(turn.get("content")) for turn in completion if turn.get("role") == "assistant"
    )
    return "\n\n".join(text for text in said if text)


def _without_ends(text: str) -> str:
    bare = text.rstrip()
    while bare.endswith(_ENDS):
        end = next(end for end in _ENDS if bare.endswith(end))
        text = bare = bare[: -len(end)].rstrip()
    return text


def read_content(content: object) -> str:
    """The text of a message: a string, or the text parts of a list.

    Raises:
      UsageError: If a part is no text, as a picture is.
    """
    match content:
        case None:
            return ""
        case str():
            return content
        case list():
            return "".join(_part(part) for part in content)
        case _:
            raise UsageError("a message's content must be a string or a list of text parts")


def _part(part: object) -> str:
    match part:
        case str():
            return part
        case {"type": "text", "text": str() as text}:
            return text
        case _:
            raise UsageError("only text can be judged; a message has a part of another kind")


def read_chat_text(text: str) -> tuple[Message, ...]:
    """Takes the chat markup of a prompt apart.

    Known are ChatML and the markups of Gemma, Llama 3 and DeepSeek. Text without them is one user
    turn, as it stands.
    """
    turns = _turns(text)
    while turns and turns[-1]["role"] == "assistant":
        turns.pop()
    return tuple(turns) or (Message(role="user", content=text),)


def split_answer(text: str) -> tuple[tuple[Message, ...], str]:
    """Parts a prompt with its answer, in one text, at the last assistant turn.

    Returns:
      The prompt's messages and the answer. Where there is no markup to tell them apart by, the
      whole is the answer and the prompt asks for a good text.
    """
    asked = Message(role="user", content="Write a good text.")
    turns = _turns(text)
    if turns and turns[-1]["role"] == "assistant":
        return tuple(turns[:-1]) or (asked,), turns[-1]["content"]
    return (asked,), read_completion(text)


def _turns(text: str) -> list[Message]:
    for markup in _MARKUPS:
        found = list(markup.header.finditer(text))
        if not found:
            continue
        ends = [*(match.start() for match in found[1:]), len(text)]
        return [
            Message(
                role=_ROLES.get(match["role"].lower(), match["role"].lower()),
                content=read_completion(text[match.end() : end].split(markup.end)[0]).strip(),
            )
            for match, end in zip(found, ends, strict=True)
        ]
    return []
