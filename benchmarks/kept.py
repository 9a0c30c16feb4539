"""The memory that small kept results hold, and the bytes that views copy, beside multiprocessing in one run.

    python benchmarks/kept.py
    python benchmarks/kept.py --only idle,broadcast

A result may be a small part of a large block, for example a slice of an argument that a worker returns. The first table
keeps such parts, drops all else, and prints the memory that this process and its workers hold in addition: private
memory, and shared memory once. The second table sends views that look larger than the memory behind them. Each side
checks its answers. Exits with 1 if an answer is wrong or a bound is missed. Linux only.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import multiprocessing
import os
import pickle
import sys
import time
from typing import TYPE_CHECKING, Any

import numpy as np

import forkshm

if TYPE_CHECKING:
    from collections.abc import Callable

MB = 10**6
WORKERS = 2

# -- functions of workers ----------------------------------------------------------------------------


def slice_of(array: Any) -> Any:
    return array[:5_000]


def many(number: int) -> list[Any]:
    return [np.full(25_000, float(number)) for _ in range(100)]


def thousands(number: int) -> list[Any]:
    return [np.full(128, float(number)) for _ in range(5_000)]


def named(number: int) -> dict[str, Any]:
    return {str(key): np.full(25_000, float(number)) for key in range(100)}


def made_and_cut(number: int) -> Any:
    return np.full(2_500_000, float(number))[:5_000]


def put_lists(queue: Any, count: int) -> None:
    for number in range(count):
        queue.put([np.full(25_000, float(number)) for _ in range(100)])


def total(array: Any) -> float:
    return float(array.sum())


# -- memory held -----------------------------------------------------------------------------------------


def family() -> list[int]:
    """Return the pids of this process and its descendants."""
    found = [os.getpid()]
    for pid in found:
        with contextlib.suppress(OSError), open(f"/proc/{pid}/task/{pid}/children") as file:
            found += map(int, file.read().split())
    return found


def held() -> int:
    """Return the bytes that this process and its descendants hold: private memory, and shared objects once."""
    private = 0
    shared: dict[tuple[int, int], int] = {}
    for pid in family():
        with contextlib.suppress(OSError):
            with open(f"/proc/{pid}/smaps_rollup") as file:
                private += sum(int(line.split()[1]) * 1024 for line in file if line.startswith("Pss_Anon:"))
            for folder in ("fd", "map_files"):
                for name in os.listdir(f"/proc/{pid}/{folder}"):
                    path = f"/proc/{pid}/{folder}/{name}"
                    with contextlib.suppress(OSError):
                        if os.readlink(path).startswith(("/memfd:", "/dev/shm/")):
                            info = os.stat(path)
                            shared[info.st_dev, info.st_ino] = info.st_blocks * 512
    return private + sum(shared.values())


def keep_slices(pool: Any, _: Any) -> list[Any]:
    return [pool.apply(slice_of, (np.full(2_500_000, float(number)),)) for number in range(50)]


def keep_first(pool: Any, _: Any) -> list[Any]:
    return [pool.apply(many, (number,))[0] for number in range(50)]


def keep_one_of_thousands(pool: Any, _: Any) -> list[Any]:
    return [pool.apply(thousands, (number,))[2_500] for number in range(50)]


def keep_one_value(pool: Any, _: Any) -> list[Any]:
    return [pool.apply(named, (number,))["50"] for number in range(50)]


def keep_cut(pool: Any, _: Any) -> list[Any]:
    return [pool.apply(made_and_cut, (number,)) for number in range(50)]


def keep_items(_: Any, library: Any) -> list[Any]:
    queue = library.Queue()
    process = library.Process(target=put_lists, args=(queue, 50))
    process.start()
    kept = [queue.get()[0] for _ in range(50)]
    process.join()
    queue.close()
    return kept


def keep_nothing(pool: Any, _: Any) -> list[Any]:
    results = pool.map(many, range(40))
    del results
    gc.collect()
    time.sleep(10)
    return []


KEPT: dict[str, tuple[str, Callable[[Any, Any], list[Any]], dict[str, Any]]] = {
    "slices": ("50 slices of 40 kB of arguments of 20 MB", keep_slices, {}),
    "first": ("the first of 100 arrays of 200 kB, 50 times", keep_first, {}),
    "one": ("one of 5,000 arrays of 1 kB, 50 times", keep_one_of_thousands, {}),
    "value": ("one value of dicts of 100 arrays of 200 kB, 50 times", keep_one_value, {}),
    "items": ("the first of 100 arrays of 200 kB in 50 queue items", keep_items, {}),
    "cut": ("50 slices of 40 kB of results of 20 MB, born shared", keep_cut, {"born_shared": True}),
    "idle": ("nothing, 10 s after 800 MB of results", keep_nothing, {}),
}


def measure_kept(row: str) -> tuple[float, float, float, bool]:
    """Return the MB that are kept, the MB held for them by forkshm and multiprocessing, and whether all are right."""
    _, keep, options = KEPT[row]
    found = []
    size = 0
    is_right = True
    for library in (forkshm, multiprocessing):
        with library.Pool(WORKERS, **(options if library is forkshm else {})) as pool:
            pool.map(abs, range(100))
            gc.collect()
            before = held()
            kept = keep(pool, library)
            gc.collect()
            found.append((held() - before) / MB)
            is_right &= all((array == float(number)).all() for number, array in enumerate(kept))
            size = sum(array.nbytes for array in kept)
    return size / MB, found[0], found[1], is_right


def bound(row: str, kept: float) -> float:
    """Return the MB that may be held: 4 times the size or 1 MiB for each array, and 64 MiB that each process keeps."""
    count = 0 if row == "idle" else 50
    return max(4 * kept, count * 2**20 / MB) + (WORKERS + 1) * 64 * 2**20 / MB


# -- views ------------------------------------------------------------------------------------------------


def views() -> dict[str, tuple[str, Any, float]]:
    """Return names, descriptions and views, and the bytes behind each."""
    row = np.arange(1_000.0)
    found: dict[str, tuple[str, Any, float]] = {
        "broadcast": ("8 kB broadcast to 40 MB", np.broadcast_to(row, (5_000, 1_000)), row.nbytes),
        "windows": (
            "windows of 1,000 over 160 kB",
            np.lib.stride_tricks.sliding_window_view(np.arange(20_000.0), 1_000),
            160_000,
        ),
    }
    with contextlib.suppress(ImportError):
        import pyarrow as pa

        table = pa.table({"x": np.arange(5_000_000.0)})
        found["arrow"] = ("10 rows of an Arrow table of 40 MB", table.slice(1_000, 10), 80)
    return found


def sum_of(view: Any) -> float:
    return float(np.asarray(view["x"]).sum()) if hasattr(view, "num_rows") else total(view)


def measure_view(view: Any) -> tuple[float, float, bool]:
    """Return the kB that forkshm copied and that multiprocessing pickles, and whether the answer is right."""
    with forkshm.Pool(1) as pool:
        pool.apply(abs, (1,))
        before = pool.statistics().bytes_copied
        answer = pool.apply(sum_of, (view,))
        copied = pool.statistics().bytes_copied - before
    return copied / 1e3, len(pickle.dumps(view, 5)) / 1e3, answer == sum_of(view)


def main() -> int:
    """Measure, print, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="rows, separated by commas: " + ", ".join([*KEPT, *views()]))
    wanted = [name for name in parser.parse_args().only.split(",") if name]
    is_good = True
    print(f"{'kept':58} {'MB kept':>8} {'forkshm':>8} {'mp':>8} {'at most':>8}")
    for row, (what, _, _) in KEPT.items():
        if wanted and row not in wanted:
            continue
        kept, ours, theirs, is_right = measure_kept(row)
        most = bound(row, kept)
        is_good &= is_right and ours <= most
        print(f"{what:58} {kept:8.1f} {ours:8.1f} {theirs:8.1f} {most:8.0f}{'' if is_right else '  WRONG'}", flush=True)
    print(f"\n{'sent':58} {'forkshm':>8} {'mp':>8}   kB copied")
    for row, (what, view, behind) in views().items():
        if wanted and row not in wanted:
            continue
        copied, pickled, is_right = measure_view(view)
        is_good &= is_right and copied * 1e3 <= 2 * behind + 10_000
        print(f"{what:58} {copied:8.1f} {pickled:8.1f}{'' if is_right else '  WRONG'}", flush=True)
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
