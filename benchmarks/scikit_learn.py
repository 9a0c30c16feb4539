"""scikit-learn through joblib: forkshm beside loky, threads and one process, in time and memory.

    pip install scikit-learn && python benchmarks/scikit_learn.py      # some ten minutes
    python benchmarks/scikit_learn.py --jobs grid --rounds 5
    python benchmarks/scikit_learn.py --quick                          # tiny sizes: does it still work?

Each side runs in a process of its own, which makes the data, runs the job once (cold: the workers are started) and
then several times more (warm: the median). The sides take turns, each starting several times; the least cold time
counts. On a virtual machine memory that was free for some seconds may have been taken back by the host, and touching
4 GB of it then takes 8 to 12 s instead of 0.6 s, which hits whichever side runs first. The scores of all sides have to
be equal. Memory is the largest sum of the proportional set sizes (PSS) of the process and its workers, less what the
process had before the first run. The bounds: 0.8 times the time of the best other side with processes when warm, 0.3
times when cold, and half of its memory. Threads, which start nothing and copy nothing, show what the computing alone
takes. Exits with 1 if a score differs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
import warnings
from typing import TYPE_CHECKING, Any

import psutil
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Callable

BACKENDS = ("forkshm", "loky", "threading", "sequential")
WORKERS = 2
SAMPLE_SECONDS = 0.05


# -- the jobs --------------------------------------------------------------------------


def grid(scale: float) -> Callable[[], Any]:
    """Search the parameters of an SVC on 100 MB: few samples with many features."""
    import numpy as np
    from sklearn.model_selection import GridSearchCV
    from sklearn.svm import SVC

    rng = np.random.default_rng(0)
    samples = 200
    labels = np.arange(samples) % 2
    features = rng.standard_normal((samples, int(62_500 * scale))) + labels[:, None] * 0.02
    search = GridSearchCV(SVC(kernel="linear"), {"C": [0.01, 0.1, 1, 10]}, cv=3)
    return lambda: search.fit(features, labels).cv_results_["mean_test_score"].tolist()


def forest(scale: float) -> Callable[[], Any]:
    """Fit a random forest, and predict with it."""
    import numpy as np
    from sklearn.ensemble import RandomForestClassifier

    rng = np.random.default_rng(0)
    features = rng.standard_normal((int(40_000 * scale) + 100, 40))
    labels = (features[:, :5].sum(axis=1) > 0).astype(int)
    model = RandomForestClassifier(24, random_state=0, max_depth=12, n_jobs=WORKERS)
    # Labels, because threads add the probabilities of the trees in an order that varies.
    return lambda: model.fit(features, labels).predict(features[:2000]).tolist()


def pipeline(scale: float) -> Callable[[], Any]:
    """Cross-validate a pipeline on a table of 400 MB."""
    import numpy as np
    from sklearn.linear_model import Ridge
    from sklearn.model_selection import cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    rng = np.random.default_rng(0)
    features = rng.standard_normal((int(250_000 * scale) + 100, 200))
    target = features[:, :10].sum(axis=1) + rng.standard_normal(len(features))
    model = make_pipeline(StandardScaler(), Ridge())
    return lambda: cross_val_score(model, features, target, cv=4, n_jobs=WORKERS).tolist()


JOBS = {"grid": grid, "forest": forest, "pipeline": pipeline}


# -- one side --------------------------------------------------------------------------


def pss(process: psutil.Process) -> int:
    """Return the proportional set size of a process and its children, in bytes."""
    total = 0
    for each in [process, *process.children(recursive=True)]:
        try:
            total += each.memory_full_info().pss
        except psutil.Error:  # it has ended
            continue
    return total


class Watch(threading.Thread):
    """Looks at the memory again and again, and keeps the largest."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.process = psutil.Process()
        self.largest = 0
        self.ended = threading.Event()

    def run(self) -> None:
        while not self.ended.wait(SAMPLE_SECONDS):
            self.largest = max(self.largest, pss(self.process))


def run_one(job: str, backend: str, rounds: int, scale: float) -> dict[str, Any]:
    import joblib

    if backend == "forkshm":
        import forkshm.joblib  # noqa: F401 - registers the backend
    run = JOBS[job](scale)
    before = pss(psutil.Process())
    times, answers = [], []
    with joblib.parallel_config(backend, n_jobs=WORKERS), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(rounds + 1):
            began = time.perf_counter()
            answers.append(run())
            times.append(time.perf_counter() - began)
        # In a run of its own, because looking takes time.
        watch = Watch()
        watch.start()
        answers.append(run())
        watch.ended.set()
        watch.join()
    if any(answer != answers[0] for answer in answers):
        raise ValueError(f"the scores of {job} on {backend} differ from run to run")
    return {"cold": times[0], "warm": times[1:], "memory": watch.largest - before, "answer": answers[0]}


def run_apart(job: str, backend: str, rounds: int, scale: float) -> dict[str, Any]:
    command = [sys.executable, __file__, "--one", job, backend, "--rounds", str(rounds), "--scale", str(scale)]
    # One thread of BLAS in each process, so that the sides differ in nothing but the processes.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def run_in_turns(job: str, starts: int, rounds: int, scale: float) -> dict[str, dict[str, Any]]:
    """Return the times of each side: the least cold one, and the median of all warm ones."""
    runs: dict[str, list[dict[str, Any]]] = {backend: [] for backend in BACKENDS}
    for _ in range(starts):
        for backend, its_runs in runs.items():
            its_runs.append(run_apart(job, backend, rounds, scale))
    if len({json.dumps(run["answer"]) for its_runs in runs.values() for run in its_runs}) > 1:
        print(f"the scores of {job} differ from side to side")
        raise SystemExit(1)
    return {
        backend: {
            "cold": min(run["cold"] for run in its_runs),
            "warm": statistics.median(seconds for run in its_runs for seconds in run["warm"]),
            "memory": statistics.median(run["memory"] for run in its_runs),
        }
        for backend, its_runs in runs.items()
    }


# -- the program -----------------------------------------------------------------------


def ratios(results: dict[str, dict[str, Any]], quantity: str) -> str:
    """Return the quantity of forkshm as a multiple of loky's."""
    ours, theirs = results["forkshm"][quantity], results["loky"][quantity]
    return f"{ours / theirs:.2f}" if theirs > 0 else "-"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", default=",".join(JOBS), help="default: %(default)s")
    parser.add_argument("--starts", type=int, default=3, help="processes of each side; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="warm runs in each process; default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="a hundredth of the data")
    parser.add_argument("--one", nargs=2, metavar=("JOB", "BACKEND"), help=argparse.SUPPRESS)
    parser.add_argument("--scale", type=float, default=1.0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(run_one(*options.one, options.rounds, options.scale)))
        return 0
    scale = 0.01 if options.quick else 1.0
    table = Table()
    for heading in ("job", "", *BACKENDS, "forkshm / loky", "bound"):
        table.add_column(heading, justify="left" if heading in ("job", "") else "right")
    for job in options.jobs.split(","):
        results = run_in_turns(job, options.starts, options.rounds, scale)
        for quantity, bound in (("cold", 0.3), ("warm", 0.8)):
            cells = [f"{results[backend][quantity]:.2f} s" for backend in BACKENDS]
            table.add_row(job, quantity, *cells, ratios(results, quantity), f"{bound:g}")
        cells = [f"{results[backend]['memory'] / 1e6:,.0f} MB" for backend in BACKENDS]
        table.add_row(job, "memory", *cells, ratios(results, "memory"), "0.5", end_section=True)
    Console(width=None if sys.stdout.isatty() else 100).print(table)
    print("The scores of all sides are equal.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
