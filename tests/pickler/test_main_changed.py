"""Names of ``__main__`` that were rebound after the fork, as when a notebook's cells are run again."""

from __future__ import annotations

import ast
import subprocess
import sys
import textwrap

import pytest

from forkshm.pickler import _names

pytestmark = pytest.mark.needs("fork")


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


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_workers_that_import_the_program_know_classes_made_in_every_statement(tmp_path, method):
    program = tmp_path / "program.py"
    program.write_text(
        textwrap.dedent(f"""
        import collections
        import enum
        import forkshm

        Pair = collections.namedtuple("Pair", "first second")
        Color, Dynamic = enum.Enum("Color", "RED"), type("Dynamic", (), {{}})
        Noted: type = type("Noted", (), {{}})
        for _ in range(1):
            class InFor:
                pass
        while True:
            class InWhile:
                pass
            break
        match 1:
            case 1:
                class InMatch:
                    pass
        try:
            raise ImportError
        except ImportError:
            class InExcept:
                pass
        else:
            pass
        finally:
            class InFinally:
                pass

        def is_known(name, thing):
            return isinstance(thing, globals()[name])

        if __name__ == "__main__":
            things = [Pair(1, 2), Color.RED, Dynamic(), Noted(), InFor(), InWhile(), InMatch(), InExcept(), InFinally()]
            context = forkshm.get_context({method!r})
            with context.Pool(1) as pool:
                print([type(x).__name__ for x in things if not pool.apply(is_known, (type(x).__name__, x))])
    """)
    )
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.stderr) == ("[]\n", "")


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


def test_submitted_functions_use_a_redefined_class():
    assert run("""
        import forkshm
        class Shape:
            version = 1
        def inspect(x):
            return isinstance(x, Shape), x.version
        with forkshm.Executor(1) as executor:
            print(executor.submit(inspect, Shape()).result())
            class Shape:
                version = 2
            print(executor.submit(inspect, Shape()).result(), *executor.map(inspect, [Shape()]))
            print(executor.submit(inspect, Shape()).result())
    """) == ["(True, 1)", "(True, 2) (True, 2)", "(True, 2)"]


def test_methods_use_a_redefined_function():
    assert run("""
        import forkshm
        def helper():
            return 1
        class Base:
            def value(self):
                return helper()
        class Model(Base):
            cache = []
            @property
            def prop(self):
                return helper()
            @classmethod
            def of_class(cls):
                return helper()
        def call(model):
            return isinstance(model, Model), isinstance(model, Base), model.value(), model.prop, Model.of_class()
        with forkshm.Pool(1) as pool:
            print(pool.apply(call, (Model(),)))
            def helper():
                return 2
            print(pool.apply(call, (Model(),)), pool.apply(Model().value), pool.apply(Model.of_class))
            made = pool.apply(lambda: Model())
            print(type(made) is Model, isinstance(made, Base))
    """) == ["(True, True, 1, 1, 1)", "(True, True, 2, 2, 2) 2 2", "True True"]


def test_a_class_whose_methods_use_a_changed_value_stays_the_workers_own():
    assert run("""
        import forkshm
        verbose = False
        class Model:
            loaded = None
            @classmethod
            def load(cls):
                cls.loaded = "yes"
            def predict(self, x):
                return x, self.loaded, verbose
        with forkshm.Pool(1, Model.load) as pool:
            verbose = True
            print(pool.map(Model().predict, [1]))
    """) == ["[(1, 'yes', False)]"]


def test_decorated_functions_use_a_redefined_function():
    assert run("""
        import functools
        import forkshm
        def helper():
            return 1
        def double(function):
            @functools.wraps(function)
            def doubled(*args):
                return 2 * function(*args)
            return doubled
        @double
        def decorated():
            return helper()
        @functools.lru_cache
        def cached():
            return helper()
        def through():
            return decorated(), cached()
        with forkshm.Pool(1) as pool:
            print(pool.apply(decorated), pool.apply(cached), pool.apply(through))
            def helper():
                return 10
            print(pool.apply(decorated), pool.apply(cached), pool.apply(through))
    """) == ["2 1 (2, 1)", "20 10 (20, 10)"]


def test_decorated_functions_and_properties_that_are_younger_than_the_worker_cross():
    assert run("""
        import functools
        import forkshm
        pool = forkshm.Pool(1)
        @functools.lru_cache(maxsize=5)
        def fibonacci(n):
            return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)
        @functools.singledispatch
        def kind(x):
            return "other"
        @kind.register
        def _(x: int):
            return "int"
        class Lazy:
            @functools.cached_property
            def value(self):
                return 7
        def call(lazy):
            return fibonacci(50), fibonacci.cache_parameters()["maxsize"], kind(1), kind("a"), lazy.value
        print(pool.apply(call, (Lazy(),)), pool.map(fibonacci, [10]), pool.apply(kind, (2,)))
        pool.terminate()
    """) == ["(12586269025, 5, 'int', 'other', 7) [55] int"]


def test_a_cached_function_keeps_its_cache_in_the_worker():
    assert run("""
        import functools
        import forkshm
        @functools.lru_cache
        def cached(x):
            return x
        def hits(_):
            cached(1)
            return cached.cache_info().hits
        with forkshm.Pool(1) as pool:
            print(pool.map(hits, range(3)), pool.apply(cached, (1,)), pool.map(hits, range(2)))
    """) == ["[0, 1, 2] 1 [4, 5]"]


def test_functions_by_value_see_globals_of_an_initializer():
    assert run("""
        import forkshm
        loaded = None
        count = 5
        def load(value):
            global loaded, count
            loaded, count = value, 6
        with forkshm.Pool(1, load, ("data",)) as pool:
            def late(x=0):
                return loaded, count
            print(pool.apply(late), pool.apply(lambda: loaded), pool.map(late, [1]))
            count = 7
            print(pool.apply(late))
    """) == ["('data', 6) data [('data', 6)]", "('data', 7)"]


def test_a_proxy_among_the_globals_is_not_asked():
    assert run("""
        import forkshm
        class Proxy:  # like Flask's request
            @property
            def __class__(self):
                raise RuntimeError("outside of a request")
            def __getattr__(self, name):
                raise RuntimeError("outside of a request")
            def __eq__(self, other):
                raise RuntimeError("outside of a request")
            __hash__ = None
        request = Proxy()
        class View:
            request = Proxy()
            def call(self, x):
                return request is not None, x
        def call(x):
            return request is not None, x
        with forkshm.Pool(1) as pool:
            print(pool.apply(call, (1,)), pool.map(View().call, [2]))
            request = Proxy()
            print(pool.apply(View().call, (3,)))
            try:
                pool.apply(id, (Proxy(),))
            except RuntimeError as error:
                print(error)
    """) == ["(True, 1) [(True, 2)]", "(True, 3)", "outside of a request (in args and kwds: __main__.Proxy)"]


def test_the_main_module_is_parsed_again_if_another_thread_parses_at_that_moment(monkeypatch):
    refusals = [SystemError("AST constructor recursion depth mismatch"), None]
    parse = ast.parse

    def refuse_once(text):
        if (refusal := refusals.pop(0)) is not None:
            raise refusal
        return parse(text)

    monkeypatch.setattr(_names.ast, "parse", refuse_once)
    assert "run" in _names._defined_in.__wrapped__(__file__)
