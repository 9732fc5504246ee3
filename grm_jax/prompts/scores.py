"""The plain reader of scores: the reference that the one on the device has to agree with."""

import re

from grm_jax import grammar

_BRACES = re.compile(re.escape(grammar.BOX_OPEN) + "|[{}]")
_WHITE_SPACE = " \t\n\r\v\f"


def _last_complete_box(text: str) -> str | None:
    """The content of the last box that is closed, or None."""
    content = None
    start = depth = 0
    for match in _BRACES.finditer(text):
        if match[0] == grammar.BOX_OPEN:
            start, depth = match.end(), 1
        elif depth and match[0] == "{":
            depth += 1
        elif depth:
            depth -= 1
            if depth == 0:
                content = text[start : match.start()]
    return content


def _integer(item: str, high: int) -> int | None:
    """The integer an item of the box spells, or None; `high + 1` may stand for anything greater."""
    digits = item.strip(_WHITE_SPACE)
    if not (digits.isascii() and digits.isdigit()):
        return None
    # Python refuses to convert thousands of digits; a number longer than `high` is greater anyway.
    significant = digits.lstrip("0")
    return high + 1 if len(significant) > len(str(high)) else int(significant or "0")


def parse_scores(
    text: str,
    num_responses: int,
    low: int = grammar.DEFAULT_LOW,
    high: int = grammar.DEFAULT_HIGH,
) -> list[int] | None:
    r"""Reads the scores from a generated text, or nothing where the text does not give them.

    The last complete `\boxed{...}` decides, and is read as `grm_jax.grammar` defines. This is the
    reference on the host of `grm_jax.rewards.extract_scores`.

    Args:
      text: what the model wrote, without the prompt.
      num_responses: how many scores there must be.
      low: the least score allowed.
      high: the greatest score allowed.

    Returns:
      One integer a response, in the order of the box, or None if the text is unreadable.
    """
    content = _last_complete_box(text)
    if content is None:
        return None
    scores = []
    for item in content.split(","):
        score = _integer(item, high)
        if score is None or not low <= score <= high:
            return None
        scores.append(score)
    return scores if len(scores) == num_responses else None
