"""Reads the text of a compiled module: its computations, their instructions, and who takes part."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, final

import numpy as np

_BITS = {"pred": 8, "token": 0, "opaque": 0, "c64": 64, "c128": 128, "bf16": 16}
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<= ]*)\](\{[^{}]*\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%([\w.\-]+) = ")
_COMPUTATION = re.compile(r"^(ENTRY )?%([\w.\-]+) .*\{$")
_COMMENT = re.compile(r"/\*.*?\*/")


class Array(NamedTuple):
    """An array of a value's type.

    Attributes:
      dtype: As HLO writes it.
      shape: Its sizes.
      fast: Whether it lies in another memory than the main one.
    """

    dtype: str
    shape: tuple[int, ...]
    fast: bool

    @property
    def size(self) -> int:
        """Bytes."""
        digits = re.search(r"\d+", self.dtype)
        bits = _BITS.get(self.dtype, int(digits[0]) if digits else 0)
        return math.ceil(math.prod(self.shape) * bits / 8)


@final
@dataclass(frozen=True, kw_only=True)
class Instruction:
    """A line of a computation.

    Attributes:
      name: Without the percent sign.
      opcode: What it does.
      arrays: What it gives; several for a tuple.
      operands: Names of what it takes.
      attributes: The rest of the line.
      root: Whether it is what the computation gives.
    """

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    attributes: str
    root: bool

    def called(self, *keys: str) -> tuple[str, ...]:
        """The computations that an attribute names."""
        found: list[str] = []
        for key in keys:
            match = re.search(rf"\b{key}=(\{{[^}}]*\}}|%[\w.\-]+)", self.attributes)
            if match:
                found += _NAME.findall(match[1])
        return tuple(found)

    def numbers(self, key: str) -> tuple[int, ...]:
        """The integers that an attribute lists."""
        match = re.search(rf"\b{key}=\{{([\d,]*)\}}", self.attributes)
        return tuple(int(number) for number in match[1].split(",") if number) if match else ()


Computation = tuple[Instruction, ...]


def parse(text: str) -> tuple[Mapping[str, Computation], str]:
    """The computations of a module by name, and the name of the one that it begins with."""
    computations: dict[str, Computation] = {}
    entry, name, lines = "", "", list[Instruction]()
    for line in text.splitlines():
        if (head := _COMPUTATION.match(line)) is not None:
            name, lines = head[2], []
            entry = name if head[1] else entry
        elif line == "}":  # some attributes have lines of their own, which begin alike
            computations[name] = tuple(lines)
        elif (found := _INSTRUCTION.match(line)) is not None:
            lines.append(_instruction(found, _COMMENT.sub("", line[found.end() :])))
    return computations, entry


def arrays_of(text: str) -> tuple[Array, ...]:
    """The arrays of a type, as HLO writes it."""
    return tuple(
        Array(
            dtype,
            tuple(int(size.strip("<= ")) for size in sizes.split(",") if size.strip()),
            "S(" in (layout or ""),
        )
        for dtype, sizes, layout in _ARRAY.findall(text)
    )


def _instruction(head: re.Match[str], rest: str) -> Instruction:
    kind, rest = _split(rest) if rest.startswith("(") else rest.split(" ", 1)
    opcode, _, rest = rest.strip().partition("(")
    operands, attributes = _split("(" + rest)
    # What stands in the parentheses of these is a number.
    plain = opcode in ("constant", "parameter")
    return Instruction(
        name=head[2],
        opcode=opcode,
        arrays=arrays_of(kind),
        operands=() if plain else tuple(_NAME.findall(operands)),
        attributes=operands + attributes if plain else attributes,
        root=head[1] is not None,
    )


def _split(text: str) -> tuple[str, str]:
    """What is in the leading parentheses, with them, and what follows."""
    depth, quoted = 0, False
    for place, letter in enumerate(text):
        if letter == '"':
            quoted = not quoted
        elif not quoted and letter == "(":
            depth += 1
        elif not quoted and letter == ")":
            depth -= 1
            if not depth:
                return text[: place + 1], text[place + 1 :]
    return text, ""


def replica_groups(attributes: str) -> Iterator[tuple[int, ...]]:
    """The groups of chips of a collective, from any of three ways of writing them."""
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", attributes)
    if mesh is not None:
        names = re.findall(r"'([^']*)'=(\d+)", mesh[1])
        sizes = [int(size) for _, size in names]
        inside = set(re.findall(r"'([^']*)'", mesh[2]))
        outer = [axis for axis, (name, _) in enumerate(names) if name not in inside]
        inner = [axis for axis, (name, _) in enumerate(names) if name in inside]
        each = math.prod(sizes[axis] for axis in inner)
        yield from _grouped(sizes, [*outer, *inner], each)
        return
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
    if iota is not None:
        _, each = (int(size) for size in iota[1].split(","))
        sizes = [int(size) for size in iota[2].split(",")]
        axes = [int(axis) for axis in iota[3].split(",")] if iota[3] else list(range(len(sizes)))
        yield from _grouped(sizes, axes, each)
        return
    written = re.search(r"replica_groups=\{(.*?)\}\}", attributes)
    if written is not None:
        yield from listed(written[1] + "}")


def _grouped(sizes: Sequence[int], axes: Sequence[int], each: int) -> Iterator[tuple[int, ...]]:
    """The numbers from 0 in an array of these sizes, read with its axes in another order."""
    order = np.arange(math.prod(sizes)).reshape(sizes).transpose(axes)
    yield from map(tuple, order.reshape(-1, each).tolist())


def listed(text: str) -> list[tuple[int, ...]]:
    """Groups of numbers that are written out, as `{0,1},{2,3}`."""
    return [
        tuple(int(number) for number in group.split(",") if number)
        for group in re.findall(r"\{([\d,]*)\}", text)
    ]
