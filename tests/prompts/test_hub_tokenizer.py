"""Tokenizers of model folders, against what `transformers` makes of the same folders."""

import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from tokenizers import (
    AddedToken,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from grm_jax.errors import UsageError
from grm_jax.prompts import (
    Tokenizer,
    encode_chat,
    save_tokenizer,
    tokenizer_from_folder,
)

CORPUS = [
    "the cat sat on the mat, and the dog stopped to stare at the cat",
    "  def stop(x):\n    return x + 12345 # stop",
    "caf\u00e9 na\u00efve \u65e5\u672c\u8a9e \U0001f642 the stops",
]
TEXTS = [
    *CORPUS,
    "",
    " ",
    "the",
    " the  cat\n\n\tstop 12345 67 it's",
    "e\u0301 \U0001f469\u200d\U0001f467 \u0416 \u200b\x00\x7f\xff",
    "<think>the</think> <think> <b>",
    "<|end|><|turn|>the<eos> <bos><start_of_turn>cat<0x0A><unk>",
]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|turn|>{{ message.role }}\n"
    "{{ message.content }}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|turn|>{% endif %}"
)
CHAT = [
    {"role": "user", "content": "  the cat <think> 12"},
    {"role": "assistant", "content": "stop\n"},
]
SPECIAL = ["<bos>", "<eos>", "<unk>", "<|turn|>"]


def byte_level() -> tokenizers.Tokenizer:
    """Like Llama 3's: some control tokens in the model's vocabulary, others behind it."""
    engine = tokenizers.Tokenizer(models.BPE(ignore_merges=True))
    words = r"\p{N}{1,3}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+"
    engine.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(words), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    engine.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    engine.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
        ),
    )
    finish(engine)
    return engine


def byte_fallback() -> tokenizers.Tokenizer:
    """Like Gemma's."""
    engine = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    engine.normalizer = normalizers.Replace(" ", "\u2581")
    engine.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    engine.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    fixed = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    engine.train_from_iterator(
        CORPUS[:2], trainers.BpeTrainer(vocab_size=340, special_tokens=fixed, show_progress=False)
    )
    # The trainer calls all fixed tokens special: only those that are stay so.
    file = json.loads(engine.to_str())
    file["added_tokens"] = [token for token in file["added_tokens"] if token["content"] in SPECIAL]
    engine = tokenizers.Tokenizer.from_str(json.dumps(file))
    engine.add_tokens([AddedToken("\u2581\u2581", normalized=False)])
    finish(engine)
    return engine


def prefixed() -> tokenizers.Tokenizer:
    """Like Llama 2's, with a space put before every stretch of text."""
    engine = byte_fallback()
    engine.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    return engine


def prefixed_once() -> tokenizers.Tokenizer:
    """Like Mistral's, with a space before the first word alone."""
    engine = byte_fallback()
    engine.normalizer = None
    engine.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return engine


def finish(engine: tokenizers.Tokenizer) -> None:
    """Adds tokens behind the vocabulary, and a beginning of text."""
    engine.add_special_tokens(["<|end|>"])
    engine.add_tokens([AddedToken("<think>", normalized=True), AddedToken("</think>")])
    engine.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 0)]
    )


KINDS = [byte_level, byte_fallback, prefixed, prefixed_once]
SETTINGS: dict[str, Any] = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<bos>",
    "eos_token": {"__type": "AddedToken", "content": "<|end|>", "special": True},
    "chat_template": TEMPLATE,
}


def write(folder: Path, engine: tokenizers.Tokenizer | None, **files: Any) -> Path:
    """Writes a folder: `tokenizer.json`, and other JSON files by name without their suffix."""
    if engine is not None:
        engine.save(str(folder / "tokenizer.json"))
    for name, value in ({"tokenizer_config": SETTINGS} | files).items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def assert_same_ids(ours: Tokenizer, theirs: PreTrainedTokenizerBase, texts: list[str]) -> None:
    for text in texts:
        expected = theirs.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert ours.encode(text) == expected, text


@pytest.mark.parametrize("kind", KINDS)
def test_text_is_encoded_as_transformers_encodes_it(
    kind: Callable[[], tokenizers.Tokenizer], tmp_path: Path
):
    write(tmp_path, kind())
    ours = tokenizer_from_folder(tmp_path)
    rng = random.Random(0)
    letters = "abcehopst 0129\n\t.<>|\u00e9\u0301\u65e5\U0001f642\u2581"
    mixed = ["".join(rng.choices(letters, k=rng.randint(1, 60))) for _ in range(200)]
    assert_same_ids(ours, AutoTokenizer.from_pretrained(tmp_path), TEXTS + mixed)


@pytest.mark.parametrize("kind", [byte_level, byte_fallback])
def test_text_survives_and_control_tokens_never_come_out(
    kind: Callable[[], tokenizers.Tokenizer], tmp_path: Path
):
    ours = tokenizer_from_folder(write(tmp_path, kind()))
    assert set(ours.control_tokens) == {*SPECIAL, "<|end|>"}
    for text in TEXTS:
        ids = ours.encode(text)
        assert ours.decode(ids) == text
        assert ours.control_ids.isdisjoint(ids)
    lone = ours.encode("\u0416")
    assert [ours.token_bytes[index] for index in lone] == [b"\xd0", b"\x96"]
    assert ours.decode(lone[:1]) == "\ufffd"
    singles = {token for token in ours.token_bytes if len(token) == 1}
    assert singles == {bytes([byte]) for byte in range(256)}
    assert b"<think>" in [ours.token_bytes[index] for index in ours.encode("the<think>cat")]


def test_a_control_token_that_merges_lead_to_stays_text(tmp_path: Path):
    engine = byte_level()
    (the,) = engine.encode("the", add_special_tokens=False).ids
    engine.add_special_tokens(["the"])
    engine.encode_special_tokens = True
    assert engine.encode("the", add_special_tokens=False).ids == [the]  # their safeguard fails
    ours = tokenizer_from_folder(write(tmp_path, engine))
    assert ours.control_id("the") == the
    assert the not in ours.encode("the others")
    assert ours.decode(ours.encode("the others")) == "the others"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", ["jinja", "settings", "list"])
def test_conversations_are_laid_out_as_transformers_does(
    kind: Callable[[], tokenizers.Tokenizer], place: str, tmp_path: Path
):
    settings = SETTINGS
    if place == "jinja":
        (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
        settings = settings | {"chat_template": "replaced by the file"}
    elif place == "list":
        choices = [{"name": "tool_use", "template": ""}, {"name": "default", "template": TEMPLATE}]
        settings = settings | {"chat_template": choices}
    write(tmp_path, kind(), tokenizer_config=settings)
    ours = tokenizer_from_folder(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    ids = encode_chat(ours, CHAT)
    expected = theirs.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    assert ids == expected
    assert ids.count(ours.bos_id) == 1


def test_a_folder_without_template_has_none(tmp_path: Path):
    for template in (None, [{"name": "tool_use", "template": "x"}]):
        write(tmp_path, byte_level(), tokenizer_config=SETTINGS | {"chat_template": template})
        assert tokenizer_from_folder(tmp_path).chat_template is None


@pytest.mark.parametrize(
    ("processor", "setting", "expected"),
    [
        (True, None, True),
        (False, None, False),
        (True, False, True),
        (False, False, False),
        (False, True, True),
    ],
)
def test_one_bos_where_the_post_processor_or_the_settings_put_it(
    processor: bool, setting: bool | None, expected: bool, tmp_path: Path
):
    engine = byte_level()
    if not processor:
        engine.post_processor = processors.ByteLevel(trim_offsets=False)
    settings = SETTINGS if setting is None else SETTINGS | {"add_bos_token": setting}
    # A template that leaves the beginning of text to the tokenizer.
    settings = settings | {"chat_template": TEMPLATE.removeprefix("{{ bos_token }}")}
    write(tmp_path, engine, tokenizer_config=settings)
    ours = tokenizer_from_folder(tmp_path)
    assert ours.add_bos is expected
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.encode("")[:1] == [0] * processor  # blind to the setting since version 5
    assert encode_chat(ours, CHAT).count(0) == expected


def test_the_beginning_of_text_may_be_named_by_the_post_processor_alone(tmp_path: Path):
    ours = tokenizer_from_folder(write(tmp_path, byte_level(), tokenizer_config={}))
    assert (ours.bos_id, ours.add_bos) == (0, True)
    engine = byte_level()
    engine.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", 1)]
    )
    ours = tokenizer_from_folder(write(tmp_path, engine, tokenizer_config={}))
    assert (ours.bos_id, ours.add_bos) == (None, False)


def test_ends_are_gathered_from_all_files(tmp_path: Path):
    engine = byte_level()
    end, turn = engine.token_to_id("<|end|>"), engine.token_to_id("<|turn|>")
    word = engine.token_to_id("a")
    write(tmp_path, engine, config={"eos_token_id": turn})
    assert tokenizer_from_folder(tmp_path).eos_ids == (end, turn, 1)
    # The other file goes first; the id of a word is nobody's choice.
    write(tmp_path, engine, config={"eos_token_id": turn}, generation_config={"eos_token_id": []})
    assert tokenizer_from_folder(tmp_path).eos_ids == (end, 1)
    write(tmp_path, engine, generation_config={"eos_token_id": [word, end, turn]})
    assert tokenizer_from_folder(tmp_path).eos_ids == (end, turn, 1)
    write(
        tmp_path,
        engine,
        tokenizer_config={"bos_token": None},
        special_tokens_map={"bos_token": {"content": "<bos>"}, "eos_token": "<think>"},
        generation_config={},
        config={},
    )
    ours = tokenizer_from_folder(tmp_path)
    assert (ours.bos_id, ours.eos_ids) == (0, (engine.token_to_id("<think>"), 1))
    assert ours.control_ids.isdisjoint(ours.encode("<think>"))


def test_a_model_may_have_more_rows_than_its_tokenizer_and_lack_added_tokens(tmp_path: Path):
    engine = byte_level()
    size = engine.get_vocab_size()
    think = engine.token_to_id("<think>")
    write(tmp_path, engine)
    ours = tokenizer_from_folder(tmp_path, vocab_size=size + 3)
    assert ours.vocab_size == size + 3
    assert ours.token_bytes[size:] == (b"",) * 3
    assert ours.control_ids >= {size, size + 1, size + 2}
    assert list(ours.find_controls("a<bos>")) == [(1, "<bos>")]
    ours = tokenizer_from_folder(tmp_path, vocab_size=think)
    assert ours.vocab_size == think
    assert max(ours.encode("<think>")) < think
    assert max(ours.control_ids) < think
    with pytest.raises(UsageError, match=f"of {size} tokens, which does not belong .* of 100"):
        tokenizer_from_folder(tmp_path, vocab_size=100)
    with pytest.raises(UsageError, match=r"names '<\|end\|>' its eos_token, which the model lacks"):
        tokenizer_from_folder(tmp_path, vocab_size=engine.token_to_id("<|end|>"))


def test_settings_that_shorten_or_vary_text_are_left_out(tmp_path: Path):
    engine = byte_level()
    expected = engine.encode(TEXTS[0], add_special_tokens=False).ids
    engine.enable_truncation(4)
    engine.enable_padding(length=100)
    engine.model.dropout = 0.9
    assert tokenizer_from_folder(write(tmp_path, engine)).encode(TEXTS[0]) == expected


# ---- SentencePiece ----


def train(kind: str = "bpe", **options: Any) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 20),
        model_writer=model,
        vocab_size=360,
        model_type=kind,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["<b>"],
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    return model.getvalue()


def spm_settings(model: bytes) -> dict[str, Any]:
    """Settings with a control token and another one behind those of the model."""
    size = sentencepiece.SentencePieceProcessor(model_proto=model).GetPieceSize()
    added = {
        0: {"content": "<unk>", "special": True},
        1: {"content": "<s>", "special": True},
        2: {"content": "</s>", "special": True},
        size: {"content": "<|end|>", "special": True},
        size + 1: {"content": "<think>", "special": False},
    }
    return {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "chat_template": TEMPLATE,
        "added_tokens_decoder": added,
    }


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_sentencepiece_models_are_read(kind: str, tmp_path: Path):
    model = train(kind)
    plain = sentencepiece.SentencePieceProcessor(model_proto=model)
    end = plain.GetPieceSize()
    (tmp_path / "tokenizer.model").write_bytes(model)
    write(tmp_path, None, tokenizer_config=spm_settings(model))
    ours = tokenizer_from_folder(tmp_path, vocab_size=end + 5)
    for text in TEXTS[:-2]:
        assert ours.encode(text) == plain.EncodeAsIds(text)
        assert ours.decode(ours.encode(text)).removeprefix(" ") == text
    assert (ours.bos_id, ours.add_bos, ours.eos_ids) == (1, True, (2,))
    assert ours.control_tokens == {"<unk>": 0, "<s>": 1, "</s>": 2, "<|end|>": end}
    assert ours.token_bytes[plain.PieceToId("<0x0A>")] == b"\n"
    assert end + 1 in ours.encode("the <think>")
    assert plain.PieceToId("<b>") in ours.encode("the <b>")
    assert ours.control_ids.isdisjoint(ours.encode("<s><|end|></s><unk>"))
    assert ours.token_bytes[end + 2 :] == (b"",) * 3
    assert ours.control_ids >= {end + 2, end + 3, end + 4}


def test_a_sentencepiece_model_is_used_as_transformers_uses_it(tmp_path: Path):
    model = train()
    (tmp_path / "tokenizer.model").write_bytes(model)
    write(tmp_path, None, tokenizer_config=spm_settings(model))
    ours = tokenizer_from_folder(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    # They put no space before one that begins a text, where SentencePiece does.
    texts = [text for text in TEXTS if not text.startswith((" ", "<think>"))]
    assert_same_ids(ours, theirs, [*texts, "the <think>cat</think> <b>"])
    ids = encode_chat(ours, CHAT)
    expected = theirs.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    assert ids == expected
    assert ids.count(1) == 1


@pytest.mark.parametrize("setting", [True, False])
def test_settings_decide_whether_a_sentencepiece_text_has_a_beginning(
    setting: bool, tmp_path: Path
):
    (tmp_path / "tokenizer.model").write_bytes(train())
    ours = tokenizer_from_folder(write(tmp_path, None, tokenizer_config={"add_bos_token": setting}))
    assert ours.add_bos is setting


def test_a_bare_sentencepiece_model_and_its_added_tokens(tmp_path: Path):
    (tmp_path / "tokenizer.model").write_bytes(train())
    ours = tokenizer_from_folder(tmp_path)
    assert (ours.bos_id, ours.eos_ids, ours.add_bos) == (1, (2,), True)
    the = ours.encode("the")[0]
    (tmp_path / "added_tokens.json").write_text('{"<x>": 500, "<y>": 501}')
    names = {"pad_token": "<x>", "additional_special_tokens": ["the"]}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(names))
    ours = tokenizer_from_folder(tmp_path)
    assert ours.vocab_size == 502
    assert 500 in ours.control_ids and 500 not in ours.encode("<x>")
    assert 501 not in ours.control_ids and 501 in ours.encode("<y>")
    assert the in ours.encode("the")


# ---- Saving ----


@pytest.mark.parametrize("source", ["tokenizer.json", "tokenizer.model"])
def test_what_came_from_a_folder_is_saved_as_it_was(source: str, tmp_path: Path):
    first, second = tmp_path / "first", tmp_path / "made" / "second"
    first.mkdir()
    if source == "tokenizer.json":
        write(first, byte_level(), generation_config={"eos_token_id": 3})
    else:
        model = train()
        (first / source).write_bytes(model)
        write(first, None, tokenizer_config=spm_settings(model), added_tokens={"<y>": 402})
    ours = tokenizer_from_folder(first)
    names = {path.name for path in first.iterdir()}
    (first / "config.json").write_text("{}")
    save_tokenizer(ours, second)
    assert {path.name for path in second.iterdir()} == names
    for name in names:
        assert (second / name).read_bytes() == (first / name).read_bytes()
    again = tokenizer_from_folder(second)
    assert again.token_bytes == ours.token_bytes
    assert again.eos_ids == ours.eos_ids


# ---- What is wrong with a folder ----


def test_a_folder_without_tokenizer_names_the_files_it_needs(tmp_path: Path):
    (tmp_path / "tokenizer.py").write_text("raise SystemExit")
    with pytest.raises(UsageError, match=r"needs tokenizer.json or tokenizer.model") as raised:
        tokenizer_from_folder(tmp_path)
    assert str(tmp_path) in str(raised.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", b"{", "is not a tokenizer: JSONDecodeError"),
        ("tokenizer.json", b"\x80\x04pickled", "is not a tokenizer: UnicodeDecodeError"),
        ("tokenizer.json", b"[]", "is not a tokenizer: TypeError"),
        ("tokenizer.json", b"{}", "is not a tokenizer: KeyError: 'model'"),
        ("tokenizer.json", b'{"model": {"type": "Unigram", "vocab": [["a", 0]]}}', "only BPE"),
        ("tokenizer.json", b'{"model": {"vocab": {"a": 0}, "merges": []}}', "steps are none"),
        ("tokenizer.model", b"\xff\xff", "is not a SentencePiece model"),
        ("tokenizer.model", b"", "is not a SentencePiece model"),
    ],
)
def test_a_broken_file_is_one_clear_line(name: str, content: bytes, message: str, tmp_path: Path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=message) as raised:
        tokenizer_from_folder(tmp_path)
    assert str(tmp_path / name) in str(raised.value)
    assert "\n" not in str(raised.value)
