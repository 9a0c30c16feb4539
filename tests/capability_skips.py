"""Capabilities that backends lack, with the reasons.

A test with the mark ``needs`` names the capability itself. Files that are skipped as a whole, because a backend may be
unable to import them, and doctests are listed here.
"""

from __future__ import annotations

import os

from forkshm.backend import kernel

# Missing capabilities of each backend, with the reason. Tests marked ``needs(capability)`` are skipped there. With
# ``only``, the mark applies to parameters whose id contains that text.
MISSING: dict[str, dict[str, str]] = {
    "posix": {
        "affinity": "not every system lets a process choose its cores: cpu_ids raises UnsupportedError",
        "ends_in_select": "recv and poll notice that the other end is gone; waiting for several connections does not",
        "exact_objects": "an object has whole pages, and one more that says what it is",
        "foreign_channels": "memory crosses foreign channels by way of /proc: it raises UnsupportedError",
        "labels": "memory of shm_open(3) without a name has no label, so /proc does not tell that it is forkshm's",
        "locks_as_leases": "a lease is a pipe, so each array on its way takes an fd of its sender",
        "mapped_files": "the kernel does not report which file is mapped at an address",
        "memfd": "memory without a name is made by shm_open(3), so it has the bounds of memory with one",
        "mutexes_in_c": "a mutex of a region is a record lock, which Python code takes",
        "pagemap": "which pages were written is not told, so copies that are handed on are copied again",
        "parent_death_signal": "a thread of each worker waits for the parent's end; in a stopped one it cannot run",
        "pidfds": "the sentinel of a child is a pipe, which its children hold",
        "populate": "no call makes a mapping take all its memory now (MADV_POPULATE_WRITE is Linux')",
        "punch_holes": "pages of shared memory cannot be given back one by one: an arena keeps what it once needed",
        "pwrite": "shared memory is written through its mapping",
        "seals": "no kernel but Linux can forbid writing to memory forever: seal() raises UnsupportedError",
        "signals_inside": "signals are deferred inside functions of several steps",
    },
    "windows": {
        "actions_in_c": "the test knows only the struct sigaction of Linux",
        "advice": "Windows has only willneed of Boost's kinds of advice",
        "carving": "each block of an arena is a section, and an exclusive one cannot be remapped in one step",
        "children": "waiting for a child does not take its exit code away from other waiters",
        "commands": "python -m forkshm ls, top and clean read /proc, and run forks: each says that it cannot",
        "cut_files": "a mapped file can be neither truncated nor deleted",
        "fd_limit": "no program reaches the limit on handles",
        "fd_numbers": "a handle cannot be given the number of another one",
        "fds_of_files": "the number of a Python file is the C library's, and the test uses it as the kernel's",
        "file_limits": "needs a limit on the open files of a process (setrlimit(2))",
        "fork": "the test is about a forked child",
        "fork_context": "the test is about several start methods, and Windows has only spawn",
        "handles_in_messages": "a pipe carries no handles: the sender keeps them until ten seconds after its end",
        "inheritance": "the test is about what a forked child inherits",
        "interrupts": "Ctrl-C belongs to a console, and cannot be sent to a process",
        "library_files": "the library of the tested Python is in a zip, and the example reads its files",
        "library_tests": "the tested Python comes without the tests of its library",
        "many_handles": "a message names at most 8,192 handles",
        "mapped_files": "no call reports which file is mapped at an address, and opens it",
        "memfd": "memory without a name is a section, which no limit on files bounds",
        "memory_limits": "needs limits on the memory of a process or a group (setrlimit(2), cgroups(7))",
        "memory_maps": "the memory of a process is read from /proc",
        "parts_of_views": "a view is unmapped as a whole: pages that a region gave up are freed with the rest of it",
        "pidfds": "the sentinel of a child is its process handle",
        "posix_backend": "the POSIX backend needs fcntl(2)",
        "proc": "the test reads /proc in a program of its own",
        "punch_holes": "pages of a section cannot be given back one by one",
        "pwrite": "a section is written through its view",
        "queue_sizes": "the size of a pipe is set when it is made",
        "seals": "sections cannot be sealed: seal() raises UnsupportedError",
        "shm_open": "named memory is a file; the standard library's is a section, as WindowsSharedMemory",
        "signals": "needs handlers of signals from other processes, or signals to the own process",
        "start_methods": "the program uses fork and forkserver beside spawn",
        "symbolic_links": "Wine does not find the target of a link that Python made",
        "terminals": "the test has a terminal of its own (openpty(3))",
        "touching_regions": "a section has one more page behind its last one, so no two regions touch",
        "unix_sockets": "Python has no AF_UNIX there",
        "written_pages": "the written pages of a mapping are unknown, so copies that are sent on are copied again",
    },
}

# Files and doctests to skip. For each backend: what it lacks, the reason, and the paths.
FILES: dict[str, dict[str, tuple[str, tuple[str, ...]]]] = {
    "posix": {
        "linux": ("about the calls of the Linux backend itself", ("backend/test_linux.py",)),
        "seals": (
            "only Linux can forbid writing to memory forever: seal() raises UnsupportedError",
            (
                "forkshm/region/_mapped.py::forkshm.region._mapped.MappedRegion.seal",
                "region/test_seal.py",
            ),
        ),
        "proc": (
            "memory crosses foreign channels by way of /proc: it raises UnsupportedError",
            (
                "forkshm/descriptor/_region.py",
                "descriptor/test_region.py",
                "descriptor/test_fuzz.py",
                "pickler/test_foreign.py",
            ),
        ),
    },
    # Features that are missing entirely (fork, /proc, fds) are in windows/_capabilities.py; tests skip when they use
    # one.
    "windows": {
        "linux": ("about the calls of the Linux backend itself", ("backend/test_linux.py",)),
        "posix": ("about the calls of the POSIX backend itself", ("backend/test_posix.py",)),
        "suites": (
            "the tested Python comes without the package test, which the upstream suites need",
            ("upstream/test_upstream.py",),
        ),
        "times": ("times under Wine mean nothing, and the benchmarks are for Linux", ("test_benchmarks.py",)),
        "windows_sections_missing": (
            "about systems without WindowsSharedMemory; windows/test_windows.py tests it",
            ("region/test_windows.py",),
        ),
        "seals": ("sections cannot be sealed: seal() raises UnsupportedError", ("region/test_seal.py",)),
        "written_pages": (
            "the written pages of a mapping are unknown, so copies that are sent on are copied again",
            ("integrations/test_born_shared.py",),
        ),
        "inheritance": ("the tests are about what a forked child inherits", ("failure/test_forked_by_others.py",)),
        "teams": (
            "teams and supervised workers are forked, and launched ones need memory that grows",
            ("spmd/test_launch.py", "spmd/test_run.py", "spmd/test_supervise.py", "spmd/test_team.py"),
        ),
    },
}


# What the Linux and the POSIX backend have only where the system has it.
_OF_PROC = ("actions_in_c", "memory_maps", "proc")


def has(capability: str) -> bool:
    """Return whether the backend of this process has a capability, for tests that go another way without it."""
    return why_missing(kernel.name, capability, "", "") is None


def reason_to_skip(backend: str, nodeid: str) -> str | None:
    """Return the reason to skip a file or doctest on a backend, or None."""
    name = nodeid.removeprefix("tests/")
    for capability, (why, paths) in FILES.get(backend, {}).items():
        if name in paths or name.partition("::")[0] in paths:
            return f"needs {capability}: {why}"
    return None


def why_missing(backend: str, capability: str, only: str, nodeid: str) -> str | None:
    """Return the reason to skip a test with such a mark on a backend, or None."""
    why = MISSING.get(backend, {}).get(capability)
    if why is None and capability in _OF_PROC and not os.path.exists("/proc/self/maps"):
        why = MISSING["windows"][capability]
    if why is None or only not in nodeid.partition("[")[2]:
        return None
    return f"needs {capability}: {why}"
