"""Examples in files, and the tokens that are learnt of them."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from grm_jax.errors import UsageError
from grm_jax.prompts import Tokenizer, encode_chat
from grm_jax.training.examples import (
    Example,
    ExampleFile,
    end_of_answer,
    example_tokens,
    read_example,
)
from tests.training.folder import TEMPLATE

RECORD = {"prompt": "Hello?", "completion": "Yes."}
TURNS = [{"role": "system", "content": "Short."}, {"role": "user", "content": "Hello?"}]


@pytest.fixture
def chat_tokenizer(byte_tokenizer: Tokenizer) -> Tokenizer:
    return dataclasses.replace(byte_tokenizer, chat_template=TEMPLATE, eos_ids=(0, 257))


def test_records_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = [
        json.dumps(RECORD),
        "",
        json.dumps({"prompt": TURNS, "completion": "Ja. \u2713"}),
        "  ",
    ]
    path.write_text("\n".join(lines))
    file = ExampleFile(path)
    assert len(file) == 2
    assert file[1] == Example(tuple(TURNS), "Ja. \u2713")
    assert file[0] == Example(({"role": "user", "content": "Hello?"},), "Yes.")
    file.close()


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot read .*a\.jsonl: No such file"):
        ExampleFile(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl").write_text("\n\n")
    with pytest.raises(UsageError, match=r"b\.jsonl has no examples"):
        ExampleFile(tmp_path / "b.jsonl")
    (tmp_path / "c.jsonl").write_text(json.dumps(RECORD) + "\n\n{no\n")
    with pytest.raises(UsageError, match=r"c\.jsonl, line 3, is not JSON"):
        ExampleFile(tmp_path / "c.jsonl")[1]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ([], "is no object"),
        ({"prompt": "a"}, "has no completion"),
        ({"prompt": "a", "completion": ""}, "has no completion"),
        ({"completion": "a"}, "has no prompt"),
        ({"prompt": [], "completion": "a"}, "has no prompt"),
        ({"prompt": [{"role": "user"}], "completion": "a"}, "without role and content"),
        ({"prompt": [{"role": "user", "content": 1}], "completion": "a"}, "without role"),
    ],
)
def test_records_that_are_no_examples(record: object, message: str) -> None:
    with pytest.raises(UsageError, match=f"^here, .*{message}"):
        read_example(record, "here")


def test_completions_are_learnt_to_their_end(chat_tokenizer: Tokenizer) -> None:
    example = read_example(RECORD, "here")
    tokens, mask = example_tokens(chat_tokenizer, example)
    prompt = encode_chat(chat_tokenizer, example.prompt)
    assert list(tokens[: len(prompt)]) == prompt
    assert list(tokens[len(prompt) :]) == [*b"Yes.", 257]
    np.testing.assert_array_equal(mask, [False] * len(prompt) + [True] * 5)


def test_text_is_no_control_token(chat_tokenizer: Tokenizer) -> None:
    example = read_example({"prompt": "a", "completion": "<|im_end|>"}, "here")
    tokens, mask = example_tokens(chat_tokenizer, example)
    assert list(np.asarray(tokens)[mask]) == [*b"<|im_end|>", 257]


def test_the_token_that_ends_an_answer(
    byte_tokenizer: Tokenizer, chat_tokenizer: Tokenizer
) -> None:
    """The one that the template writes, which here is not the first; without one, the first."""
    assert end_of_answer(chat_tokenizer) == 257
    assert end_of_answer(dataclasses.replace(chat_tokenizer, chat_template=None)) == 0
    assert end_of_answer(byte_tokenizer) == 257
    with pytest.raises(UsageError, match="has no token that ends an answer"):
        end_of_answer(dataclasses.replace(byte_tokenizer, eos_ids=()))
