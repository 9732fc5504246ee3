"""A scalar reward model: one number for a conversation and a response to it.

    grm-jax train --config configs/X.py --workdir DIR

Trained as Bradley and Terry have it: of the best response of a comparison and any other, the best
has the higher number. Records of a single response have nothing to compare and are left out. This
is one of the baselines of arXiv:2504.02495, appendix C.2.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from grm_jax.data import turns
from grm_jax.prompts import Tokenizer, encode_chat
from grm_jax.training.classifiers import preferred
from grm_jax.training.config import Settings
from grm_jax.training.pairs import Pair, pair_config, train_on_pairs


def default_config() -> ConfigDict:
    """Every key of the stage with its default; `data.comparisons` is for the user to fill in."""
    config = pair_config("bt")
    # How strongly rewards are kept around 0; see `bradley_terry_loss`.
    config.centre = 0.0
    return config


def run(settings: Settings, workdir: Path) -> bool:
    """Runs the stage on the comparisons of `data.comparisons`.

    Args:
      settings: Of `default_config`.
      workdir: Where everything goes; the model that comes out is in its folder `model`, and how
        good it is on comparisons that it has not seen in `report.json`.

    Returns:
      Whether all steps are done.

    Raises:
      UsageError: A setting or the data is wrong.
    """

    def write(tokenizer: Tokenizer, pair: Pair) -> Iterator[list[int]]:
        messages, responses = turns(pair.comparison), pair.comparison.responses
        for index in (pair.best, pair.other):
            yield response_tokens(tokenizer, messages, responses[index])

    return train_on_pairs(settings, workdir, write, preferred(float(settings["centre"])))


def response_tokens(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]], response: str
) -> list[int]:
    """A conversation that ends with a response, in the chat template: what the model reads.

    Raises:
      UsageError: If the chat template refuses the conversation.
    """
    chat = [*messages, {"role": "assistant", "content": response}]
    return encode_chat(tokenizer, chat, add_generation_prompt=False)
