"""A linked list in shared memory, built by one process and walked and changed by another.

The nodes are ctypes structures. Their pointers are `OffsetPtr`, which store the distance to their target instead of its
address. So the list is valid wherever a process maps the memory. The other process is a pool's worker. It gets the
region as an argument, as a descriptor without bytes, and maps it at another address, which is checked first. It removes
every odd number from the list, and appends the doubles of the remaining ones. All processes that have the region see
that at once, and find the new nodes by the same pointers.

    pip install forkshm
    python examples/linked_list.py
"""

from __future__ import annotations

import argparse
import ctypes  # noqa: TID251 - the language of layouts
import os
import sys
from typing import TYPE_CHECKING

import forkshm
from forkshm.region import OffsetPtr, aligned, construct, place

if TYPE_CHECKING:
    from collections.abc import Iterator


class Node(ctypes.Structure):
    """A number, and a pointer to the next node."""

    _fields_ = (("value", ctypes.c_int64), ("next", OffsetPtr["Node"]))
    value: int
    next: OffsetPtr[Node]


class List(ctypes.Structure):
    """The head at the start of the region; the nodes follow."""

    _fields_ = (("first", OffsetPtr[Node]), ("last", OffsetPtr[Node]), ("used", ctypes.c_uint64))
    first: OffsetPtr[Node]
    last: OffsetPtr[Node]
    used: int


def create(size: int) -> forkshm.MappedRegion:
    """Create a region with an empty list."""
    region = forkshm.anonymous_shared_memory(size)
    construct(region, List, used=aligned(ctypes.sizeof(List), Node))
    return region


def append(region: forkshm.MappedRegion, value: int) -> None:
    """Append a node."""
    whole = place(region, List)
    node = construct(region, Node, whole.used, value)
    whole.used += ctypes.sizeof(Node)
    if whole.last:
        whole.last[0].next = node
    else:
        whole.first = node
    whole.last = node


def nodes(region: forkshm.MappedRegion) -> Iterator[Node]:
    """Walk the list."""
    node = place(region, List).first.get()
    while node is not None:
        yield node
        node = node.next.get()


def change(region: forkshm.MappedRegion, elsewhere: int) -> tuple[int, int, list[int]]:
    """Walk the list in the worker: remove odd numbers, append doubles; return the worker's pid and the address."""
    # If the first mapping happens to have the same address as in the other process, use a second one.
    mine = region if region.address != elsewhere else forkshm.MappedRegion(region)
    found = [node.value for node in nodes(mine)]
    whole = place(mine, List)
    link = whole.first  # the field itself: setting it changes the list
    while (node := link.get()) is not None:
        if node.value % 2:
            link.set(node.next)
        else:
            whole.last.set(node)
            link = node.next
    for value in [node.value for node in nodes(mine)]:
        append(mine, 2 * value)
    return os.getpid(), mine.address, found


def main() -> int:
    """Build a list, let the worker change it, and check the result."""
    parser = argparse.ArgumentParser(description="A linked list in shared memory.")
    parser.add_argument("--nodes", type=int, default=10_000, help="how many to start with (%(default)s)")
    count = parser.parse_args().nodes

    region = create(ctypes.sizeof(List) + 2 * (count + 1) * ctypes.sizeof(Node))
    for value in range(count):
        append(region, value)
    print(f"process {os.getpid()} built {count:,} nodes in a region at {region.address:#x}")
    with forkshm.Pool(1) as pool:
        pid, address, found = pool.apply(change, (region, region.address))
    print(f"process {pid} found {len(found):,} nodes in its mapping at {address:#x}, and changed the list")

    even = list(range(0, count, 2))
    left = [node.value for node in nodes(region)]
    if found != list(range(count)) or left != even + [2 * value for value in even]:
        print("linked_list: the list is not what it should be", file=sys.stderr)
        return 1
    if address == region.address or pid == os.getpid():
        print("linked_list: the other process was not another, at another address", file=sys.stderr)
        return 1
    print(f"here it has {len(left):,} nodes now: the pointers are right at both addresses, and no byte was copied")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
