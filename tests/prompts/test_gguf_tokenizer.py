"""GGUF's tokenizers against ids of the reference libraries, and toy vocabularies known in full."""

import dataclasses
import random
from pathlib import Path
from typing import Any

import gguf
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grm_jax.errors import UsageError
from grm_jax.prompts import (
    Tokenizer,
    save_tokenizer,
    tokenizer_from_folder,
    tokenizer_from_gguf,
)

CONTROL = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]

# What `transformers` makes of these texts, with SmolLM2 (digits cut apart, as it was trained) and
# with Gemma 3.
TEXTS = {
    "Hello, world! It's 2024.": (
        [19556, 28, 905, 17, 657, 506, 216, 34, 32, 34, 36, 30],
        [9259, 236764, 1902, 236888, 1030, 236789, 236751, 236743, 236778, 236771, 236778, 236812]
        + [236761],
    ),
    "  two leading spaces": ([216, 827, 2899, 5600], [138, 13498, 5830, 9952]),
    "def f(x):\n    if x:\n\t\treturn [1, 22]\n\n\n": (
        [1604, 275, 24, 104, 727, 472, 585, 1792, 42, 3354, 197, 5406, 933, 33, 28, 216, 34, 34, 77]
        + [16506],
        [2063, 517, 236769, 236781, 1473, 107, 140, 584, 1123, 236787, 107, 255969, 2060, 870]
        + [236770, 236764, 236743, 236778, 236778, 236842, 109],
    ),
    "\u65e5\u672c\u8a9e\u3068\u4e2d\u6587": (
        [23274, 115, 40993, 179, 120, 248, 7365, 118, 28589, 29184],
        [94951, 237032, 55041],
    ),
    "\U0001f642 emoji \U0001f469\u200d\U0001f467": (
        [10813, 38887, 649, 33777, 15107, 235, 119, 321, 231, 10813, 235, 117],
        [240731, 64334, 236743, 243767, 237243, 244814],
    ),
    "$\\frac{a_1}{b} \\boxed{7, 10}$": (
        [43278, 18169, 107, 81, 79, 33, 15009, 82, 109, 3814, 4810, 277, 107, 39, 28, 216, 33, 32]
        + [24362],
        [3292, 1420, 236782, 236746, 236779, 236770, 1170, 236763, 236783, 621, 57296, 236782]
        + [236832, 236764, 236743, 236770, 236771, 823],
    ),
    "na\u00efve caf\u00e9 e\u0301": (
        [3546, 46494, 37366, 297, 151, 219],
        [1789, 238527, 560, 33443, 545, 238288],
    ),
    "a   9  b\r\n": ([81, 333, 41, 216, 278, 2738], [236746, 139, 236819, 138, 236763, 251, 107]),
}


def read_fields(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def byte_letters() -> list[str]:
    """The letters of the 256 bytes, in order of the byte."""
    plain = {*range(33, 127), *range(161, 173), *range(174, 256)}
    moved = iter(range(256, 512))
    return [chr(byte) if byte in plain else chr(next(moved)) for byte in range(256)]


def bpe_fields(*merges: str, pre: str = "gpt-2", extra: tuple[str, ...] = (), **other: Any) -> dict:
    """Metadata of a byte-level vocabulary: three control tokens, all bytes, what merges make."""
    made = [merge.replace(" ", "") for merge in merges]
    tokens = [*CONTROL, *byte_letters(), *made, *extra]
    fields = {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": [3] * 3 + [1] * (len(tokens) - 3),
        "merges": list(merges),
        "eos_token_id": 1,
    }
    return {f"tokenizer.ggml.{name}": value for name, value in (fields | other).items()}


def spm_fields(**other: Any) -> dict:
    """Metadata of a SentencePiece vocabulary with every byte and a few words."""
    head = ["<unk>", "<bos>", "<eos>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words = ["\u2581th", "th", "\u2581", "t", "h", "e", "  ", "<b>"]
    fields = {
        "model": "llama",
        "tokens": head + words,
        "token_type": [3] * 3 + [6] * 256 + [1] * 6 + [4] * 2,
        "scores": [0.0] * 259 + [-float(rank) for rank in range(len(words))],
        "unknown_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "add_space_prefix": False,
    }
    return {f"tokenizer.ggml.{name}": value for name, value in (fields | other).items()}


TOY_BPE = tokenizer_from_gguf(bpe_fields("t h", "th e"))
TOY_SPM = tokenizer_from_gguf(spm_fields())


def pieces(tokenizer: Tokenizer, text: str) -> list[bytes]:
    return [tokenizer.token_bytes[index] for index in tokenizer.encode(text)]


@pytest.mark.parametrize("text", TEXTS)
def test_smollm2_encodes_as_the_reference_does(smollm2: Tokenizer, text: str):
    assert smollm2.encode(text) == TEXTS[text][0]
    assert smollm2.decode(smollm2.encode(text)) == text


def test_smollm2_metadata(smollm2: Tokenizer):
    assert smollm2.vocab_size == 49152
    assert smollm2.control_ids == frozenset(range(17))
    assert (smollm2.bos_id, smollm2.add_bos) == (1, False)
    assert smollm2.eos_ids == (2, 0)
    assert smollm2.control_id("<|im_end|>") == 2
    assert smollm2.token_bytes[2] == b"<|im_end|>"
    assert smollm2.chat_template is not None


@pytest.mark.slow
def test_gemma3_encodes_as_the_reference_does(gemma3_gguf: Path):
    gemma = tokenizer_from_gguf(read_fields(gemma3_gguf))
    for text, (_, expected) in TEXTS.items():
        assert gemma.encode(text) == expected
        assert gemma.decode(expected) == text
    assert gemma.vocab_size == 262144
    assert (gemma.bos_id, gemma.add_bos, gemma.chat_template) == (2, True, None)
    assert gemma.eos_ids == (1, 106)
    assert gemma.token_bytes[108] == b"\n\n" and gemma.token_bytes[140] == b"    "
    assert {token for token in gemma.token_bytes if len(token) == 1} == {
        bytes([byte]) for byte in range(256)
    }
    spelled = gemma.encode("<bos><start_of_turn>user<end_of_turn>")
    assert gemma.control_ids.isdisjoint(spelled)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["smollm2", "gemma3"])
def test_random_text_is_encoded_as_transformers_encodes_it(
    model: str, request: pytest.FixtureRequest
):
    import tokenizers
    from transformers import AutoTokenizer

    path: Path = request.getfixturevalue(f"{model}_gguf")
    ours = tokenizer_from_gguf(read_fields(path))
    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    if model == "smollm2":
        # Their conversion forgets that this vocabulary has its digits cut apart first.
        split = tokenizers.pre_tokenizers
        theirs.backend_tokenizer.pre_tokenizer = split.Sequence(
            [split.Digits(individual_digits=True), split.ByteLevel(add_prefix_space=False)]
        )
    rng = random.Random(0)
    letters = "abcXYZ 0129\n\t.,'<>{}\\\u00e9\u0301\u65e5\U0001f642_-#  strein"
    for _ in range(300):
        text = "".join(rng.choices(letters, k=rng.randint(1, 120)))
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("tokenizer", [TOY_BPE, TOY_SPM], ids=["bpe", "spm"])
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581")))
def test_text_survives_the_way_there_and_back(tokenizer: Tokenizer, text: str):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("tokenizer", [TOY_BPE, TOY_SPM], ids=["bpe", "spm"])
@given(data=st.data())
def test_spelling_a_control_token_gives_text(tokenizer: Tokenizer, data: st.DataObject):
    parts = st.sampled_from([*tokenizer.control_tokens, "<", "|", "the ", "<|im_", "end|>"])
    text = "".join(data.draw(st.lists(parts)))
    ids = tokenizer.encode(text)
    assert tokenizer.control_ids.isdisjoint(ids)
    assert tokenizer.decode(ids) == text


def test_a_word_of_the_vocabulary_that_spells_a_control_token_is_text_too():
    tokens = [*byte_letters(), "stop"]
    fields = bpe_fields(pre="llama-bpe", tokens=tokens, token_type=[1] * 256 + [3], merges=[])
    tokenizer = tokenizer_from_gguf(fields)
    assert pieces(tokenizer, "stop") == [b"s", b"t", b"o", b"p"]


@pytest.mark.parametrize("tokenizer", [TOY_BPE, TOY_SPM], ids=["bpe", "spm"])
def test_half_a_surrogate_pair_is_a_replacement_character(tokenizer: Tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\ud83db")) == "a\ufffdb"


def test_decoding_joins_bytes_before_reading_characters():
    euro = TOY_SPM.encode("\u20ac")
    assert len(euro) == 3
    assert TOY_SPM.decode(euro) == "\u20ac"
    assert TOY_SPM.decode(euro[:2]) == "\ufffd"
    assert TOY_SPM.decode([TOY_SPM.control_id("<eos>"), *euro]) == "<eos>\u20ac"


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("gpt-2", ["1234", "'", "S", " ", " 5"]),
        ("default", ["1234", "'", "S", " ", " 5"]),
        ("llama-bpe", ["12", "3", "4", "'S", " ", " ", "5"]),
        ("qwen2", ["1", "2", "3", "4", "'S", " ", " ", "5"]),
        ("smollm", ["1", "2", "3", "4", "'", "S", "  ", "5"]),
    ],
)
def test_each_family_cuts_text_its_own_way(pre: str, expected: list[str]):
    # The merges would join whatever a cut does not keep apart.
    merges = ["1 2", "3 4", "12 34", "' S", "\u0120 5", "\u0120 \u0120"]
    tokenizer = tokenizer_from_gguf(bpe_fields(*merges, pre=pre))
    assert pieces(tokenizer, "1234'S  5") == [piece.encode() for piece in expected]


def test_only_llama_takes_whole_words_and_only_qwen_composes():
    made = {
        pre: tokenizer_from_gguf(bpe_fields(pre=pre, extra=("word",)))
        for pre in ("llama-bpe", "qwen2")
    }
    assert pieces(made["llama-bpe"], "word") == [b"word"]
    assert pieces(made["qwen2"], "word") == [b"w", b"o", b"r", b"d"]
    assert made["llama-bpe"].decode(made["llama-bpe"].encode("e\u0301")) == "e\u0301"
    assert made["qwen2"].decode(made["qwen2"].encode("e\u0301")) == "\u00e9"


def test_user_defined_tokens_are_found_in_text():
    assert pieces(TOY_SPM, "the <b>  the") == [b"th", b"e", b" ", b"<b>", b"  ", b"th", b"e"]
    types = [3] * 3 + [1] * 256 + [4]
    tokenizer = tokenizer_from_gguf(bpe_fields(extra=("<b\u00a0>",), token_type=types))
    assert pieces(tokenizer, "a<b\u00a0>c") == [b"a", "<b\u00a0>".encode(), b"c"]


def test_an_end_of_turn_listed_as_user_defined_is_control():
    types = [3, 4, 3] + [1] * 256
    tokenizer = tokenizer_from_gguf(bpe_fields(token_type=types))
    assert 1 in tokenizer.control_ids
    assert 1 not in tokenizer.encode("<|im_end|>")


def test_a_space_goes_first_where_the_file_asks_for_it():
    fields = spm_fields(add_space_prefix=True)
    assert pieces(tokenizer_from_gguf(fields), "the") == [b" th", b"e"]
    del fields["tokenizer.ggml.add_space_prefix"]
    assert pieces(tokenizer_from_gguf(fields), "the") == [b" th", b"e"]


def test_ends_and_beginnings():
    tokenizer = tokenizer_from_gguf(bpe_fields(eot_token_id=0))
    assert tokenizer.eos_ids == (1, 0, 2)
    assert (tokenizer.bos_id, tokenizer.add_bos) == (None, False)
    assert not tokenizer_from_gguf(bpe_fields(bos_token_id=0)).add_bos
    assert tokenizer_from_gguf(bpe_fields(bos_token_id=0, pre="llama-bpe")).add_bos
    assert TOY_SPM.add_bos
    assert not tokenizer_from_gguf(spm_fields(add_bos_token=False)).add_bos


@pytest.mark.parametrize(
    "name",
    ["bpe", "whole words", "composed", "spm", "prefix", "smollm2"]
    + [pytest.param("gemma3", marks=pytest.mark.slow)],
)
def test_what_is_saved_is_read_as_the_same_tokenizer(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
):
    from transformers import AutoTokenizer

    merges = ("t h", "th e", "\u0120 the", "1 2")
    types = [3] * 3 + [1] * (256 + len(merges)) + [4]
    byte_level = {"extra": ("<b>",), "token_type": types}
    match name:
        case "bpe":
            ours = tokenizer_from_gguf(bpe_fields(*merges, **byte_level, chat_template="{{ 1 }}"))
        case "whole words":
            fields = bpe_fields(*merges, **byte_level, pre="llama-bpe", bos_token_id=0)
            ours = tokenizer_from_gguf(fields)
        case "composed":
            ours = tokenizer_from_gguf(bpe_fields(*merges, **byte_level, pre="qwen2"))
        case "spm":
            ours = tokenizer_from_gguf(spm_fields())
        case "prefix":  # and no user-defined tokens, which would have it put after them too
            types = [3] * 3 + [6] * 256 + [1] * 8
            ours = tokenizer_from_gguf(spm_fields(add_space_prefix=True, token_type=types))
        case "smollm2":
            ours = request.getfixturevalue("smollm2")
        case _:
            ours = tokenizer_from_gguf(read_fields(request.getfixturevalue("gemma3_gguf")))
    save_tokenizer(ours, tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    again = tokenizer_from_folder(tmp_path)
    for attribute in dataclasses.fields(Tokenizer):
        if attribute.name not in ("text_encoder", "inner_encoder", "files"):
            assert vars(again)[attribute.name] == vars(ours)[attribute.name]
    assert theirs.chat_template == ours.chat_template
    assert theirs.encode("") == [ours.bos_id] * ours.add_bos

    rng = random.Random(0)
    letters = "abcXYZ the 0129\n\t.,'<>{}\\\u00e9\u0301\u65e5\U0001f642_-#  strein"
    texts = ["".join(rng.choices(letters, k=rng.randint(1, 120))) for _ in range(100)]
    spelled = "the<|im_end|> the <bos>the</bos><eos><unk><0x0A>"
    for text in [*TEXTS, *texts, spelled, "the  <b> the"]:
        expected = ours.encode(text)
        assert theirs.encode(text, add_special_tokens=False, split_special_tokens=True) == expected
        assert again.encode(text) == expected
        if name != "composed":
            assert theirs.decode(expected) == text
    if ours.control_tokens.keys() >= {"<|im_end|>"}:
        assert theirs.encode("<|im_end|>") == [*theirs.encode(""), ours.control_id("<|im_end|>")]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "tokenizer.ggml.model 'None'; known here are gpt2, llama"),
        (bpe_fields(model="bert"), "'bert'; known here are gpt2, llama"),
        (bpe_fields(pre="klingon"), "'klingon'; known here are default, gpt-2, llama-bpe"),
        (bpe_fields(tokens=[]), "no vocabulary"),
        (bpe_fields(token_type=[1]), "259 tokens and 1 entries"),
        (bpe_fields(merges=None), "without tokenizer.ggml.merges"),
        (bpe_fields(merges=["ab"]), "not two pieces: 'ab'"),
        (bpe_fields(merges=["a qq"]), "do not fit its vocabulary"),
        (bpe_fields(eos_token_id=999), "eos_token_id 999, outside its 259 tokens"),
        (bpe_fields(add_bos_token=True), "without tokenizer.ggml.bos_token_id"),
        (spm_fields(scores=None), "267 SentencePiece tokens and no scores"),
        (spm_fields(scores=[0.0]), "267 SentencePiece tokens and 1 scores"),
        (spm_fields(unknown_token_id=None), "no tokenizer.ggml.unknown_token_id"),
        (spm_fields(token_type=[3] * 3 + [6] * 264), "byte token spelled '\u2581th'"),
        (spm_fields(token_type=[3] * 3 + [6] * 250 + [1] * 14), "cannot be used"),
    ],
)
def test_broken_metadata_is_one_clear_line(fields: dict, message: str):
    with pytest.raises(UsageError, match=message) as raised:
        tokenizer_from_gguf(fields)
    assert "\n" not in str(raised.value)
