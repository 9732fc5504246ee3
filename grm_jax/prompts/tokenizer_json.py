"""The file `tokenizer.json`: how the `tokenizers` library writes down a tokenizer.

That library can be told to leave alone the control tokens that a text spells, but a model whose own
vocabulary holds one may still merge its way to it. So control tokens are taken out of the file
before the library reads it.
"""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import tokenizers

from grm_jax.errors import UsageError
from grm_jax.prompts.vocabulary import (
    SPACE_MARK,
    Encoder,
    Vocabulary,
    byte_value,
    letters_to_bytes,
    piece_to_bytes,
)


def read_tokenizer_json(source: bytes, name: str) -> Vocabulary:
    """Reads a `tokenizer.json` with byte-pair encoding, byte-level or like SentencePiece's.

    Args:
      source: the file.
      name: what errors call it.

    Raises:
      UsageError: if it is no such file; building the encoder may raise it too.
    """
    try:
        file = json.loads(source)
        model = file["model"]
        added = {token["content"]: token for token in file.get("added_tokens") or ()}
        ids = {content: int(token["id"]) for content, token in added.items()} | dict(model["vocab"])
        special = {ids[content] for content, token in added.items() if token["special"]}
        steps = _steps(file.get("pre_tokenizer"), "pretokenizers")
        steps += _steps(file.get("decoder"), "decoders")
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{name} is not a tokenizer: {_line(error)}") from error
    if "merges" not in model:
        raise UsageError(f"{name} has a model of type {model.get('type')}; known here is only BPE")

    def build(control: frozenset[int]) -> Encoder:
        try:
            text = json.dumps(_without(control, file, ids))
            first = tokenizers.Tokenizer.from_str(text)
            # The quotes tell the setting from a token spelled like it, where they are escaped.
            later_text = text.replace('"prepend_scheme": "first"', '"prepend_scheme": "never"')
            later = first if later_text == text else tokenizers.Tokenizer.from_str(later_text)
        except Exception as error:  # the library has no exception of its own
            raise UsageError(f"{name} is not a tokenizer: {_line(error)}") from error
        return Encoder(
            encode=lambda text: first.encode(text, add_special_tokens=False).ids,
            inner=lambda text: later.encode(text, add_special_tokens=False).ids,
            opening=first.encode("").ids,
        )

    return Vocabulary(
        ids=ids,
        added=frozenset(ids[content] for content in added),
        special=frozenset(special),
        spell=_speller(steps, added, name),
        build=build,
    )


def _line(error: Exception) -> str:
    """What went wrong, in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def _steps(part: Mapping[str, Any] | None, inner: str) -> list[Mapping[str, Any]]:
    """The steps of a pre-tokenizer or decoder, which may be a sequence of others."""
    if part is None:
        return []
    if part["type"] == "Sequence":
        return [step for each in part[inner] for step in _steps(each, inner)]
    return [part]


def _speller(
    steps: Sequence[Mapping[str, Any]], added: Collection[str], name: str
) -> Callable[[str], bytes]:
    """How to read the bytes of a token that is text, by the steps that cut and join text."""
    types = {step["type"] for step in steps}
    if "ByteLevel" in types:
        return lambda token: token.encode() if token in added else letters_to_bytes(token)
    if "Metaspace" not in types and {"String": SPACE_MARK} not in (s.get("pattern") for s in steps):
        raise UsageError(
            f"{name} is neither byte-level nor like SentencePiece's: its steps are "
            + (", ".join(sorted(types)) or "none")
        )

    def spell(token: str) -> bytes:
        byte = byte_value(token) if "ByteFallback" in types else None
        return piece_to_bytes(token) if byte is None else bytes([byte])

    return spell


def _without(
    control: frozenset[int], file: Mapping[str, Any], ids: Mapping[str, int]
) -> Mapping[str, Any]:
    """The file without some of its tokens, or anything that would change or shorten a text.

    Added tokens join the model's vocabulary, so that they keep their ids.
    """
    model = file["model"]
    removed = {content for content, index in ids.items() if index in control}

    def reaches(merge: str | Sequence[str]) -> bool:
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        return not removed.isdisjoint((left, right, left + right))

    kept = {content: index for content, index in ids.items() if content not in removed}
    unknown = model.get("unk_token")  # the model asks for it, and no text leads there
    return {
        **file,
        "truncation": None,
        "padding": None,
        "added_tokens": [
            token for token in file.get("added_tokens") or () if token["content"] in kept
        ],
        "model": {
            **model,
            "dropout": None,
            "vocab": kept if unknown is None else kept | {unknown: ids[unknown]},
            "merges": [merge for merge in model["merges"] if not reaches(merge)],
        },
    }
