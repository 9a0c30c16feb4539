"""A random walk through arena and leases beside a plain dict of who holds what."""

from __future__ import annotations

import os
import random

import pytest

from forkshm.region._segment import Share, claim

PAGE = os.sysconf("SC_PAGE_SIZE")


class Model:
    """Every block that anybody holds, and what must be in it."""

    def __init__(self, arena, seed):
        self.arena = arena
        self.chance = random.Random(seed)
        self.number = 0
        #: Filled, not lent: block and tag.
        self.filled = []
        #: Open leases: lease, block, tag.
        self.leases = []
        #: Claimed views: view, block, tag.
        self.views = []

    def live(self):
        held = [(block, tag) for block, tag in self.filled]
        held += [(block, tag) for _, block, tag in [*self.leases, *self.views]]
        return {(id(block.carved), block.offset): (block, tag) for block, tag in held}

    def some(self, things):
        return things.pop(self.chance.randrange(len(things))) if things else None

    def allocate(self):
        block = self.arena.allocate(
            self.chance.choice([1, PAGE, 3 * PAGE + 1, 100_000, self.chance.randrange(300_000)])
        )
        for other, _ in self.live().values():
            assert (
                other.carved is not block.carved
                or other.offset + other.size <= block.offset
                or block.offset + block.size <= other.offset
            ), "a block that somebody holds was handed out again"
        self.number += 1
        tag = self.number.to_bytes(8, "little")
        for position in range(0, block.size, PAGE):
            block.write(position, tag, 8)
        block.write(block.size - 8, tag, 8)
        self.filled.append((block, tag))

    def free(self):
        if found := self.some(self.filled):
            self.arena.free(found[0])

    def lend(self):
        if found := self.some(self.filled):
            self.leases.append((self.arena.lend(found[0]), *found))

    def claim(self):
        if self.leases:
            lease, block, tag = self.chance.choice(self.leases)
            window = claim(
                os.dup(lease.fd),
                block.offset,
                block.size,
                Share.private if self.chance.random() < 0.3 else Share.exclusive,
            )
            self.views.append((memoryview(window).cast("B"), block, tag))

    def close(self):
        if found := self.some(self.leases):
            found[0].close()

    def drop(self):
        self.some(self.views)

    def trim(self):
        self.arena.trim(self.chance.choice([0, 100_000]))

    def verify(self):
        if self.views:
            view, block, tag = self.chance.choice(self.views)
            assert bytes(view[:8]) == bytes(view[block.size - 8 :]) == tag
            position = self.chance.randrange(block.size // PAGE) * PAGE
            assert bytes(view[position : position + 8]) == tag or position + 8 > block.size - 8


@pytest.mark.parametrize("seed", [1, 2])
def test_no_live_block_is_handed_out_again_and_all_keep_their_bytes(fresh_arena, seed):
    model = Model(fresh_arena, seed)
    actions = [
        *[model.allocate] * 6,
        *[model.lend] * 5,
        *[model.claim] * 5,
        *[model.close] * 5,
        *[model.drop] * 5,
        *[model.verify] * 3,
        model.free,
    ]
    for step in range(1500):
        model.chance.choice(actions)()
        if step % 100 == 99:
            model.trim()
            assert fresh_arena.statistics().blocks == len(model.live())
    for view, block, tag in model.views:
        assert bytes(view[:8]) == bytes(view[block.size - 8 :]) == tag
        del view
    for lease, _, _ in model.leases:
        lease.close()
    for block, _ in model.filled:
        fresh_arena.free(block)
    model.views.clear()
    statistics = fresh_arena.statistics()
    assert (statistics.blocks, statistics.used_bytes) == (0, 0)
    assert all(carved.sizes == [carved.segment.size] for carved in fresh_arena._carved)
