"""A reward model that thinks first: a critique of a response in words, then a number.

    grm-jax train --config configs/X.py --workdir DIR

The critiques are given, one of each response, in files of any writer: a stronger model, or a critic
of one's own that the stage `sft` has trained. None is rejected. The number is read behind the
critique and trained as in the stage `bt`. This is CLoud (arXiv:2408.11791), with a critic of its
own as in arXiv:2504.02495, appendix C.2.

A line of such a file is `{"id": ..., "critiques": [...]}`, with the critiques in the order of the
comparison's responses.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from grm_jax.data import Comparison, turns
from grm_jax.errors import UsageError
from grm_jax.prompts import Tokenizer, load_template
from grm_jax.sampling import judged_tokens
from grm_jax.training.classifiers import preferred
from grm_jax.training.config import Settings
from grm_jax.training.pairs import Pair, pair_config, train_on_pairs


def default_config() -> ConfigDict:
    """Every key of the stage with its default.

    `data.comparisons` and `data.critiques` are for the user to fill in.
    """
    config = pair_config("cloud")
    # Files of critiques, and how the model is shown what they are about.
    config.data.critiques = ()
    config.data.template = "meta"
    # How strongly rewards are kept around 0; see `bradley_terry_loss`.
    config.centre = 0.0
    return config


def run(settings: Settings, workdir: Path) -> bool:
    """Runs the stage on the comparisons of `data.comparisons` that have critiques.

    Args:
      settings: Of `default_config`.
      workdir: Where everything goes; the model that comes out is in its folder `model`, and how
        good it is on comparisons that it has not seen in `report.json`. It is asked like a meta
        reward model (`MetaModel.tokens`), with one response and the critique of it.

    Returns:
      Whether all steps are done.

    Raises:
      UsageError: A setting or the data is wrong.
    """
    template = load_template(str(settings["data.template"]))
    critiques = read_critiques([Path(file) for file in settings["data.critiques"]])

    def refuse(comparison: Comparison) -> str | None:
        found = critiques.get(comparison.id)
        if found is None:
            return "no_critiques"
        return None if len(found) == len(comparison.responses) else "wrong_number_of_critiques"

    def write(tokenizer: Tokenizer, pair: Pair) -> Iterator[list[int]]:
        messages, responses = turns(pair.comparison), pair.comparison.responses
        written = critiques[pair.comparison.id]
        for index in (pair.best, pair.other):
            shown = [responses[index]]
            yield judged_tokens(tokenizer, template, messages, shown, written[index])

    objective = preferred(float(settings["centre"]))
    return train_on_pairs(settings, workdir, write, objective, refuse=refuse)


def read_critiques(paths: Sequence[Path]) -> Mapping[str, tuple[str, ...]]:
    """Reads files of critiques.

    Args:
      paths: The files.

    Returns:
      The critiques by the id of their comparison.

    Raises:
      UsageError: There is no file, one cannot be read, a line is not of the form above, or two are
        about one comparison.
    """
    if not paths:
        raise UsageError("data.critiques is empty; name at least one file of critiques")
    found: dict[str, tuple[str, ...]] = {}
    for path in paths:
        try:
            lines = path.read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"cannot read {path}: {error}") from error
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            name, critiques = _read_line(line, where)
            if name in found:
                raise UsageError(f"{where}: comparison {name!r} has critiques already; keep one")
            found[name] = critiques
    return found


def _read_line(line: str, where: str) -> tuple[str, tuple[str, ...]]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise UsageError(f"{where}, is not JSON: {error}") from error
    match record:
        case {"id": str() | int() as name, "critiques": list(critiques)} if all(
            isinstance(critique, str) for critique in critiques
        ):
            return str(name), tuple(critiques)
        case _:
            raise UsageError(f"{where}, needs an id and critiques, a list of strings")
