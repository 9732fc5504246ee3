"""From text to token ids and back, with the bytes of every token in the open.

A `Tokenizer` is plain data around functions that turn text into ids. The bytes of each token are
listed rather than hidden in a decoder, because the device reads scores from them
(`grm_jax.grammar.token_table`): what `decode` returns on the host and what the automaton sees are
the same bytes by construction.

Control tokens (turn markers, beginning and end of text) never come out of `encode`: text that
spells one is text. Only `grm_jax.prompts.encode_chat` places them, where a chat template wrote
them.

`tokenizer_from_gguf` and `tokenizer_from_folder` read tokenizers; `save_tokenizer` writes them in
the form that goes with weights in a folder.
"""

import difflib
import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import final

from grm_jax.errors import UsageError

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Tokenizer:
    """A vocabulary with its encoder.

    Attributes:
      token_bytes: for each of the `V` ids, the bytes it adds to a text; a control token adds its
        spelling.
      control_ids: the ids that stand for structure and never for text. Rows that the model has
        beyond its tokenizer's entries are among them, and add no bytes.
      bos_id: the token that begins every text, if there is one.
      eos_ids: the tokens that end an answer, the one the tokenizer names first.
      add_bos: whether the model expects `bos_id` before everything else.
      chat_template: the Jinja source that lays out a conversation; None for a base model.
      text_encoder: text without lone surrogates to ids, which hold no control token.
      inner_encoder: the same for text that follows a control token, where that differs: some
        tokenizers put a space before the first word of all, and before no other.
      files: the files, by name, that describe the tokenizer to other programs, made on demand.
    """

    token_bytes: tuple[bytes, ...] = field(repr=False)
    control_ids: frozenset[int] = field(repr=False)
    bos_id: int | None
    eos_ids: tuple[int, ...]
    add_bos: bool
    chat_template: str | None = field(repr=False)
    text_encoder: Callable[[str], list[int]] = field(repr=False)
    inner_encoder: Callable[[str], list[int]] | None = field(repr=False, default=None)
    files: Callable[["Tokenizer"], Mapping[str, bytes]] = field(repr=False, default=lambda _: {})

    @property
    def vocab_size(self) -> int:
        """The number of ids, `V`."""
        return len(self.token_bytes)

    def encode(self, text: str, *, after_control: bool = False) -> list[int]:
        """Turns plain text into ids: no token is added, and a control token's spelling stays text.

        Half of a surrogate pair, which no encoding can carry, is read as U+FFFD.

        Args:
          text: any text.
          after_control: whether it will stand after a control token.
        """
        encoder = (after_control and self.inner_encoder) or self.text_encoder
        return encoder(_LONE_SURROGATE.sub("\ufffd", text))

    def decode(self, ids: Sequence[int]) -> str:
        """Joins the bytes of `ids` to text; bytes that are not UTF-8 become U+FFFD."""
        return b"".join([self.token_bytes[index] for index in ids]).decode(errors="replace")

    @functools.cached_property
    def control_tokens(self) -> Mapping[str, int]:
        """The id of each control token by its spelling."""
        ids = (index for index in sorted(self.control_ids) if self.token_bytes[index])
        return {self.token_bytes[index].decode(): index for index in ids}

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


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes the files by which a folder of weights describes its tokenizer.

    `transformers.AutoTokenizer` and `tokenizer_from_folder` read them. A tokenizer that came from a
    folder is written as it was there, byte for byte.

    Raises:
      UsageError: if the tokenizer was made of functions alone, which no file can hold.
    """
    files = tokenizer.files(tokenizer)
    if not files:
        raise UsageError("this tokenizer cannot be saved: it came from no folder and no GGUF file")
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
