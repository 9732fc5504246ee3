"""Pages that are not in this folder: the repository's own, and the reference by package.

`README.md` becomes the start page. Other Markdown of the repository keeps its path, so that links
between files lead to the same places on the site and in the repository.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds every page that the navigation names and this folder has not, and their pictures."""
    for path in _paths(config["nav"]):
        if files.get_file_from_path(path) is None:
            files.append(File.generated(config, path, content=content_of(path)))
    for picture in sorted(ROOT.glob("benchmarks/*.png")):
        path = picture.relative_to(ROOT).as_posix()
        files.append(File.generated(config, path, abs_src_path=str(picture)))
    return files


def content_of(path: str) -> str:
    """The Markdown of a page, by its path on the site."""
    if path.startswith("api/"):
        name = path.removeprefix("api/").removesuffix(".md")
        return f"# `{name}`\n\n::: {name}\n"
    source = ROOT / ("README.md" if path == "index.md" else path)
    text = source.read_text(encoding="utf-8")
    # In the repository these are files of another folder; on the site they lie beside it.
    return text.replace("](docs/", "](") if path == "index.md" else text


def _paths(nav: Any) -> Iterator[str]:
    match nav:
        case str():
            yield nav
        case list():
            for item in nav:
                yield from _paths(item)
        case dict():
            for item in nav.values():
                yield from _paths(item)
