"""The README is short, its links lead to existing files, and it has the two commands that CI takes from it.

Its programs are run by tests/docs/test_snippets.py.
"""

from __future__ import annotations

import re

import pytest
from pages import ROOT, snippets

README = ROOT / "README.md"
TEXT = README.read_text()


def test_the_readme_is_short():
    assert len(TEXT.splitlines()) <= 130


def test_the_readme_shows_programs_and_their_output():
    assert [snippet.output is not None for snippet in snippets(README)] == [True, True]


@pytest.mark.parametrize("words", ["pytest -n auto", "examples/quickstart.py"])
def test_commands_are_alone_in_their_blocks(words):
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)
    (command,) = [block for language, block in blocks if not language and words in block]
    assert command.startswith("python3 -m venv")
    assert command.count("\n") == 1


def test_the_links_of_the_readme_lead_to_files():
    links = [link for link in re.findall(r"\]\(([^)#]+)[^)]*\)", TEXT) if "://" not in link]
    assert len(links) > 20
    assert not [link for link in links if not (ROOT / link).exists()]
