"""The pages of the documentation, and the programs on them."""

from __future__ import annotations

import pathlib
import re
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md"]
PAGES += [page for folder in (".", "howto", "internals") for page in sorted((ROOT / "docs" / folder).glob("*.md"))]

_BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n```output\n(.*?)^```$)?", re.DOTALL | re.MULTILINE)


# A line that prints, and a comment that shows what.
_PRINTED = re.compile(r"^ *print\(.*\)  # (.*\n)", re.MULTILINE)


class Snippet(NamedTuple):
    """A program on a page, and the output shown for it: below, or in comments if each line that prints has one."""

    page: pathlib.Path
    line: int
    source: str
    output: str | None

    def __str__(self):
        return f"{self.page.relative_to(ROOT).with_suffix('')}:{self.line}"


def snippets(page):
    """Return the programs of a page."""
    text = page.read_text()
    return [
        Snippet(page, text.count("\n", 0, m.start()) + 1, m[1], m[2] or _output_in_comments(m[1]))
        for m in _BLOCK.finditer(text)
    ]


def _output_in_comments(source):
    printed = _PRINTED.findall(source)
    return "".join(printed) if printed and len(printed) == source.count("print(") else None


def matches(said, expected):
    """Return whether the output of a program matches that on the page, where ``...`` stands for anything."""
    pattern = ".*?".join(re.escape(part) for part in expected.split("..."))
    return re.fullmatch(pattern, said, re.DOTALL) is not None
