"""Classes and code sent by value, and objects that are refused."""

from __future__ import annotations

import ctypes  # noqa: TID251 - what is sent
import dataclasses
import doctest
import io
import linecache
import subprocess
import sys
import traceback
import typing
import zipapp

import pytest

import forkshm
from forkshm.pickler import explain, pack


def made_on_the_spot():
    @dataclasses.dataclass(slots=True)
    class Data:
        x: int = 1

    @dataclasses.dataclass(slots=True, frozen=True)
    class Frozen:
        x: int = 1

    class One:
        __slots__ = "x"  # noqa: PLC0205 - allowed, and met

        def __init__(self):
            self.x = 1

    class Several:
        __slots__ = ("__hidden", "__weakref__", "x")

        def __init__(self):
            self.x = self.__hidden = 1

        def hidden(self):
            return self.__hidden

    class Derived(Several):
        __slots__ = ("y",)

        def __init__(self):
            super().__init__()
            self.y = 2

    class Plain(Several):
        pass

    class Named(typing.NamedTuple):
        x: int = 1

    return [Data(), Frozen(), One(), Several(), Derived(), Plain(), Named()]


def made_at(index):
    return made_on_the_spot()[index]


@pytest.mark.parametrize("index", range(7))
def test_an_object_with_slots_of_a_local_class_goes_there_and_comes_back(index):
    with forkshm.Pool(1) as pool:
        made = pool.apply(made_at, (index,))
        assert made.x == 1
        # Instances of a class that this process has, and that the worker recreated.
        mine = made_at(index)
        back = pool.apply(lambda thing: thing, (mine,))
        assert type(back) is type(mine)
        assert back.x == 1
        assert pool.apply(lambda thing: hasattr(thing, "__dict__"), (mine,)) == hasattr(mine, "__dict__")
        if hasattr(mine, "hidden"):
            assert back.hidden() == 1


Odd = type("Odd", (), {"__module__": None, "x": 3})


def test_an_object_of_a_class_without_a_module_crosses(cross):
    assert cross(Odd()).value.x == 3
    assert cross([Odd(), {"o": Odd}]).value[0].x == 3


def test_the_error_about_a_class_without_a_module_names_the_class():
    sent = Odd()
    sent.frame = sys._getframe()
    with pytest.raises(TypeError) as caught:
        pack(sent)
    explain(caught.value, {"args": (sent,)})
    assert "args[0].frame: frame" in str(caught.value)


@pytest.mark.parametrize("where", ["argument", "attribute", "closure"])
def test_an_open_file_is_refused_with_its_path_in_the_object(tmp_path, where):
    path = tmp_path / "f"
    path.write_text("abc")
    with path.open() as file, forkshm.Pool(1) as pool:

        class Holder:
            log = file

        calls = {
            "argument": lambda: pool.apply(id, (file,)),
            "attribute": lambda: pool.apply(id, ({"k": Holder()},)),
            "closure": lambda: pool.apply(lambda: file),
        }
        with pytest.raises(TypeError, match=r"cannot pickle '_io.TextIOWrapper' object") as caught:
            calls[where]()
        assert str(path) in str(caught.value)
        ways = {"argument": r"args[0]", "attribute": "log", "closure": "func.__closure__['file']"}
        assert ways[where] in str(caught.value)


def test_standard_streams_arrive_as_the_receivers_own(cross):
    if type(sys.stderr) is io.TextIOWrapper:
        assert cross(sys.stderr).value is sys.stderr


@pytest.mark.parametrize("make", [lambda: memoryview(bytearray(10)), lambda: forkshm.anonymous_shared_memory(5).buf])
def test_a_memoryview_is_refused(make):
    view = make()
    with pytest.raises(TypeError, match=r"cannot pickle a memoryview of .* bytes"):
        pack({"a": view})
    view.release()


class Pair(ctypes.Structure):
    _fields_ = (("a", ctypes.c_int), ("b", ctypes.c_double * 3))


CTYPES = {
    "array": lambda: (ctypes.c_double * 3)(1, 2, 3),
    "two axes": lambda: (ctypes.c_short * 2 * 3)((1, 2), (3, 4)),
    "of structures": lambda: (Pair * 2)(Pair(1), Pair(2)),
    "number": lambda: ctypes.c_int(5),
    "structure": lambda: Pair(3, (1, 2, 3)),
}


@pytest.mark.parametrize("name", CTYPES)
def test_ctypes_cross(cross, name):
    sent = CTYPES[name]()
    value = cross([sent]).value[0]
    assert type(value) is type(sent)
    assert bytes(value) == bytes(sent)


def test_an_array_of_pointers_is_refused_with_its_type_and_path():
    sent = {"p": (ctypes.c_char_p * 2)(b"a", b"b")}
    with pytest.raises(ValueError, match="pointers") as caught:
        pack(sent)
    explain(caught.value, {"args": (sent,)})
    assert "args[0]['p']: " in str(caught.value)
    assert "c_char_p_Array_2" in str(caught.value)


def failing_from(source, name):
    namespace = {"__name__": "__main__"}
    exec(compile(source, name, "exec"), namespace)
    return namespace["fail"]


CELL = "def fail(x):\n    y = x - 1\n    return 1 / y  # of the cell\n"


def text_of_failure(function):
    with forkshm.Pool(1) as pool, pytest.raises(ZeroDivisionError) as caught:
        pool.apply(function, (1,))
    return str(caught.value.__cause__)


def test_a_function_made_on_the_spot_keeps_file_and_line():
    offset = 1
    line = sys._getframe().f_lineno + 1
    text = text_of_failure(lambda x: 1 / (x - offset))
    assert f'File "{__file__}", line {line}' in text
    assert "1 / (x - offset)" in text


def test_a_cell_of_a_notebook_that_is_younger_than_the_worker_shows_its_source():
    name = "<ipython-input-7-forkshm>"
    with forkshm.Pool(1) as pool:
        pool.apply(len, ([],))
        linecache.cache[name] = len(CELL), None, CELL.splitlines(keepends=True), name
        try:
            with pytest.raises(ZeroDivisionError) as caught:
                pool.apply(failing_from(CELL, name), (1,))
        finally:
            del linecache.cache[name]
    text = str(caught.value.__cause__)
    assert f'File "{name}", line 3, in fail' in text
    assert "return 1 / y  # of the cell" in text


def test_a_function_of_a_doctest_that_is_younger_than_the_worker_shows_its_source():
    text = """
        >>> def fail(x):
        ...     return 1 / x  # of the doctest
        >>> try:
        ...     pool.apply(fail, (0,))
        ... except ZeroDivisionError as error:
        ...     text = str(error.__cause__)
        >>> "return 1 / x  # of the doctest" in text
        True
    """
    with forkshm.Pool(1) as pool:
        pool.apply(len, ([],))
        example = doctest.DocTestParser().get_doctest(text, {"pool": pool, "__name__": "__main__"}, "page", None, 0)
        assert doctest.DocTestRunner(verbose=False).run(example).failed == 0


OF_A_PROGRAM = """
import forkshm

def fail(x):
    return 1 / x  # of the program

if __name__ == "__main__":
    with forkshm.get_context("spawn").Pool(1) as pool:
        for function in (fail, lambda x: 2 / x):
            try:
                pool.apply(function, (0,))
            except ZeroDivisionError as error:
                print(error.__cause__)
"""


def shown_by(*arguments):
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_spawned_worker_shows_the_source_of_an_archive(tmp_path):
    folder = tmp_path / "app"
    folder.mkdir()
    (folder / "__main__.py").write_text(OF_A_PROGRAM)
    zipapp.create_archive(folder, tmp_path / "app.pyz")
    shown = shown_by(str(tmp_path / "app.pyz"))
    assert "return 1 / x  # of the program" in shown
    assert "lambda x: 2 / x" in shown


@pytest.mark.skipif(sys.version_info < (3, 13), reason="Python has no source of -c")
def test_a_spawned_worker_shows_the_source_of_the_command_line():
    shown = shown_by("-c", OF_A_PROGRAM)
    assert "return 1 / x  # of the program" in shown
    assert "lambda x: 2 / x" in shown


def test_code_without_a_source_still_crosses(cross):
    function = cross(failing_from(CELL, "<nowhere>")).value
    assert function.__code__.co_filename == "<nowhere>"
    with pytest.raises(ZeroDivisionError):
        function(1)


def fail_here(x):
    return 1 / (x - 1)


def test_frames_of_the_library_are_folded_away():
    for text in (text_of_failure(fail_here), text_of_failure(lambda x: 1 / (x - 1))):
        assert "_worker.py" not in text
        assert "1 / (x - 1)" in text


def test_the_frames_of_an_error_of_the_library_stay():
    from forkshm.errors import remote_text

    with pytest.raises(ValueError, match="size") as caught:
        forkshm.anonymous_shared_memory(-1)
    caught.value.__traceback__ = caught.value.__traceback__.tb_next
    assert "anonymous_shared_memory" in remote_text(caught.value) or "_anonymous.py" in remote_text(caught.value)
    assert remote_text(ValueError("x")) == "".join(traceback.format_exception(ValueError("x")))


LAZY = """
import dataclasses

@dataclasses.dataclass
class Data:
    x: int = 1

class Plain:
    x: int

class Unknown:
    x: int
    y: OnlyForTypeCheckers

def function(x: int, *, y: OnlyForTypeCheckers = 2) -> Data:
    "Its documentation."
    return x, y, function.__kwdefaults__, function.mark

function.mark = "mark"
"""


@pytest.mark.skipif(sys.version_info < (3, 14), reason="annotations are evaluated when they are made")
def test_annotations_that_are_not_evaluated_yet():
    names: dict[str, typing.Any] = {"__name__": "nowhere"}
    exec(compile(LAZY, "<lazy>", "exec", dont_inherit=True), names)
    with forkshm.Pool(1) as pool:
        annotations = [pool.apply(lambda thing: thing.__annotations__, (names[name],)) for name in ("Plain", "Unknown")]
        function = pool.apply(lambda function: (function(1), function.__doc__, function), (names["function"],))
        assert pool.apply(names["Data"]).x == 1
    assert annotations == [{"x": int}, {"x": "int", "y": "OnlyForTypeCheckers"}]
    assert function[:2] == ((1, 2, {"y": 2}, "mark"), "Its documentation.")
    assert function[2].__annotations__ == {"x": "int", "y": "OnlyForTypeCheckers", "return": "Data"}
