"""Headers of GGUF files: their metadata, and where their tensors lie.

The `gguf` package reads them too, but makes an array of each text, which takes seconds for the
vocabulary of a small model; its quantised blocks are read by it all the same. The format is that of
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import math
import mmap
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np

_TEXT, _ARRAY = 8, 9
# Of kinds of values by their numbers, as `struct` and NumPy name them.
_NUMBERS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
_VERSIONS = (2, 3)
_ALIGNMENT = 32


class Tensor(NamedTuple):
    """A tensor in a file.

    Attributes:
      shape: Its sizes, the slowest axis first.
      kind: How it is quantised.
      offset: Its first byte in the file.
      size: How many bytes it has.
    """

    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType
    offset: int
    size: int


def read_header(path: Path) -> tuple[Mapping[str, Any], Mapping[str, Tensor]]:
    """The metadata and the tensors of a file, by their names.

    Raises:
      ValueError: It is no GGUF file, or its header cannot be read.
    """
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
    ):
        try:
            return _read(_Cursor(data))
        except struct.error:
            raise ValueError("it ends within its header") from None


class _Cursor:
    """Reads one value after another."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.at = 0

    def number(self, kind: str) -> Any:
        (value,) = struct.unpack_from("<" + kind, self.data, self.at)
        self.at += struct.calcsize(kind)
        return value

    def texts(self, count: int) -> list[str]:
        # Each has its length before it; this is the one place where many are read.
        data, at, length_at = self.data, self.at, struct.Struct("<Q").unpack_from
        found = []
        for _ in range(count):
            (length,) = length_at(data, at)
            at += 8 + length
            found.append(str(data[at - length : at], "utf-8"))
        if at > len(data):
            raise ValueError("it ends within a text")
        self.at = at
        return found

    def value(self, kind: int) -> Any:
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind == _TEXT:
            return self.texts(1)[0]
        if kind != _ARRAY:
            raise ValueError(f"{kind} is no kind of value")
        inner, count = self.number("I"), self.number("Q")
        if inner == _TEXT:
            return self.texts(count)
        if inner not in _NUMBERS:
            raise ValueError(f"{inner} is no kind of value in an array")
        values = np.frombuffer(self.data, "<" + _NUMBERS[inner], count, self.at)
        self.at += values.nbytes
        return values.tolist()


def _read(cursor: _Cursor) -> tuple[Mapping[str, Any], Mapping[str, Tensor]]:
    if bytes(cursor.data[:4]) != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    cursor.at = 4
    version = cursor.number("I")
    if version not in _VERSIONS:
        raise ValueError(f"version {version} is not among {_VERSIONS}")
    tensors, fields = cursor.number("Q"), cursor.number("Q")
    metadata: dict[str, Any] = {}
    for _ in range(fields):
        (name,) = cursor.texts(1)
        if name in metadata:
            raise ValueError(f"field {name} is there twice")
        metadata[name] = cursor.value(cursor.number("I"))
    listed: dict[str, tuple[tuple[int, ...], int, int]] = {}
    for _ in range(tensors):
        (name,) = cursor.texts(1)
        # The fastest axis comes first.
        sizes = [cursor.number("Q") for _ in range(cursor.number("I"))]
        if name in listed:
            raise ValueError(f"tensor {name} is there twice")
        listed[name] = tuple(reversed(sizes)), cursor.number("I"), cursor.number("Q")
    alignment = metadata.get("general.alignment", _ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"general.alignment is {alignment!r}")
    begin = -(-cursor.at // alignment) * alignment
    return metadata, {name: _tensor(*what, begin) for name, what in listed.items()}


def _tensor(shape: tuple[int, ...], number: int, offset: int, begin: int) -> Tensor:
    kind = gguf.GGMLQuantizationType(number)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    if not shape or shape[-1] % block:
        raise ValueError(f"a tensor of {kind.name} has shape {shape}, but blocks of {block}")
    return Tensor(shape, kind, begin + offset, math.prod(shape) // block * size)
