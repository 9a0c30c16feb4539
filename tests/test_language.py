"""The prose of this repository follows the language rules of CONTRIBUTING.md, as far as a search can tell."""

from __future__ import annotations

import functools
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PAGES = ["*.md", *(f"{folder}/**/*.md" for folder in ("docs", "examples", "benchmarks", "tests"))]
CODE = ["conftest.py", *(f"{folder}/**/*.py" for folder in ("forkshm", "docs", "examples", "benchmarks", "tests"))]
# Built pages, copies of the sources, and this file, which has an example of each fault.
OMITTED = re.compile(r"/(?:_build|source|gallery_output|\.[^/]*)/|/test_language\.py$")

# Each fault, with a word of advice.
FAULTS = {
    r"\b[Ww]ho(?:m)?ever\b": "name the process or thread",
    r"(?:^|[.;:] )Who (?!is |has )": "name the process or thread",
    r"\b(?:of|by|to|for|with|from) who [a-z]+s\b": "name the process or thread",
    r"(?:^|[.;] )Of (?!course)[a-z]": "put the subject first",
    r"(?:^|[.!?] )(?:And|Likewise|Nor)\b": "write a sentence that stands alone",
    r"^The same[,.;]": "write a sentence that stands alone",
    r"\bfor ever\b": "forever",
    r"\bas ever\b": "as usual",
    r"\bbut for\b": "except for",
    r"\b(?:has|have|had) not(?=[.,;:)]|$| (?:the|an?|any|enough|got)\b)": "lacks",
    r"(?<!here )\b(?:is|are|was|were) no (?:[a-z]+ (?:of|that)|other's|such)\b": "is not a",
    r"\bthere for\b": "say what it does",
    r"\b(?:whence|thereby|thereof|whither|ere|lest|anew|amid|whilst|amongst)\b": "use the common word",
    r"\b(?:bury|buries|buried|bells?|tapes?|commons|crews?|outbox|annex)\b": "use the field's word",
    r"\b(?:marry|marries|divorces?|wed|culprits?|ancestors?|doors?)\b": "use the field's word",
    r"\b(?:(?:colour|behaviour|neighbour|honour|favour)\w*|recognise[ds]?|grey|centre)\b": "use American spelling",
    r"\b(?:process|class)' ": "process's, class's",
}
ANY = re.compile("|".join(FAULTS))
# Words that do not begin a docstring, because they do not say what the caller of a function gets.
OPENING = re.compile(r"(?:Say|Tell|Let|Be|Know|Whether|What|Who|Whose|How|That|Is|Are|See to|Not|And|Or|The same)\b")
# A function with a docstring: its decorators, its name, and the first line.
FUNCTION = re.compile(
    r'((?:^ *@.*\n)*)^ *(?:async )?def (\w+)\((?:.*|\n(?>(?: .*\n)*? *\)).*):\n *r?"""(.*)', re.MULTILINE
)
NAME = re.compile(
    r"test_(?:what|who|it|its|those|whoever|one_that|of|also)_|_who(?:ever)?_|_what_(?!to_)|_as_ever(?!y)|_for_ever(?!y)"
)


@functools.cache
def text_of(path):
    return path.read_text(encoding="utf-8")


def paths(*patterns):
    """Return the files of the repository that match one of these patterns."""
    found = [path for pattern in patterns for path in ROOT.glob(pattern) if not OMITTED.search(str(path))]
    assert found
    return found


def prose_of(path):
    """Yield the line and the text of each comment, docstring and paragraph of a file."""
    text = text_of(path)
    if path.suffix == ".md":
        text = re.sub(r"^```.*?^```", lambda block: "\n" * block[0].count("\n"), text, flags=re.DOTALL | re.MULTILINE)
        blocks = re.finditer(r"(?:^.*\S.*\n?)+", text, re.MULTILINE)
        yield from ((text.count("\n", 0, block.start()) + 1, block[0]) for block in blocks)
        return
    for block in re.finditer(r"(?:^ *# .*\n)+|  # (?!noqa|type:|pragma|pyright)(.*)$", text, re.MULTILINE):
        yield text.count("\n", 0, block.start()) + 1, block[1] or re.sub(r"^ *# ?", "", block[0], flags=re.MULTILINE)
    for block in re.finditer(r'^ *r?"""(.*?)"""', text, re.DOTALL | re.MULTILINE):
        for part in re.finditer(r"(?:^.*\S.*\n?)+", block[1], re.MULTILINE):
            yield text.count("\n", 0, block.start(1) + part.start()) + 1, part[0]


def faults_of(path, root=ROOT):
    """Return the faults in the prose of a file, each as a line of text."""
    found = []
    for line, text in prose_of(path):
        words = re.sub(r"``.*?``|`[^`]*`", "`code`", " ".join(text.split()))
        if ANY.search(words):
            found += [
                f"{path.relative_to(root)}:{line}: {words[max(match.start() - 30, 0) : match.end() + 30]!r}: {advice}"
                for fault, advice in FAULTS.items()
                for match in re.finditer(fault, words)
            ]
    return found


def test_prose_has_no_known_fault():
    files = paths(*PAGES, *CODE)
    assert len(files) > 400
    found = [fault for path in files for fault in faults_of(path)]
    assert not found, "\n".join(["rewrite these:", *found])


def test_docstrings_of_functions_begin_with_a_verb():
    found = [
        f"{path.relative_to(ROOT)}: {name}: {first}"
        for path in paths(*CODE)
        for decorators, name, first in FUNCTION.findall(text_of(path))
        if OPENING.match(first) and "property" not in decorators and not name.startswith("test_")
    ]
    assert not found, "\n".join(["begin with what the caller gets:", *found])


def test_fields_are_documented_by_strings():
    found = [str(path) for path in paths(*CODE) if "#:" in text_of(path)]
    assert not found, f"write a string below the field, or a comment, in {', '.join(found)}"


def test_names_of_tests_have_subjects():
    found = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in paths("tests/**/test_*.py")
        for name in re.findall(r"^ *(?:async )?def (test_\w+)\(", text_of(path), re.MULTILINE)
        if NAME.search(name)
    ]
    assert not found, "\n".join(["name the subject and its behavior:", *found])


@pytest.mark.parametrize(
    ("text", "is_fault"),
    [
        ("# Whoever has it closes it.\n", True),
        ("# The process that has it closes it.\n", False),
        ('"""Return the parts.\n\nOf a view only the elements are sent.\n"""\n', True),
        ('"""Return the parts, of which a view has one."""\n', False),
        ("x = 1  # as ever\n", True),
        ("x = 1  # `as ever` is quoted\n", False),
        ("# Use what it has not.\n", True),
        ("# A message that has not been received is lost.\n", False),
    ],
)
def test_the_search_finds_faults(tmp_path, text, is_fault):
    path = tmp_path / "module.py"
    path.write_text(text, encoding="utf-8")
    assert bool(faults_of(path, tmp_path)) == is_fault
