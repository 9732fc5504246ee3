"""How vocabularies spell bytes, and what all readers of tokenizers have in common."""

import functools
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

ENDS = ("<|im_end|>", "<|endoftext|>", "<end_of_turn>", "<|eot_id|>", "<eos>", "</s>")
"""Tokens that end a turn or a text in any layout, whatever a file calls the end."""

SPACE_MARK = "\u2581"
"""How SentencePiece writes a space."""


class Encoder(NamedTuple):
    """Turns text into ids.

    Attributes:
      encode: text to ids that hold no control token.
      inner: the same for text after a control token.
      opening: the ids that the file itself puts around an empty text.
    """

    encode: Callable[[str], list[int]]
    inner: Callable[[str], list[int]]
    opening: list[int]


class Vocabulary(NamedTuple):
    """The entries of a tokenizer's file.

    Attributes:
      ids: the id of each token by its spelling in the file.
      added: the ids of tokens that were added to those of the model and are found whole in text.
      special: of these, the ids that the file sets apart from text.
      spell: the bytes of the token spelled so, where it is text.
      build: the encoder, given the ids that it must never emit.
    """

    ids: Mapping[str, int]
    added: frozenset[int]
    special: frozenset[int]
    spell: Callable[[str], bytes]
    build: Callable[[frozenset[int]], Encoder]


@functools.cache
def _byte_of_letter() -> Mapping[str, int]:
    """The byte that each letter of a byte-level vocabulary stands for.

    Printable bytes of Latin-1 stand for themselves; the others take the code points from 256 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + i): byte for i, byte in enumerate(rest)
    }


def letters_to_bytes(token: str) -> bytes:
    """The bytes of a token of a byte-level vocabulary; one that has other letters is plain text."""
    letters = _byte_of_letter()
    if letters.keys() >= set(token):
        return bytes([letters[letter] for letter in token])
    return token.encode()


def piece_to_bytes(token: str) -> bytes:
    """The bytes of a SentencePiece token that stands for text."""
    return token.replace(SPACE_MARK, " ").encode()


def byte_value(token: str) -> int | None:
    """The byte that a token such as `<0x0A>` stands for; None where it is spelled otherwise."""
    match = re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", token)
    return int(match[1], 16) if match else None
