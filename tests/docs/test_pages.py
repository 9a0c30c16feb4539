"""The pages are complete and correct: every error has an entry, and the tables match the programs."""

from __future__ import annotations

import importlib.util
import pkgutil
import re
import sys

import pytest
from pages import PAGES, ROOT

import forkshm
from forkshm.__main__ import COMMANDS
from forkshm.backend import kernel

DOCS = ROOT / "docs"


def page(name):
    return (DOCS / f"{name}.md").read_text()


def headings(name):
    return set(re.findall(r"^#+ (.+)$", page(name), re.MULTILINE))


@pytest.mark.parametrize("name", [*forkshm.errors.__all__, "ResultNotPicklableError"])
def test_each_error_has_an_entry(name):
    assert name in headings("troubleshooting")


def test_each_warning_has_an_entry():
    """Check that each place that warns has a row in the table."""
    places = 0
    for path in (ROOT / "forkshm").rglob("*.py"):
        places += len(re.findall(r"^\s+ForkshmWarning,$", path.read_text(), re.MULTILINE))
        # The line of an import looks alike.
        places -= len(re.findall(r"^from \S+ import \((?:[^)]*\n)?\s+ForkshmWarning,$", path.read_text(), re.MULTILINE))
    entry = page("troubleshooting").partition("### ForkshmWarning")[2].partition("\n### ")[0]
    rows = re.findall(r"^\| [`.]", entry, re.MULTILINE)
    assert places == len(rows)


def test_each_warning_of_a_category_of_python_has_an_entry():
    source = "".join(path.read_text() for path in (ROOT / "forkshm").rglob("*.py"))
    raised = re.findall(r"(?<![\w.])(?:warnings\.)?warn\((?:(?!warn\().)*?\b([A-Z]\w+Warning),", source, re.DOTALL)
    entry = page("troubleshooting").partition("### Other warnings")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(\w+Warning): ", entry, re.MULTILINE)
    assert sorted(rows) == sorted(name for name in raised if name not in forkshm.errors.__all__)


def test_each_command_has_a_row_and_an_example():
    for name in COMMANDS:
        assert re.search(rf"^\| `{name}` \|.*`python -m forkshm {name}", page("cli"), re.MULTILINE), name


def test_each_public_name_is_in_the_reference():
    text = "".join(path.read_text() for path in (DOCS / "api").glob("*.md"))
    # Exceptions are listed by their module. These are multiprocessing's own, or values of listed ones.
    others = {"AuthenticationError", "ProcessError", "TimeoutError", "aio", "reducer"}
    others |= {name for name in forkshm.__all__ if isinstance(getattr(forkshm, name), (forkshm.Mode, forkshm.Creation))}
    others |= {name for name in forkshm.__all__ if name in forkshm.errors.__all__}
    others |= {"active_children", "allow_connection_pickling", "cpu_count", "current_process", "freeze_support"}
    others |= {"get_logger", "log_to_stderr", "parent_process", "set_executable", "set_forkserver_preload"}
    missing = [name for name in forkshm.__all__ if name not in others and f"forkshm.{name}\n" not in text + "\n"]
    assert not missing


def test_methods_of_a_base_class_are_in_the_reference():
    """A class shows what it inherits from classes of forkshm that have no entry of their own."""
    text = "".join(path.read_text() for path in (DOCS / "api").glob("*.md"))
    entries = dict(re.findall(r"autoclass:: ([\w.]+)(?:\(\))?\n((?:   :.*\n)*)", text))
    # What these inherit serves forkshm itself.
    internal = {"forkshm.pool.ApplyResult", "forkshm.pool.AsyncResult", "forkshm.pool.IMapIterator", "forkshm.Process"}
    classes = {name: pkgutil.resolve_name(name) for name in entries}
    missing = [
        f"{name}.{member}"
        for name, kind in classes.items()
        if isinstance(kind, type) and name not in internal and ":inherited-members:" not in entries[name]
        for member in dir(kind)
        for base in [next((base for base in kind.__mro__ if member in vars(base)), kind)]
        if not member.startswith("_") and base.__module__.startswith("forkshm") and base not in classes.values()
    ]
    assert not missing


def test_links_between_pages_lead_to_pages():
    """Sphinx checks these, too, but not by default."""
    broken = []
    for path in PAGES:
        for link, anchor in re.findall(r"\]\(([^)#\s]*)(#[^)\s]*)?\)", path.read_text()):
            if "://" in link:
                continue
            # Relative to the page, so that the link works in the repository as well.
            target = path.parent / link if link else path
            if not target.exists():
                broken.append((path.name, link))
            elif anchor and target.suffix == ".md" and "ARCHITECTURE" not in target.name:
                text = target.read_text()
                for included in re.findall(r"```\{include\} (\S+)", text):
                    text += (target.parent / included).read_text()
                slugs = {
                    re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")
                    for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE)
                }
                if anchor[1:] not in slugs:
                    broken.append((path.name, link, anchor))
    assert not broken


@pytest.fixture(scope="module")
def crossing():
    pytest.importorskip("numpy")
    spec = importlib.util.spec_from_file_location("make_crossing", DOCS / "make_crossing.py")
    module = sys.modules["make_crossing"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["make_crossing"]


@pytest.mark.slow
@pytest.mark.skipif(kernel.name != "linux", reason="the table is that of Linux")
def test_the_table_of_shared_and_copied_types_is_correct(crossing):
    with forkshm.Pool(1) as pool:
        found = {name: cells for name, (_, cells) in crossing.rows_of(pool).items()}
    written = crossing.rows_in_file()
    assert found == {name: written.get(name) for name in found}
