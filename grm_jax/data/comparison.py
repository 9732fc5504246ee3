"""The comparison record: a conversation, the responses to judge and, if known, which is right.

Records are JSON objects, one a line, plain or gzipped. Reading never stops at a bad line: each
becomes a `BadRecord` in its place, so that a long run reports it and goes on.
"""

import difflib
import gzip
import io
import json
import sys
import zlib
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TypedDict, assert_never, final

from grm_jax.errors import UsageError

ROLES = ("system", "user", "assistant", "tool")
GZIP_MAGIC = b"\x1f\x8b"
FIELDS = ("id", "messages", "responses", "source", "subset", "meta", "label")


class Message(TypedDict):
    """One turn of a conversation, in the form chat templates read."""

    role: str
    content: str


@final
@dataclass(frozen=True)
class BestLabel:
    """The response at `index` is the best one."""

    index: int


@final
@dataclass(frozen=True)
class ScoresLabel:
    """A known quality for each response, in order; higher is better and ties are allowed."""

    values: tuple[float, ...]


@final
@dataclass(frozen=True)
class PointwiseLabel:
    """Whether the only response is correct."""

    correct: bool


Label = BestLabel | ScoresLabel | PointwiseLabel


@final
@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One conversation with the responses to judge.

    Attributes:
      id: Name of the record, unique in its file.
      messages: The conversation up to and including the user's last turn.
      responses: The candidates, one or more.
      source: Where the record is from.
      subset: Which part of its source it belongs to.
      meta: Anything else the source says about the record.
      label: What is known about the responses' quality.
      extras: Keys of the record that mean nothing here; kept so that `to_record` returns them.
    """

    id: str
    messages: tuple[Message, ...]
    responses: tuple[str, ...]
    source: str | None = None
    subset: str | None = None
    meta: Mapping[str, object] | None = None
    label: Label | None = None
    extras: Mapping[str, object] = field(default_factory=dict)


@final
@dataclass(frozen=True, kw_only=True)
class BadRecord:
    """A line that cannot be judged.

    Attributes:
      id: The record's own id where it could be read, else `line-N`.
      line: Line number in the file, from 1.
      error: One line saying what is wrong.
    """

    id: str
    line: int
    error: str


def best_index(comparison: Comparison) -> int | None:
    """Returns the index of the best response, or None where the label names no single one.

    Scores name one if their maximum is unique; a pointwise label and no label never do.
    """
    match comparison.label:
        case BestLabel(index):
            return index
        case ScoresLabel(values):
            top = max(values)
            return values.index(top) if values.count(top) == 1 else None
        case PointwiseLabel() | None:
            return None
        case label:
            assert_never(label)


def turns(comparison: Comparison) -> list[dict[str, str]]:
    """The conversation in the form that templates take."""
    return [{"role": turn["role"], "content": turn["content"]} for turn in comparison.messages]


def from_record(record: object, *, default_id: str | None = None) -> Comparison:
    """Builds a comparison from a parsed JSON object, checking every field.

    An `id` may be an integer and becomes a string. Unknown keys are allowed and end up in
    `extras`; only one that looks like a misspelt `label` is refused, because ignoring it would
    quietly drop the truth that training and evaluation need.

    Args:
      record: The JSON object.
      default_id: The id of a record that has none; without it, `id` is required.

    Returns:
      The comparison.

    Raises:
      UsageError: A field is missing or malformed; the line names the record and the field.
    """
    if not isinstance(record, Mapping):
        raise UsageError(f"a record must be a JSON object, not {_kind(record)}")
    name = _read_id(record, default_id)
    try:
        responses = _read_responses(_required(record, "responses"))
        return Comparison(
            id=name,
            messages=_read_messages(_required(record, "messages")),
            responses=responses,
            source=_optional_string(record, "source"),
            subset=_optional_string(record, "subset"),
            meta=_read_meta(record.get("meta")),
            label=_read_label(record, len(responses)),
            extras={key: value for key, value in record.items() if key not in FIELDS},
        )
    except UsageError as error:
        raise UsageError(f"record {_short(name)}: {error}") from None


def to_record(comparison: Comparison) -> dict[str, object]:
    """Returns the comparison as a JSON-ready object; absent fields are left out."""
    record: dict[str, object] = {
        "id": comparison.id,
        "messages": [dict(message) for message in comparison.messages],
        "responses": list(comparison.responses),
        "source": comparison.source,
        "subset": comparison.subset,
        "meta": None if comparison.meta is None else dict(comparison.meta),
        "label": None if comparison.label is None else _label_record(comparison.label),
    }
    return {key: value for key, value in record.items() if value is not None} | dict(
        comparison.extras
    )


def read_comparisons(path: str | Path) -> Iterator[Comparison | BadRecord]:
    """Reads comparisons one by one from a JSON Lines file, plain or gzipped.

    Gzip is recognised by content, whatever the name. Blank lines are passed over, a byte order
    mark is too, and a record without an id is called `line-N`. The file is opened, and its first
    line decoded, before this returns, so that a wrong path fails at once.

    Args:
      path: The file, or `-` for standard input.

    Returns:
      An iterator of comparisons in file order, with a `BadRecord` for every line that is not one.
      A record whose id stood on an earlier line is a bad one.

    Raises:
      UsageError: The file cannot be opened, or it is not text in UTF-8.
    """
    name = "standard input" if str(path) == "-" else str(path)
    lines = open_lines(path)
    try:
        first = next(lines, b"")
        first.decode()
    except UnicodeDecodeError:
        raise UsageError(
            f"{name} is not UTF-8 text; give JSON Lines, one record a line, plain or gzipped"
        ) from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UsageError(f"{name} is not a readable gzip file: {error}") from None
    except OSError as error:
        raise UsageError(f"cannot read {name}: {error.strerror or error}") from None
    return _parse_lines(chain([first], lines))


def examples_path() -> Path:
    """Returns the path of a few short comparisons that come with the package."""
    return Path(__file__).with_name("examples.jsonl")


def open_lines(path: str | Path) -> Iterator[bytes]:
    """Yields a file's lines as they arrive, unzipped where it is gzip; never closes `stdin`."""
    standard = str(path) == "-"
    with nullcontext(sys.stdin.buffer) if standard else Path(path).expanduser().open("rb") as file:
        first = file.readline()
        if not first.startswith(GZIP_MAGIC):
            yield from chain([first], file)
            return
        # A pipe cannot go back to the start that `readline` took; what is zipped fits in memory.
        zipped = file if file.seekable() else io.BytesIO(first + file.read())
        if file.seekable():
            file.seek(-len(first), io.SEEK_CUR)
        with gzip.open(zipped) as unzipped:
            yield from unzipped


def _parse_lines(lines: Iterator[bytes]) -> Iterator[Comparison | BadRecord]:
    seen: set[str] = set()
    number = 0
    while True:
        number += 1
        try:
            line = next(lines, None)
        except (EOFError, OSError, zlib.error) as error:
            message = f"the file cannot be read beyond line {number - 1}: {error}"
            yield BadRecord(id=f"line-{number}", line=number, error=message)
            return
        if line is None:
            return
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line.strip():
            continue
        item = _parse_line(line, number)
        if isinstance(item, Comparison) and item.id in seen:
            message = f"record {_short(item.id)}: the `id` was used before; make it unique"
            item = BadRecord(id=item.id, line=number, error=message)
        seen.add(item.id)
        yield item


def _parse_line(line: bytes, number: int) -> Comparison | BadRecord:
    default_id = f"line-{number}"
    try:
        record = json.loads(line.decode(), parse_constant=_refuse_constant)
    except UnicodeDecodeError:
        error = f"line {number} is not UTF-8 text"
    except RecursionError:
        error = f"line {number} is JSON nested too deeply"
    except json.JSONDecodeError as problem:
        error = f"line {number} is not JSON: {problem.msg} at column {problem.colno}"
    except ValueError as problem:
        error = f"line {number} is not JSON: {problem}"
    else:
        try:
            return from_record(record, default_id=default_id)
        except UsageError as problem:
            error = str(problem)
            if isinstance(record, dict):
                default_id = _id_or(record, default_id)
    return BadRecord(id=default_id, line=number, error=error)


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON value")


def _id_or(record: Mapping[str, object], default: str) -> str:
    try:
        return _read_id(record, default)
    except UsageError:
        return default


def _read_id(record: Mapping[str, object], default: str | None) -> str:
    value = record.get("id", default)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, str) and value:
        return value
    where = "" if default is None else f"record {_short(default)}: "
    found = "it is empty" if value == "" else f"not {_kind(value)}"
    raise UsageError(f"{where}`id` must be a string that names the record; {found}")


def _required(record: Mapping[str, object], key: str) -> object:
    if key in record:
        return record[key]
    near = _nearest(key, record)
    hint = f"; rename {_short(near)} if it is meant" if near else ""
    raise UsageError(f"`{key}` is missing{hint}")


def _nearest(key: str, record: Mapping[str, object]) -> str | None:
    others = [str(other) for other in record if other not in FIELDS]
    return next(iter(difflib.get_close_matches(key, others, n=1, cutoff=0.8)), None)


def _optional_string(record: Mapping[str, object], key: str) -> str | None:
    value = record.get(key)
    if value is None or isinstance(value, str):
        return value
    raise UsageError(f"`{key}` must be a string, not {_kind(value)}")


def _read_meta(value: object) -> Mapping[str, object] | None:
    if value is None or isinstance(value, Mapping):
        return value
    raise UsageError(f"`meta` must be an object, not {_kind(value)}")


def _read_messages(value: object) -> tuple[Message, ...]:
    if not isinstance(value, list | tuple):
        raise UsageError(f"`messages` must be a list of {{role, content}}, not {_kind(value)}")
    if not value:
        raise UsageError("`messages` is empty; give the conversation up to the user's last turn")
    messages = tuple(_read_message(item, index) for index, item in enumerate(value))
    if messages[-1]["role"] != "user":
        raise UsageError(
            f"`messages` ends with the {messages[-1]['role']}'s turn; it must end with the "
            "user's, and what answers it belongs in `responses`"
        )
    return messages


def _read_message(item: object, index: int) -> Message:
    where = f"`messages[{index}]`"
    if not isinstance(item, Mapping):
        raise UsageError(f"{where} must be an object with `role` and `content`, not {_kind(item)}")
    role, content = item.get("role"), item.get("content")
    if role not in ROLES:
        found = _short(role) if isinstance(role, str) else _kind(role)
        raise UsageError(f"{where} has the role {found}; it must be one of {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise UsageError(f"{where} must have a string as `content`, not {_kind(content)}")
    return Message(role=role, content=content)


def _read_responses(value: object) -> tuple[str, ...]:
    if not isinstance(value, list | tuple):
        raise UsageError(f"`responses` must be a list of strings, not {_kind(value)}")
    if not value:
        raise UsageError("`responses` is empty; give at least one string")
    for index, item in enumerate(value):
        if not isinstance(item, str):
            raise UsageError(f"`responses[{index}]` must be a string, not {_kind(item)}")
    return tuple(value)


def _read_label(record: Mapping[str, object], count: int) -> Label | None:
    value = record.get("label")
    if value is None:
        near = _nearest("label", record)
        if near is not None:
            raise UsageError(f"unknown key {_short(near)}; did you mean `label`?")
        return None
    if not isinstance(value, Mapping):
        raise UsageError(f"`label` must be an object with `kind`, not {_kind(value)}")
    match value.get("kind"):
        case "best":
            return _read_best(value.get("index"), count)
        case "scores":
            return _read_scores(value.get("values"), count)
        case "pointwise":
            return _read_pointwise(value.get("correct"), count)
        case kind:
            found = _short(kind) if isinstance(kind, str) else _kind(kind)
            raise UsageError(f"`label.kind` is {found}; it must be best, scores or pointwise")


def _read_best(index: object, count: int) -> BestLabel:
    if not isinstance(index, int) or isinstance(index, bool):
        raise UsageError(f"`label.index` must be an integer, not {_kind(index)}")
    if not 0 <= index < count:
        raise UsageError(f"`label.index` is {index}; it must be 0 to {count - 1}")
    return BestLabel(index)


def _read_scores(values: object, count: int) -> ScoresLabel:
    if not isinstance(values, list | tuple):
        raise UsageError(f"`label.values` must be a list of numbers, not {_kind(values)}")
    if len(values) != count:
        raise UsageError(f"`label.values` has {len(values)} numbers for {count} responses")
    return ScoresLabel(tuple(_read_number(value, index) for index, value in enumerate(values)))


def _read_number(value: object, index: int) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UsageError(f"`label.values[{index}]` must be a number, not {_kind(value)}")
    if not abs(value) <= sys.float_info.max:  # so written, it refuses NaN and huge integers too
        raise UsageError(f"`label.values[{index}]` must be finite")
    return value


def _read_pointwise(correct: object, count: int) -> PointwiseLabel:
    if not isinstance(correct, bool):
        raise UsageError(f"`label.correct` must be true or false, not {_kind(correct)}")
    if count != 1:
        raise UsageError(f"a pointwise `label` is for a single response; there are {count}")
    return PointwiseLabel(correct)


def _label_record(label: Label) -> dict[str, object]:
    match label:
        case BestLabel(index):
            return {"kind": "best", "index": index}
        case ScoresLabel(values):
            return {"kind": "scores", "values": list(values)}
        case PointwiseLabel(correct):
            return {"kind": "pointwise", "correct": correct}
        case _:
            assert_never(label)


def _kind(value: object) -> str:
    """Names a value's type in the words of JSON."""
    match value:
        case None:
            return "null"
        case bool():
            return "a boolean"
        case int() | float():
            return "a number"
        case str():
            return "a string"
        case list() | tuple():
            return "a list"
        case Mapping():
            return "an object"
        case _:
            return f"a Python {type(value).__name__}"


def _short(text: str) -> str:
    """Quotes text on one line, cut where it is long."""
    return repr(text if len(text) <= 60 else text[:57] + "...")
