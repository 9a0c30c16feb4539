"""The list of what is left out on a backend names tests that there are."""

from __future__ import annotations

import ast
import pathlib

import pytest
from capability_skips import SKIPS, reason_to_skip

TESTS = pathlib.Path(__file__).parent

LISTED = [
    (backend, capability, test)
    for backend, skips in SKIPS.items()
    for capability, (_, tests) in skips.items()
    for test in tests
]


@pytest.mark.parametrize(("backend", "capability", "test"), LISTED, ids=lambda value: value)
def test_what_is_left_out_exists(backend, capability, test):
    path, _, name = test.partition("::")
    file = (TESTS.parent if path.startswith("forkshm/") else TESTS) / path
    assert file.is_file()
    if name and not path.startswith("forkshm/"):
        names = {node.name for node in ast.walk(ast.parse(file.read_text())) if hasattr(node, "name")}
        assert set(name.partition("[")[0].split("::")) <= names
    assert reason_to_skip(backend, path if path.startswith("forkshm/") else f"tests/{test}") or name
    assert reason_to_skip("linux", f"tests/{test}") is None
