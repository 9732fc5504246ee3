"""The default model's tokenizer, read once: parsing the file takes seconds."""

from pathlib import Path

import gguf
import pytest

from grm_jax.prompts import Tokenizer, tokenizer_from_gguf


@pytest.fixture(scope="session")
def smollm2(smollm2_gguf: Path) -> Tokenizer:
    fields = gguf.GGUFReader(smollm2_gguf).fields
    return tokenizer_from_gguf({name: field.contents() for name, field in fields.items()})
