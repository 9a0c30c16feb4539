"""The examples of the standard library's documentation of multiprocessing run with only the import changed.

Each program is written for ``multiprocessing``; only the name of the package in its imports is replaced. It must print
the same output.
"""

from __future__ import annotations

import re
import textwrap

import pytest
from started import CAN_FORK

pytestmark = pytest.mark.slow

# Name: (program, output). Where the order of lines depends on the scheduler, the program sorts them.
SNIPPETS = {
    "a pool maps": (
        """
        from multiprocessing import Pool

        def f(x):
            return x * x

        if __name__ == "__main__":
            with Pool(5) as p:
                print(p.map(f, [1, 2, 3]))
        """,
        "[1, 4, 9]",
    ),
    "a process greets": (
        """
        from multiprocessing import Process

        def f(name):
            print("hello", name)

        if __name__ == "__main__":
            p = Process(target=f, args=("bob",))
            p.start()
            p.join()
        """,
        "hello bob",
    ),
    "who is who": (
        """
        from multiprocessing import Process
        import os

        def info(title):
            print(title)
            print("module name:", __name__)
            return os.getppid(), os.getpid()

        def f(name, parent):
            ppid, pid = info("function f")
            print("parent:", ppid == parent, "itself:", pid != parent)
            print("hello", name)

        if __name__ == "__main__":
            _, me = info("main line")
            p = Process(target=f, args=("bob", me))
            p.start()
            p.join()
        """,
        """
        main line
        module name: __main__
        function f
        module name: __main__
        parent: True itself: True
        hello bob
        """,
    ),
    "the start method is set": (
        """
        import multiprocessing as mp

        def foo(q):
            q.put("hello")

        if __name__ == "__main__":
            mp.set_start_method("spawn")
            q = mp.Queue()
            p = mp.Process(target=foo, args=(q,))
            p.start()
            print(q.get())
            p.join()
        """,
        "hello",
    ),
    "a context is asked for": (
        """
        import multiprocessing as mp

        def foo(q):
            q.put("hello")

        if __name__ == "__main__":
            for method in ("spawn", "forkserver", "fork"):
                ctx = mp.get_context(method)
                q = ctx.Queue()
                p = ctx.Process(target=foo, args=(q,))
                p.start()
                print(method, q.get())
                p.join()
        """,
        """
        spawn hello
        forkserver hello
        fork hello
        """,
    ),
    "a queue": (
        """
        from multiprocessing import Process, Queue

        def f(q):
            q.put([42, None, "hello"])

        if __name__ == "__main__":
            q = Queue()
            p = Process(target=f, args=(q,))
            p.start()
            print(q.get())
            p.join()
        """,
        "[42, None, 'hello']",
    ),
    "a pipe": (
        """
        from multiprocessing import Process, Pipe

        def f(conn):
            conn.send([42, None, "hello"])
            conn.close()

        if __name__ == "__main__":
            parent_conn, child_conn = Pipe()
            p = Process(target=f, args=(child_conn,))
            p.start()
            print(parent_conn.recv())
            p.join()
        """,
        "[42, None, 'hello']",
    ),
    "a lock around print": (
        """
        from multiprocessing import Process, Lock, Value

        def f(l, i, order):
            l.acquire()
            try:
                order.value += 1
            finally:
                l.release()

        if __name__ == "__main__":
            lock = Lock()
            order = Value("i", 0, lock=False)
            processes = [Process(target=f, args=(lock, num, order)) for num in range(10)]
            for p in processes:
                p.start()
            for p in processes:
                p.join()
            print(order.value, [p.exitcode for p in processes] == [0] * 10)
        """,
        "10 True",
    ),
    "shared values": (
        """
        from multiprocessing import Process, Value, Array

        def f(n, a):
            n.value = 3.1415927
            for i in range(len(a)):
                a[i] = -a[i]

        if __name__ == "__main__":
            num = Value("d", 0.0)
            arr = Array("i", range(10))
            p = Process(target=f, args=(num, arr))
            p.start()
            p.join()
            print(num.value)
            print(arr[:])
        """,
        """
        3.1415927
        [0, -1, -2, -3, -4, -5, -6, -7, -8, -9]
        """,
    ),
    "a manager": (
        """
        from multiprocessing import Process, Manager

        def f(d, l):
            d[1] = "1"
            d["2"] = 2
            d[0.25] = None
            l.reverse()

        if __name__ == "__main__":
            with Manager() as manager:
                d = manager.dict()
                l = manager.list(range(10))
                p = Process(target=f, args=(d, l))
                p.start()
                p.join()
                print(d)
                print(l)
        """,
        """
        {1: '1', '2': 2, 0.25: None}
        [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]
        """,
    ),
    "a pool of workers": (
        """
        from multiprocessing import Pool, TimeoutError
        import time
        import os

        def f(x):
            return x * x

        if __name__ == "__main__":
            with Pool(processes=4) as pool:
                print(pool.map(f, range(10)))
                print(sorted(i for i in pool.imap_unordered(f, range(10))))
                res = pool.apply_async(f, (20,))
                print(res.get(timeout=30))
                res = pool.apply_async(os.getpid, ())
                print(res.get(timeout=30) != os.getpid())
                multiple_results = [pool.apply_async(os.getpid, ()) for i in range(4)]
                print(len([res.get(timeout=30) for res in multiple_results]))
                res = pool.apply_async(time.sleep, (10,))
                try:
                    print(res.get(timeout=0.05))
                except TimeoutError:
                    print("We lacked patience and got a multiprocessing.TimeoutError")
                print("For the moment, the pool remains available for more work")
            print("Now the pool is closed and no longer available")
        """,
        """
        [0, 1, 4, 9, 16, 25, 36, 49, 64, 81]
        [0, 1, 4, 9, 16, 25, 36, 49, 64, 81]
        400
        True
        4
        We lacked patience and got a multiprocessing.TimeoutError
        For the moment, the pool remains available for more work
        Now the pool is closed and no longer available
        """,
    ),
    "a process is terminated": (
        """
        import multiprocessing, time, signal

        if __name__ == "__main__":
            mp_context = multiprocessing.get_context("spawn")
            p = mp_context.Process(target=time.sleep, args=(1000,))
            print(p.name, p.is_alive())
            p.start()
            print(p.is_alive())
            p.terminate()
            p.join()
            print(p.is_alive())
            print(p.exitcode == -signal.SIGTERM)
            p.close()
        """,
        """
        SpawnProcess-1 False
        True
        False
        True
        """,
    ),
    "connections": (
        """
        from multiprocessing import Pipe, BufferTooShort
        import array

        if __name__ == "__main__":
            a, b = Pipe()
            a.send([1, "hello", None])
            print(b.recv())
            b.send_bytes(b"thank you")
            print(a.recv_bytes())
            arr1 = array.array("i", range(5))
            arr2 = array.array("i", [0] * 10)
            a.send_bytes(arr1)
            count = b.recv_bytes_into(arr2)
            assert count == len(arr1) * arr1.itemsize
            print(arr2)
            a.send_bytes(arr1)
            try:
                b.recv_bytes_into(bytearray(3))
            except BufferTooShort as error:
                print(len(error.args[0]), b.poll())
        """,
        """
        [1, 'hello', None]
        b'thank you'
        array('i', [0, 1, 2, 3, 4, 0, 0, 0, 0, 0])
        20 False
        """,
    ),
    "a listener and a client": (
        """
        from multiprocessing import Process
        from multiprocessing.connection import Client, Listener
        from array import array

        def serve(conn):
            conn.send([2.25, None, "junk", float])
            conn.send_bytes(b"hello")
            conn.send_bytes(array("i", [42, 1729]))

        def client(address):
            with Client(address, authkey=b"secret password") as conn:
                print(conn.recv())
                print(conn.recv_bytes())
                arr = array("i", [0, 0, 0, 0, 0])
                print(conn.recv_bytes_into(arr))
                print(arr)

        if __name__ == "__main__":
            with Listener(("localhost", 0), authkey=b"secret password") as listener:
                p = Process(target=client, args=(listener.address,))
                p.start()
                with listener.accept() as conn:
                    print("connection accepted:", listener.last_accepted is not None)
                    serve(conn)
                    p.join()
        """,
        """
        connection accepted: True
        [2.25, None, 'junk', <class 'float'>]
        b'hello'
        8
        array('i', [42, 1729, 0, 0, 0])
        """,
    ),
    "waiting for many readers": (
        """
        from multiprocessing import Process, Pipe, current_process
        from multiprocessing.connection import wait

        def foo(w):
            for i in range(10):
                w.send((i, current_process().name))
            w.close()

        if __name__ == "__main__":
            readers, seen = [], []
            for i in range(4):
                r, w = Pipe(duplex=False)
                readers.append(r)
                p = Process(target=foo, args=(w,))
                p.start()
                w.close()
            while readers:
                for r in wait(readers):
                    try:
                        msg = r.recv()
                    except EOFError:
                        readers.remove(r)
                    else:
                        seen.append(msg)
            print(len(seen), sorted({name for _, name in seen}))
        """,
        "40 ['Process-1', 'Process-2', 'Process-3', 'Process-4']",
    ),
    "structures": (
        """
        from multiprocessing import Process, Lock
        from multiprocessing.sharedctypes import Value, Array
        from ctypes import Structure, c_double

        class Point(Structure):
            _fields_ = [("x", c_double), ("y", c_double)]

        def modify(n, x, s, A):
            n.value **= 2
            x.value **= 2
            s.value = s.value.upper()
            for a in A:
                a.x **= 2
                a.y **= 2

        if __name__ == "__main__":
            lock = Lock()
            n = Value("i", 7)
            x = Value(c_double, 1.0 / 3.0, lock=False)
            s = Array("c", b"hello world", lock=lock)
            A = Array(Point, [(1.875, -6.25), (-5.75, 2.0), (2.375, 9.5)], lock=lock)
            p = Process(target=modify, args=(n, x, s, A))
            p.start()
            p.join()
            print(n.value)
            print(x.value)
            print(s.value)
            print([(a.x, a.y) for a in A])
        """,
        """
        49
        0.1111111111111111
        b'HELLO WORLD'
        [(3.515625, 39.0625), (33.0625, 4.0), (5.640625, 90.25)]
        """,
    ),
    "proxies": (
        """
        from multiprocessing import Manager

        if __name__ == "__main__":
            with Manager() as manager:
                l = manager.list([i * i for i in range(10)])
                print(l)
                print(repr(l).startswith("<ListProxy object, typeid 'list' at 0x"))
                print(l[4])
                print(l[2:5])
                a = manager.list()
                b = manager.list()
                a.append(b)
                b.append("hello")
                print(a[0][0], len(b))
                print(manager.list([1, 2, 3]) == [1, 2, 3])
                outer = manager.list([{}, {}])
                d = outer[0]
                d["a"] = 1
                print(outer[0])
                outer[0] = d
                print(outer[0])
                Global = manager.Namespace()
                Global.x = 10
                Global.y = "hello"
                Global._z = 12.3
                print(Global)
        """,
        """
        [0, 1, 4, 9, 16, 25, 36, 49, 64, 81]
        True
        16
        [4, 9, 16]
        hello 1
        False
        {}
        {'a': 1}
        Namespace(x=10, y='hello')
        """,
    ),
    "a customized manager": (
        """
        from multiprocessing.managers import BaseManager

        class MathsClass:
            def add(self, x, y):
                return x + y
            def mul(self, x, y):
                return x * y

        class MyManager(BaseManager):
            pass

        MyManager.register("Maths", MathsClass)

        if __name__ == "__main__":
            with MyManager() as manager:
                maths = manager.Maths()
                print(maths.add(4, 3))
                print(maths.mul(7, 8))
        """,
        """
        7
        56
        """,
    ),
    "what a manager exposes": (
        """
        from multiprocessing import freeze_support
        from multiprocessing.managers import BaseManager, BaseProxy
        import operator

        class Foo:
            def f(self):
                print("you called Foo.f()", flush=True)
            def g(self):
                print("you called Foo.g()", flush=True)
            def _h(self):
                print("you called Foo._h()", flush=True)

        def baz():
            for i in range(10):
                yield i * i

        class GeneratorProxy(BaseProxy):
            _exposed_ = ["__next__"]
            def __iter__(self):
                return self
            def __next__(self):
                return self._callmethod("__next__")

        def get_operator_module():
            return operator

        class MyManager(BaseManager):
            pass

        MyManager.register("Foo1", Foo)
        MyManager.register("Foo2", Foo, exposed=("g", "_h"))
        MyManager.register("baz", baz, proxytype=GeneratorProxy)
        MyManager.register("operator", get_operator_module)

        if __name__ == "__main__":
            freeze_support()
            manager = MyManager()
            manager.start()
            f1 = manager.Foo1()
            f1.f()
            f1.g()
            print(hasattr(f1, "_h"), sorted(f1._exposed_))
            f2 = manager.Foo2()
            f2.g()
            f2._h()
            print(hasattr(f2, "f"), sorted(f2._exposed_))
            print([i for i in manager.baz()])
            op = manager.operator()
            print(op.add(23, 45), op.pow(2, 94))
            manager.shutdown()
        """,
        """
        you called Foo.f()
        you called Foo.g()
        False ['f', 'g']
        you called Foo.g()
        you called Foo._h()
        False ['_h', 'g']
        [0, 1, 4, 9, 16, 25, 36, 49, 64, 81]
        68 19807040628566084398385987584
        """,
    ),
    "a remote manager": (
        """
        from multiprocessing import Process
        from multiprocessing.managers import BaseManager
        import queue

        the_queue = queue.Queue()

        class QueueManager(BaseManager):
            pass

        class QueueClient(BaseManager):
            pass

        QueueManager.register("get_queue", callable=lambda: the_queue)
        QueueClient.register("get_queue")

        def client(address):
            m = QueueClient(address=address, authkey=b"abracadabra")
            m.connect()
            m.get_queue().put("hello")

        if __name__ == "__main__":
            with QueueManager(address=("127.0.0.1", 0), authkey=b"abracadabra") as manager:
                p = Process(target=client, args=(manager.address,))
                p.start()
                print(manager.get_queue().get())
                p.join()
        """,
        "hello",
    ),
    "ways to use a pool": (
        """
        import multiprocessing
        import time

        def calculate(func, args):
            result = func(*args)
            return "%s says that %s%s = %s" % (multiprocessing.current_process().name[:14], func.__name__, args, result)

        def calculatestar(args):
            return calculate(*args)

        def mul(a, b):
            return a * b

        def plus(a, b):
            return a + b

        def f(x):
            return 1.0 / (x - 5.0)

        def noop(x):
            pass

        def test():
            with multiprocessing.Pool(4) as pool:
                TASKS = [(mul, (i, 7)) for i in range(2)] + [(plus, (i, 8)) for i in range(2)]
                results = [pool.apply_async(calculate, t) for t in TASKS]
                for r in results:
                    print(r.get())
                for x in pool.imap(calculatestar, TASKS):
                    print(x)
                print(sorted(pool.imap_unordered(calculatestar, TASKS)) == sorted(pool.map(calculatestar, TASKS)))
                for call in (
                    lambda: pool.apply(f, (5,)),
                    lambda: pool.map(f, list(range(10))),
                    lambda: list(pool.imap(f, list(range(10)))),
                ):
                    try:
                        call()
                    except ZeroDivisionError:
                        print("Got ZeroDivisionError as expected")
                it = pool.imap(f, list(range(10)))
                for i in range(10):
                    try:
                        next(it)
                    except ZeroDivisionError:
                        if i == 5:
                            pass
                    except StopIteration:
                        break
                    else:
                        if i == 5:
                            raise AssertionError("expected ZeroDivisionError")
                print("Got ZeroDivisionError from IMapIterator.next()", i)
                res = pool.apply_async(time.sleep, (0.3,))
                while True:
                    try:
                        res.get(0.02)
                        break
                    except multiprocessing.TimeoutError:
                        pass
                it = pool.imap(noop, range(3))
                while True:
                    try:
                        it.next(0.02)
                    except StopIteration:
                        break
                    except multiprocessing.TimeoutError:
                        pass
                print("done")

        if __name__ == "__main__":
            multiprocessing.freeze_support()
            test()
        """,
        """
        ForkPoolWorker says that mul(0, 7) = 0
        ForkPoolWorker says that mul(1, 7) = 7
        ForkPoolWorker says that plus(0, 8) = 8
        ForkPoolWorker says that plus(1, 8) = 9
        ForkPoolWorker says that mul(0, 7) = 0
        ForkPoolWorker says that mul(1, 7) = 7
        ForkPoolWorker says that plus(0, 8) = 8
        ForkPoolWorker says that plus(1, 8) = 9
        True
        Got ZeroDivisionError as expected
        Got ZeroDivisionError as expected
        Got ZeroDivisionError as expected
        Got ZeroDivisionError from IMapIterator.next() 9
        done
        """,
    ),
    "queues feed workers": (
        """
        from multiprocessing import Process, Queue, current_process, freeze_support

        def worker(input, output):
            for func, args in iter(input.get, "STOP"):
                output.put(calculate(func, args))

        def calculate(func, args):
            return "%s%s = %s" % (func.__name__, args, func(*args))

        def mul(a, b):
            return a * b

        def plus(a, b):
            return a + b

        def test():
            TASKS1 = [(mul, (i, 7)) for i in range(20)]
            TASKS2 = [(plus, (i, 8)) for i in range(10)]
            task_queue = Queue()
            done_queue = Queue()
            for task in TASKS1:
                task_queue.put(task)
            processes = [Process(target=worker, args=(task_queue, done_queue)) for i in range(4)]
            for p in processes:
                p.start()
            results = [done_queue.get() for i in range(len(TASKS1))]
            for task in TASKS2:
                task_queue.put(task)
            results += [done_queue.get() for i in range(len(TASKS2))]
            for i in range(4):
                task_queue.put("STOP")
            print(len(results), "mul(19, 7) = 133" in results, "plus(9, 8) = 17" in results)
            for p in processes:
                p.join()

        if __name__ == "__main__":
            freeze_support()
            test()
        """,
        "30 True True",
    ),
    "a joinable queue": (
        """
        import multiprocessing

        def worker(q, total):
            while True:
                item = q.get()
                with total.get_lock():
                    total.value += item
                q.task_done()

        if __name__ == "__main__":
            q = multiprocessing.JoinableQueue()
            total = multiprocessing.Value("i", 0)
            for i in range(4):
                multiprocessing.Process(target=worker, args=(q, total), daemon=True).start()
            for item in range(100):
                q.put(item)
            q.join()
            print(total.value, len(multiprocessing.active_children()))
        """,
        "4950 4",
    ),
    "synchronization": (
        """
        import multiprocessing

        def stage(event, barrier, condition, semaphore, ready):
            event.wait()
            with semaphore:
                pass
            barrier.wait()
            with condition:
                ready.value += 1
                condition.notify_all()

        if __name__ == "__main__":
            event = multiprocessing.Event()
            barrier = multiprocessing.Barrier(3)
            condition = multiprocessing.Condition()
            semaphore = multiprocessing.BoundedSemaphore(2)
            ready = multiprocessing.Value("i", 0, lock=multiprocessing.RLock())
            args = (event, barrier, condition, semaphore, ready)
            processes = [multiprocessing.Process(target=stage, args=args) for _ in range(3)]
            for p in processes:
                p.start()
            print(event.is_set(), barrier.parties)
            event.set()
            with condition:
                print(condition.wait_for(lambda: ready.value == 3))
            for p in processes:
                p.join()
            try:
                semaphore.release()
            except ValueError as error:
                print(error)
        """,
        """
        False 3
        True
        semaphore or lock released too many times
        """,
    ),
    "the dummy module": (
        """
        import multiprocessing.dummy
        from multiprocessing.dummy import Pool
        from multiprocessing.pool import ThreadPool
        import os

        if __name__ == "__main__":
            with Pool(3) as pool:
                print(isinstance(pool, ThreadPool), pool.map(abs, [-1, -2]))
                print(set(pool.map(lambda _: os.getpid(), range(5))) == {os.getpid()})
            q = multiprocessing.dummy.Queue()
            p = multiprocessing.dummy.Process(target=q.put, args=("hello",))
            p.start()
            p.join()
            print(q.get(), p.exitcode)
        """,
        """
        True [1, 2]
        True
        hello 0
        """,
    ),
    "logging": (
        """
        import multiprocessing, logging, sys

        if __name__ == "__main__":
            sys.stderr = sys.stdout
            logger = multiprocessing.log_to_stderr()
            logger.setLevel(logging.WARNING)
            logger.info("not said")
            logger.warning("doomed")
            p = multiprocessing.Process(target=logger.warning, args=("in the child",))
            p.start()
            p.join()
            logger.setLevel(logging.ERROR)
            print(logger is multiprocessing.get_logger(), multiprocessing.SUBDEBUG)
        """,
        """
        [WARNING/MainProcess] doomed
        [WARNING/Process-1] in the child
        True 5
        """,
    ),
    "shared memory by name": (
        """
        from multiprocessing import shared_memory
        from multiprocessing.managers import SharedMemoryManager
        from multiprocessing import Process
        import array

        def work(sl):
            sl[0] = sl[0] * 2

        if __name__ == "__main__":
            shm_a = shared_memory.SharedMemory(create=True, size=10)
            buffer = shm_a.buf
            buffer[:4] = bytearray([22, 33, 44, 55])
            shm_b = shared_memory.SharedMemory(shm_a.name)
            print(array.array("b", shm_b.buf[:5]))
            shm_b.buf[:5] = b"howdy"
            print(bytes(shm_a.buf[:5]))
            buffer.release()
            shm_b.close()
            shm_a.close()
            shm_a.unlink()
            with SharedMemoryManager() as smm:
                sl = smm.ShareableList([1, "two", 3.5, None, True])
                p = Process(target=work, args=(sl,))
                p.start()
                p.join()
                print(list(sl))
                sl.shm.close()
        """,
        """
        array('b', [22, 33, 44, 55, 0])
        b'howdy'
        [2, 'two', 3.5, None, True]
        """,
    ),
    "guidelines": (
        """
        import multiprocessing as mp
        import sys

        class Worker(mp.Process):
            def __init__(self, q):
                super().__init__(name="Bee", daemon=True)
                self.q = q
            def run(self):
                self.q.put((self.name, mp.current_process().name, mp.parent_process().name, self.daemon))
                sys.exit(3)

        if __name__ == "__main__":
            q = mp.SimpleQueue()
            p = Worker(q)
            print(mp.parent_process(), mp.current_process().name)
            p.start()
            print(*q.get())
            p.join()
            print(p.exitcode, mp.active_children())
            print(mp.get_start_method() in mp.get_all_start_methods(), mp.cpu_count() > 0)
        """,
        """
        None MainProcess
        Bee Bee MainProcess True
        3 []
        True True
        """,
    ),
}


# Outputs that differ where processes are spawned, with multiprocessing as well.
STARTED_ANEW = {
    "who is who": ("function f\nmodule name: __main__", "function f\nmodule name: __mp_main__"),
    "ways to use a pool": ("ForkPoolWorker", "SpawnPoolWorke"),
}


def with_our_import(program):
    """Replace the name of the package where it is imported, and in dotted names after ``import multiprocessing``."""
    program = re.sub(
        r"^(\s*)import multiprocessing(?=,|$)", r"\1import forkshm as multiprocessing", program, flags=re.MULTILINE
    )
    program = re.sub(
        r"^(\s*)import multiprocessing\.(\w+)$",
        r"\1import forkshm.\2; import forkshm as multiprocessing",
        program,
        flags=re.MULTILINE,
    )
    return re.sub(r"^(\s*(?:from|import)) multiprocessing\b", r"\1 forkshm", program, flags=re.MULTILINE)


@pytest.mark.needs("inheritance", only="a remote manager")
@pytest.mark.needs("inheritance", only="logging")
@pytest.mark.needs("start_methods", only="a context is asked for")
@pytest.mark.needs("ends_in_select", only="waiting for many readers")
@pytest.mark.parametrize("name", SNIPPETS)
def test_a_snippet_runs_with_forkshm(run_script, name, monkeypatch):
    program, expected = (textwrap.dedent(text) for text in SNIPPETS[name])
    if not CAN_FORK:
        expected = expected.replace(*STARTED_ANEW.get(name, ("", "")))
        monkeypatch.setenv("PYTHONUNBUFFERED", "1")  # only forked processes write out what was printed before
    ours = with_our_import(program)
    assert "forkshm" in ours
    assert not re.search(r"^\s*(from|import) multiprocessing", ours, re.MULTILINE)
    assert run_script(ours).strip() == expected.strip()


def test_there_are_twenty():
    assert len(SNIPPETS) >= 20
