"""SentencePiece vocabularies, read, changed and written in the form their library loads.

The library loads a vocabulary only as a serialised message. Its generated Python classes demand one
version of the protobuf package, so the few fields needed are handled here in protobuf's wire
format.
"""

import struct
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import sentencepiece

from grm_jax.errors import UsageError
from grm_jax.prompts.vocabulary import (
    SPACE_MARK,
    Encoder,
    Vocabulary,
    byte_value,
    piece_to_bytes,
)

# Types of token. GGUF numbers them alike.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

_VARINT, _BLOCK, _FIXED32 = 0, 2, 5  # wire types
_FIXED_SIZES = {1: 8, _FIXED32: 4}
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3  # fields of `ModelProto`
_TEXT, _SCORE, _KIND = 1, 2, 3  # fields of a piece
_PREFIX = 3  # the field of `NormalizerSpec` that puts a space before a text


class AddedToken(NamedTuple):
    """A token that files beside a model add to its own."""

    content: str
    special: bool


def bpe_model(
    pieces: Iterable[tuple[str, float, int]], *, unknown: int, prefix: bool, bytes_exist: bool
) -> bytes:
    """Writes a BPE model that leaves text as it is, but for a space put first.

    Args:
      pieces: the text, score and type of each id.
      unknown: the id of the unknown piece.
      prefix: whether the space is put first.
      bytes_exist: whether there are pieces of type `BYTE`.
    """
    trainer = _number(3, 2) + _number(35, bytes_exist) + _number(40, unknown)
    normalizer = (
        _block(1, b"identity") + _number(_PREFIX, prefix) + _number(4, False) + _number(5, True)
    )
    return (
        b"".join(_block(_PIECES, _piece(*piece)) for piece in pieces)
        + _block(_TRAINER, trainer)
        + _block(_NORMALIZER, normalizer)
    )


def read_sentencepiece_model(
    source: bytes, added: Mapping[int, AddedToken], name: str
) -> Vocabulary:
    """Reads a `tokenizer.model`.

    Args:
      source: the file.
      added: by id, tokens that are found whole in text; they may be pieces of the model, or follow
        them.
      name: what errors call the file.

    Raises:
      UsageError: if it is no such file.
    """
    _load(source, name)
    pieces = [dict(_fields(content)) for number, content in _fields(source) if number == _PIECES]
    kinds = {index: piece.get(_KIND, NORMAL) for index, piece in enumerate(pieces)}
    ids = {piece[_TEXT].decode(): index for index, piece in enumerate(pieces)}
    ids |= {token.content: index for index, token in added.items()}
    apart = {index for index, kind in kinds.items() if kind in (UNKNOWN, CONTROL)}

    def spell(token: str) -> bytes:
        byte = byte_value(token) if kinds.get(ids[token]) == BYTE else None
        return piece_to_bytes(token) if byte is None else bytes([byte])

    def build(control: frozenset[int]) -> Encoder:
        # The library finds user-defined pieces whole in text, and control pieces never.
        retyped = dict.fromkeys(added, USER_DEFINED) | dict.fromkeys(control, CONTROL)
        model = _retype(source, retyped, added)
        engine = _load(model, name)
        # A block given twice is merged: this one changes one setting of the first.
        later = _load(model + _block(_NORMALIZER, _number(_PREFIX, False)), name)
        opening = [engine.bos_id()] if engine.bos_id() >= 0 else []
        return Encoder(engine.EncodeAsIds, later.EncodeAsIds, opening)

    return Vocabulary(
        ids=ids,
        added=frozenset(apart | added.keys()),
        special=frozenset(apart | {index for index, token in added.items() if token.special}),
        spell=spell,
        build=build,
    )


def _load(model: bytes, name: str) -> sentencepiece.SentencePieceProcessor:
    engine = sentencepiece.SentencePieceProcessor()
    try:
        engine.LoadFromSerializedProto(model)
    except RuntimeError as error:
        raise UsageError(f"{name} is not a SentencePiece model: {error}") from error
    return engine


def _retype(source: bytes, kinds: Mapping[int, int], added: Mapping[int, AddedToken]) -> bytes:
    """The model with other types of pieces, and with pieces for the added tokens that follow it."""
    out = []
    index = 0
    for number, content in _fields(source):
        if number == _PIECES:
            # There has to be one unknown piece. Of a field given twice the last value counts.
            if index in kinds and dict(_fields(content)).get(_KIND) != UNKNOWN:
                content += _number(_KIND, kinds[index])
            index += 1
        out.append(_block(number, content))
    for follower in range(index, max(kinds, default=-1) + 1):
        kind = kinds.get(follower, CONTROL)
        # Control pieces are never looked for, but no two pieces may be spelled alike.
        text = added[follower].content if kind == USER_DEFINED else f"\1{follower}"
        out.append(_block(_PIECES, _piece(text.replace(" ", SPACE_MARK), 0.0, kind)))
    return b"".join(out)


# ---- Protobuf's wire format ----


def _varint(value: int) -> bytes:
    """A number in sevens of bits, the lowest first."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _number(tag: int, value: int) -> bytes:
    return _varint(tag << 3 | _VARINT) + _varint(value)


def _block(tag: int, content: bytes) -> bytes:
    return _varint(tag << 3 | _BLOCK) + _varint(len(content)) + content


def _piece(text: str, score: float, kind: int) -> bytes:
    header = struct.pack("<Bf", _SCORE << 3 | _FIXED32, score)
    return _block(_TEXT, text.encode()) + header + _number(_KIND, kind)


def _read_varint(message: bytes, at: int) -> tuple[int, int]:
    """The number that starts at a place, and where it ends."""
    value = shift = 0
    while message[at] > 0x7F:
        value |= (message[at] & 0x7F) << shift
        shift += 7
        at += 1
    return value | message[at] << shift, at + 1


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Yields the number of each field, and its content: an integer, or bytes."""
    at = 0
    while at < len(message):
        tag, at = _read_varint(message, at)
        size = _FIXED_SIZES.get(tag & 7)
        if size is None:  # the number itself, or the length of a block
            size, at = _read_varint(message, at)
        if tag & 7 == _VARINT:
            yield tag >> 3, size
        else:
            yield tag >> 3, message[at : at + size]
            at += size
