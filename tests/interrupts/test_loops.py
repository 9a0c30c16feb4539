"""An exception that a signal handler raises between two rounds of a loop reaches the handlers around the loop.

CPython 3.13 and 3.14 compile some loops so that their backward jump belongs to no ``try`` or ``with`` around them
(cpython 130279), and they run signal handlers there: loops whose body ends with an ``if`` without an ``else``, and in
3.13 all ``while`` loops with a condition. A ``continue`` or ``break`` before the last statement avoids it.
"""

import ast
import dis
import itertools
import pathlib
import sys
import types

import pytest

import forkshm

HAS_SUCH_JUMPS = (3, 13) <= sys.version_info < (3, 15)
pytestmark = pytest.mark.skipif(not HAS_SUCH_JUMPS, reason="other Pythons have no such jumps")

FOLDER = pathlib.Path(forkshm.__file__).parent
PATHS = sorted(FOLDER.rglob("*.py")) if HAS_SUCH_JUMPS else []
NO_CODE = ("CACHE", "EXTENDED_ARG", "NOP", "NOT_TAKEN")
# In the handler that the compiler puts around each generator.
OF_GENERATOR = "INTRINSIC_STOPITERATION_ERROR"
LOOPS = ast.For, ast.AsyncFor, ast.While, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp


def codes_in(code):
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from codes_in(constant)


def uncovered(code):
    """Yield the lines of conditional jumps back that lack a handler which covers the loop."""
    bytecode = dis.Bytecode(code)
    at = {instruction.offset: instruction for instruction in bytecode}
    entries = [entry for entry in bytecode.exception_entries if at[entry.target].argrepr != OF_GENERATOR]

    def handlers(offset):
        return {entry.target for entry in entries if entry.start <= offset < entry.end}

    steps = [instruction for instruction in at.values() if instruction.opname not in NO_CODE]
    for (before, test), (_, jump) in itertools.pairwise(itertools.pairwise(steps)):
        if (
            test.opname.startswith("POP_JUMP")
            and jump.opname == "JUMP_BACKWARD"
            and handlers(before.offset) & handlers(jump.argval) - handlers(jump.offset)
        ):
            yield jump.positions.lineno


def cleans_up(node, part):
    """Return whether *node* must see every exception of *part*."""
    if isinstance(node, (ast.With, ast.AsyncWith)):
        managers = [ast.unparse(item.context_expr) for item in node.items]
        return any(not manager.startswith(("open(", "contextlib.suppress(")) for manager in managers)
    if not isinstance(node, ast.Try) or part not in node.body:
        return False
    caught = [handler.type and ast.unparse(handler.type) for handler in node.handlers]
    return bool(node.finalbody) or None in caught or "BaseException" in caught


def is_guarded(tree, line):
    """Return whether the innermost loop around *line* must not be left without its handlers."""
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    loops = [node for node in ast.walk(tree) if isinstance(node, LOOPS) and node.lineno <= line <= node.end_lineno]
    part = max(loops, key=lambda node: (node.lineno, -node.end_lineno))
    while (node := parents.get(part)) is not None and not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        if cleans_up(node, part):
            return True
        part = node
    return False


def faults_of(source):
    tree = ast.parse(source)
    lines = {line for code in codes_in(compile(source, "source", "exec")) for line in uncovered(code)}
    return sorted(line for line in lines if is_guarded(tree, line))


def test_such_a_jump_is_found():
    assert faults_of("def f():\n  with lock:\n    for x in y:\n      if x:\n        g()\n") == [4]
    assert faults_of("def f():\n  for x in y:\n    with lock:\n      g()\n") == []


@pytest.mark.parametrize("path", PATHS, ids=lambda path: str(path.relative_to(FOLDER)))
def test_each_jump_back_is_covered(path):
    found = faults_of(path.read_text(encoding="utf-8"))
    assert not found, f"end these loops with another statement than an if: {path} line {found}"
