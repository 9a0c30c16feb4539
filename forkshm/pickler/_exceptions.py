"""Sends exceptions without calling their ``__init__``.

Pickle calls ``type(error)(*error.args)``. This fails, or makes a different error, if ``__init__`` takes other arguments
than it passes to ``super().__init__``. Here the receiver makes the object with the ``__new__`` of its built-in base
class. It then sets the arguments, attributes, slots and notes that the sender's object had, and the exceptions that it
names as cause and context.

The chain is sent as far as possible: an exception in it that cannot be pickled is sent without the parts at fault. If
that is not possible either, or if it cannot be unpickled, it is left out.
"""

from __future__ import annotations

import builtins
import contextlib
import copyreg
import pickle
from types import MemberDescriptorType
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from forkshm.errors import add_note, safe_repr, set_cause, set_context

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ("reduce_exception", "without_unpicklable")

_Links: TypeAlias = tuple[int | None, int | None, bool]

# Number of exceptions of a chain that are sent; a longer chain is cut.
_LONGEST_CHAIN = 32

_LINKS = ("__cause__", "__context__")

# The class of an exception may define how its attributes are read and set, so use those of BaseException.
_set_args: Any = vars(BaseException)["args"].__set__
_args_of: Any = vars(BaseException)["args"].__get__
_set_suppressed: Any = vars(BaseException)["__suppress_context__"].__set__
_dict_of: Any = vars(BaseException)["__dict__"].__get__


def _subclasses_of(base: type) -> list[type]:
    return [kind for kind in vars(builtins).values() if isinstance(kind, type) and issubclass(kind, base)]


def reduce_exception(error: BaseException, dump: Callable[[BaseException], bytes] | None) -> Any:
    """Return what ``__reduce__`` would return for an exception, or NotImplemented to let pickle do it.

    Args:
        error: The exception.
        dump: Pickles one exception of the chain, without its own chain; None to send no chain.
    """
    chain = _chain_of(error) if dump is not None else []
    kind = type(error)
    builtin = _builtin_base(kind)
    if _has_own_way(kind, builtin):
        # The class defines how it is rebuilt; only the chain and the notes are added.
        notes = _dict_of(error).get("__notes__")
        if not chain and not notes:
            return _plainly(error)
        parts = error.__reduce_ex__(pickle.HIGHEST_PROTOCOL)
        if not isinstance(parts, tuple) or not 2 <= len(parts) <= 3:
            return NotImplemented
        own_state = parts[2] if len(parts) == 3 else None
        pickled = _pickled(chain, dump) if dump is not None else []
        return *parts[:2], (own_state, pickled, _linked(error, chain), notes), None, None, fill_rebuilt
    is_builtin = kind is builtin and kind.__init__ is builtin.__init__
    if not chain and is_builtin and not _dict_of(error) and not _c_fields_of(error, builtin):
        return _plainly(error)
    # The built-in class knows the values of its own fields, such as the errno of an OSError.
    reduced = cast("Any", builtin.__reduce__(error))
    fields = reduced[2] if isinstance(reduced, tuple) and len(reduced) > 2 else None
    state: Any = dict(fields) if isinstance(fields, dict) else {}
    for name in copyreg._slotnames(kind):  # type: ignore[attr-defined]  # what pickle itself uses
        with contextlib.suppress(AttributeError):
            state[name] = object.__getattribute__(error, name)
    if _has_own_state(kind, builtin):
        state = error.__getstate__()
    elif fields is None or isinstance(fields, dict):
        state = {**state, **_c_fields_of(error, builtin)}
    args = _args_of(error)
    made_of: Any = args
    if isinstance(error, BaseExceptionGroup):
        # The arguments are those of the class's own constructor.
        made_of = error.message, list(error.exceptions)
    elif isinstance(reduced, tuple):
        made_of = next((part for part in reduced[1:2] if isinstance(part, tuple)), made_of)
    links = _linked(error, chain)
    pickled = _pickled(chain, dump) if dump is not None else []
    # The state comes separately, because it may refer to the exception.
    return new_exception, (kind, made_of), (args, state, pickled, links), None, None, fill_exception


def without_unpicklable(error: BaseException, dump: Callable[[Any], object]) -> BaseException | None:
    """Return an exception of the same class without the parts that cannot be pickled.

    Attributes are left out, and arguments replaced by their ``repr``. A note says which.

    Args:
        error: The exception.
        dump: Raises if an object cannot be pickled.

    Returns:
        The new exception, or None if its class has its own way of pickling.
    """
    kind = type(error)
    if _has_own_way(kind, _builtin_base(kind)):
        return None
    reduced = reduce_exception(error, None)
    if isinstance(reduced, tuple) and reduced[0] is new_exception:
        (_, made_of), filling = reduced[1:3]
    else:  # pickle would do it
        made_of, filling = _args_of(error), (_args_of(error), None, [], [])
    omitted: list[str] = []

    def can_pickle(thing: Any, what: str) -> bool:
        try:
            dump(thing)
        except Exception as refusal:
            omitted.append(f"{what} ({safe_repr(refusal)})")
            return False
        return True

    def picklable(thing: Any, what: str) -> Any:
        if isinstance(thing, BaseException) and thing is not error:
            return without_unpicklable(thing, dump) or thing
        parts: Any = thing
        if type(thing) in (list, tuple) and any(isinstance(part, BaseException) for part in parts):
            return type(thing)(picklable(part, what) for part in parts)
        return thing if can_pickle(thing, what) else safe_repr(thing)

    args, made_of = (
        tuple(picklable(part, f"args[{index}]") for index, part in enumerate(parts)) for parts in (filling[0], made_of)
    )
    state = filling[1]
    made = new_exception(kind, made_of)
    if type(state) is dict:
        state = {name: value for name, value in state.items() if can_pickle(value, f"the attribute {name!r}")}
    fill_exception(made, (args, state, [], []))
    set_cause(made, error.__cause__)
    set_context(made, error.__context__)
    _set_suppressed(made, error.__suppress_context__)
    if omitted:
        add_note(made, f"Not sent, because it cannot be pickled: {', '.join(dict.fromkeys(omitted))}")
    return made


def new_exception(kind: type[BaseException], made_of: tuple[Any, ...]) -> BaseException:
    """Return an exception of a class without calling the class's ``__init__``."""
    builtin = _builtin_base(kind)
    error: BaseException = builtin.__new__(kind, *made_of)
    with contextlib.suppress(Exception):  # some classes have fields in C; an exception without them is better than none
        builtin.__init__(error, *made_of)
    return error


def fill_exception(
    error: BaseException, filling: tuple[tuple[Any, ...], Any, list[bytes | None], list[_Links]]
) -> None:
    """Give a new exception its arguments, state and chain."""
    args, state, chain, links = filling
    kind = type(error)
    _set_args(error, args)
    if kind.__setstate__ is not BaseException.__setstate__:
        if state is not None:
            error.__setstate__(state)
    else:
        _set_state(error, state)
    _link(error, chain, links)


def fill_rebuilt(error: BaseException, filling: tuple[Any, list[bytes | None], list[_Links], Any]) -> None:
    """Give an exception that its own class rebuilt its state, chain and notes."""
    state, chain, links, notes = filling
    if state is not None:
        error.__setstate__(state)
    if notes:
        _dict_of(error).setdefault("__notes__", notes)
    _link(error, chain, links)


def _builtin_base(kind: type[BaseException]) -> type[BaseException]:
    for base in kind.__mro__:
        if base.__module__ == "builtins" and issubclass(base, BaseException):
            return base
    return BaseException


def _has_own_way(kind: type, builtin: type) -> bool:
    """Return whether a class below the built-in one defines how it is pickled."""
    for base in kind.__mro__:
        if base is builtin:
            break
        if not {"__reduce__", "__reduce_ex__"}.isdisjoint(vars(base)):
            return True
    return kind in copyreg.dispatch_table and not _is_of_tblib(kind)


def _has_own_state(kind: type, builtin: type) -> bool:
    """Return whether a class below the built-in one defines its state."""
    return any("__getstate__" in vars(base) for base in kind.__mro__[: kind.__mro__.index(builtin)])


def _set_state(error: BaseException, state: Any) -> None:
    """Set attributes and slots as pickle does, without calling the class's ``__setattr__``."""
    for part in state if type(state) is tuple and len(state) == 2 else (state,):
        for name, value in part.items() if isinstance(part, dict) else ():
            with contextlib.suppress(AttributeError, TypeError):
                object.__setattr__(error, name, value)


def _c_fields_of(error: BaseException, builtin: type[BaseException]) -> dict[str, Any]:
    """Return the fields in C that do not follow from the arguments of an exception, such as the name of a NameError."""
    names = _C_FIELDS.get(builtin, ())
    if not names:
        return {}
    reduced = cast("Any", builtin.__reduce__(error))
    made = new_exception(builtin, reduced[1] if isinstance(reduced, tuple) else _args_of(error))
    return {
        name: value
        for name in names
        if (value := object.__getattribute__(error, name)) is not object.__getattribute__(made, name)
    }


# The object that lacks an attribute is not sent: it may be large, and CPython does not pickle it either.
_C_FIELDS: dict[type, tuple[str, ...]] = {
    kind: tuple(name for name, field in vars(base).items() if isinstance(field, MemberDescriptorType) and name != "obj")
    for base in (AttributeError, NameError, OSError, StopIteration, SyntaxError, SystemExit)
    for kind in (base, *_subclasses_of(base))
}


def _is_of_tblib(kind: type) -> bool:
    """Return whether tblib reduces the class. Dask registers every exception with tblib, which needs ``__init__``."""
    reduce: Any = copyreg.dispatch_table.get(cast("Any", kind))
    module = getattr(getattr(reduce, "func", reduce), "__module__", None) or ""
    return module.partition(".")[0] == "tblib"


def _plainly(error: BaseException) -> Any:
    """Return what pickle makes of an exception, without tblib."""
    return error.__reduce_ex__(pickle.HIGHEST_PROTOCOL) if _is_of_tblib(type(error)) else NotImplemented


def _chain_of(error: BaseException) -> list[BaseException]:
    """Return the exceptions that *error* names, and the exceptions that these name; each once, the nearest first."""
    if error.__cause__ is None and error.__context__ is None:
        return []
    chain = [error]
    found = {id(error)}
    for link in chain:  # the list grows meanwhile
        for name in _LINKS:
            other = getattr(link, name)
            if other is not None and id(other) not in found and len(chain) <= _LONGEST_CHAIN:
                found.add(id(other))
                chain.append(other)
    return chain[1:]


def _pickled(chain: list[BaseException], dump: Callable[[BaseException], bytes]) -> list[bytes | None]:
    pickled: list[bytes | None] = []
    for error in chain:
        try:
            pickled.append(dump(error))
        except Exception:  # any error of its parts: send the rest of it, or the chain without it
            pickled.append(None)
            with contextlib.suppress(Exception):
                rest = without_unpicklable(error, dump)
                pickled[-1] = None if rest is None else dump(rest)
    return pickled


def _linked(error: BaseException, chain: list[BaseException]) -> list[_Links]:
    """Return the indexes of cause and context for the exception and each of its chain; -1 is the exception itself."""
    if not chain:
        return []
    where = {id(other): index for index, other in enumerate(chain)}
    where[id(error)] = -1
    return [
        (where.get(id(one.__cause__)), where.get(id(one.__context__)), one.__suppress_context__)
        for one in (error, *chain)
    ]


def _link(error: BaseException, chain: list[bytes | None], links: list[_Links]) -> None:
    if not links:
        return
    opened: list[BaseException | None] = []
    for pickled in chain:
        other: Any = None
        if pickled is not None:
            with contextlib.suppress(Exception):  # its class may be missing here
                other = pickle.loads(pickled)
        opened.append(other if isinstance(other, BaseException) else None)
    opened.append(error)  # index -1
    for one, (cause, context, suppressed) in zip((error, *opened[:-1]), links, strict=True):
        if one is not None:
            set_cause(one, opened[cause] if cause is not None else None)
            set_context(one, opened[context] if context is not None else None)
            _set_suppressed(one, suppressed)
