"""The arena and its leases, compared with a simple model of their holders; Hypothesis chooses the operations.

The only rule: a block that has a holder, by a lease in flight or by a view in any process, is never handed out, and its
bytes do not change.
"""

from __future__ import annotations

import itertools
import os
import signal

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)

from forkshm import _system
from forkshm.backend import kernel
from forkshm.region._lifetime import guard
from forkshm.region.blocks._arena import Arena
from forkshm.region.blocks._claim import Share, claim
from forkshm.region.blocks._segment import drop_segment

PAGE = os.sysconf("SC_PAGE_SIZE")

SIZES = st.one_of(st.sampled_from([1, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE + 1, 100_000]), st.integers(1, 300_000))


class Held:
    """A block in the model: its location, its content, and the number of its holders."""

    numbers = itertools.count(1)

    def __init__(self, block):
        # Until the block is lent: the arena takes back a block without a reference.
        self.block = block
        self.carved, self.offset, self.size = block.carved, block.offset, block.size
        self.tag = next(self.numbers).to_bytes(8, "little")
        self.holders = 1

    def fill(self):
        for position in range(0, self.block.size, PAGE):
            self.block.write(position, self.tag, 8)
        self.block.write(self.block.size - 8, self.tag, 8)

    def overlaps(self, other):
        return (
            self.carved is other.carved
            and self.offset < other.offset + other.size
            and other.offset < self.offset + self.size
        )


class ArenaModel(RuleBasedStateMachine):
    """The operations of a process, its receivers and its children on blocks."""

    filled = Bundle("filled")
    leases = Bundle("leases")
    views = Bundle("views")
    born = Bundle("born")
    children = Bundle("children")

    def __init__(self):
        super().__init__()
        self.arena = Arena()
        self.held: set[Held] = set()
        self.living: dict[int, Held] = {}

    def let_go(self, held):
        held.holders -= 1
        if not held.holders:
            self.held.discard(held)

    @rule(target=filled, nbytes=SIZES)
    def allocate(self, nbytes):
        held = Held(self.arena.allocate(nbytes))
        assert held.block.size >= nbytes
        for other in self.held:
            assert not held.overlaps(other), "a held block was handed out"
        held.fill()
        self.held.add(held)
        return held

    @rule(held=consumes(filled))
    def free(self, held):
        self.arena.free(held.block)
        held.block = None
        self.let_go(held)

    @rule(held=consumes(filled))
    def lose(self, held):
        held.block = None
        self.let_go(held)

    @rule(target=leases, held=consumes(filled))
    def lend(self, held):
        lease = self.arena.lend(held.block)
        held.block = None
        return lease, held

    @rule(target=born, held=consumes(filled), share=st.sampled_from([Share.exclusive, Share.shared]))
    def hold(self, held, share):
        kept = [self.arena.hold(held.block, share)]
        held.block = None
        return kept, held

    @rule(made=consumes(born))
    def end(self, made):
        kept, held = made
        kept.clear()
        self.let_go(held)

    @rule(target=views, lent=leases, share=st.sampled_from([Share.exclusive, Share.private, Share.read_only]))
    def receive(self, lent, share):
        lease, held = lent
        if lease.fd < 0:
            return multiple()
        window = claim(lease.fd, held.offset, held.size, share)
        held.holders += 1
        return [memoryview(window).cast("B")], held

    @rule(lent=leases, parked=st.booleans())
    def park(self, lent, parked):
        lease, _ = lent
        lease.park() if parked else lease.unpark()

    @rule(lent=consumes(leases))
    def sent(self, lent):
        lease, held = lent
        lease.close()
        lease.close()
        self.let_go(held)

    @rule(target=views, view=views)
    def slice_of(self, view):
        views, held = view
        if not views:
            return multiple()
        held.holders += 1
        return [views[0][:8]], held

    @rule(view=consumes(views))
    def drop(self, view):
        views, held = view
        if views:
            views.clear()
            self.let_go(held)

    def fork(self, view):
        """Fork a child that keeps only its views; it holds all blocks that are held here by claims."""
        views, held = view
        if not views or len(self.living) > 2:
            return multiple()
        ready_read, ready_write = os.pipe()
        go_read, go_write = os.pipe()
        tag, seen = held.tag, views[0]
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                os.close(go_write)
                os.write(ready_write, b"!")
                os.read(go_read, 1)
                code = 0 if bytes(seen[:8]) == tag else 2
            finally:
                os._exit(code)
        os.close(go_read)
        os.close(ready_write)
        assert os.read(ready_read, 1) == b"!"
        os.close(ready_read)
        self.living[pid] = held
        held.holders += 1
        return pid, go_write

    @rule(child=consumes(children), killed=st.booleans())
    def child_ends(self, child, killed):
        pid, go_write = child
        held = self.living.pop(pid)
        if killed:
            os.kill(pid, signal.SIGKILL)
        else:
            os.write(go_write, b"!")  # children forked later have this end, too
        os.close(go_write)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert code == (-signal.SIGKILL if killed else 0), "the bytes that a child sees have changed"
        self.let_go(held)

    if _system.CAN_FORK:
        fork = rule(target=children, view=views)(fork)

    @rule(keep=st.sampled_from([0, 100_000]))
    def trim(self, keep):
        self.arena.trim(keep)

    @rule(view=views)
    def look(self, view):
        views, held = view
        for seen in views:
            assert bytes(seen[:8]) == held.tag
            if len(seen) > 8:
                assert bytes(seen[-8:]) == held.tag
                assert all(bytes(seen[at : at + 8]) == held.tag for at in range(0, len(seen) - PAGE, PAGE))

    @invariant()
    def counts_agree(self):
        statistics = self.arena.statistics()
        if self.living:  # they hold the blocks that were held here when they were forked
            assert statistics.blocks >= len(self.held)
        else:
            assert statistics.blocks == len(self.held)
            assert statistics.used_bytes == sum(held.size for held in self.held)
        free = sum(sum(carved.sizes) for carved in self.arena._carved)
        assert free + statistics.used_bytes == statistics.reserved_bytes

    def teardown(self):
        for pid in self.living:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        for name, values in self.bundles.items():
            for reference in values:
                self.give_back(name, self.names_to_values[reference.name])
        statistics = self.arena.statistics()
        assert (statistics.blocks, statistics.used_bytes) == (0, 0)
        assert all(carved.sizes == [carved.segment.size] for carved in self.arena._carved)
        with guard:
            for carved in self.arena._carved:
                drop_segment(carved.segment)

    def give_back(self, name, value):
        if name == "filled":
            self.arena.free(value.block)
            value.block = None
        elif name == "leases":
            value[0].close()
        elif name in ("views", "born"):
            value[0].clear()
        else:
            kernel.close(value[1])


@pytest.mark.parametrize(
    ("examples", "steps"), [(25, 60), pytest.param(2000, 200, marks=pytest.mark.nightly)], ids=["short", "long"]
)
def test_no_block_is_handed_out_while_it_has_views(examples, steps):
    run_state_machine_as_test(
        ArenaModel,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            database=None,
            derandomize=examples < 1000,
            suppress_health_check=list(HealthCheck),
            print_blob=True,
        ),
    )
