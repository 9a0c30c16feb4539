"""Interrupt every scenario at every point, and print a table.

``python all.py [--variant V] [--step N] [--again N] [SCENARIO ...]``

Exits with 1 if there is a fault at any point.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
VARIANTS = ("interrupt", "uses", "exception")


def run_alone(command, environment):
    """Run a program; return what it printed to stdout and stderr, and its exit code. No process of it is left."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=out, stderr=errors, env=environment, start_new_session=True)
        try:
            # Not until the end of a pipe, which a child that hangs keeps open.
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        finally:
            # Not reaped before: until then no other process group has this number.
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        out.seek(0)
        errors.seek(0)
        return out.read(), errors.read(), process.returncode


def run(name, variant, step=1, first=1, last=0, most_bad=1000, environment=None, again=0):
    """Run one scenario; return the number of points, the number tested, and the faults."""
    tried, total, bad = 0, 0, []
    while True:
        numbers = map(str, (first, step, last, again))
        command = [sys.executable, os.path.join(HERE, "trial.py"), name, variant, *numbers]
        out, errors, status = run_alone(command, {**os.environ, **(environment or {})})
        at, where, resume, is_done = None, None, None, False
        for line in out.splitlines():
            try:
                said = json.loads(line)
            except ValueError:
                continue
            if "total" in said:
                total = max(total, said["total"])
            if "at" in said:
                at, where = said["at"], None
                tried += 1
            where = said.get("where", where)
            if "bad" in said:
                bad.append((said["bad"], said["where"], said["problem"]))
            if "resume" in said:
                resume = said["resume"]
            is_done = is_done or "done" in said
        if is_done or len(bad) >= most_bad:
            return total, tried, bad
        if resume is None:
            bad.append((at, where, f"hangs, or ended with {status}: {errors[-3000:]}"))
            if at is None:
                return total, tried, bad
            resume = at + step
        first = resume
        if first > (last or total):
            return total, tried, bad


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scenarios", nargs="*")
    parser.add_argument("--variant", choices=(*VARIANTS, "all"), default="all")
    parser.add_argument("--step", type=int, default=1, help="try every n-th point only")
    parser.add_argument("--first", type=int, default=1)
    parser.add_argument("--last", type=int, default=0)
    parser.add_argument("--again", type=int, default=0, help="interrupt a second time, this many points later")
    options = parser.parse_args()
    sys.path.insert(0, HERE)
    from scenarios import SCENARIOS

    is_bad = False
    print("| scenario | variant | points | tried | bad | seconds |", flush=True)
    print("| --- | --- | --- | --- | --- | --- |", flush=True)
    for name in options.scenarios or SCENARIOS:
        for variant in VARIANTS if options.variant == "all" else (options.variant,):
            began = time.monotonic()
            total, tried, bad = run(name, variant, options.step, options.first, options.last, again=options.again)
            took = time.monotonic() - began
            print(f"| {name} | {variant} | {total} | {tried} | {len(bad)} | {took:.0f} |", flush=True)
            for at, where, problem in bad:
                print(f"    {at} {where}: {problem}", flush=True)
            is_bad = is_bad or bool(bad)
    return is_bad


if __name__ == "__main__":
    sys.exit(main())
