"""The status region: one slot for each worker, in which it says what it holds.

The slot is written *before* the fact: "claiming" before a worker looks into the queue,
the task's number before it touches the task. So when a worker dies, its slot tells:

* a task's number: it held that task, and nobody else has it;
* claiming or last look: it may have taken a message and not yet named it;
* idle: it held nothing.

It also tells the parent whether somebody has to be woken. A worker that is claiming is
going to look into the queue again; one that is past its last look sleeps until a byte
comes through the bell. Sending happens before the parent reads the slot, and the last
look after the worker wrote it, both under the socket's own lock: so one of them sees the
other, and no message is left to sleepers.
"""

from __future__ import annotations

from forkshm.region import anonymous_shared_memory

__all__ = ("CLAIMING", "FIRST_TASK", "IDLE", "LAST_LOOK", "STARTING", "Status")

#: Not yet through its initializer.
STARTING = 0
#: Asleep, with nothing taken from the queue.
IDLE = 1
#: Looking into the queue, and going to look again.
CLAIMING = 2
#: Looking into the queue once more before it sleeps.
LAST_LOOK = 3
#: Task numbers begin here.
FIRST_TASK = 16

_WORDS = 2  # state; which item of a chunk, counted from 1


class Status:
    """The slots of one pool. Each word has one writer, and is written in one store."""

    def __init__(self, workers: int) -> None:
        self._region = anonymous_shared_memory(workers * _WORDS * 8)
        self.words = self._region.buf.cast("Q")

    def reset(self, worker: int) -> None:
        """Make a slot ready for a new worker."""
        self.words[worker * _WORDS] = STARTING
        self.words[worker * _WORDS + 1] = 0

    def state(self, worker: int) -> int:
        """What the worker says it does."""
        return self.words[worker * _WORDS]

    def states(self) -> list[int]:
        """What all slots say."""
        return self.words[::_WORDS].tolist()

    def item(self, worker: int) -> int | None:
        """Which item of its chunk it is at, counted from 0; None when it has no chunk."""
        return self.words[worker * _WORDS + 1] - 1 if self.words[worker * _WORDS + 1] else None

    def close(self) -> None:
        """Give the region back."""
        self.words.release()
        self._region.close()
