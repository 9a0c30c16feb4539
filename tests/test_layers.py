"""Layers are numbered from the kernel up; each imports only from lower-numbered layers, and public names only."""

from __future__ import annotations

import ast
import functools
import pathlib

import pytest

import forkshm

ROOT = pathlib.Path(forkshm.__file__).parent

# From the kernel up. Every layer may import the modules in BESIDE.
LAYERS = [
    "backend",
    "region",
    "sync",
    "descriptor",
    "pickler",
    "channel",
    "processes",
    "pool",
    "context",
    "spmd",
    "executor",
    "decorator",
    "containers",
    "aio",
    "_patch",
    "accounting",
    "_commands",
    "__main__",
]
# Other modules that multiprocessing has, above all layers: only users import them.
LAYERS += ["shared_memory", *sorted(forkshm._MODULES - {*LAYERS, "shared_memory"})]
LAYERS += ["popen_fork", "popen_forkserver", "popen_spawn_posix", "popen_spawn_win32"]
BESIDE = {"errors", "_help", "_interrupts", "_leaks", "_ledger", "_multiprocess", "_system"}
OPEN = {"cluster", "integrations", "joblib", "pandas", "pytest", "testing"}

MODULES = sorted(ROOT.rglob("*.py"))


def part_of(module):
    """Return the package of a module: forkshm.region._table is in region, and forkshm itself in none."""
    return [*module.split("."), ""][1]


def name_of(path, root=ROOT):
    return ".".join(["forkshm", *path.relative_to(root).with_suffix("").parts]).removesuffix(".__init__")


@functools.cache
def read(path):
    """Return the docstring, and each import: ``from`` what, the name, the line, and whether it runs at import."""
    tree = ast.parse(path.read_text())
    inside = set()
    for node in ast.walk(tree):
        for_types = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        if for_types or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            inside.update(map(id, ast.walk(node)))
    found = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            assert getattr(node, "level", 0) == 0, f"{path}:{node.lineno} imports relatively"
            origin = getattr(node, "module", None)
            found += [(origin, alias.name, node.lineno, id(node) not in inside) for alias in node.names]
    return ast.get_docstring(tree), found


@functools.cache
def is_module(name):
    path = ROOT.parent / name.replace(".", "/")
    return path.is_dir() or path.with_suffix(".py").is_file()


def imports(path):
    """Return every import: the module's full name, its line, and whether it runs at import."""
    for origin, name, line, at_import in read(path)[1]:
        # ``from forkshm import region`` names a module, ``from forkshm.region import x`` need not.
        whole = name if origin is None else f"{origin}.{name}"
        yield whole if origin is None or is_module(whole) else origin, line, at_import


def wrong_imports(path, root=ROOT):
    """Return imports of *path* from higher layers, each as one line with an arrow."""
    mine = part_of(name_of(path, root))
    for imported, line, at_import in imports(path):
        theirs = part_of(imported)
        if imported.partition(".")[0] != "forkshm" or theirs in BESIDE or mine in OPEN or mine == "":
            continue
        arrow = f"forkshm/{path.relative_to(root)}:{line}: {mine} -> {theirs or 'forkshm'} ({imported})"
        if theirs in OPEN:
            if at_import:
                yield f"{arrow}: only when it is needed, inside a function"
        elif mine in BESIDE:
            yield f"{arrow}: {mine} stands beside the layers and imports none"
        elif theirs not in LAYERS:
            yield f"{arrow}: not a layer"
        elif mine not in LAYERS:
            yield f"{arrow}: {mine} is not a layer: enter it in this test"
        elif LAYERS.index(theirs) > LAYERS.index(mine):
            yield f"{arrow}: imports from a higher layer"


def test_a_layer_imports_from_lower_layers_only():
    wrong = [line for path in MODULES for line in wrong_imports(path)]
    assert not wrong, "\n".join(["imports that the layers forbid:", *wrong])


def test_an_import_from_a_higher_layer_is_found(tmp_path):
    path = tmp_path / "region" / "_low.py"
    path.parent.mkdir()
    path.write_text("def f():\n    from forkshm.pool import Pool\nfrom forkshm.integrations.numpy import zeros\n")
    assert sorted(line.split(": ")[1] for line in wrong_imports(path, tmp_path)) == [
        "region -> integrations (forkshm.integrations.numpy)",
        "region -> pool (forkshm.pool)",
    ]


def circles(arrows):
    """Return the sets of modules that reach each other, given the modules that each module imports."""
    reached = {}
    for start in arrows:
        found, left = set(), [start]
        while left:
            new = arrows.get(left.pop(), set()) - found
            found |= new
            left += new
        reached[start] = found
    return {frozenset(b for b in found if a in reached[b]) for a, found in reached.items() if a in found}


def test_no_modules_import_each_other_in_a_circle():
    """Imports inside functions and for type checkers count, too."""
    names = {name_of(path): path for path in MODULES}
    arrows = {
        name: {found for found, _, _ in imports(path) if found in names and found != name}
        for name, path in names.items()
        if name != "forkshm"
    }
    assert circles(arrows) == set()


def test_a_circle_of_imports_is_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == {frozenset("bc")}


def private_imports(path, root=ROOT):
    """Return imports of *path* that name a private module, or a private name, of another package."""
    package = name_of(path, root)
    if path.name != "__init__.py":
        package = package.rpartition(".")[0]
    for origin, name, line, _ in read(path)[1]:
        if origin is None or not origin.startswith("forkshm."):
            continue
        parts = [*origin.split("."), name]
        private = next((index for index, part in enumerate(parts) if index > 1 and part.startswith("_")), None)
        if private is None:
            continue
        owner = ".".join(parts[:private])
        if package != owner and not package.startswith(owner + "."):
            yield f"forkshm/{path.relative_to(root)}:{line}: {'.'.join(parts)} is private to {owner}"


def test_packages_use_public_names_of_each_other():
    assert [line for path in MODULES for line in private_imports(path)] == []


def test_a_private_import_is_found(tmp_path):
    path = tmp_path / "pool" / "_low.py"
    path.parent.mkdir()
    path.write_text("from forkshm.region._table import Mode\nfrom forkshm.pool._tasks import Task\n")
    assert [line.split(": ")[1] for line in private_imports(path, tmp_path)] == [
        "forkshm.region._table.Mode is private to forkshm.region"
    ]


@pytest.mark.parametrize(
    ("library", "allowed"),
    [
        # C is called in backend; other packages use ctypes to describe layouts, and to send objects of its types.
        (
            "ctypes",
            {
                "backend/_memory.py",
                "backend/windows/_winapi.py",
                "backend/_syscalls.py",
                "backend/numpy_hook.py",
                "backend/_native_locks.py",
                "backend/posix/_whole.py",
                "pickler/_ctypes.py",
                "region/pointers/_layout.py",
                "region/pointers/_offset_ptr.py",
                "region/pointers/_place.py",
                "sync/sharedctypes.py",
            },
        ),
        ("multiprocess", {"_multiprocess.py"}),
        (
            "numpy",
            {
                "cluster/_executor.py",
                "integrations/numpy/__init__.py",
                "integrations/numpy/_array.py",
                "integrations/numpy/_bundles.py",
                "integrations/numpy/_create.py",
                "integrations/numpy/_files.py",
                "integrations/numpy/_foreign.py",
                "integrations/numpy/_send.py",
                "integrations/numpy/_subclasses.py",
                "integrations/pandas.py",
                "integrations/pandas_engine.py",
                "integrations/numpy_memory.py",
                "integrations/torch.py",
            },
        ),
        ("torch", {"integrations/torch.py"}),
        ("pandas", {"integrations/pandas.py", "integrations/pandas_engine.py"}),
        ("joblib", {"integrations/joblib.py"}),
        ("pytest", {"integrations/pytest.py"}),
        ("pyarrow", {"integrations/pyarrow.py"}),
        ("distributed", {"cluster/_agent.py"}),
        ("cloudpickle", {"cluster/_values.py", "pickler/_pack.py", "pickler/_code.py", "integrations/pytest.py"}),
    ],
)
def test_a_library_is_imported_in_its_one_place(library, allowed):
    users = {
        path.relative_to(ROOT).as_posix()
        for path in MODULES
        for imported, _, _ in imports(path)
        if imported.partition(".")[0] == library
    }
    assert users <= allowed


def test_every_module_has_a_docstring():
    assert [name_of(path) for path in MODULES if not read(path)[0]] == []
