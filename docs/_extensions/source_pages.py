"""Show files of the repository as pages, so that links to the code work offline.

A page of these docs, or a file of the repository that a page includes, may have a link such as
``[the policy](../forkshm/pickler/_policy.py)``. It leads to a page that shows this file, or lists this folder. Each
build creates these pages again.
"""

from __future__ import annotations

import os
import pathlib
import re
import shutil
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sphinx.application import Sphinx

ROOT = pathlib.Path(__file__).parents[2]
DOCS = ROOT / "docs"
# The folder, below docs, for the pages created here.
PAGES = "source"
# The files of the repository that have pages of their own on the site.
KNOWN = {
    "README.md": "/index.md",
    "ARCHITECTURE.md": "/architecture.md",
    "CHANGELOG.md": "/changelog.md",
    "CONTRIBUTING.md": "/contributing.md",
    "SECURITY.md": "/security.md",
    "benchmarks/README.md": "/benchmarks.md",
}
_LINK = re.compile(r"(?<!!)(\[[^\]\[]+\]\()([^)\s#]+)(#[^)\s]*)?(\))")
_IMAGE = re.compile(r"(!\[[^\]]*\]\()([^)\s]+)(\))")
_LANGUAGES = {".py": "python", ".md": "markdown", ".toml": "toml", ".sh": "bash", ".json": "json"}

_wanted: set[str] = set()


def target_of(link: str, folder: pathlib.Path) -> str | None:
    """Return the file or folder of the repository that *link* names from *folder*, relative to the root, or None."""
    if "://" in link or link.startswith(("/", "mailto:")):
        return None
    path = pathlib.Path(os.path.normpath(folder / link))
    return path.relative_to(ROOT).as_posix() if path.exists() and path.is_relative_to(ROOT) else None


def rewrite(text: str, folder: pathlib.Path) -> str:
    """Return *text* with its links into the repository replaced by links to pages."""

    def link(match: re.Match[str]) -> str:
        before, path, anchor, after = match.groups()
        target = target_of(path, folder)
        if target is None:
            return match[0]
        if target.startswith("docs/"):
            # The target is a page of the docs. A file outside of docs names it from the root of the repository.
            if folder.is_relative_to(DOCS):
                return match[0]
            return f"{before}/{target.removeprefix('docs/')}{anchor or ''}{after}"
        if target in KNOWN:
            return f"{before}{KNOWN[target]}{anchor or ''}{after}"
        _wanted.add(target)
        return f"{before}/{PAGES}/{page_name(target)}.md{after}"

    def image(match: re.Match[str]) -> str:
        target = target_of(match[2], folder)
        if target is None or target.startswith("docs/"):
            return match[0]
        return f"{match[1]}/../{target}{match[3]}"

    return _IMAGE.sub(image, _LINK.sub(link, text))


def page_name(target: str) -> str:
    """Return the name of the page of a file or folder."""
    return f"{target}/index" if (ROOT / target).is_dir() else target


def _on_read(app: Sphinx, docname: str, content: list[str]) -> None:
    content[0] = rewrite(content[0], (DOCS / docname).parent)


def _on_include(app: Sphinx, path: pathlib.Path, docname: str, content: list[str]) -> None:
    content[0] = rewrite(content[0], (DOCS / path).resolve().parent)


def _make_pages(app: Sphinx) -> None:
    """Write a page for each file that any page links to; this runs before Sphinx looks for pages."""
    shutil.rmtree(DOCS / PAGES, ignore_errors=True)
    _wanted.clear()
    for page in [*DOCS.rglob("*.md"), *(ROOT / name for name in KNOWN)]:
        if "_build" not in page.parts:
            rewrite(page.read_text(), page.parent)
    folders = {target for target in _wanted if (ROOT / target).is_dir()}
    for folder in folders:
        _wanted.update(f"{folder}/{each.name}" for each in (ROOT / folder).glob("*.py"))
    for target in sorted(_wanted):
        page = DOCS / PAGES / f"{page_name(target)}.md"
        page.parent.mkdir(parents=True, exist_ok=True)
        up = "../" * (len(page.relative_to(DOCS).parts) - 1)
        head = f"---\norphan: true\nnosearch: true\nhtml_theme.sidebar_secondary.remove: true\n---\n\n# {target}\n\n"
        if target in folders:
            # A package's docstring comes first; most folders have one.
            body = "".join(
                f"- [`{each.name}`](/{PAGES}/{target}/{each.name}.md)\n"
                for each in sorted((ROOT / target).glob("*.py"))
            )
        else:
            language = _LANGUAGES.get(pathlib.Path(target).suffix, "text" if "." in target else "bash")
            body = f"```{{literalinclude}} {up}../{target}\n:language: {language}\n:linenos:\n```\n"
        page.write_text(head + body)


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("builder-inited", _make_pages)
    app.connect("source-read", _on_read)
    app.connect("include-read", _on_include)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
