"""A process is killed while it holds a lock. Does any process hang, and is the data still right?

Two accounts are in a region of shared memory. A process that moves money between them holds a mutex in the same region.
A clerk takes money from one account, and is killed by SIGKILL before it adds the money to the other. With a
``multiprocessing.Lock`` all other processes would now wait forever. Here the next process gets the lock and is told
that its last owner died. It repairs the accounts from the journal, and all continue. Several clerks die like that while
others work, and at the end no money is missing.

    python examples/robust_mutex.py
"""

from __future__ import annotations

import os
import signal
import sys
import time
from multiprocessing import Lock
from typing import TYPE_CHECKING

from forkshm import anonymous_shared_memory
from forkshm.region import Mutex

if TYPE_CHECKING:
    from collections.abc import Callable

MONEY = 1000
CLERKS = 4
TRANSFERS = 500


class Bank:
    """Two accounts, and a journal with the balances before the current transfer."""

    def __init__(self) -> None:
        self.region = anonymous_shared_memory(Mutex.SIZE + 6 * 8)
        self.mutex = Mutex(self.region, repair=self.repair)
        words = self.region.buf[Mutex.SIZE :].cast("q")
        self.accounts, self.journal, self.repairs = words[:2], words[2:5], words[5:]
        self.accounts[0] = MONEY

    def transfer(self, amount: int, die: Callable[[], object] = bool) -> None:
        """Move money from the first account to the second, or back if it is negative."""
        with self.mutex:
            self.journal[0], self.journal[1] = self.accounts
            self.journal[2] = 1  # from here on the journal is valid
            self.accounts[0] -= amount
            die()  # the worst moment: the money is in neither account
            self.accounts[1] += amount
            self.journal[2] = 0

    def repair(self) -> None:
        """Undo the transfer of a dead clerk. Called by the next process, with the mutex held."""
        if self.journal[2]:
            self.accounts[0], self.accounts[1] = self.journal[:2]
            self.journal[2] = 0
        self.repairs[0] += 1


def fork(action: Callable[[], object]) -> int:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            action()
            code = 0
        finally:
            os._exit(code)
    return pid


def end_of(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_me() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def main() -> int:
    bank = Bank()

    # The behavior of multiprocessing.
    lock = Lock()
    end_of(fork(lambda: (lock.acquire(), kill_me())))
    print(
        "multiprocessing.Lock, its holder killed:  acquired =", lock.acquire(timeout=0.2), "after 0.2 s, and ever after"
    )

    # The same with a mutex in a region, step by step: without `repair`, the next owner repairs the data itself.
    code = end_of(fork(lambda: bank.transfer(100, kill_me)))
    print(f"forkshm Mutex, its holder ended with {code}: accounts = {list(bank.accounts)}, 100 are missing")
    mutex = Mutex.attach(bank.region)
    start = time.perf_counter()
    acquired = mutex.acquire()
    took = time.perf_counter() - start
    died = mutex.owner_died
    print(f"forkshm Mutex, the next owner:            acquired = {acquired} after {took * 1e6:.0f} us, {died = }")
    bank.repair()
    mutex.make_consistent()
    mutex.release()
    print(f"repaired:                                 accounts = {list(bank.accounts)}")

    # Many processes at once, with `repair`.
    def work() -> None:
        for number in range(TRANSFERS):
            bank.transfer(1 if number % 2 else -1)

    workers = [fork(work) for _ in range(CLERKS)]
    victims = [end_of(fork(lambda: bank.transfer(10, kill_me))) for _ in range(CLERKS)]
    codes = [end_of(pid) for pid in workers]
    bank.transfer(0)  # repairs after the last process as well

    total, repairs = sum(bank.accounts), bank.repairs[0]
    right = (
        not lock.acquire(block=False)
        and acquired
        and died
        and codes == [0] * CLERKS
        and victims == [-signal.SIGKILL] * CLERKS
        and (total, repairs) == (MONEY, 1 + CLERKS)
    )
    if not right:
        print(f"robust_mutex: {total = }, {repairs = }, {codes = }, {victims = }", file=sys.stderr)
        return 1
    print(
        f"proved: {1 + CLERKS} holders were killed, {repairs} repairs were made, {CLERKS * TRANSFERS:,} transfers of "
        f"others went on, and all {total:,} are there"
    )
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
