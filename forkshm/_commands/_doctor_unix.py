"""Checks of the doctor on systems with process limits and, optionally, /proc."""

from __future__ import annotations

import mmap
import os
import resource
import sys
import time
from typing import TYPE_CHECKING

from forkshm._commands._scan import SHM
from forkshm._commands._table import nbytes
from forkshm.backend import Access, Advice, kernel

if TYPE_CHECKING:
    from collections.abc import Iterator

    from forkshm._commands._table import Finding

assert sys.platform != "win32"  # type checkers leave out the rest on Windows

__all__ = ("PARTS",)

_SHMEM_ENABLED = "/sys/kernel/mm/transparent_hugepage/shmem_enabled"
# Below this limit on open files, a pool and a few hundred arrays do not fit.
_FEW_FDS = 1024


def _read(path: str) -> str:
    try:
        with open(path) as file:
            return file.read().strip()
    except OSError:
        return ""


def _cgroup(name: str) -> str:
    """Return a setting of the innermost cgroup (version 2) in which it is not "max"."""
    line = _read("/proc/self/cgroup")
    path = line.partition("0::")[2].partition("\n")[0]
    while True:
        value = _read(f"/sys/fs/cgroup{path.rstrip('/')}/{name}")
        if value and not value.startswith("max"):
            return value
        if path in ("", "/"):
            return ""
        path = os.path.dirname(path)


# Number of bytes filled to measure the speed.
_TRIAL = 32 * 2**20


def _fill_shared(source: mmap.mmap) -> float:
    """Return the time in seconds to fill new shared memory as an arena does."""
    fd = kernel.create_memory(_TRIAL, "probe")
    address = kernel.map(fd, _TRIAL, Access.SHARED)
    try:
        if kernel.fills_huge_pages():
            kernel.advise(address, _TRIAL, Advice.huge_pages)
        start = kernel.address_of(source)
        began = time.perf_counter()
        if kernel.fills_huge_pages() or not kernel.write_memory(fd, kernel.identify(fd)[0], 0, start, _TRIAL):
            kernel.copy_memory(address, start, _TRIAL)
        return time.perf_counter() - began
    finally:
        kernel.unmap(address, _TRIAL)
        kernel.close(fd)


def _fill_private(source: mmap.mmap) -> float:
    """Return the time in seconds to fill new private memory in huge pages."""
    with mmap.mmap(-1, _TRIAL + 2 * 2**20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as target:
        address = kernel.address_of(target)
        kernel.advise(address, len(target), Advice.huge_pages)
        began = time.perf_counter()
        kernel.copy_memory(address, kernel.address_of(source), _TRIAL)
        return time.perf_counter() - began


def _huge_pages() -> Iterator[Finding]:
    enabled = _read(_SHMEM_ENABLED)
    chosen = enabled.partition("[")[2].partition("]")[0]
    useful = chosen in ("always", "within_size", "advise", "force")
    yield (
        "huge pages for shared memory",
        chosen or "unknown",
        "huge_pages=True requests them, as do copies of arrays" if useful else "huge_pages=True has no effect",
        False,
    )
    try:
        with mmap.mmap(-1, _TRIAL, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as source:
            kernel.clear_memory(kernel.address_of(source), _TRIAL)  # allocates the pages
            shared = min(_fill_shared(source) for _ in range(3))
            private = min(_fill_private(source) for _ in range(3)) if chosen and not useful else shared
    except OSError as error:  # out of memory, or not permitted
        yield "filling new shared memory", str(error.strerror), "copies of arrays may fail as well", True
        return
    gain = ""
    if private < 0.8 * shared and kernel.name == "linux":
        gain = f"in huge pages about {_TRIAL / private / 1e9:.1f} GB/s, after: echo advise > {_SHMEM_ENABLED} (as root)"
    yield "filling new shared memory", f"{_TRIAL / shared / 1e9:.1f} GB/s", gain, False


def _limits() -> Iterator[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    words = "unlimited" if hard == resource.RLIM_INFINITY else f"{hard:,}"
    few = hard != resource.RLIM_INFINITY and hard < _FEW_FDS
    raised = "" if soft == hard else "; the soft limit is raised when few are left"
    yield "open files", f"{soft:,} of {words}", f"at most about {words} regions per process{raised}", few
    mappings = _read("/proc/sys/vm/max_map_count")
    if mappings:
        yield "mappings of a process", f"{int(mappings):,}", "each region and each lent array needs one", False
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
                "beyond it the kernel kills a process; its task raises WorkerDiedError, and the pool continues",
                False,
            )
    strict = _read("/proc/sys/vm/overcommit_memory") == "2"
    yield (
        "overcommit of memory",
        "strict" if strict else "allowed",
        "allocations may be refused" if strict else "memory is allocated page by page, when first written",
        strict,
    )


def _shm() -> Iterator[Finding]:
    try:
        status = os.statvfs(SHM)
    except OSError as error:
        yield SHM, os.strerror(error.errno or 0), "named memory is unavailable; all other memory works", True
        return
    free, total = status.f_bavail * status.f_frsize, status.f_blocks * status.f_frsize
    if status.f_flag & os.ST_RDONLY or not os.access(SHM, os.W_OK):
        yield SHM, "not writable", "SharedMemoryObject can open but not create; all other memory works", True
    else:
        follows = "limits only SharedMemoryObject (ENOSPC at truncate)"
        yield SHM, f"{nbytes(free)} of {nbytes(total)} free", follows, False


def _processes() -> Iterator[Finding]:
    usable, there = kernel.default_workers(), os.cpu_count() or 1
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
        "regions can be sent through the standard library's channels between processes of one user",
        False,
    )


# Checks in the order of the report.
PARTS = (_huge_pages, _limits, _shm, _processes)
