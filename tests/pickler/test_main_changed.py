"""Names of ``__main__`` that were rebound after the fork, as when a notebook's cells are run again."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

from forkshm.backend import kernel

pytestmark = pytest.mark.skipif(kernel.name == "windows", reason="there is no fork")


def run(source):
    """Run a script, and return the lines that it prints."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(source)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\n")[:-1]


def test_old_functions_use_a_redefined_class():
    assert run("""
        import forkshm
        class Shape:
            version = 1
        def inspect(x):
            return isinstance(x, Shape), x.version, Shape.version
        def outer(x):
            return inspect(x)
        def unrelated(x):
            return x + 1
        with forkshm.Pool(1) as pool:
            before = Shape()
            print(pool.apply(inspect, (before,)))
            class Shape:
                version = 2
            print(pool.apply(inspect, (Shape(),)), pool.apply(outer, (Shape(),)))
            print(pool.map(inspect, [Shape(), Shape()]))
            print(pool.apply(unrelated, (1,)))
            made = pool.apply(lambda: Shape())
            print(type(made) is Shape)
            class Shape:
                version = 3
            print(pool.apply(inspect, (Shape(),)), pool.apply(inspect, (before,)))
    """) == [
        "(True, 1, 1)",
        "(True, 2, 2) (True, 2, 2)",
        "[(True, 2, 2), (True, 2, 2)]",
        "2",
        "True",
        "(True, 3, 3) (False, 1, 3)",
    ]


def test_a_function_sees_a_global_set_since_the_fork():
    assert run("""
        import forkshm
        factor = 2.5
        table = {"a": 1}
        def scale(x):
            return x * factor
        def through(x):
            return scale(x) + table["a"]
        def late(x):
            return helper(x)
        with forkshm.Pool(1) as pool:
            print(pool.apply(scale, (2,)), pool.apply(through, (2,)))
            factor = 3.5
            print(pool.apply(scale, (2,)), pool.apply(through, (2,)), pool.map(scale, [1, 2]))
            factor = 2.5
            print(pool.apply(scale, (2,)))
            table = {"a": 100}
            print(pool.apply(through, (2,)))
            def helper(x):
                return -x
            print(pool.apply(late, (2,)))
    """) == ["5.0 6.0", "7.0 8.0 [3.5, 7.0]", "5.0", "105.0", "-2"]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_class_that_was_bound_anew_is_known_to_workers_that_import_the_program(tmp_path, method):
    path = tmp_path / "program.py"
    path.write_text(
        textwrap.dedent(f"""
        import forkshm
        class Shape:
            version = 1
        limit = 5
        def inspect(x):
            return isinstance(x, Shape), x.version, limit
        if __name__ == "__main__":
            limit = 7  # not known: the workers have what the program says
            with forkshm.get_context({method!r}).Pool(1) as pool:
                print(pool.apply(inspect, (Shape(),)))
                class Shape:
                    version = 2
                print(pool.apply(inspect, (Shape(),)))
        """)
    )
    done = subprocess.run([sys.executable, path], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.split("\n")[:-1] == ["(True, 1, 5)", "(True, 2, 5)"], done.stderr


def test_globals_set_by_an_initializer_are_seen():
    assert run("""
        import forkshm
        state = None
        factor = 1
        def prepare():
            global state, only_here
            state, only_here = "set", 5
        def look():
            return state, only_here, factor
        with forkshm.Pool(1, initializer=prepare) as pool:
            print(pool.apply(look))
            factor = 2
            print(pool.apply(look))
    """) == ["('set', 5, 1)", "('set', 5, 2)"]


def test_an_unpicklable_global_is_that_of_the_worker():
    assert run("""
        import forkshm, threading
        lock = None
        limit = 1
        def look():
            return lock is None, limit
        with forkshm.Pool(1) as pool:
            lock = threading.Lock()
            limit = 2
            print(pool.apply(look))
    """) == ["(True, 2)"]


def test_functions_with_unchanged_globals_are_sent_by_name():
    assert run("""
        import forkshm
        from forkshm.pickler import importable_now, pack_by_name, still_by_name
        limit = 10
        def look():
            return limit
        known = importable_now()
        other = [1]
        del other
        assert pack_by_name(look, known) and still_by_name(look, known)
        limit = 5 + 5
        assert still_by_name(look, known)
        limit = 11
        assert pack_by_name(look, known) is None and not still_by_name(look, known)
        print("ok")
    """) == ["ok"]


def test_the_snapshot_of_the_globals_keeps_nothing_large_alive():
    pytest.importorskip("numpy")
    assert run("""
        import weakref, numpy
        from forkshm.pickler import importable_now
        big = numpy.zeros(1000)
        text = "x" * 100_000
        gone = weakref.ref(big)
        known = importable_now()
        del big
        print(gone() is None, any(value is text for value in known.names.values()))
    """) == ["True False"]


def test_a_worker_sends_functions_back_by_name():
    assert run("""
        import forkshm
        state = None
        def prepare():
            global state
            state = 1
        def look():
            return state
        def give():
            return look
        with forkshm.Pool(1, initializer=prepare) as pool:
            print(pool.apply(give) is look)
    """) == ["True"]
