"""Tokenizers from the metadata of GGUF files.

Two kinds are known: byte-level BPE, run by the `tokenizers` library, and SentencePiece, run by the
library of that name.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from grm_jax.errors import UsageError
from grm_jax.prompts.hub_tokenizer import hub_files
from grm_jax.prompts.sentencepiece_model import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    bpe_model,
)
from grm_jax.prompts.tokenizer import Tokenizer
from grm_jax.prompts.vocabulary import (
    ENDS,
    SPACE_MARK,
    byte_value,
    letters_to_bytes,
    piece_to_bytes,
)


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
    control = {i for i, type_ in enumerate(vocabulary.types) if type_ in (CONTROL, UNKNOWN)}
    # Some files list an end of turn as user-defined, which text could spell.
    control.update(
        index
        for index in (bos, *ends)
        if index is not None and vocabulary.types[index] == USER_DEFINED
    )
    ends += [index for index in sorted(control) if vocabulary.tokens[index] in ENDS]

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
        files=lambda tokenizer: hub_files(tokenizer, rules.engine(tokenizer.control_ids)),
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
      engine: the whole vocabulary for the `tokenizers` library, given the ids that are control.
      add_bos: whether text begins with a token of its own where the file does not say.
    """

    spell: Callable[[int], bytes]
    build: Callable[[frozenset[int]], Callable[[str], list[int]]]
    engine: Callable[[frozenset[int]], tokenizers.Tokenizer]
    add_bos: bool


def _read_vocabulary(fields: Mapping[str, Any]) -> _Vocabulary:
    tokens = fields.get("tokenizer.ggml.tokens")
    if not tokens:
        raise UsageError(
            "the GGUF file has no vocabulary: tokenizer.ggml.tokens is missing or empty"
        )
    types = fields.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
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


def _byte_level_rules(vocabulary: _Vocabulary, fields: Mapping[str, Any]) -> _Rules:
    name = fields.get("tokenizer.ggml.pre", "default")
    if name not in _SPLITTINGS:
        known = ", ".join(sorted(_SPLITTINGS))
        raise UsageError(f"the GGUF file has tokenizer.ggml.pre {name!r}; known here are {known}")
    splitting = _SPLITTINGS[name]
    lines = fields.get("tokenizer.ggml.merges")
    if lines is None:
        raise UsageError("the GGUF file has a byte-level vocabulary without tokenizer.ggml.merges")
    user_defined = {i for i, type_ in enumerate(vocabulary.types) if type_ == USER_DEFINED}

    def spell(index: int) -> bytes:
        token = vocabulary.tokens[index]
        return token.encode() if index in user_defined else letters_to_bytes(token)

    def engine(
        control: frozenset[int], absent: frozenset[int] = frozenset()
    ) -> tokenizers.Tokenizer:
        merges = []
        for line in lines:
            left, _, right = line.partition(" ")
            if not right:
                raise UsageError(f"the GGUF file has a merge that is not two pieces: {line!r}")
            merges.append((left, right))
        ids = {token: index for index, token in enumerate(vocabulary.tokens) if index not in absent}
        try:
            model = models.BPE(vocab=ids, merges=merges, ignore_merges=splitting.whole_words)
        except Exception as error:  # the library has no exception of its own
            raise UsageError(
                f"the GGUF file's merges do not fit its vocabulary: {error}"
            ) from error
        made = tokenizers.Tokenizer(model)
        made.pre_tokenizer = splitting.cut()
        made.decoder = decoders.ByteLevel()
        if splitting.compose:
            made.normalizer = normalizers.NFC()
        made.add_tokens(
            [
                tokenizers.AddedToken(vocabulary.tokens[index], normalized=False)
                for index in sorted(user_defined - control)
            ]
        )
        return made

    def build(control: frozenset[int]) -> Callable[[str], list[int]]:
        encoder = engine(control, absent=control)
        return lambda text: encoder.encode(text, add_special_tokens=False).ids

    return _Rules(spell, build, engine, splitting.add_bos)


# ---- SentencePiece ----


def _sentencepiece_rules(vocabulary: _Vocabulary, fields: Mapping[str, Any]) -> _Rules:
    tokens, types = vocabulary
    scores = fields.get("tokenizer.ggml.scores")
    if scores is None or len(scores) != len(tokens):
        found = "no scores" if scores is None else f"{len(scores)} scores"
        raise UsageError(f"the GGUF file has {len(tokens)} SentencePiece tokens and {found}")
    unknown = _read_id(fields, "unknown_token_id", vocabulary)
    if unknown is None and UNKNOWN not in types:
        raise UsageError(
            "the GGUF file has SentencePiece tokens and no tokenizer.ggml.unknown_token_id"
        )
    unknown = types.index(UNKNOWN) if unknown is None else unknown
    prefix = bool(fields.get("tokenizer.ggml.add_space_prefix", True))
    # How the library spells them.
    spelled = [
        token.replace(" ", SPACE_MARK) if kind in (NORMAL, USER_DEFINED) else token
        for token, kind in zip(tokens, types, strict=True)
    ]

    def spell(index: int) -> bytes:
        if types[index] != BYTE:
            return piece_to_bytes(tokens[index])
        byte = byte_value(tokens[index])
        if byte is None:
            raise UsageError(
                f"the GGUF file has a byte token spelled {tokens[index]!r}; "
                "it should look like '<0x0A>'"
            )
        return bytes([byte])

    def build(control: frozenset[int]) -> Callable[[str], list[int]]:
        # The library wants exactly one unknown piece; files mark it as control, or several.
        kinds = [CONTROL if index in control else kind for index, kind in enumerate(types)]
        kinds[unknown] = UNKNOWN
        model = bpe_model(
            zip(spelled, scores, kinds, strict=True),
            unknown=unknown,
            prefix=prefix,
            bytes_exist=BYTE in types,
        )
        try:
            engine = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, ValueError) as error:
            raise UsageError(
                f"the GGUF file's SentencePiece vocabulary cannot be used: {error}"
            ) from error
        return engine.EncodeAsIds

    def engine(control: frozenset[int]) -> tokenizers.Tokenizer:
        text_ids = [
            index
            for index, kind in enumerate(types)
            if kind in (NORMAL, USER_DEFINED) and index not in control
        ]
        model = models.BPE(
            vocab={token: index for index, token in enumerate(spelled)},
            merges=_merges({spelled[index]: scores[index] for index in text_ids}),
            unk_token=spelled[unknown],
            fuse_unk=True,
            byte_fallback=BYTE in types,
        )
        made = tokenizers.Tokenizer(model)
        space = normalizers.Replace(" ", SPACE_MARK)
        made.normalizer = (
            normalizers.Sequence([normalizers.Prepend(SPACE_MARK), space]) if prefix else space
        )
        made.decoder = decoders.Sequence(
            [
                decoders.Replace(SPACE_MARK, " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                *([decoders.Strip(" ", 1, 0)] if prefix else []),
            ]
        )
        # Runs of spaces are found after normalising, which a prefix would put before each token.
        made.add_tokens(
            [
                tokenizers.AddedToken(spelled[index], normalized=not prefix)
                for index in text_ids
                if types[index] == USER_DEFINED
            ]
        )
        return made

    return _Rules(spell, build, engine, add_bos=True)


def _merges(scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """The merges in the order in which SentencePiece makes them: the best piece first."""
    return [
        (piece[:cut], piece[cut:])
        for piece in sorted(scores, key=lambda piece: -scores[piece])
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]


_KINDS: Mapping[str, Callable[[_Vocabulary, Mapping[str, Any]], _Rules]] = {
    "gpt2": _byte_level_rules,
    "llama": _sentencepiece_rules,
}
