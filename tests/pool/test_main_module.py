"""Functions of the script itself that are sent by name, and those that are sent by value."""

import textwrap

HEAD = """
import forkshm, os, sys
STATE = None
class Point:
    def __init__(self, x): self.x = x
    class Inner: pass
    def double(self): return self.x * 2
def init(value):
    global STATE
    STATE = value
def get_state(_=None): return STATE
def is_point(thing): return isinstance(thing, Point)
"""


def program(body):
    """Spawned processes import the script, too."""
    return HEAD + 'if __name__ == "__main__":\n' + textwrap.indent(body, "    ")


def test_globals_that_an_initializer_sets_are_seen_by_tasks(run_script):
    out = run_script(
        program("""
with forkshm.Pool(2, init, ("set",)) as pool:
    print(set(pool.map(get_state, range(10), chunksize=1)), pool.apply(get_state), STATE)
""")
    )
    assert out == "{'set'} set None\n"


def test_classes_of_the_script_are_the_same_on_both_sides(run_script):
    out = run_script(
        program("""
with forkshm.Pool(1) as pool:
    print(pool.apply(is_point, (Point(1),)), type(pool.apply(Point, (2,))) is Point)
    print(type(pool.apply(Point.Inner)) is Point.Inner, pool.apply(Point.double, (Point(4),)))
""")
    )
    assert out == "True True\nTrue 8\n"


def test_functions_defined_after_the_pool_are_sent_by_value(run_script):
    out = run_script(
        program("""
def version(): return 1
with forkshm.Pool(1) as pool:
    print(pool.apply(version))
    def version(): return 2
    def late(x): return x + 1
    class Late:
        value = 7
    print(pool.apply(version), pool.apply(late, (1,)), pool.apply(lambda thing: thing.value, (Late(),)))
    print(type(pool.apply(Late)).__name__)
""")
    )
    assert out == "1\n2 2 7\nLate\n"


def test_a_script_may_end_without_closing_its_pool(run_script):
    out = run_script(
        program("""
pool = forkshm.Pool(2)
results = [pool.apply_async(get_state) for _ in range(100)]
arrays = pool.apply(bytes, (1_000_000,))
print(len(arrays))
""")
    )
    assert out == "1000000\n"


def test_arrays_alive_at_exit_do_no_harm(run_script):
    out = run_script(
        program("""
import numpy as np
pool = forkshm.Pool(1)
kept = pool.apply(np.ones, (1_000_000,))
shared = forkshm.ones(1000)
view = shared[::2]
print(kept.sum(), view.sum())
""")
    )
    assert out == "1000000.0 500.0\n"
