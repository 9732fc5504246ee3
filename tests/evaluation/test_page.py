"""The report in a browser: it draws, it filters, and it asks nobody for anything.

It needs a Chromium on the machine, and is skipped where there is none.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.evaluation.browser import Page, browse, find_program
from tests.evaluation.fixtures import made, rewardbench_rows, write_lines

WIDE, PHONE = 1280, 390


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    rows = rewardbench_rows(["mt-bench-med", "mt-bench-hard", "donotanswer", "hep-go"], 8)
    # Of two samples, votes are tied now and then.
    made("rewardbench", write_lines(folder / "rows.jsonl", rows), folder, samples=2)
    return folder / "report.html"


@pytest.fixture(scope="module", params=[WIDE, PHONE])
def page(
    request: pytest.FixtureRequest, report: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Page]:
    program = find_program()
    if program is None:
        pytest.skip("there is no Chromium on this machine")
    with browse(program, tmp_path_factory.mktemp("profile")) as opened:
        opened.open(report, width=request.param)
        yield opened


def test_plots_are_drawn(page: Page) -> None:
    boxes = page.run(
        "[...document.querySelectorAll('figure svg')].map(plot => {"
        " const box = plot.getBoundingClientRect();"
        " return [box.width, box.height, plot.querySelectorAll('path').length]; })"
    )
    assert len(boxes) == 5
    for width, height, paths in boxes:
        assert width > 250
        assert height > 120
        assert paths > 10


def test_nothing_but_tables_is_wider_than_the_window(page: Page) -> None:
    assert page.run("document.scrollingElement.scrollWidth <= window.innerWidth")
    assert page.run("[...document.querySelectorAll('table')].length") >= 5


def test_the_filter_shows_what_it_says(page: Page) -> None:
    def press(kind: str) -> int:
        page.run(f"document.querySelector('button[data-kind={kind}]').click()")
        said = page.run("document.getElementById('count').textContent")
        shown: int = page.run("document.querySelectorAll('#list details').length")
        assert said == f"{shown} judgements"
        pressed = "[...document.querySelectorAll('button[aria-pressed=true]')]"
        assert page.run(f"{pressed}.map(button => button.dataset.kind)") == [kind]
        if kind != "all":
            assert page.run(f"document.querySelectorAll('#list .tag.{kind}').length") == shown
        return shown

    everything = press("all")
    assert everything == 32
    for kind in ("wrong", "tied", "unreadable"):
        assert 0 < press(kind) < everything
    assert press("all") == everything


def test_a_judgement_opens_with_its_critiques_side_by_side(page: Page) -> None:
    page.run("document.querySelector('#list details summary').click()")
    # The event that fills it in comes after the click.
    page.run("new Promise(done => setTimeout(done, 50))")
    tops = page.run(
        "[...document.querySelectorAll('#list details[open] .side:last-child .card')]"
        ".map(card => card.getBoundingClientRect().top)"
    )
    assert len(tops) == 2
    assert len(set(tops)) == 1
    # Text of a model is text: its tags are shown and not obeyed.
    text = "document.querySelector('#list details[open] .side:last-child .card .text')"
    assert page.run(f"{text}.textContent") == "Analysis: <b>both</b> are & short. </script>"
    assert page.run(f"{text}.childElementCount") == 0


def test_the_page_says_and_asks_for_nothing(page: Page) -> None:
    """Last, so that all that was done before counts."""
    assert page.happened("Runtime.consoleAPICalled") == []
    assert page.happened("Runtime.exceptionThrown") == []
    assert page.happened("Log.entryAdded") == []
    asked = [event["request"]["url"] for event in page.happened("Network.requestWillBeSent")]
    assert len([url for url in asked if not url.startswith("data:")]) == 1
    assert asked[0].startswith("file://")
