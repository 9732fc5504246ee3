"""What a tokenizer does with its data, whatever file that came from."""

import dataclasses
from pathlib import Path

import pytest

from grm_jax.errors import UsageError
from grm_jax.prompts import Tokenizer, save_tokenizer


def toy(*control: str) -> Tokenizer:
    """A token for each byte, then control tokens; empty ones are rows without an entry."""
    return Tokenizer(
        token_bytes=(*(bytes([byte]) for byte in range(256)), *(name.encode() for name in control)),
        control_ids=frozenset(range(256, 256 + len(control))),
        bos_id=None,
        eos_ids=(),
        add_bos=False,
        chat_template=None,
        text_encoder=lambda text: list(text.encode()),
    )


def test_controls_are_found_where_they_overlap_and_where_they_break_off():
    tokenizer = toy("<a>", "<a><a", "a>>")
    assert list(tokenizer.find_controls("<a><a>>")) == [(0, "<a><a"), (3, "<a>"), (4, "a>>")]
    assert list(tokenizer.unfinished_controls("x<a>")) == [1, 2]
    assert list(tokenizer.unfinished_controls("a> ")) == []


def test_rows_without_an_entry_are_spelled_by_no_text():
    tokenizer = toy("<a>", "", "")
    assert tokenizer.vocab_size == 259
    assert tokenizer.control_tokens == {"<a>": 256}
    assert list(tokenizer.find_controls("x<a>")) == [(1, "<a>")]
    assert tokenizer.decode([120, 257, 258, 121]) == "xy"
    assert list(toy("").find_controls("x")) == []


def test_an_unknown_control_token_is_named_with_the_nearest():
    with pytest.raises(UsageError, match=r"no control token '<im_end>'.*'<\|im_end\|>'"):
        toy("<|im_start|>", "<|im_end|>").control_id("<im_end>")


def test_text_after_a_control_token_may_have_an_encoder_of_its_own():
    plain = toy()
    assert plain.encode("ab", after_control=True) == [97, 98]
    split = dataclasses.replace(plain, inner_encoder=lambda text: [len(text)])
    assert split.encode("ab") == [97, 98]
    assert split.encode("a\ud83d", after_control=True) == [2]


def test_saving_writes_the_files_of_the_tokenizer(tmp_path: Path):
    tokenizer = dataclasses.replace(toy("<a>"), files=lambda it: {"x": it.token_bytes[256]})
    save_tokenizer(tokenizer, tmp_path / "new" / "folder")
    assert (tmp_path / "new" / "folder" / "x").read_bytes() == b"<a>"
    with pytest.raises(UsageError, match="came from no folder"):
        save_tokenizer(toy(), tmp_path)
