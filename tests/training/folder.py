"""A tiny model in a folder, with a tokenizer of bytes, and a file of examples."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from grm_jax.checkpoints import save_folder
from tests.training import tiny

CONFIG = dataclasses.replace(tiny.CONFIG, vocab_size=260, max_context=256)
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_model(folder: Path) -> Path:
    """Writes the model; its tokens 256 and on are the end of text and a turn's start and end."""
    folder.mkdir()
    save_folder(folder, CONFIG, tiny.random_params(CONFIG))
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: index for index, letter in enumerate(letters)}
    engine = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    engine.decoder = decoders.ByteLevel()
    engine.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    engine.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|endoftext|>",
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    generation = {"eos_token_id": [256, 258]}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def write_examples(path: Path, count: int = 40) -> Path:
    """Writes examples of two kinds of prompt."""
    records: list[dict[str, Any]] = []
    for number in range(count):
        prompt: Any = f"Count to {number}."
        if number % 2:
            prompt = [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": prompt},
            ]
        records.append({"prompt": prompt, "completion": " ".join(map(str, range(number % 7 + 1)))})
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def write_comparisons(path: Path, count: int) -> Path:
    """Writes comparisons of two and three responses in turn, whose best one is none's to guess."""
    records = [
        {
            "id": str(number),
            "messages": [{"role": "user", "content": str(number)}],
            "responses": ["a", "b", "c"][: 2 + number % 2],
            "label": {"kind": "best", "index": number % 2},
        }
        for number in range(count)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def write_templates(folder: Path) -> tuple[str, str]:
    """Writes judge prompts of few bytes, for several responses and for a single one."""
    several, single = folder / "several.jinja", folder / "single.jinja"
    several.write_text(
        "{{ conversation }}\n"
        "{% for response in responses %}\n{{ loop.index }}: {{ response }}\n{% endfor %}\n"
        "{% if hint is not none %}\nHINT {{ hint + 1 }}\n{% endif %}\n"
    )
    single.write_text(
        "{% set low = 0 %}\n{% set high = 1 %}\n{{ conversation }}\n{{ responses[0] }}\n"
        "{% if hint is not none %}\nHINT {{ hint }}\n{% endif %}\n"
    )
    return str(several), str(single)


def write_config(path: Path, model: Path, examples: Path) -> Path:
    """Writes a configuration of a few steps."""
    path.write_text(
        "from grm_jax.training import sft\n\n\n"
        "def get_config():\n"
        "    config = sft.default_config()\n"
        f"    config.model.name = {str(model)!r}\n"
        f"    config.data.files = ({str(examples)!r},)\n"
        "    config.data.length = 128\n"
        "    config.steps = 6\n"
        "    config.checkpoint.every = 2\n"
        "    config.optimizer.learning_rate = 3e-3\n"
        "    config.optimizer.schedule = 'constant'\n"
        "    return config\n"
    )
    return path
