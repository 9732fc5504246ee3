"""Judge prompts: what a model is told before it writes a judgement.

A template is a Jinja file that lays out one prompt, run in a sandbox. Those that come with the
package follow the structure of arXiv:2504.02495, appendix G, in words of their own:

| name | what it asks for |
| --- | --- |
| `paper` | criteria with four bands of points, then an integer from 1 to 10 for each response |
| `compact` | the same in far fewer tokens, for small models and short contexts |
| `single01` | whether one response to a checkable question is correct, as 0 or 1 |
| `meta` | the bare prompt a judgement is shown under to the meta reward model |
| `judge` | the number of the best response: the LLM-as-a-judge baseline |

All put first what the order of the responses does not touch, and little after them, so that prompts
that differ in that order share most of their work.

A template of your own is a file that may use these variables, and no others:

| variable | holds |
| --- | --- |
| `conversation` | the messages as text: `User: ...`, a blank line, `Assistant: ...`, and so on |
| `messages` | the messages, each with `role` and `content` |
| `responses` | the responses, a list of text; a template that does not use it is refused |
| `hint` | None, or what is known about the responses; see `render` |
| `low`, `high` | the range of a score |
| `markers` | the headings and the opening of the box: `criteria`, `analysis`, `scores`, `box` |

The range is 1 to 10, unless the template sets it, as in `{% set low = 0 %}{% set high = 1 %}`.
`{{ raise_exception("why") }}` refuses what the template is not meant for. Messages and responses
come to a template escaped (`grm_jax.prompts.escape_text`).
"""

import difflib
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import NoReturn, final

import jinja2
import jinja2.meta
import jinja2.nodes
import jinja2.sandbox

from grm_jax import grammar
from grm_jax.errors import UsageError
from grm_jax.prompts.escape import escape_text

_MARKERS: Mapping[str, str] = {
    "criteria": grammar.CRITERIA,
    "analysis": grammar.ANALYSIS,
    "scores": grammar.SCORES,
    "box": grammar.BOX_OPEN,
}
_VARIABLES = ("conversation", "messages", "responses", "hint", "low", "high", "markers")
_FUNCTIONS = ("raise_exception",)
_SUFFIX = ".jinja"


@final
@dataclass(frozen=True, kw_only=True)
class Template:
    """A judge prompt.

    Attributes:
      name: the name or path it was loaded by.
      source: the Jinja source.
      low: the lowest score it asks for.
      high: the highest.
    """

    name: str
    source: str
    low: int
    high: int


def load_template(name_or_path: str) -> Template:
    """Loads a template by the name of one that comes with the package, or else from a file.

    Raises:
      UsageError: if there is neither, the file cannot be read or parsed, it uses a variable that
        templates are not given, or it leaves the responses out.
    """
    source = _read(name_or_path)
    try:
        tree = _environment().parse(source)
        _compile(source)
    except jinja2.TemplateSyntaxError as error:
        raise UsageError(
            f"template {name_or_path}, line {error.lineno}: {_one_line(error)}"
        ) from error
    used = jinja2.meta.find_undeclared_variables(tree)
    known = (*_VARIABLES, *_FUNCTIONS, *_environment().globals)
    for variable in sorted(used.difference(known)):
        raise UsageError(
            f"template {name_or_path} uses an unknown variable {variable!r}"
            f"{_nearest(variable, known)}; known are {', '.join(_VARIABLES)}"
        )
    if "responses" not in used:
        raise UsageError(f"template {name_or_path} never uses the variable 'responses'")
    low = _setting(name_or_path, tree, "low", grammar.DEFAULT_LOW)
    high = _setting(name_or_path, tree, "high", grammar.DEFAULT_HIGH)
    if not 0 <= low < high:
        raise UsageError(
            f"template {name_or_path} sets scores from {low} to {high}; it needs 0 <= low < high"
        )
    return Template(name=name_or_path, source=source, low=low, high=high)


def render(
    template: Template,
    messages: Sequence[Mapping[str, str]],
    responses: Sequence[str],
    *,
    hint: int | None = None,
    judgement: str | None = None,
) -> list[dict[str, str]]:
    """Writes the prompt for a comparison, as a chat for `grm_jax.prompts.encode_chat`.

    Messages and responses are escaped, so that they can neither close their own block nor pose as
    part of the prompt.

    Args:
      template: the prompt to write.
      messages: the conversation up to the user's last turn.
      responses: the responses, in the order in which the judge is to see them.
      hint: what the judge is told when rejective sampling is hinted: the index of the best of
        several responses, from 0; for a single response 1 if it is correct and 0 if not. Templates
        without a place for it ignore it.
      judgement: a finished judgement, added as the assistant's turn.

    Returns:
      A user turn, and an assistant turn if there is a judgement.

    Raises:
      UsageError: if there are no responses, the hint fits none, or the template refuses or fails.
    """
    if not responses:
        raise UsageError("there are no responses to judge")
    hints = max(2, len(responses))
    if hint is not None and not 0 <= hint < hints:
        raise UsageError(f"the hint is {hint}; for these responses it is from 0 to {hints - 1}")
    safe = [
        {"role": escape_text(message["role"]), "content": escape_text(message["content"])}
        for message in messages
    ]
    conversation = "\n\n".join(f"{turn['role'].capitalize()}: {turn['content']}" for turn in safe)
    try:
        prompt = _compile(template.source).render(
            conversation=conversation,
            messages=safe,
            responses=[escape_text(response) for response in responses],
            hint=hint,
            low=template.low,
            high=template.high,
            markers=_MARKERS,
        )
    except Exception as error:  # a user's program may fail in any way
        reason = _one_line(error)
        raise UsageError(f"template {template.name} cannot write this prompt: {reason}") from error
    chat = [{"role": "user", "content": prompt}]
    if judgement is not None:
        chat.append({"role": "assistant", "content": judgement})
    return chat


def _read(name_or_path: str) -> str:
    folder = resources.files("grm_jax.prompts") / "templates"
    built_in = {
        item.name.removesuffix(_SUFFIX): item
        for item in folder.iterdir()
        if item.name.endswith(_SUFFIX)
    }
    if name_or_path in built_in:
        return built_in[name_or_path].read_text(encoding="utf-8")
    path = Path(name_or_path)
    if not path.is_file():
        raise UsageError(
            f"no template {name_or_path!r}{_nearest(name_or_path, list(built_in))}; "
            f"it is one of {', '.join(sorted(built_in))} or the path of a file"
        )
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"template {name_or_path} cannot be read: {_one_line(error)}") from error


def _nearest(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f" (the nearest is {near[0]!r})" if near else ""


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _setting(name: str, tree: jinja2.nodes.Template, variable: str, default: int) -> int:
    """The integer that the template sets `variable` to, outside of any block."""
    value: object = default
    target = jinja2.nodes.Name(variable, "store")
    for node in tree.body:
        if isinstance(node, jinja2.nodes.Assign) and node.target == target:
            value = node.node.value if isinstance(node.node, jinja2.nodes.Const) else None
    if type(value) is not int:
        raise UsageError(f"template {name} has to set {variable!r} to a plain integer")
    return value


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.globals["raise_exception"] = _raise_exception
    return environment


@functools.lru_cache(maxsize=16)
def _compile(source: str) -> jinja2.Template:
    return _environment().from_string(source)
