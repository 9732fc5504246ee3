"""Keeps text that is judged from posing as the frame it is judged in."""

import re

from grm_jax import grammar

SECTIONS = (
    "Evaluation Criteria",
    "Conversation Context",
    "Responses to be Scored",
    "Output Format Requirements",
)

# White space, and characters that take no room: a reader sees a marker through either.
_GAP = r"[\s\u00ad\u200b-\u200f\u2060-\u2064\ufeff]*"


def _spaced(words: str) -> str:
    return _GAP.join(map(re.escape, words.split()))


_DELIMITER = re.compile(
    rf"\[(?={_GAP}(?:{_spaced('The Begin of Response')}|{_spaced('The End of Response')}))",
    re.IGNORECASE,
)
# The look-behind allows one attempt for each run of hashes, however long.
_HEADING = re.compile(
    rf"(?<!#)#{{3,}}(?={_GAP}(?:{'|'.join(map(_spaced, SECTIONS))}){_GAP}#)", re.IGNORECASE
)
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def escape_text(text: str) -> str:
    r"""Makes a message or response safe to stand inside a judge prompt.

    The opening bracket of a response's delimiter becomes a parenthesis, the hashes before one of
    the prompt's section titles become `(#)`, and `\boxed{` becomes `\boxed {`, which LaTeX reads
    alike and the grammar of scores does not read at all. Delimiters and headings are found in any
    case and spacing. Half of a surrogate pair becomes U+FFFD. Everything else stays as it is.

    Escaping what is escaped changes nothing, and the time is linear in the text.
    """
    text = _LONE_SURROGATE.sub("\ufffd", text)
    text = _DELIMITER.sub("(", text)
    text = _HEADING.sub("(#)", text)
    box = grammar.BOX_OPEN
    return text.replace(box, f"{box[:-1]} {box[-1]}")
