"""The cores that the workers of a pool may use."""

from __future__ import annotations

import operator
from collections.abc import Iterable

from forkshm.backend import kernel

__all__ = ("usable_cpus",)


def usable_cpus(cpu_ids: Iterable[int | Iterable[int]]) -> list[frozenset[int]]:
    """Return the cores of each entry, once the kernel has let this thread use them.

    Raises:
        ValueError: There are none, or a core cannot be used.
        TypeError: An entry is neither a number nor a collection of numbers.
    """
    entries = []
    for entry in cpu_ids:
        try:
            cpus = entry if isinstance(entry, Iterable) else (entry,)
            entries.append(frozenset(operator.index(cpu) for cpu in cpus))
        except TypeError:
            raise TypeError(f"an entry of cpu_ids must be a number or several, got {entry!r}") from None
    if not entries or not all(entries):
        raise ValueError("cpu_ids names no core: give a number, or several, for each worker; None for all cores")
    before = kernel.use_cpus(None)
    try:
        for cpus in set(entries):
            try:
                refused = cpus - kernel.use_cpus(cpus)
            except (OSError, ValueError, OverflowError):
                refused = cpus
            if not refused:
                continue
            raise ValueError(
                f"cpu_ids names {', '.join(f'core {cpu}' for cpu in sorted(refused))}, which this process cannot "
                f"use: it may use {sorted(before)}. Choose from these, or let the system give it more."
            )
    finally:
        kernel.use_cpus(before)
    return entries
