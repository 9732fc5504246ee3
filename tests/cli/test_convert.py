"""`grm-jax convert` between the formats, and judging with what it writes."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.numpy
import tokenizers
import torch
import transformers

from grm_jax import GRM, UsageError, checkpoints
from grm_jax.checkpoints.peft import adapter_pieces
from grm_jax.cli.main import OK, WRONG_CALL, main
from grm_jax.models import Lora, add_lora, merge_lora
from grm_jax.prompts import tokenizer_from_folder

TURNS = [{"role": "user", "content": "2+2?"}]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with random weights that reads and writes bytes."""
    folder = tmp_path_factory.mktemp("source")
    config = transformers.LlamaConfig(
        vocab_size=264,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(letters)}
    engine = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    engine.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = tokenizers.decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=engine, bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    return folder


def state(folder: Path) -> dict[str, np.ndarray]:
    return dict(safetensors.numpy.load_file(folder / "model.safetensors"))


def convert(*args: object) -> int:
    return main(["convert", *map(str, args)])


def verdict(folder: Path, **settings: Any) -> list[str]:
    judge = GRM.from_pretrained(str(folder), **settings)
    judgement = judge.judge(TURNS, ["4", "5"], samples=2, max_new_tokens=24)
    return [sample.text for sample in judgement.samples]


def test_there_and_back(source: Path, tmp_path: Path) -> None:
    assert convert(source, tmp_path / "orbax", "--to", "orbax") == OK
    assert convert(tmp_path / "orbax", tmp_path / "back") == OK
    wanted, found = state(source), state(tmp_path / "back")
    assert wanted.keys() == found.keys()
    for name, array in wanted.items():
        np.testing.assert_array_equal(found[name], array)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")
    assert model.config.eos_token_id == theirs.eos_token_id
    ours = tokenizer_from_folder(tmp_path / "orbax")
    text = "Is 17.25 right?\n"
    assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)
    texts = verdict(source)
    assert len(set(texts)) == 2, "samples should differ"
    assert verdict(tmp_path / "orbax") == verdict(tmp_path / "back") == texts
    # Nothing but the folders is left behind.
    assert {path.name for path in tmp_path.iterdir()} == {"orbax", "back"}


def test_adapters_are_merged_or_kept_apart(source: Path, tmp_path: Path) -> None:
    config, params = checkpoints.load(str(source))
    lora = Lora(rank=2, alpha=64.0, targets=("v", "up"))
    config, params = add_lora(config, params, lora, jax.random.key(0))
    params = jax.tree.map(lambda leaf: leaf if leaf.any() else leaf + 0.1, params)
    checkpoints.save_orbax(tmp_path / "trained", config, params)
    for path in source.glob("tokenizer*"):
        (tmp_path / "trained" / path.name).write_bytes(path.read_bytes())
    assert convert(tmp_path / "trained", tmp_path / "adapter", "--to", "peft") == OK
    names = set(safetensors.numpy.load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    assert names == {piece.name for piece in adapter_pieces(config)}
    assert convert(source, tmp_path / "one", "--adapter", tmp_path / "adapter") == OK
    assert convert(tmp_path / "trained", tmp_path / "two") == OK
    wanted = checkpoints.load(str(tmp_path / "one"))
    found = checkpoints.load(str(tmp_path / "two"))
    assert found[0] == wanted[0]
    jax.tree.map(np.testing.assert_array_equal, found[1], wanted[1])
    jax.tree.map(np.testing.assert_array_equal, merge_lora(config, params)[1], wanted[1])
    assert verdict(source, adapter=str(tmp_path / "adapter")) == verdict(tmp_path / "one")
    assert verdict(source) != verdict(tmp_path / "one")


def test_adapters_in_fewer_bits(source: Path, tmp_path: Path) -> None:
    """With a head too, as a meta reward model's."""
    config, params = checkpoints.load(str(source))
    lora = Lora(rank=2, alpha=64.0, targets=("v", "up"))
    config, params = add_lora(config, params, lora, jax.random.key(0))
    config = dataclasses.replace(config, num_labels=1)
    params = {**params, "score": np.ones((1, config.width), np.float32)}
    checkpoints.save_adapter(tmp_path / "trained", config, params, base=str(source))
    flags = ("--to", "peft", "--dtype", "bfloat16")
    assert convert(tmp_path / "trained", tmp_path / "small", *flags) == OK
    before, after = (
        safetensors.numpy.load_file(tmp_path / name / "adapter_model.safetensors")
        for name in ("trained", "small")
    )
    assert before.keys() == after.keys()
    for name, array in after.items():
        assert array.dtype.name == "bfloat16"
        np.testing.assert_array_equal(array, before[name].astype(array.dtype))
    texts = [(tmp_path / one / "adapter_config.json").read_text() for one in ("trained", "small")]
    assert texts[0] == texts[1]
    # Merged, it is a classifier as `transformers` has them.
    assert convert(tmp_path / "trained", tmp_path / "whole") == OK
    kind = transformers.AutoModelForSequenceClassification
    whole = kind.from_pretrained(tmp_path / "whole")
    assert (whole.num_labels, float(whole.score.weight.detach().mean())) == (1, 1.0)


def test_bfloat16(source: Path, tmp_path: Path) -> None:
    assert convert(source, tmp_path / "small", "--dtype", "bfloat16") == OK
    for name, array in state(tmp_path / "small").items():
        assert array.dtype.name == "bfloat16"
        np.testing.assert_array_equal(array, state(source)[name].astype(array.dtype))
    assert checkpoints.open_checkpoint(str(tmp_path / "small")).dtype == "bfloat16"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--to", "peft"], "no adapters to write"),
        (["--to", "peft", "--adapter", "x"], "--adapter is merged"),
        (["--adapter", "nowhere"], "nowhere has no adapter_config.json"),
    ],
)
def test_wrong_calls(
    source: Path, tmp_path: Path, flags: list[str], words: str, capsys: Any
) -> None:
    assert convert(source, tmp_path / "out", *flags) == WRONG_CALL
    line = capsys.readouterr().err
    assert words in line
    assert line.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_what_is_there_is_not_overwritten(source: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "file").write_text("mine")
    assert convert(source, tmp_path) == WRONG_CALL
    assert f"{tmp_path} exists already" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_without_a_tokenizer(source: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((source / name).read_bytes())
    with pytest.raises(UsageError, match=r"tokenizer\.json"):
        GRM.from_pretrained(str(tmp_path))
