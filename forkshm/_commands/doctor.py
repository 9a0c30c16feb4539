"""Say what this system offers, where its limits are, and what forkshm will therefore do."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import os
import platform
import resource
import sys
from typing import TYPE_CHECKING

from forkshm._commands._scan import SHM
from forkshm._commands._table import nbytes, show
from forkshm.backend import capabilities, kernel

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ("add_arguments", "findings", "run")

#: What, what was found, what follows, and whether that is a lack.
Finding = tuple[str, str, str, bool]

#: Below so many open files a pool and a few hundred arrays do not go together.
_FEW_FDS = 1024


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Say what the command takes."""
    parser.add_argument("--strict", action="store_true", help="exit with 1 when anything is marked with !")


def _read(path: str) -> str:
    try:
        with open(path) as file:
            return file.read().strip()
    except OSError:
        return ""


def _cgroup(name: str) -> str:
    """Return a setting of the innermost cgroup (version 2) that has one other than "max"."""
    line = _read("/proc/self/cgroup")
    path = line.partition("0::")[2].partition("\n")[0]
    while True:
        value = _read(f"/sys/fs/cgroup{path.rstrip('/')}/{name}")
        if value and not value.startswith("max"):
            return value
        if path in ("", "/"):
            return ""
        path = os.path.dirname(path)


def _kernel() -> Iterator[Finding]:
    asked = os.environ.get("FORKSHM_BACKEND")
    follows = "" if kernel.name == "linux" else "slower, no seals, and memory crosses no channels but forkshm's"
    yield "backend", f"{kernel.name}{' (FORKSHM_BACKEND)' if asked else ''}", follows, False
    for field in dataclasses.fields(capabilities):
        if field.metadata["needed"] == kernel.name:
            there = getattr(capabilities, field.name)
            yield field.name, "works" if there else "MISSING", "" if there else "forkshm cannot work", not there
    fd = kernel.create_memory(kernel.page_size, "probe")
    try:
        kernel.seal_writes(fd)
        yield "seals against writes", "work", "region.seal() is enforced by the kernel", False
    except OSError as error:
        yield "seals against writes", os.strerror(error.errno or 0), "region.seal() raises UnsupportedError", True
    finally:
        kernel.close(fd)
    try:
        kernel.own_pages(0, 0)
        yield "/proc/self/pagemap", "readable", "copies are handed on without copying again", False
    except OSError as error:
        yield "/proc/self/pagemap", os.strerror(error.errno or 0), "copies that are handed on are copied again", True
    enabled = _read("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
    chosen = enabled.partition("[")[2].partition("]")[0]
    useful = chosen in ("always", "within_size", "advise", "force")
    yield (
        "huge pages for shared memory",
        chosen or "unknown",
        "huge_pages=True asks for them" if useful else "huge_pages=True changes nothing",
        False,
    )


def _limits() -> Iterator[Finding]:
    assert sys.platform != "win32"  # looks into /proc
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    words = "unlimited" if hard == resource.RLIM_INFINITY else f"{hard:,}"
    few = hard != resource.RLIM_INFINITY and hard < _FEW_FDS
    raised = "" if soft == hard else "; the soft limit is raised when few are left"
    yield "open files", f"{soft:,} of {words}", f"at most about {words} regions in a process{raised}", few
    mappings = _read("/proc/sys/vm/max_map_count")
    if mappings:
        yield "mappings of a process", f"{int(mappings):,}", "each region and each lent array is one", False
    space = resource.getrlimit(resource.RLIMIT_AS)[0]
    if space != resource.RLIM_INFINITY:
        yield "address space", nbytes(space), "beyond it, RegionCreateError (ENOMEM) at creation", True
    meminfo = dict(line.split(":", 1) for line in _read("/proc/meminfo").splitlines())
    if "MemAvailable" in meminfo:
        available, total = (int(meminfo[name].split()[0]) * 1024 for name in ("MemAvailable", "MemTotal"))
        yield "memory", f"{nbytes(available)} of {nbytes(total)} available", "", False
        left = kernel.memory_left()
        if left is not None and left < total:
            yield (
                "memory of this cgroup",
                f"{nbytes(max(left, 0))} left",
                "beyond it the kernel kills: that task raises WorkerDiedError, and the pool goes on",
                False,
            )
    strict = _read("/proc/sys/vm/overcommit_memory") == "2"
    yield (
        "overcommit of memory",
        "strict" if strict else "allowed",
        "untouched memory may be refused later" if strict else "memory is taken page by page, when first written",
        strict,
    )


def _shm() -> Iterator[Finding]:
    assert sys.platform != "win32"  # looks into /proc
    try:
        status = os.statvfs(SHM)
    except OSError as error:
        yield SHM, os.strerror(error.errno or 0), "no memory with a name; all other memory works", True
        return
    free, total = status.f_bavail * status.f_frsize, status.f_blocks * status.f_frsize
    if status.f_flag & os.ST_RDONLY or not os.access(SHM, os.W_OK):
        yield SHM, "not writable", "SharedMemoryObject can open and not create; all other memory works", True
    else:
        follows = "bounds SharedMemoryObject (ENOSPC at truncate), and nothing else"
        yield SHM, f"{nbytes(free)} of {nbytes(total)} free", follows, False


def _processes() -> Iterator[Finding]:
    assert sys.platform != "win32"  # looks into /proc
    usable, there = kernel.usable_cores(), os.cpu_count() or 1
    quota, _, period = _cgroup("cpu.max").partition(" ")
    share = f", of which this cgroup may use {int(quota) / int(period):.1f}" if period else ""
    yield "cores", f"{usable} of {there}{share}", f"Pool() starts {usable} workers", False
    limit = resource.getrlimit(resource.RLIMIT_NPROC)[0]
    if limit != resource.RLIM_INFINITY:
        yield "processes of this user", f"{limit:,}", "beyond it, WorkerStartError", False
    scope = _read("/proc/sys/kernel/yama/ptrace_scope")
    yield (
        "looking into other processes",
        f"yama ptrace_scope {scope}" if scope else "as proc(5) says",
        "regions cross the standard library's channels between processes of one user",
        False,
    )


def _python() -> Iterator[Finding]:
    born = platform.machine() == "x86_64" and sys.implementation.name == "cpython"
    has_numpy = importlib.util.find_spec("numpy") is not None
    yield (
        "NumPy",
        "there" if has_numpy else "not installed",
        "shared arrays" if has_numpy else "regions without arrays: pip install 'forkshm[numpy]'",
        not has_numpy,
    )
    yield (
        "arrays born shared",
        "possible" if born and has_numpy else "not here",
        "" if born and has_numpy else "shared_allocations and born_shared raise UnsupportedError",
        False,
    )


def findings() -> Iterator[Finding]:
    """Look at everything."""
    version = f"forkshm {sys.modules['forkshm'].__version__}, Python {platform.python_version()}"
    yield "this is", f"{version}, {platform.system()} {platform.release()} {platform.machine()}", "", False
    for part in (_kernel, _limits, _shm, _processes, _python):
        yield from part()


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    found = list(findings())
    show(
        ("", "what", "found", "so"),
        [["!" if lacks else "", what, there, follows] for what, there, follows, lacks in found],
    )
    return 1 if arguments.strict and any(lacks for *_, lacks in found) else 0
