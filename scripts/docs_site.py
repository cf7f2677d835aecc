"""Hooks of mkdocs: the site holds docs/, the README, and whatever else of the repository these link to.

Links are written for the repository, so that they work where its Markdown is shown. On the site the README is the first
page, docs/ lies at the top, and a file outside docs/ keeps its path: Markdown is a page, a source file a page that
shows it, a folder its README or a list of its files, and anything else is copied.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path, PurePosixPath
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
FIRST = ("README.md", "README.zh-CN.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md")
SOURCES = {".py": "python", ".sh": "bash", ".yaml": "yaml", ".txt": "text", "": "text"}
LINK = re.compile(r"(?<=\]\()(?!https?:|#)([^)#\s]+)")
WIDE = re.compile(r"^(\|[^|\n]*){7,}\|$", re.MULTILINE)  # a table that needs the room of the list of contents
FENCE = re.compile(r"(^ *```.*?^ *```$)", re.MULTILINE | re.DOTALL)

_origins: dict[str, str] = {}  # of a page of the site: where it lies in the repository


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what is linked to, and what that links to."""
    _origins.clear()
    _origins.update({file.src_uri: f"docs/{file.src_uri}" for file in files})
    ahead = [*FIRST, *(origin for origin in _origins.values() if origin.endswith(".md"))]
    done: set[str] = set()
    while ahead:
        origin = ahead.pop()
        if origin in done:
            continue
        done.add(origin)
        uri, text = _uri(origin), _text(origin)
        if uri not in _origins:
            _origins[uri] = origin
            source = {"content": text} if text is not None else {"abs_src_path": str(ROOT / origin)}
            files.append(File.generated(config, uri, **source))
        if text is not None and not _is_source(origin):
            ahead += [_target(origin, link) for part in FENCE.split(text)[::2] for link in LINK.findall(part)]
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links of the repository into links of the site."""
    here = page.file.src_uri
    origin = _origins[here]
    if _is_source(origin) or WIDE.search(markdown):
        page.meta["hide"] = ["toc"]
    if _is_source(origin):
        return markdown

    def moved(found: re.Match[str]) -> str:
        return posixpath.relpath(_uri(_target(origin, found[1])), posixpath.dirname(here) or ".")

    parts = FENCE.split(markdown)  # Python's Markdown knows no escaped <
    parts[::2] = [LINK.sub(moved, part).replace("\\<", "&lt;") for part in parts[::2]]
    return "".join(parts)


class MarkdownDocstrings(griffe.Extension):
    """Docstrings as Markdown: references are code, and a block of code follows one colon."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of ``obj``."""
        if obj.docstring is not None:
            text = re.sub(r":(?:class|func|meth|data|attr|mod):`~?([^`]+)`", r"``\1``", obj.docstring.value)
            obj.docstring.value = re.sub(r"::$", ":", text, flags=re.MULTILINE)


def _target(origin: str, link: str) -> str:
    """The path in the repository that a link of the file ``origin`` names."""
    folder = origin if (ROOT / origin).is_dir() else posixpath.dirname(origin)
    path = posixpath.normpath(posixpath.join(folder, link))
    if path.startswith("..") or not (ROOT / path).exists():
        raise PluginError(f"{origin} links to {link}, which is not there")
    return f"{path}/README.md" if (ROOT / path / "README.md").exists() else path


def _is_source(origin: str) -> bool:
    return PurePosixPath(origin).suffix in SOURCES and not (ROOT / origin).is_dir()


def _uri(origin: str) -> str:
    """Where a path of the repository lies on the site."""
    uri = "index.md" if origin == "README.md" else origin.removeprefix("docs/")
    if (ROOT / origin).is_dir():
        return f"{uri}/index.md"
    return f"{uri}.md" if _is_source(origin) else uri


def _text(origin: str) -> str | None:
    """The Markdown of a page; None for what is copied as it is."""
    path = ROOT / origin
    if path.is_dir():
        names = sorted(one.name for one in path.iterdir() if one.is_file())
        return "\n".join([f"# {origin}", "", *(f"* [{name}]({name})" for name in names)])
    if path.suffix == ".md":
        return path.read_text(encoding="utf-8")
    if _is_source(origin):
        return f"# {origin}\n\n````{SOURCES[path.suffix]}\n{path.read_text(encoding='utf-8')}\n````\n"
    return None
