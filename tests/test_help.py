"""``help()`` and signatures are readable: types have no quotes, and commands have examples."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from forkshm.__main__ import COMMANDS

SESSION = """
import inspect, typing
import forkshm
for name in forkshm.__all__:
    thing = getattr(forkshm, name)
    kinds = [thing] + [each for key, each in vars(thing).items() if not key.startswith("_")] * isinstance(thing, type)
    for each in kinds:
        if callable(each) and getattr(each, "__module__", "").startswith("forkshm"):
            try:
                print(name, inspect.signature(each))
            except ValueError:
                pass  # a builtin base has none
shared_memory = forkshm.shared_memory
for thing in (forkshm.region.Mutex, forkshm.aio.Pool.call, shared_memory.SharedMemory, forkshm.testing.check_leaks):
    print(thing.__name__, inspect.signature(thing))
for thing in (forkshm.Pool, forkshm.SharedList, forkshm.Process):
    help(thing)
print(typing.get_type_hints(forkshm.worker_state))
"""


def test_signatures_have_no_quotes():
    pytest.importorskip("numpy")
    done = subprocess.run([sys.executable, "-c", SESSION], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert not re.findall(r"^.*[(, ]\*{0,2}\w+: ['\"].*\) ->.*$|^.*\) -> ['\"].*$", done.stdout, re.MULTILINE)
    assert "processes: int | None = None" in done.stdout
    assert re.search(r"^Executor \(max_workers: int \| None = None, ", done.stdout, re.MULTILINE)
    assert "'return': typing.Any" in done.stdout


def test_pydoc_shows_types_without_quotes():
    done = subprocess.run([sys.executable, "-m", "pydoc", "forkshm.Pool"], capture_output=True, text=True, timeout=100)
    assert "processes: int | None = None" in done.stdout, done.stderr


def test_help_lists_the_commands_with_examples():
    done = subprocess.run([sys.executable, "-m", "forkshm", "--help"], capture_output=True, text=True, timeout=100)
    listed, _, examples = done.stdout.partition("\nexamples:\n")
    for name in COMMANDS:
        assert re.search(rf"^    {name} +\w", listed, re.MULTILINE)
        assert f"python -m forkshm {name}" in examples


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_ends_with_examples(command):
    asked = [sys.executable, "-m", "forkshm", command, "--help"]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=100)
    examples = done.stdout.partition("\nexamples:\n")[2].splitlines()
    assert len(examples) >= 2
    assert all(re.match(rf"  python -m forkshm {command}\b.*  +\w", line) for line in examples)
