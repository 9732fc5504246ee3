"""Prompts: judge and chat templates, tokenizers, and the host's reader of scores.

The way of a comparison to the model: `render` writes the judge prompt from a `Template`, escaping
what is judged; `encode_chat` lays it out in the model's chat template and encodes it with its
`Tokenizer`, which is read from a GGUF file or a model folder. Back from the model,
`Tokenizer.decode` gives the text and `parse_scores` its scores.
"""

from grm_jax.prompts.chat import encode_chat
from grm_jax.prompts.escape import escape_text
from grm_jax.prompts.gguf_tokenizer import tokenizer_from_gguf
from grm_jax.prompts.hub_tokenizer import tokenizer_from_folder
from grm_jax.prompts.scores import parse_scores
from grm_jax.prompts.templates import Template, load_template, render
from grm_jax.prompts.tokenizer import Tokenizer, save_tokenizer

__all__ = [
    "Template",
    "Tokenizer",
    "encode_chat",
    "escape_text",
    "load_template",
    "parse_scores",
    "render",
    "save_tokenizer",
    "tokenizer_from_folder",
    "tokenizer_from_gguf",
]
