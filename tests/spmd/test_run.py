"""``python -m forkshm run``: a script in ranked processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

pytest.importorskip("numpy")

HEAD = """
import atexit, os, signal, sys, time
import forkshm
me = forkshm.worker()
def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())
def wait():
    while True:  # Python may have looked for signals just before one comes: pause() would not see it
        time.sleep(0.05)
"""


@pytest.fixture
def script(tmp_path):
    def write(body):
        path = tmp_path / "script.py"
        path.write_text(HEAD + body)
        return str(path)

    return write


def command(*options):
    return [sys.executable, "-W", "error::ResourceWarning", "-m", "forkshm", "run", *map(str, options)]


def run(*options, **more):
    return subprocess.run(command(*options), capture_output=True, text=True, timeout=60, **more)


def test_a_script_runs_in_ranked_workers_that_meet(script):
    path = script("""
import helper
table = me.array("table", (me.size,), int)
table[me.rank] = me.rank + 1
me.barrier()
say(me.rank, me.size, table.sum(), me.reduce(1), __name__, sys.argv[1:], helper.answer)
atexit.register(say, "at exit", me.rank)
""")
    with open(os.path.join(os.path.dirname(path), "helper.py"), "w") as helper:
        helper.write("answer = 42\n")
    done = run("-n", 3, path, "-x", "--prefix", "y")
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(done.stdout.splitlines()) == sorted(
        [f"{rank} 3 6 3 __main__ ['-x', '--prefix', 'y'] 42" for rank in range(3)]
        + [f"at exit {rank}" for rank in range(3)]
    )


def test_a_worker_script_also_runs_alone(script):
    done = subprocess.run(
        [sys.executable, script("me.barrier()\nsay(me.rank, me.size)")], capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "0 1\n"


def test_a_module_runs_as_well(script):
    path = script("say(__name__, me.rank)")
    done = run("-n", 2, "-m", "script", cwd=os.path.dirname(path))
    assert sorted(done.stdout.splitlines()) == ["__main__ 0", "__main__ 1"]


def test_lines_are_prefixed_by_rank_on_request(script):
    done = run(
        "--prefix",
        "--workers",
        2,
        script("""
print("one")
os.write(1, b"two, ")
time.sleep(0.01)
os.write(1, b"and no end")
print("complaint", file=sys.stderr)
os.system("echo from a program")
"""),
    )
    assert done.returncode == 0
    for rank in range(2):
        mine = [line[4:] for line in done.stdout.splitlines() if line.startswith(f"[{rank}] ")]
        assert mine == ["one", "two, and no endfrom a program"]
        assert f"[{rank}] complaint" in done.stderr.splitlines()


def test_a_program_that_lives_on_does_not_keep_the_output_open(script):
    body = "child = os.fork()\nif child == 0:\n    while True:\n        signal.pause()\nsay(child)"
    done = run("-n", 1, "--prefix", script(body))
    rank, child = done.stdout.split()
    os.kill(int(child), signal.SIGKILL)  # it existed, and held its end of the pipe
    assert (done.returncode, rank) == (0, "[0]")


@pytest.mark.parametrize(
    ("end", "code", "said"),
    [
        ("sys.exit(7)", 7, "exited with code 7"),
        ("sys.exit('enough')", 1, "enough"),
        ("raise KeyError('boo')", 1, "KeyError: 'boo'"),
        ("os._exit(0)", 1, "exited with code 0"),
        ("os.kill(os.getpid(), signal.SIGKILL)", 137, "was killed by SIGKILL"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", 139, "was killed by SIGSEGV"),
    ],
)
def test_the_first_failure_stops_the_rest_and_its_exit_code_is_passed_on(script, end, code, said):
    done = run("-n", 3, "--grace", 0.1, script(f"me.barrier()\nif me.rank == 1:\n    {end}\nsignal.pause()"))
    assert done.returncode == code
    assert said in done.stderr
    assert "python -m forkshm run: worker 1 of 3 (pid " in done.stderr
    assert "runpy" not in done.stderr


def test_workers_waiting_for_a_dead_one_are_released(script):
    done = run("-n", 3, "--grace", 60, script("if me.rank == 1:\n    os._exit(3)\nme.barrier()"))
    assert done.returncode == 3
    assert done.stderr.count("TeamBrokenError: member") == 2


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"])
def test_signals_are_passed_on(script, name):
    number = signal.Signals[name]
    path = script(
        f"""
def stop(number, frame):
    say("stopped by", number)
    sys.exit(0)
signal.signal(signal.{name}, stop)
me.barrier()
if me.rank == 0:
    say("ready")
wait()
"""
    )
    with subprocess.Popen(command("-n", 2, path), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        assert process.stdout.read() == f"stopped by {int(number)}\n" * 2
    assert process.returncode == 0


def test_ctrl_c_is_one_traceback_and_130(script):
    path = script('me.barrier()\nif me.rank == 0:\n    say("ready")\nwait()')
    with subprocess.Popen(
        command("-n", 3, path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout.readline() == "ready\n"
        os.killpg(process.pid, signal.SIGINT)
        _, complained = process.communicate(timeout=60)
    assert process.returncode == 130
    assert complained.count("Traceback") == 1


def test_workers_end_with_the_launcher(script, wait_until):
    path = script("pids = me.reduce([os.getpid()])\nif me.rank == 0:\n    say(*pids)\nsignal.pause()")
    with subprocess.Popen(command("-n", 2, path), stdout=subprocess.PIPE, text=True) as process:
        pids = process.stdout.readline().split()
        process.kill()
        assert process.stdout.read() == ""  # no process has the other end any more
    assert len(pids) == 2


def test_nothing_is_left_in_dev_shm(script):
    before = set(os.listdir("/dev/shm"))
    done = run("-n", 2, script("me.array('a', 1000)[:] = 1\nme.barrier()\nos.kill(os.getpid(), 9)"))
    assert done.returncode == 137
    assert not {name for name in set(os.listdir("/dev/shm")) - before if "forkshm" in name}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["no-such-script.py"], "script 'no-such-script.py' does not exist"),
        (["-n", "0", "x.py"], "argument -n/--workers: invalid"),
        ([], "the following arguments are required: script"),
    ],
)
def test_nonsense_is_refused(options, said):
    done = run(*options)
    assert done.returncode == 2
    assert said in done.stderr


def test_help_lists_the_commands():
    done = subprocess.run([sys.executable, "-m", "forkshm", "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert "run a script in several ranked processes" in done.stdout
