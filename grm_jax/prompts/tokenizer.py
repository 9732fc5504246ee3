"""From text to token ids and back, with the bytes of every token in the open.

A `Tokenizer` is plain data around one function that turns text into ids. The bytes of each token
are listed rather than hidden in a decoder, because the device reads scores from them
(`grm_jax.grammar.token_table`): what `decode` returns on the host and what the automaton sees are
the same bytes by construction.

Control tokens (turn markers, beginning and end of text) never come out of `encode`: text that
spells one is text. Only `grm_jax.prompts.encode_chat` places them, where a chat template wrote
them.

Two kinds are read from the metadata of a GGUF file: byte-level BPE, run by the `tokenizers`
library, and SentencePiece, run by the library of that name.
"""

import difflib
import functools
import re
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, final

import sentencepiece
import tokenizers
from tokenizers import normalizers, pre_tokenizers

from grm_jax.errors import UsageError

# Types of token, as GGUF numbers them; SentencePiece's own numbers are the same.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)

# Tokens that end a turn or a text in any layout, whatever the metadata calls the end.
_ENDS = ("<|im_end|>", "<|endoftext|>", "<end_of_turn>", "<|eot_id|>", "<eos>", "</s>")

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_SPACE_MARK = "\u2581"  # SentencePiece writes a space this way


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Tokenizer:
    """A vocabulary with its encoder.

    Attributes:
      token_bytes: for each of the `V` ids, the bytes it adds to a text; a control token adds its
        spelling.
      control_ids: the ids that stand for structure and never for text.
      bos_id: the token that begins every text, if there is one.
      eos_ids: the tokens that end an answer, the one named in the metadata first.
      add_bos: whether the model expects `bos_id` before everything else.
      chat_template: the Jinja source that lays out a conversation; None for a base model.
      text_encoder: text without lone surrogates to ids, which hold no control token.
    """

    token_bytes: tuple[bytes, ...] = field(repr=False)
    control_ids: frozenset[int] = field(repr=False)
    bos_id: int | None
    eos_ids: tuple[int, ...]
    add_bos: bool
    chat_template: str | None = field(repr=False)
    text_encoder: Callable[[str], list[int]] = field(repr=False)

    @property
    def vocab_size(self) -> int:
        """The number of ids, `V`."""
        return len(self.token_bytes)

    def encode(self, text: str) -> list[int]:
        """Turns plain text into ids: no token is added, and a control token's spelling stays text.

        Half of a surrogate pair, which no encoding can carry, is read as U+FFFD.
        """
        return self.text_encoder(_LONE_SURROGATE.sub("\ufffd", text))

    def decode(self, ids: Sequence[int]) -> str:
        """Joins the bytes of `ids` to text; bytes that are not UTF-8 become U+FFFD."""
        return b"".join([self.token_bytes[index] for index in ids]).decode(errors="replace")

    @functools.cached_property
    def control_tokens(self) -> Mapping[str, int]:
        """The id of each control token by its spelling."""
        return {self.token_bytes[index].decode(): index for index in sorted(self.control_ids)}

    def control_id(self, spelling: str) -> int:
        """Returns the id of the control token spelled so.

        Raises:
          UsageError: if there is none.
        """
        if spelling not in self.control_tokens:
            near = difflib.get_close_matches(spelling, self.control_tokens, n=1)
            hint = f"; the nearest is {near[0]!r}" if near else ""
            raise UsageError(f"the vocabulary has no control token {spelling!r}{hint}")
        return self.control_tokens[spelling]

    @functools.cached_property
    def _control_heads(self) -> re.Pattern[str]:
        """Matches what a control token can begin with."""
        heads = sorted({re.escape(spelling[0]) for spelling in self.control_tokens})
        return re.compile(f"[{''.join(heads)}]" if heads else "(?!)")

    @functools.cached_property
    def _control_sizes(self) -> tuple[int, ...]:
        """The lengths of control tokens, in characters, longest first."""
        return tuple(sorted({len(spelling) for spelling in self.control_tokens}, reverse=True))

    def find_controls(self, text: str) -> Iterator[tuple[int, str]]:
        """Yields where `text` spells a control token, with the longest that starts there.

        They may overlap. Vocabularies have thousands of control tokens but few lengths of them, so
        looking up slices beats a pattern of alternatives; the time is linear in the text.
        """
        for match in self._control_heads.finditer(text):
            start = match.start()
            for size in self._control_sizes:
                spelling = text[start : start + size]
                if spelling in self.control_tokens:
                    yield start, spelling
                    break

    def unfinished_controls(self, text: str) -> Iterator[int]:
        """Yields each place from which on `text` is a control token or the beginning of one."""
        first = max(0, len(text) - max(self._control_sizes, default=0) + 1)
        for match in self._control_heads.finditer(text, first):
            tail = text[match.start() :]
            if any(spelling.startswith(tail) for spelling in self.control_tokens):
                yield match.start()


def tokenizer_from_gguf(fields: Mapping[str, Any]) -> Tokenizer:
    """Builds the tokenizer that a GGUF file describes.

    Args:
      fields: the file's metadata, by name, as plain Python values; of these, `tokenizer.*` are
        read.

    Raises:
      UsageError: if the metadata lacks what the kind of tokenizer needs, contradicts itself, or
        names a kind or a splitting rule unknown here.
    """
    kind = str(fields.get("tokenizer.ggml.model"))
    if kind not in _KINDS:
        known = ", ".join(sorted(_KINDS))
        raise UsageError(f"the GGUF file has tokenizer.ggml.model {kind!r}; known here are {known}")
    vocabulary = _read_vocabulary(fields)
    rules = _KINDS[kind](vocabulary, fields)

    bos = _read_id(fields, "bos_token_id", vocabulary)
    named = [_read_id(fields, f"{name}_token_id", vocabulary) for name in ("eos", "eot", "eom")]
    ends = [index for index in named if index is not None]
    control = {i for i, type_ in enumerate(vocabulary.types) if type_ in (_CONTROL, _UNKNOWN)}
    # Some files list an end of turn as user-defined, which text could spell.
    control.update(
        index
        for index in (bos, *ends)
        if index is not None and vocabulary.types[index] == _USER_DEFINED
    )
    ends += [index for index in sorted(control) if vocabulary.tokens[index] in _ENDS]

    add_bos = fields.get("tokenizer.ggml.add_bos_token")
    if add_bos and bos is None:
        raise UsageError(
            "the GGUF file sets tokenizer.ggml.add_bos_token without tokenizer.ggml.bos_token_id"
        )
    return Tokenizer(
        token_bytes=tuple(
            token.encode() if index in control else rules.spell(index)
            for index, token in enumerate(vocabulary.tokens)
        ),
        control_ids=frozenset(control),
        bos_id=bos,
        eos_ids=tuple(dict.fromkeys(ends)),
        add_bos=bool(rules.add_bos if add_bos is None else add_bos) and bos is not None,
        chat_template=fields.get("tokenizer.chat_template") or None,
        text_encoder=rules.build(frozenset(control)),
    )


class _Vocabulary(NamedTuple):
    """The tokens of a file and their types, one of each an id."""

    tokens: Sequence[str]
    types: Sequence[int]


class _Rules(NamedTuple):
    """What a kind of tokenizer makes of a vocabulary.

    Attributes:
      spell: the bytes of the token with an id, control tokens aside.
      build: the encoder, given the ids that it must never emit.
      add_bos: whether text begins with a token of its own where the file does not say.
    """

    spell: Callable[[int], bytes]
    build: Callable[[frozenset[int]], Callable[[str], list[int]]]
    add_bos: bool


def _read_vocabulary(fields: Mapping[str, Any]) -> _Vocabulary:
    tokens = fields.get("tokenizer.ggml.tokens")
    if not tokens:
        raise UsageError(
            "the GGUF file has no vocabulary: tokenizer.ggml.tokens is missing or empty"
        )
    types = fields.get("tokenizer.ggml.token_type") or [_NORMAL] * len(tokens)
    if len(types) != len(tokens):
        raise UsageError(
            f"the GGUF file has {len(tokens)} tokens and {len(types)} entries in token_type"
        )
    return _Vocabulary(tokens, types)


def _read_id(fields: Mapping[str, Any], name: str, vocabulary: _Vocabulary) -> int | None:
    index = fields.get(f"tokenizer.ggml.{name}")
    if index is None:
        return None
    if not 0 <= index < len(vocabulary.tokens):
        size = len(vocabulary.tokens)
        raise UsageError(
            f"the GGUF file has tokenizer.ggml.{name} {index}, outside its {size} tokens"
        )
    return int(index)


# ---- Byte-level BPE ----


def _split_words(digits: str) -> pre_tokenizers.PreTokenizer:
    """Cuts text into words with a space or mark before them, runs of marks, and white space."""
    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
    rest = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    pieces = pre_tokenizers.Split(tokenizers.Regex(f"{words}|{digits}|{rest}"), behavior="isolated")
    return pre_tokenizers.Sequence(
        [pieces, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


def _split_gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def _split_smollm() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _split_gpt2()])


class _Splitting(NamedTuple):
    """How a family cuts text before merging.

    Attributes:
      cut: makes the first cut of a text.
      compose: whether Unicode is composed (NFC) first.
      whole_words: whether a word in the vocabulary is taken as it is, even where the merges would
        not reach it.
      add_bos: as in `_Rules`.
    """

    cut: Callable[[], pre_tokenizers.PreTokenizer]
    compose: bool = False
    whole_words: bool = False
    add_bos: bool = False


_SPLITTINGS: Mapping[str, _Splitting] = {
    "default": _Splitting(_split_gpt2),
    "gpt-2": _Splitting(_split_gpt2),
    "llama-bpe": _Splitting(lambda: _split_words(r"\p{N}{1,3}"), whole_words=True, add_bos=True),
    "qwen2": _Splitting(lambda: _split_words(r"\p{N}"), compose=True),
    "smollm": _Splitting(_split_smollm),
}


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


def _byte_level_rules(vocabulary: _Vocabulary, fields: Mapping[str, Any]) -> _Rules:
    name = fields.get("tokenizer.ggml.pre", "default")
    if name not in _SPLITTINGS:
        known = ", ".join(sorted(_SPLITTINGS))
        raise UsageError(f"the GGUF file has tokenizer.ggml.pre {name!r}; known here are {known}")
    splitting = _SPLITTINGS[name]
    lines = fields.get("tokenizer.ggml.merges")
    if lines is None:
        raise UsageError("the GGUF file has a byte-level vocabulary without tokenizer.ggml.merges")
    letters = _byte_of_letter()

    def spell(index: int) -> bytes:
        token = vocabulary.tokens[index]
        if vocabulary.types[index] != _USER_DEFINED and letters.keys() >= set(token):
            return bytes([letters[letter] for letter in token])
        return token.encode()

    def build(control: frozenset[int]) -> Callable[[str], list[int]]:
        merges = []
        for line in lines:
            left, _, right = line.partition(" ")
            if not right:
                raise UsageError(f"the GGUF file has a merge that is not two pieces: {line!r}")
            merges.append((left, right))
        ids = {
            token: index for index, token in enumerate(vocabulary.tokens) if index not in control
        }
        try:
            model = tokenizers.models.BPE(
                vocab=ids, merges=merges, ignore_merges=splitting.whole_words
            )
        except Exception as error:  # the library has no exception of its own
            raise UsageError(
                f"the GGUF file's merges do not fit its vocabulary: {error}"
            ) from error
        engine = tokenizers.Tokenizer(model)
        engine.pre_tokenizer = splitting.cut()
        if splitting.compose:
            engine.normalizer = normalizers.NFC()
        engine.add_tokens(
            [
                tokenizers.AddedToken(token, normalized=False)
                for index, token in enumerate(vocabulary.tokens)
                if vocabulary.types[index] == _USER_DEFINED and index not in control
            ]
        )
        return lambda text: engine.encode(text, add_special_tokens=False).ids

    return _Rules(spell, build, splitting.add_bos)


# ---- SentencePiece ----


def _sentencepiece_rules(vocabulary: _Vocabulary, fields: Mapping[str, Any]) -> _Rules:
    tokens, types = vocabulary
    scores = fields.get("tokenizer.ggml.scores")
    if scores is None or len(scores) != len(tokens):
        found = "no scores" if scores is None else f"{len(scores)} scores"
        raise UsageError(f"the GGUF file has {len(tokens)} SentencePiece tokens and {found}")
    unknown = _read_id(fields, "unknown_token_id", vocabulary)
    if unknown is None and _UNKNOWN not in types:
        raise UsageError(
            "the GGUF file has SentencePiece tokens and no tokenizer.ggml.unknown_token_id"
        )
    unknown = types.index(_UNKNOWN) if unknown is None else unknown
    prefix = fields.get("tokenizer.ggml.add_space_prefix", True)

    def spell(index: int) -> bytes:
        if types[index] == _BYTE:
            return bytes([_byte_value(tokens[index])])
        return tokens[index].replace(_SPACE_MARK, " ").encode()

    def build(control: frozenset[int]) -> Callable[[str], list[int]]:
        pieces = []
        for index, (token, score, kind) in enumerate(zip(tokens, scores, types, strict=True)):
            # The library wants exactly one unknown piece; files mark it as control, or several.
            fixed = _UNKNOWN if index == unknown else _CONTROL if index in control else kind
            text = token.replace(" ", _SPACE_MARK) if fixed in (_NORMAL, _USER_DEFINED) else token
            pieces.append(_piece(text, score, fixed))
        model = _model_proto(
            pieces, unknown=unknown, prefix=bool(prefix), bytes_exist=_BYTE in types
        )
        try:
            engine = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, ValueError) as error:
            raise UsageError(
                f"the GGUF file's SentencePiece vocabulary cannot be used: {error}"
            ) from error
        return engine.EncodeAsIds

    return _Rules(spell, build, add_bos=True)


def _byte_value(token: str) -> int:
    """Reads the number in a token such as `<0x0A>`."""
    match = re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", token)
    if match is None:
        raise UsageError(
            f"the GGUF file has a byte token spelled {token!r}; it should look like '<0x0A>'"
        )
    return int(match[1], 16)


# The library loads a vocabulary only as a serialised message. Its generated Python classes demand
# one version of the protobuf package, so the few fields needed are written here in protobuf's wire
# format.


def _varint(value: int) -> bytes:
    """A number in sevens of bits, the lowest first."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _number(tag: int, value: int) -> bytes:
    return _varint(tag << 3) + _varint(value)


def _block(tag: int, content: bytes) -> bytes:
    return _varint(tag << 3 | 2) + _varint(len(content)) + content


def _piece(text: str, score: float, kind: int) -> bytes:
    """`ModelProto.pieces`: text is field 1, score 2 (a 32-bit float), type 3."""
    encoded = text.encode()
    return _block(1, _block(1, encoded) + struct.pack("<Bf", 2 << 3 | 5, score) + _number(3, kind))


def _model_proto(
    pieces: Sequence[bytes], *, unknown: int, prefix: bool, bytes_exist: bool
) -> bytes:
    """`ModelProto` of a BPE model that leaves text as it is, but for a space put first."""
    trainer = (
        _number(3, 2) + _number(4, len(pieces)) + _number(35, bytes_exist) + _number(40, unknown)
    )
    normalizer = _block(1, b"identity") + _number(3, prefix) + _number(4, False) + _number(5, True)
    return b"".join(pieces) + _block(2, trainer) + _block(3, normalizer)


_KINDS: Mapping[str, Callable[[_Vocabulary, Mapping[str, Any]], _Rules]] = {
    "gpt2": _byte_level_rules,
    "llama": _sentencepiece_rules,
}
