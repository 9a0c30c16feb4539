"""Common parts of the programs: options, the machine, running the sides, and the table."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from _measure import FULL, QUICK, Measured, measure_row, started
from _peers import PEERS
from _rows import LIMIT, OURS, Row, Rows, Scale

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

# Above this fraction of the machine used by other processes, measurements are doubtful.
BUSY = 0.1

# Short names for narrow columns of the table.
SHORT = {
    "multiprocessing": "mp",
    "concurrent.futures": "futures",
    "joblib (multiprocessing)": "joblib (mp)",
}


def machine() -> dict[str, str]:
    with open("/proc/cpuinfo") as lines:
        models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.machine(),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 1e9:.0f} GB",
        "kernel": platform.release(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "load": f"{os.getloadavg()[0]:.2f}",
    }


def options_of(description: str, rows: Rows) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, few repetitions; bounds are not judged")
    parser.add_argument("--rows", metavar="NAME,...", help=f"only these of: {', '.join(rows)}")
    parser.add_argument("--peers", metavar="NAME,...", help=f"only these beside forkshm: {', '.join(list(PEERS)[1:])}")
    parser.add_argument("--json", metavar="FILE", help="write all numbers there")
    parser.add_argument("--chart", metavar="FILE", help="draw them there; needs matplotlib")
    parser.add_argument(
        "--from", dest="source", metavar="FILE", help="measure nothing, take the numbers of an earlier run"
    )
    return parser


def chosen(
    parser: argparse.ArgumentParser,
    kind: str,
    wanted: str | None,
    known: Iterable[str],
    default: Iterable[str] | None = None,
) -> list[str]:
    known = list(known)
    if wanted is None:
        return known if default is None else list(default)
    names = [name for name in wanted.split(",") if name]
    if unknown := [name for name in names if name not in known]:
        parser.error(f"no such {kind}: {', '.join(unknown)}; there are: {', '.join(known)}")
    return names


# A row and its parameters.
Step: TypeAlias = "tuple[Row, dict[str, Any]]"


def measure_all(
    module: str,
    plan: Sequence[Step],
    peers: Sequence[str],
    scale: Scale,
    enough: Callable[[str, Row, dict[str, Any]], str],
    done: Callable[[Row, dict[str, Any], Measured], None],
) -> tuple[list[Measured], dict[str, str], dict[str, str]]:
    """Measure forkshm, the peers and the limit.

    Args:
        module: The module with the rows.
        plan: The steps to measure.
        peers: Names of the peers.
        scale: The amount of work.
        enough: Returns the reason for a side to skip a step; empty if it should not.
        done: Called with the result of each step.

    Returns:
        The measurements of each step; the versions of the sides that started; the reasons for those that did not.
    """
    results = [Measured() for _ in plan]
    versions: dict[str, str] = {}
    left_out: dict[str, str] = {}
    restless = [name for name in peers if PEERS[name].restless]
    # Sides whose processes work even when idle come after the others are done.
    for names in [[OURS, *(name for name in peers if name not in restless), LIMIT], *([name] for name in restless)]:
        with started(names) as (sides, missing):
            left_out |= missing
            versions |= {side.name: side.version for side in sides if side.name != LIMIT}
            for (row, parameters), result in zip(plan, results, strict=True):
                reasons = {side.name: enough(side.name, row, parameters) for side in sides}
                result.cannot |= {name: reason for name, reason in reasons.items() if reason}
                taking = [side for side in sides if not reasons[side.name] and (side.name != LIMIT or row.limit)]
                print(" ".join([row.name, *map("{:,}".format, parameters.values())]), end=" ", file=sys.stderr)
                print(f"({len(taking)} sides)", end=" ", file=sys.stderr, flush=True)
                began = time.perf_counter()
                measure_row(taking, module, row, scale, QUICK if scale.quick else FULL, parameters, result)
                print(f"{time.perf_counter() - began:.1f} s", file=sys.stderr, flush=True)
                done(row, parameters, result)
    return results, versions, left_out


def row_as_json(row: Row, parameters: dict[str, Any], measured: Measured, *, judged: bool) -> dict[str, Any]:
    timings = measured.timings
    limit = timings.get(LIMIT)
    bounds: dict[str, bool | None] = {}
    for bound in row.bounds:
        try:
            bounds[str(bound)] = bound.is_kept(timings) if judged else None
        except KeyError:
            bounds[str(bound)] = None  # a side that the bound refers to was not measured
    return {
        "name": row.name,
        "title": row.title.format(**parameters),
        "parameters": parameters,
        "unit": row.unit,
        "sides": {name: taken.as_json() for name, taken in timings.items()},
        "over_limit": {name: taken.median / limit.median for name, taken in timings.items() if limit},
        "bounds": bounds,
        "cannot": measured.cannot,
        "failed": measured.failed,
        "others": measured.others,
    }


def run(
    module: str,
    rows: Rows,
    description: str,
    chart: Callable[[dict[str, Any], str], None],
    arguments: Sequence[str] | None,
    *,
    steps: Callable[[Row, Scale], list[dict[str, Any]]] = lambda *_: [{}],
    enough: Callable[[str, Row, dict[str, Any]], str] = lambda *_: "",
    done: Callable[[Row, dict[str, Any], Measured], None] = lambda *_: None,
) -> int:
    """Measure rows, print their table, and write the requested files."""
    parser = options_of(description, rows)
    options = parser.parse_args(arguments)
    names = chosen(parser, "row", options.rows, rows)
    # By default, --quick omits peers that take seconds to start.
    default = [name for name, peer in PEERS.items() if name != OURS and not (options.quick and peer.restless)]
    peers = chosen(parser, "peer", options.peers, [name for name in PEERS if name != OURS], default)
    if options.source:
        with open(options.source) as file:
            report = json.load(file)
    else:
        described = machine()
        scale = Scale(options.quick)
        plan = [(rows[name], parameters) for name in names for parameters in steps(rows[name], scale)]
        began = time.perf_counter()
        results, versions, left_out = measure_all(module, plan, peers, scale, enough, done)
        report = {
            "machine": described,
            "versions": versions,
            "left_out": left_out,
            "quick": options.quick,
            "minutes": (time.perf_counter() - began) / 60,
            "rows": [
                row_as_json(row, parameters, measured, judged=not options.quick)
                for (row, parameters), measured in zip(plan, results, strict=True)
            ],
        }
    print_report(report)
    write(report, options.json)
    if options.chart:
        chart(report, options.chart)
    return 0


def write(report: dict[str, Any], path: str | None) -> None:
    if path:
        with open(path, "w") as file:
            json.dump(report, file, indent=1)
            file.write("\n")


# -- output ---------------------------------------------------------------------------


def with_unit(value: float, unit: str = "s") -> str:
    """Return a value as text with three digits and a unit."""
    if unit != "s":
        return f"{value:.3g} {unit}"
    scaled, name = (
        next(
            (value / factor, name)
            for factor, name in ((1, "s"), (1e-3, "ms"), (1e-6, "us"), (1e-9, "ns"))
            if value >= factor
        )
        if value >= 1e-9
        else (value, "s")
    )
    return f"{scaled:,.0f} {name}" if scaled >= 100 else f"{scaled:.3g} {name}"


def verdict(row: dict[str, Any]) -> str:
    kept = list(row["bounds"].values())
    # On a busy machine, the measured limits are not those of the machine.
    doubt = "?" if row["others"] > BUSY else ""
    if False in kept:
        return f"MISSED{doubt}"
    return f"ok{doubt}" if kept and None not in kept else "-"


def header(report: dict[str, Any]) -> list[str]:
    return [
        "; ".join(f"{name} {value}" for name, value in report["machine"].items()),
        "; ".join(f"{name} {value}" for name, value in report["versions"].items()),
    ]


def print_report(report: dict[str, Any]) -> None:
    """Print two tables: forkshm with its bounds, and forkshm beside the peers."""
    print("\n".join(header(report)))
    rows = report["rows"]
    judged = any(row["bounds"] for row in rows)
    headings = ["row", OURS, LIMIT, "over limit", *(["bound", "verdict"] * judged), "others"]
    lines = []
    for row in rows:
        told = [", ".join(row["bounds"]), verdict(row)] * judged
        lines.append([row["title"], cell(row, OURS), cell(row, LIMIT), over_limit(row), *told, f"{row['others']:.0%}"])
    print_table(headings, lines)
    if peers := [name for name in PEERS if name != OURS and name in report["versions"]]:
        lines = [[row["title"], *(cell(row, side) for side in (OURS, *peers))] for row in rows]
        print_table(["row", OURS, *(SHORT.get(name, name) for name in peers)], lines)
    print(
        f"Medians. others: the part of the machine that other processes took meanwhile; above {BUSY:.0%} verdicts have "
        "a question mark: measure again. mp: multiprocessing."
    )
    print_notes(report)


def cell(row: dict[str, Any], side: str) -> str:
    if side in row["failed"]:
        return "failed"
    return with_unit(row["sides"][side]["median"], row["unit"]) if side in row["sides"] else "-"


def over_limit(row: dict[str, Any]) -> str:
    """Return forkshm's ratio to the limit, or the difference if the bound is a difference."""
    if OURS not in row["sides"] or LIMIT not in row["sides"]:
        return "-"
    ours, limit = (row["sides"][side]["median"] for side in (OURS, LIMIT))
    if any("limit +" in bound for bound in row["bounds"]):
        return f"{(ours - limit) * 1e6:+,.1f} us"
    return f"{ours / limit:.2f}x"


def print_notes(report: dict[str, Any]) -> None:
    for name, reason in report["left_out"].items():
        print(f"left out: {name}: {reason}")
    # Sides that share a reason, and the rows it applies to.
    reasons: dict[str, tuple[list[str], list[str]]] = {}
    for row in report["rows"]:
        for name, reason in [
            *row["cannot"].items(),
            *((name, f"failed: {why}") for name, why in row["failed"].items()),
        ]:
            sides, where = reasons.setdefault(reason, ([], []))
            sides += [name] * (name not in sides)
            where += [row["name"]] * (row["name"] not in where)
    for reason, (sides, where) in reasons.items():
        print(f"{', '.join(where)}: not {', '.join(sides)}: {reason}")
    for row in report["rows"]:
        once = [name for name, taken in row["sides"].items() if taken["count"] == 1]
        if once and row["unit"] == "s":
            print(f"{row['title']}: measured once: {', '.join(once)}")
    if report["quick"]:
        print("Sizes were a hundredth of what the rows say, so bounds were not judged.")
    print(f"{report['minutes']:.1f} minutes.")


def print_table(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    """Print a table with rich, or as plain text if rich is not installed."""
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(map(len, column)) for column in zip(headings, *lines, strict=True)]
        for line in [headings, *lines]:
            print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in headings:
        is_text = heading in ("row", "bound", "verdict")
        table.add_column(heading, justify="left" if is_text else "right", no_wrap=heading not in ("row", "bound"))
    for line in lines:
        table.add_row(*line, style="bold red" if any(cell.startswith("MISSED") for cell in line) else None)
    # A file has no width, so lines may be as long as needed.
    console = Console() if sys.stdout.isatty() else Console(width=200)
    console.print(table)
