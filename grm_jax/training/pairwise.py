"""A pairwise reward model: of two responses to a conversation, a logit that the first is better.

    grm-jax train --config configs/X.py --workdir DIR

Every pair is learnt in both orders, the second as a negative, so that no place is favoured. Such a
model compares and does not rate: with more than two responses it has to be asked about each pair.
This is PairRM of arXiv:2504.02495, appendix C.2.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from grm_jax.data import turns
from grm_jax.prompts import Template, Tokenizer, encode_chat, load_template, render
from grm_jax.training.classifiers import labelled
from grm_jax.training.config import Settings
from grm_jax.training.pairs import Pair, pair_config, train_on_pairs


def default_config() -> ConfigDict:
    """Every key of the stage with its default; `data.comparisons` is for the user to fill in."""
    config = pair_config("pairwise")
    # How the model is shown the conversation and the two responses.
    config.data.template = "meta"
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
    template = load_template(str(settings["data.template"]))

    def write(tokenizer: Tokenizer, pair: Pair) -> Iterator[list[int]]:
        messages, responses = turns(pair.comparison), pair.comparison.responses
        best, other = responses[pair.best], responses[pair.other]
        yield pair_tokens(tokenizer, template, messages, best, other)
        yield pair_tokens(tokenizer, template, messages, other, best)

    return train_on_pairs(settings, workdir, write, labelled(2))


def pair_tokens(
    tokenizer: Tokenizer,
    template: Template,
    messages: Sequence[Mapping[str, str]],
    first: str,
    second: str,
) -> list[int]:
    """A prompt with two responses, up to where an answer would begin: what the model reads.

    Raises:
      UsageError: If a template refuses the conversation.
    """
    return encode_chat(tokenizer, render(template, messages, [first, second]))
