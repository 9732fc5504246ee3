"""Tokenizers in the folders in which models are published, beside weights and `config.json`.

A folder's tokenizer is spread over several files: the vocabulary in one of two formats, the names
of tokens with a part to play, the chat template, and the ids that end an answer. Only data is read:
tokenizers that are Python programs are not supported.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import processors

from grm_jax.errors import UsageError
from grm_jax.prompts.sentencepiece_model import AddedToken, read_sentencepiece_model
from grm_jax.prompts.tokenizer import Tokenizer
from grm_jax.prompts.tokenizer_json import read_tokenizer_json
from grm_jax.prompts.vocabulary import ENDS, Vocabulary

_JSON = "tokenizer.json"
_MODEL = "tokenizer.model"
_SETTINGS = "tokenizer_config.json"
_NAMES = "special_tokens_map.json"
_ADDED = "added_tokens.json"
_TEMPLATE = "chat_template.jinja"
_GENERATION = "generation_config.json"
_CONFIG = "config.json"

_FILES = (_JSON, _MODEL, _SETTINGS, _NAMES, _ADDED, _TEMPLATE, _GENERATION, _CONFIG)


def tokenizer_from_folder(folder: Path, *, vocab_size: int | None = None) -> Tokenizer:
    """Reads the tokenizer of a model folder, as published on the Hugging Face hub.

    `tokenizer.json` is preferred, and `tokenizer.model` read where it is missing.

    Args:
      folder: the folder.
      vocab_size: `V`, the ids that the model knows. Models often have a few more rows than their
        tokenizer has entries, and some lack the last of its added tokens. By default as many as the
        tokenizer's entries need.

    Raises:
      UsageError: if a file is missing or broken, or the tokenizer is of a kind unknown here or does
        not fit a model of that size.
    """
    files = {name: (folder / name).read_bytes() for name in _FILES if (folder / name).is_file()}
    settings, names, generation, config = (
        _read_object(files, name, folder) for name in (_SETTINGS, _NAMES, _GENERATION, _CONFIG)
    )
    vocabulary = _read_vocabulary(folder, files, settings, names)
    ids = vocabulary.ids
    size = max(ids.values(), default=-1) + 1 if vocab_size is None else vocab_size
    beyond = {index for index in ids.values() if index >= size}
    if not beyond <= vocabulary.added:
        raise UsageError(
            f"{folder} has a tokenizer of {max(ids.values()) + 1} tokens, which does not belong to "
            f"a model of {size}"
        )

    def named(role: str) -> list[int]:
        """The id of the token with a role, if there is one."""
        for content in _contents(settings.get(role) or names.get(role)):
            if ids.get(content, size) >= size:
                raise UsageError(f"{folder} names {content!r} its {role}, which the model lacks")
            return [ids[content]]
        return []

    bos = named("bos_token")
    ends = named("eos_token")
    # An id that no file sets may be a default, and then that of a word.
    ends += [
        index
        for index in _numbers(generation.get("eos_token_id", config.get("eos_token_id")))
        if index in vocabulary.added - beyond
    ]
    control = vocabulary.special.union(beyond, bos, ends)
    known = control - beyond
    ends += [ids[content] for content in ENDS if ids.get(content) in known]

    encoder = vocabulary.build(control)
    opening = encoder.opening[:1]
    bos = bos or [index for index in opening if index in known.difference(ends)]
    add_bos = settings.get("add_bos_token")
    if add_bos is None or (_JSON in files and not add_bos):
        # That file does the work, and what it adds cannot be switched off beside it.
        add_bos = opening == bos

    token_bytes = [b""] * size
    for content, index in ids.items():
        if index < size:
            token_bytes[index] = content.encode() if index in control else vocabulary.spell(content)
    return Tokenizer(
        token_bytes=tuple(token_bytes),
        control_ids=known.union(set(range(size)).difference(ids.values())),
        bos_id=bos[0] if bos else None,
        eos_ids=tuple(dict.fromkeys(ends)),
        add_bos=bool(bos and add_bos),
        chat_template=_chat_template(files, settings),
        text_encoder=encoder.encode,
        inner_encoder=encoder.inner,
        files=lambda _: {name: files[name] for name in files if name != _CONFIG},
    )


def hub_files(tokenizer: Tokenizer, engine: tokenizers.Tokenizer) -> Mapping[str, bytes]:
    """Describes a tokenizer from elsewhere by the files that a model folder holds.

    Args:
      tokenizer: the tokenizer.
      engine: the same for the `tokenizers` library, which does not yet know which tokens are
        control.
    """
    bos, eos = (
        None if index is None else tokenizer.token_bytes[index].decode()
        for index in (tokenizer.bos_id, next(iter(tokenizer.eos_ids), None))
    )
    engine.add_special_tokens(
        [tokenizers.AddedToken(token, normalized=False) for token in tokenizer.control_tokens]
    )
    if tokenizer.add_bos:
        engine.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", "$B"], special_tokens=[(bos, tokenizer.bos_id)]
        )
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "chat_template": tokenizer.chat_template,
        "clean_up_tokenization_spaces": False,
    }
    generation = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_ids or None}
    return {
        _JSON: engine.to_str().encode(),
        _SETTINGS: json.dumps(settings, indent=2).encode(),
        _GENERATION: json.dumps(generation, indent=2).encode(),
    }


def _read_vocabulary(
    folder: Path,
    files: Mapping[str, bytes],
    settings: Mapping[str, Any],
    names: Mapping[str, Any],
) -> Vocabulary:
    if _JSON in files:
        return read_tokenizer_json(files[_JSON], str(folder / _JSON))
    if _MODEL not in files:
        raise UsageError(f"{folder} has no tokenizer: it needs {_JSON} or {_MODEL}")
    special = {content for value in names.values() for content in _contents(value)}
    added = {
        index: AddedToken(content, content in special)
        for content, index in _read_object(files, _ADDED, folder).items()
    }
    for index, token in settings.get("added_tokens_decoder", {}).items():
        added[int(index)] = AddedToken(token["content"], token.get("special", False))
    return read_sentencepiece_model(files[_MODEL], added, str(folder / _MODEL))


def _read_object(files: Mapping[str, bytes], name: str, folder: Path) -> Mapping[str, Any]:
    """A JSON object from a file; an empty one where the file is missing."""
    try:
        value = json.loads(files.get(name, b"{}"))
    except ValueError as error:
        raise UsageError(f"{folder / name} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise UsageError(f"{folder / name} is not a JSON object")
    return value


def _contents(value: Any) -> Iterator[str]:
    """The spellings in a setting: those of one token or several, as text or as objects."""
    match value:
        case str():
            yield value
        case {"content": str(content)}:
            yield content
        case list():
            for item in value:
                yield from _contents(item)


def _numbers(value: Any) -> list[int]:
    """The ids in a setting: one or several."""
    match value:
        case int():
            return [value]
        case list():
            return [number for item in value for number in _numbers(item)]
    return []


def _chat_template(files: Mapping[str, bytes], settings: Mapping[str, Any]) -> str | None:
    if _TEMPLATE in files:
        return files[_TEMPLATE].decode(errors="replace")
    template = settings.get("chat_template")
    for choice in template if isinstance(template, list) else ():
        if choice["name"] == "default":
            template = choice["template"]
    return template if isinstance(template, str) and template else None
