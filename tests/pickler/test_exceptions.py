"""Exceptions arrive unchanged, whatever arguments their ``__init__`` takes."""

from __future__ import annotations

import dataclasses
import os
import pickle
import re
import sys
import threading
import urllib.error

import pytest

import forkshm
from forkshm.errors import RemoteTraceback


class TwoArguments(Exception):
    def __init__(self, code, detail):
        super().__init__(f"{code}: {detail}")
        self.code = code
        self.detail = detail


class KeywordOnly(ValueError):
    def __init__(self, *, limit):
        self.limit = limit


class NoArguments(LookupError):
    def __init__(self):
        super().__init__("nothing", "there")


class OfFiles(FileNotFoundError):
    def __init__(self, path):
        super().__init__(2, "no such thing", path)
        self.extra = [path]


class OfText(UnicodeDecodeError):
    def __init__(self, position):
        super().__init__("utf-8", b"abc", position, position + 1, "odd")


class OfImport(ImportError):
    def __init__(self, module):
        super().__init__("missing", name=module, path="/there")


class Leaving(SystemExit):
    def __init__(self, status, why):
        super().__init__(status)
        self.why = why


class Slotted(Exception):
    __slots__ = ("where",)

    def __init__(self, where):
        super().__init__("slotted")
        self.where = where


class NotForTheSecondTime(Exception):
    made = 0

    def __init__(self, text):
        type(self).made += 1
        super().__init__(text)


class OwnWay(Exception):
    def __init__(self, a, b):
        super().__init__("own")
        self.pair = a, b

    def __reduce__(self):
        return type(self), self.pair


class OwnState(Exception):
    def __init__(self, a):
        super().__init__("state")
        self.a = a

    def __setstate__(self, state):
        self.a = state["a"] * 2


class Many(ExceptionGroup):
    def __new__(cls, excs):
        return super().__new__(cls, "many", excs)

    def __init__(self, excs):
        self.count = len(excs)


class Counted(ExceptionGroup):
    def __new__(cls, message, excs, code):
        made = super().__new__(cls, message, excs)
        made.code = code
        return made


class OwnReduction(Exception):
    def __reduce__(self):
        return OwnReduction, self.args, self.__dict__


@dataclasses.dataclass(frozen=True)
class Frozen(Exception):
    code: int


class RefusesAssignments(Exception):
    def __setattr__(self, name, value):
        raise AttributeError(f"no {name}")


class ReadOnlyCause(Exception):
    __cause__ = property(lambda self: None)


class NoText(Exception):
    def __str__(self):
        raise ZeroDivisionError

    __repr__ = __str__


class NoTextAndNoPickle(NoText):
    def __reduce__(self):
        raise ValueError("not me")


class Delegating(Exception):
    """Every method needs an object that exists only after ``__init__`` has run."""

    def __init__(self, response):
        super().__init__("of a response")
        self.response = response

    def __getattr__(self, name):
        return getattr(self.response, name)


class OddAttributes(Exception):
    def __getattr__(self, name):
        raise ZeroDivisionError(name)


class StateOfItsOwn(Exception):
    def __init__(self, a, b):
        super().__init__()
        self.a, self.b = a, b

    def __getstate__(self):
        return {"a": self.a}

    def __setstate__(self, state):
        self.a, self.b = state["a"], "again"


class OwnTraceback(Exception):
    def with_traceback(self, tb):
        raise ZeroDivisionError


MADE = {
    "two arguments": lambda: TwoArguments(7, "x"),
    "keyword only": lambda: KeywordOnly(limit=3),
    "no arguments": NoArguments,
    "of files": lambda: OfFiles("/a/b"),
    "of text": lambda: OfText(1),
    "of imports": lambda: OfImport("m"),
    "leaving": lambda: Leaving(3, "why"),
    "own way": lambda: OwnWay(1, 2),
    "built in": lambda: KeyError("k"),
    "of the kernel": lambda: OSError(13, "no", "/f", None, "/g"),
    "of text, built in": lambda: UnicodeEncodeError("ascii", "é", 0, 1, "no"),
    "stop": lambda: StopIteration(5),
}

UNUSUAL = {
    "frozen": (lambda: Frozen(3), Frozen),
    "refuses assignments": (lambda: RefusesAssignments(1), RefusesAssignments),
    "read-only cause": (lambda: ReadOnlyCause(1), ReadOnlyCause),
    "no text": (lambda: NoText(1), NoText),
    "no text, no pickle": (lambda: NoTextAndNoPickle(1), forkshm.NotPicklableError),
    "delegating": (lambda: Delegating("answer"), Delegating),
    "odd attributes": (lambda: OddAttributes(1), OddAttributes),
    "own state": (lambda: StateOfItsOwn(1, 2), StateOfItsOwn),
    "own traceback": (lambda: OwnTraceback(1), OwnTraceback),
}

FIELDS = ("args", "code", "detail", "limit", "errno", "strerror", "filename", "filename2", "extra", "start", "end")
FIELDS += ("reason", "object", "encoding", "name", "path", "why", "pair", "value", "pos", "lineno", "doc", "__dict__")


@pytest.mark.parametrize("name", MADE)
def test_an_exception_comes_back_unchanged(cross, name):
    sent = MADE[name]()
    sent.add_note("seen")
    if name != "own way":
        sent.colour = "red"
    value = cross(sent).value
    assert type(value) is type(sent)
    assert str(value) == str(sent)
    if name == "own way":
        assert value.pair == sent.pair
        return
    for field in FIELDS:
        assert getattr(value, field, "none") == getattr(sent, field, "none"), field
    assert value.__notes__ == ["seen"]
    assert value.colour == "red"


def test_slots_of_an_exception_are_kept(cross):
    assert cross(Slotted("there")).value.where == "there"


def test_an_own_setstate_is_called(cross):
    assert cross(OwnState(2)).value.a == 4


def test_a_group_comes_back_with_its_members(cross):
    value = cross(Many([TwoArguments(1, "a"), KeywordOnly(limit=1)])).value
    assert (type(value), value.count, value.message) == (Many, 2, "many")
    assert [type(member) for member in value.exceptions] == [TwoArguments, KeywordOnly]
    assert value.exceptions[0].code == 1


def test_a_group_with_a_constructor_of_its_own_comes_back(cross):
    value = cross(Counted("many", [ValueError(1), KeyError(2)], 7)).value
    assert (type(value), value.code, value.message) == (Counted, 7, "many")
    assert [type(member) for member in value.exceptions] == [ValueError, KeyError]


@pytest.mark.parametrize("kind", [ValueError, Slotted, OwnState])
def test_an_exception_may_refer_to_itself(cross, kind):
    sent = kind(3)
    sent.parts = [sent]
    sent.__cause__ = KeyError("k")
    value = cross(sent).value
    if kind is not OwnState:
        assert value.parts[0] is value
    assert isinstance(value.__cause__, KeyError)


def test_an_exception_with_its_own_reduction_may_refer_to_itself(cross):
    sent = OwnReduction(1)
    sent.me = sent
    sent.__cause__ = KeyError("k")
    value = cross(sent).value
    assert value.me is value
    assert isinstance(value.__cause__, KeyError)


def test_init_is_not_called(cross):
    sent = NotForTheSecondTime("x")
    made = NotForTheSecondTime.made
    cross(sent)
    assert NotForTheSecondTime.made == made


def chained():
    try:
        try:
            raise TwoArguments(1, "first")
        except TwoArguments as first:
            raise KeywordOnly(limit=2) from first
    except KeywordOnly as error:
        return error


def test_cause_and_context_come_along(cross):
    value = cross(chained()).value
    assert isinstance(value.__cause__, TwoArguments)
    assert value.__cause__ is value.__context__
    assert value.__suppress_context__
    assert value.__cause__.code == 1


def test_a_built_in_exception_brings_its_cause(cross):
    sent = ValueError("x")
    sent.__context__ = chained()
    value = cross(sent).value
    assert isinstance(value.__context__, KeywordOnly)
    assert isinstance(value.__context__.__cause__, TwoArguments)
    assert not value.__suppress_context__


def test_an_exception_with_its_own_reduction_keeps_its_cause(cross):
    sent = OwnWay(1, 2)
    sent.__cause__ = chained()
    value = cross(sent).value
    assert value.pair == (1, 2)
    assert isinstance(value.__cause__, KeywordOnly)


def test_a_chain_that_comes_back_to_its_start_is_sent(cross):
    first, second = ValueError(1), ValueError(2)
    first.__context__, second.__context__ = second, first
    value = cross(first).value
    assert value.__context__.args == (2,)
    assert value.__context__.__context__ is value


def test_a_very_long_chain_is_cut(cross):
    error = None
    for number in range(5000):
        other = ValueError(number)
        other.__cause__ = error
        error = other
    value = cross(error).value
    assert value.__cause__.args == (4998,)


def test_unpicklable_parts_of_an_exception_chain_are_omitted(cross):
    sent = chained()
    sent.__cause__.lock = threading.Lock()
    value = cross(sent).value
    assert (type(value), value.limit) == (KeywordOnly, 2)
    assert value.__cause__.args == sent.__cause__.args
    assert not hasattr(value.__cause__, "lock")
    assert "the attribute 'lock'" in value.__cause__.__notes__[-1]
    assert value.__cause__.__cause__ is None


def test_an_exception_in_a_chain_that_cannot_be_pickled_at_all_is_omitted(cross):
    class Refusing(Exception):
        def __reduce__(self):
            raise ZeroDivisionError

    sent = chained()
    sent.__cause__ = Refusing()
    value = cross(sent).value
    assert (type(value), value.limit, value.__cause__) == (KeywordOnly, 2, None)


def test_an_exception_that_cannot_be_pickled_says_so():
    sent = TwoArguments(1, "x")
    sent.lock = threading.Lock()
    with pytest.raises(TypeError, match="pickle"):
        forkshm.pickler.pack(sent)


class WithLock(Exception):
    def __init__(self, code):
        super().__init__("message", threading.Lock())
        self.code = code
        self.lock = threading.Lock()


def not_found():
    return urllib.error.HTTPError("http://a", 404, "not found", {}, open(os.devnull, "rb"))


def with_lock_in_a_group():
    return ExceptionGroup("group", [WithLock(3), KeyError("k")])


def os_error_with_a_file():
    error = with_fields(OSError(2, "no such file", "/a"), file=open(os.devnull))
    error.__cause__ = WithLock(4)
    return error


def raise_made(make):
    raise make()


def caught(raise_it, make):
    with pytest.raises(Exception) as raised:
        raise_it(make)
    return raised.value


def in_member(make):
    with forkshm.team(2) as me:
        if me.rank:
            raise make()


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("where", ["task", "team"])
def test_parts_of_a_raised_exception_that_cannot_be_pickled_are_left_out(pool, where):
    raise_it = in_member if where == "team" else lambda make: pool.apply(raise_made, (make,))
    error = caught(raise_it, lambda: WithLock(3))
    assert (type(error), error.code, error.args[0]) == (WithLock, 3, "message")
    assert "_thread.lock" in error.args[1]
    assert not hasattr(error, "lock")
    assert re.search(r"cannot be pickled: args\[1\] \(.*, the attribute 'lock' \(.*_thread.lock", error.__notes__[0])

    error = caught(raise_it, not_found)
    assert (type(error), error.code, error.url) == (urllib.error.HTTPError, 404, "http://a")
    assert str(error) == "HTTP Error 404: not found"

    error = caught(raise_it, with_lock_in_a_group)
    assert [type(inner) for inner in error.exceptions] == [WithLock, KeyError]
    assert error.exceptions[0].code == 3

    error = caught(raise_it, os_error_with_a_file)
    assert (type(error), error.errno, error.filename) == (FileNotFoundError, 2, "/a")


def raise_it(name):
    error = MADE[name]()
    raise error


def raise_chained():
    raise chained()


def raise_unusual(name):
    error = UNUSUAL[name][0]()
    raise error from KeyError("cause")


def in_a_team(name):
    with forkshm.team(2) as me:
        if me.rank:
            raise_unusual(name)


@pytest.fixture(scope="module")
def pool():
    with forkshm.Pool(1) as made:
        yield made


@pytest.mark.parametrize("name", UNUSUAL)
def test_an_unusual_exception_is_raised_and_its_worker_lives_on(pool, name):
    expected = UNUSUAL[name][1]
    worker = pool.apply(os.getpid)
    ways = (
        lambda: pool.apply(raise_unusual, (name,)),
        lambda: pool.map(raise_unusual, [name]),
        lambda: next(pool.imap(raise_unusual, [name])),
        lambda: in_a_team(name),
    )
    for way in ways:
        with pytest.raises(expected) as caught:
            way()
        cause = BaseException.__dict__["__cause__"].__get__(caught.value)
        assert "raise_unusual" in cause.tb
    assert pool.apply(os.getpid) == worker


def test_an_unusual_exception_is_returned_in_place_of_its_result():
    called = forkshm.parallel(raise_unusual, on_error="return", workers=1)
    try:
        assert type(called.map(["frozen"])[0]) is Frozen
    finally:
        called.close()


def test_an_exception_gets_the_state_that_it_returned(cross):
    value = cross(StateOfItsOwn(1, 2)).value
    assert (value.a, value.b) == (1, "again")


def test_an_exception_with_its_own_reduction_keeps_its_notes(cross):
    sent = OwnWay(1, 2)
    sent.add_note("seen")
    value = cross(sent).value
    assert (value.pair, value.__notes__) == ((1, 2), ["seen"])


def test_except_clauses_match_the_exception_of_a_task():
    with forkshm.Pool(1) as pool:
        with pytest.raises(TwoArguments) as caught:
            pool.apply(raise_it, ("two arguments",))
        assert (caught.value.code, caught.value.detail) == (7, "x")
        assert isinstance(caught.value.__cause__, RemoteTraceback)
        with pytest.raises(KeywordOnly) as caught:
            pool.apply(raise_chained)
        remote = caught.value.__cause__
        assert isinstance(remote, RemoteTraceback)
        assert isinstance(remote.__cause__, TwoArguments)


def test_an_exception_crosses_a_queue_and_a_result():
    queue = forkshm.Queue()
    queue.put(chained())
    value = queue.get()
    assert (value.limit, value.__cause__.code) == (2, 1)
    with forkshm.Pool(1) as pool:
        assert pool.apply(chained).__cause__.detail == "first"


def test_plain_pickles_are_unchanged():
    if "tblib" in sys.modules:
        pytest.skip("tblib has changed plain pickles in this process")
    with pytest.raises(TypeError):
        pickle.loads(pickle.dumps(TwoArguments(1, 2)))


def test_parts_that_cannot_be_pickled_are_left_out_after_tblib_was_installed(run_script):
    pytest.importorskip("tblib")
    said = run_script("""
import threading
import tblib.pickling_support
import forkshm

tblib.pickling_support.install()  # registers a reducer for every exception

class WithLock(Exception):
    pass

def fail():
    error = WithLock(3)
    error.lock = threading.Lock()
    raise ExceptionGroup("group", [error, KeyError("k")])

with forkshm.Pool(1) as pool:
    try:
        pool.apply(fail)
    except ExceptionGroup as group:
        print([type(inner).__name__ for inner in group.exceptions], group.exceptions[0].args)
""")
    assert said == "['WithLock', 'KeyError'] (3,)\n"


@pytest.mark.slow
def test_exceptions_arrive_unchanged_after_dask_was_imported(run_script):
    pytest.importorskip("distributed")
    said = run_script("""
import distributed  # registers tblib's way for every exception
import forkshm


class Unusual(Exception):
    def __init__(self, *, limit):
        super().__init__(f"over {limit}")
        self.limit = limit


def fail(kind):
    if kind == "unusual":
        raise Unusual(limit=3)
    raise UnicodeDecodeError("ascii", b"abc", 1, 2, "odd")


if __name__ == "__main__":
    with forkshm.Pool(1) as pool:
        for kind in ("unusual", "decode"):
            try:
                pool.apply(fail, (kind,))
            except Unusual as error:
                print(error.limit, error)
            except UnicodeDecodeError as error:
                print(error)
""")
    assert said.split("\n")[:2] == ["3 over 3", "'ascii' codec can't decode byte 0x62 in position 1: odd"]


def with_fields(error, **fields):
    for name, value in fields.items():
        setattr(error, name, value)
    return error


IN_C = {
    "AttributeError": lambda: AttributeError("no such attribute", name="colour"),
    "NameError": lambda: NameError("no such name", name="colour"),
    "OSError": lambda: with_fields(OfFiles("/a"), filename="/b", filename2="/c"),
    "SyntaxError": lambda: with_fields(SyntaxError("bad"), filename="a.conf", lineno=3, text="x ="),
    "StopIteration": lambda: with_fields(StopIteration(1), value=2),
    "SystemExit": lambda: with_fields(Leaving(1, "late"), code=2),
    "URL": lambda: urllib.error.HTTPError("http://a", 404, "not found", {}, None),
}


@pytest.mark.parametrize("name", IN_C)
def test_fields_of_built_in_classes_are_kept(cross, name):
    sent = IN_C[name]()
    value = cross(sent).value
    assert str(value) == str(sent)
    for field in (*FIELDS[1:-1], "text", "msg", "code", "url"):
        assert getattr(value, field, "none") == getattr(sent, field, "none"), field
    for error in (sent, value):
        if isinstance(error, urllib.error.HTTPError):
            error.close()
