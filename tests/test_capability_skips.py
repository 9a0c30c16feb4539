"""The files and marks of tests that backends skip."""

from __future__ import annotations

import ast
import pathlib

import pytest
from capability_skips import FILES, MISSING, reason_to_skip, why_missing

TESTS = pathlib.Path(__file__).parent

LISTED = [(backend, path) for backend, skips in FILES.items() for _, paths in skips.values() for path in paths]


@pytest.mark.parametrize(("backend", "path"), LISTED)
def test_skipped_files_exist_and_are_run_on_linux(backend, path):
    assert ((TESTS.parent if path.startswith("forkshm/") else TESTS) / path.partition("::")[0]).is_file()
    assert reason_to_skip(backend, path if path.startswith("forkshm/") else f"tests/{path}")
    assert reason_to_skip("linux", f"tests/{path}") is None


def marked():
    """Return every mark and question: the capability that it names, and its place."""
    for path in sorted(TESTS.rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("pytest.mark.needs", "has"):
                yield ast.literal_eval(node.args[0]), f"{path.relative_to(TESTS)}:{node.lineno}"


def test_marks_name_capabilities_that_a_backend_lacks():
    known = {capability for missing in MISSING.values() for capability in missing}
    assert [where for capability, where in marked() if capability not in known] == []
    assert known - {capability for capability, _ in marked()} == set()


def test_a_mark_applies_to_its_backends_and_parameters():
    assert why_missing("posix", "seals", "", "a.py::test_a").startswith("needs seals: ")
    assert why_missing("linux", "seals", "", "a.py::test_a") is None
    assert why_missing("posix", "seals", "one", "a.py::test_one[two]") is None
    assert why_missing("posix", "seals", "two", "a.py::test_one[one-two]") is not None
