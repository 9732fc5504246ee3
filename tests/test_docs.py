"""The documentation's snippets run, its commands exist, its links lead somewhere, and it builds."""

import argparse
import importlib
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from grm_jax.cli.main import COMMANDS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINKED = [*PAGES, *sorted(ROOT.glob("*/README.md")), *sorted((ROOT / "benchmarks").glob("*.md"))]
_FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
# What asks for a model needs a download, once for all pages.
_NEEDS_MODEL = ('from_pretrained("', "checkpoints.load(")


def blocks(page: Path, language: str) -> list[str]:
    return [text for name, text in _FENCE.findall(page.read_text()) if name == language]


def needs_model(snippet: str) -> bool:
    return any(word in snippet for word in _NEEDS_MODEL)


def execute(snippets: list[str]) -> None:
    # Readers go from top to bottom, so a page is one program.
    exec(compile("\n".join(snippets), "page", "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_snippets_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    snippets = [text for text in blocks(page, "python") if not needs_model(text)]
    assert snippets
    execute(snippets)


def test_snippets_that_need_a_model_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for page in PAGES:
        snippets = blocks(page, "python")
        if any(map(needs_model, snippets)):
            execute(snippets)


def commands() -> Iterator[object]:
    for page in PAGES:
        for block in blocks(page, "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                for part in re.split(r"&&|\|\|?|;", line):
                    words = shlex.split(part, comments=True)
                    while words and "=" in words[0]:
                        words.pop(0)
                    if words[:1] == ["grm-jax"]:
                        yield pytest.param(words[1:], id=f"{page.stem}-{words[1]}")


@pytest.mark.parametrize("words", list(commands()))
def test_commands_are_understood(words: list[str]) -> None:
    parser = argparse.ArgumentParser(exit_on_error=False)
    subcommands = parser.add_subparsers(dest="command")
    importlib.import_module(COMMANDS[words[0]]).add_parser(subcommands)
    args, rest = parser.parse_known_args(words)
    assert args.command == words[0]
    assert all(word.startswith("--config.") for word in rest)
    for word in words:
        if word.startswith(("configs/", "grm_jax/")):
            assert (ROOT / word).exists()


@pytest.mark.parametrize("page", LINKED, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for link in _LINK.findall(page.read_text()):
        if link.startswith(("https://", "http://", "mailto:")):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{page.name} links to {link}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in headings}
            assert anchor in slugs, f"{page.name} links to {link}"


def test_files_that_pages_name_exist() -> None:
    named = re.compile(
        r"`((?:grm_jax|tests|notebooks|examples|benchmarks|configs|launch)/[\w./]+)`"
    )
    for page in PAGES:
        for path in named.findall(page.read_text()):
            assert (ROOT / path).exists(), f"{page.name} names {path}"


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert found.returncode == 0, found.stderr
    assert "WARNING" not in found.stderr
    text = (tmp_path / "api" / "grm_jax.rewards.html").read_text()
    assert "outcome_reward" in text and "eq 11" in text
    assert "Two commands" in (tmp_path / "index.html").read_text()
