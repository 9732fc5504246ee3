"""Lays out a conversation as the token ids a model expects.

The layout is the chat template that comes with the model: a foreign Jinja program, run in a
sandbox. What it writes may contain control tokens; what the messages contain may not. A response
that spells `<|im_end|>` would otherwise end its own turn and could instruct the judge.

The two are told apart after rendering, where they have become one string, by a mark: a private-use
character that occurs nowhere in the conversation is put inside every control token that a message
spells. The template sees messages that differ from the originals nowhere else, so that it trims and
joins as ever; the rendered text is split at the control tokens that are still whole, which the
template wrote; and the mark is taken out of the text between them before it is encoded.
"""

import datetime
import functools
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from grm_jax.errors import UsageError
from grm_jax.prompts.tokenizer import Tokenizer

# Private-use characters, from which the mark is taken.
_MARKS = (range(0xE000, 0xF900), range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))

# What templates that ask for today's date are told. A prompt must not depend on the day it was
# made, and this is the day on which Llama's templates fall back.
_TODAY = datetime.date(2024, 7, 26)


class _Generation(jinja2.ext.Extension):
    """Renders what is in a `generation` block, by which templates mark the assistant's words."""

    tags = {"generation"}  # noqa: RUF012 (the base class declares it so)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, str]],
    *,
    add_generation_prompt: bool = True,
) -> list[int]:
    """Turns a conversation into the ids that a model reads, beginning-of-text token included.

    That token is there exactly once if the model expects it, whatever the template does. Control
    tokens come from the template alone: where a message spells one, it is encoded as text. In every
    other respect the ids are those of the rendered template with its control tokens recognised. A
    tokenizer without a template gets a plain layout: the contents of the messages, separated by
    blank lines.

    Args:
      tokenizer: the tokenizer, with the chat template.
      messages: the conversation; of each message `role` and `content` are read.
      add_generation_prompt: whether the layout ends where the assistant's next answer begins.

    Raises:
      UsageError: if the template refuses the conversation, or fails, or reaches for what the
        sandbox denies.
    """
    if tokenizer.chat_template is None:
        text = "\n\n".join(message["content"] for message in messages)
        ids = tokenizer.encode(text + "\n\n" if add_generation_prompt else text)
    else:
        turns = [(message["role"], message["content"]) for message in messages]
        mark = _unused_mark(tokenizer.chat_template, *itertools.chain.from_iterable(turns))
        marked = [
            {"role": _disarm(tokenizer, role, mark), "content": _disarm(tokenizer, content, mark)}
            for role, content in turns
        ]
        ids = _encode_marked(tokenizer, _render(tokenizer, marked, add_generation_prompt), mark)
    return _with_one_bos(tokenizer, ids)


def _with_one_bos(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    """Adds the beginning of text where the template left it out, or takes away what it doubled."""
    bos = tokenizer.bos_id
    start = len(list(itertools.takewhile(lambda index: index == bos, ids)))
    return [bos] * bool(start or tokenizer.add_bos) + ids[start:] if bos is not None else ids


def _unused_mark(*texts: str) -> str:
    """The first private-use character that no text contains."""
    used = set().union(*texts)
    for code in itertools.chain(*_MARKS):
        if chr(code) not in used:
            return chr(code)
    raise UsageError("the conversation uses every private-use character of Unicode")


def _disarm(tokenizer: Tokenizer, text: str, mark: str) -> str:
    """Puts the mark behind the first character of every control token in `text`.

    So it does at the end of the text to what may become one with the text that the template puts
    next.
    """
    spelled = {start for start, _ in tokenizer.find_controls(text)}
    starts = sorted(spelled.union(tokenizer.unfinished_controls(text.rstrip())))
    cuts = [0, *(start + 1 for start in starts), len(text)]
    return mark.join(text[begin:end] for begin, end in itertools.pairwise(cuts))


def _encode_marked(tokenizer: Tokenizer, text: str, mark: str) -> list[int]:
    """Encodes a rendered template: unmarked control tokens by their ids, the rest as text."""
    ids: list[int] = []
    done = 0
    for start, spelling in tokenizer.find_controls(text):
        # A control token of one character holds no mark; it is followed by it.
        if start >= done and not text.startswith(mark, start + 1):
            ids += tokenizer.encode(text[done:start].replace(mark, ""), after_control=done > 0)
            ids.append(tokenizer.control_tokens[spelling])
            done = start + len(spelling)
    return ids + tokenizer.encode(text[done:].replace(mark, ""), after_control=done > 0)


def _render(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool
) -> str:
    bos, eos = (
        "" if index is None else tokenizer.token_bytes[index].decode(errors="replace")
        for index in (tokenizer.bos_id, next(iter(tokenizer.eos_ids), None))
    )
    try:
        return _compile(tokenizer.chat_template or "").render(
            messages=messages,
            add_generation_prompt=add_generation_prompt,
            bos_token=bos,
            eos_token=eos,
            tools=None,
            documents=None,
        )
    except Exception as error:  # a foreign program may fail in any way
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(
            f"the model's chat template cannot lay out this conversation: {reason}"
        ) from error


@functools.lru_cache(maxsize=16)
def _compile(source: str) -> jinja2.Template:
    """Compiles a chat template with the helpers that templates published with models expect."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _TODAY.strftime
    return environment.from_string(source)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Writes JSON as it is: the filter that Jinja brings escapes it for HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
