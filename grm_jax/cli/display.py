"""How a judgement looks on a terminal."""

import unicodedata

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from grm_jax.data import Comparison, Judgement

_SHOWN_CHARACTERS = 160


def show_judgement(console: Console, comparison: Comparison | None, judgement: Judgement) -> None:
    """Prints a table of the responses with their scores, and the critique that won."""
    title = Text(printable(judgement.id), style="bold")
    if judgement.error is not None:
        console.print(title, Text(judgement.error, style="red"))
        console.print()
        return
    table = Table(title=title, title_justify="left", expand=True, show_edge=False)
    table.add_column("", justify="right", no_wrap=True)
    table.add_column("score", justify="right", no_wrap=True)
    table.add_column("response", ratio=1)
    responses = comparison.responses if comparison is not None else ()
    for index, score in enumerate(judgement.scores or ()):
        text = " ".join(printable(responses[index]).split()) if responses else ""
        if len(text) > _SHOWN_CHARACTERS:
            text = text[: _SHOWN_CHARACTERS - 1] + "…"
        best = index == judgement.best
        mark = "tied" if index in judgement.tied and len(judgement.tied) > 1 else ""
        label = Text(f"{'★ ' if best else ''}{index + 1}")
        style = "bold green" if best else ""
        table.add_row(label, Text(f"{score}{' ' + mark if mark else ''}"), Text(text), style=style)
    console.print(table)
    sample = judgement.winning_sample()
    if sample is not None:
        seen = ", ".join(str(index + 1) for index in sample.order)
        heading = f"critique ({judgement.valid_samples} of {len(judgement.samples)} readable"
        heading += f"; this one saw the responses in the order {seen})"
        console.print(Text(heading, style="dim"))
        console.print(Padding(Text(printable(sample.text.strip())), (0, 0, 1, 2)))


def printable(text: str) -> str:
    """Text without characters that would command the terminal; lines are kept."""
    return "".join(
        char if char == "\n" or unicodedata.category(char)[0] != "C" else "\ufffd" for char in text
    )
