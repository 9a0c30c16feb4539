"""NumPy's hook for the memory of arrays (NEP 49), set from Python.

The hook is a structure of C functions. If these were ctypes callbacks, the smallest array would pay 3 us for Python. At
the recursion limit a callback cannot be entered, and would return whatever lay on the stack. So the functions are a few
instructions of machine code. They leave small arrays to NumPy's own functions and call Python for large ones. If Python
does not answer, the array gets NumPy's own memory.

This is separate from `_syscalls` because only programs with NumPy use it.
"""

from __future__ import annotations

import atexit
import ctypes
import itertools
import mmap
import os
import platform
import sys
import threading
from typing import TYPE_CHECKING, Any

from forkshm import _interrupts
from forkshm.backend._support import IS_FREE_THREADED

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ("Hook", "malloc_usable_size")

# PyDataMem_SetHandler and PyDataMem_DefaultHandler in NumPy's table of C functions, since NumPy 1.22.
_SET_HANDLER = 304
_DEFAULT_HANDLER = 306

_PAGE = mmap.PAGESIZE
_WORD = 8
_NEVER = 2**64 - 1

# The words of eight bytes at the first argument of the code below: min_bytes; NumPy's own malloc, calloc, realloc,
# free; allocate, reallocate, release in Python; "call" below; and four functions of Python's C API.
_MIN_BYTES, _CALL = 0, 8
_PYTHON = ("PyGILState_Ensure", "PyErr_Fetch", "PyErr_Restore", "PyGILState_Release")
# Offsets in bytes behind those words: NumPy's structure (name[127], version, context, malloc, calloc, realloc, free);
# the context within it; and the name of the capsule.
_HANDLER, _CONTEXT, _NAME = 256, 128, 512

# For x86-64. forkshm's memory begins at a page boundary, and memory of the C library does not, which tells them apart.
# (C memory at a page boundary would be looked up in Python.) Python writes its answer through the last argument, which
# points at 0 before.
_CODE = {
    "malloc": (
        "48 3b 37"  #             cmp  rsi, [rdi]           size < min_bytes?
        "73 08"  #                jae  large
        "48 8b 47 08"  #   own:   mov  rax, [rdi+8]
        "31 ff"  #                xor  edi, edi
        "ff e0"  #                jmp  rax                  NumPy's malloc(NULL, size)
        "57 56"  #         large: push rdi; push rsi
        "6a 00"  #                push 0
        "31 d2"  #                xor  edx, edx
        "48 89 e1"  #             mov  rcx, rsp
        "48 8b 47 28"  #          mov  rax, [rdi+40]
        "ff 57 40"  #             call [rdi+64]             allocate(self, size, 0, &answer)
        "58 5e 5f"  #             pop  rax; pop rsi; pop rdi
        "48 85 c0"  #             test rax, rax
        "74 e0"  #                jz   own
        "c3"  #                   ret
    ),
    "calloc": (
        "49 89 d0"  #             mov  r8, rdx
        "48 89 f0"  #             mov  rax, rsi
        "48 f7 e2"  #             mul  rdx
        "70 05"  #                jo   own
        "48 3b 07"  #             cmp  rax, [rdi]           count * size < min_bytes?
        "73 0b"  #                jae  large
        "4c 89 c2"  #      own:   mov  rdx, r8
        "48 8b 47 10"  #          mov  rax, [rdi+16]
        "31 ff"  #                xor  edi, edi
        "ff e0"  #                jmp  rax                  NumPy's calloc(NULL, count, size)
        "57 56 41 50"  #   large: push rdi; push rsi; push r8
        "6a 00 6a 00"  #          push 0; push 0            twice: keeps the stack aligned
        "48 89 c6"  #             mov  rsi, rax
        "ba 01 00 00 00"  #       mov  edx, 1
        "48 89 e1"  #             mov  rcx, rsp
        "48 8b 47 28"  #          mov  rax, [rdi+40]
        "ff 57 40"  #             call [rdi+64]             allocate(self, count * size, 1, &answer)
        "58 59 41 58 5e 5f"  #    pop  rax; pop rcx; pop r8; pop rsi; pop rdi
        "48 85 c0"  #             test rax, rax
        "74 d0"  #                jz   own
        "c3"  #                   ret
    ),
    "realloc": (
        "f7 c6 ff 0f 00 00"  #    test esi, 4095
        "74 0d"  #                jz   ask                  may be forkshm's
        "48 3b 17"  #             cmp  rdx, [rdi]           size < min_bytes?
        "73 08"  #                jae  ask
        "48 8b 47 18"  #          mov  rax, [rdi+24]
        "31 ff"  #                xor  edi, edi
        "ff e0"  #                jmp  rax                  NumPy's realloc(NULL, old, size)
        "6a 00"  #         ask:   push 0
        "48 89 e1"  #             mov  rcx, rsp
        "48 8b 47 30"  #          mov  rax, [rdi+48]
        "ff 57 40"  #             call [rdi+64]             reallocate(self, old, size, &answer)
        "58"  #                   pop  rax
        "c3"  #                   ret
    ),
    "free": (
        "f7 c6 ff 0f 00 00"  #    test esi, 4095
        "74 08"  #                jz   ask                  may be forkshm's
        "48 8b 47 20"  #          mov  rax, [rdi+32]
        "31 ff"  #                xor  edi, edi
        "ff e0"  #                jmp  rax                  NumPy's free(NULL, old, size)
        "48 8b 47 38"  #   ask:   mov  rax, [rdi+56]
        "ff 67 40"  #             jmp  [rdi+64]             release(self, old)
    ),
    # Arrays are also freed while an exception propagates, and Python code cannot run with one set: it is saved and
    # restored. The thread that frees an array holds the GIL today, but NEP 49 does not promise that.
    "call": (
        "53 55 41 54 41 55"  #    push rbx; push rbp; push r12; push r13
        "41 56 41 57"  #          push r14; push r15
        "48 83 ec 28"  #          sub  rsp, 40
        "48 89 fb 48 89 f5"  #    mov  rbx, rdi; mov rbp, rsi
        "49 89 d4 49 89 cd"  #    mov  r12, rdx; mov r13, rcx
        "49 89 c6"  #             mov  r14, rax
        "ff 53 48"  #             call [rbx+72]             PyGILState_Ensure()
        "41 89 c7"  #             mov  r15d, eax
        "48 89 e7"  #             mov  rdi, rsp
        "48 8d 74 24 08"  #       lea  rsi, [rsp+8]
        "48 8d 54 24 10"  #       lea  rdx, [rsp+16]
        "ff 53 50"  #             call [rbx+80]             PyErr_Fetch(&type, &value, &traceback)
        "48 89 df 48 89 ee"  #    mov  rdi, rbx; mov rsi, rbp
        "4c 89 e2 4c 89 e9"  #    mov  rdx, r12; mov rcx, r13
        "41 ff d6"  #             call r14
        "48 8b 3c 24"  #          mov  rdi, [rsp]
        "48 8b 74 24 08"  #       mov  rsi, [rsp+8]
        "48 8b 54 24 10"  #       mov  rdx, [rsp+16]
        "ff 53 58"  #             call [rbx+88]             PyErr_Restore(type, value, traceback)
        "44 89 ff"  #             mov  edi, r15d
        "ff 53 60"  #             call [rbx+96]             PyGILState_Release(state)
        "48 83 c4 28"  #          add  rsp, 40
        "41 5f 41 5e 41 5d 41 5c 5d 5b"  # pop the six registers
        "c3"  #                   ret
    ),
    "nothing": "c3",
}

_long = ctypes.c_size_t
_Allocate = ctypes.CFUNCTYPE(None, _long, _long, _long, _long)
_Release = ctypes.CFUNCTYPE(None, _long, _long)
# NumPy's own functions, called as NumPy calls them: with the GIL, which guards their cache.
_Malloc = ctypes.PYFUNCTYPE(_long, _long, _long)
_Realloc = ctypes.PYFUNCTYPE(_long, _long, _long, _long)
_Free = ctypes.PYFUNCTYPE(None, _long, _long, _long)

_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.restype = _long
_capsule_pointer.argtypes = (ctypes.py_object, ctypes.c_char_p)
_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = (_long, _long, _long)
_set_async_exc = ctypes.pythonapi.PyThreadState_SetAsyncExc
_set_async_exc.argtypes = (ctypes.c_ulong, ctypes.py_object)

malloc_usable_size: Callable[[int], int] | None = getattr(
    ctypes.PyDLL(None) if os.name == "posix" else None, "malloc_usable_size", None
)
"""Returns the capacity in bytes of a block of C library memory; None where the library does not tell."""
if malloc_usable_size is not None:
    malloc_usable_size.argtypes = (_long,)  # type: ignore[attr-defined]
    malloc_usable_size.restype = _long  # type: ignore[attr-defined]


def _word(address: int) -> Any:
    return _long.from_address(address)


def _load_code() -> dict[str, int]:
    """Return the addresses of the functions; the memory stays until the process ends.

    Raises:
        OSError: The kernel refused memory that holds code.
    """
    assert sys.platform != "win32"  # the code is for the calling convention of POSIX
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mprotect.argtypes = (_long, _long, ctypes.c_int)
    start = _new_page()
    addresses = {}
    where = start
    for name, text in _CODE.items():
        code = bytes.fromhex(text)
        ctypes.memmove(where, code, len(code))
        addresses[name] = where
        where += -(-len(code) // 64) * 64
    if libc.mprotect(start, _PAGE, mmap.PROT_READ | mmap.PROT_EXEC) != 0:
        raise OSError(ctypes.get_errno(), f"mprotect: {os.strerror(ctypes.get_errno())}")
    return addresses


def _new_page() -> int:
    """Return the address of a page of zeros, which is never unmapped."""
    assert sys.platform != "win32"  # the code is for the calling convention of POSIX
    page = mmap.mmap(-1, _PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # Interpreter teardown must not collect the page: arrays are freed through it until the process ends.
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(page))
    return ctypes.addressof(ctypes.c_char.from_buffer(page))


def _in_main_interpreter() -> bool:
    current, main = ctypes.pythonapi.PyInterpreterState_Get, ctypes.pythonapi.PyInterpreterState_Main
    current.restype = main.restype = ctypes.c_void_p
    return bool(current() == main())


_delivered: list[int] = []


def _callback(work: Callable[..., None]) -> Any:
    """Return *work* as a C function that no exception leaves: exceptions are raised later, in the caller.

    Most often the exception is a Ctrl-C that came while NumPy computed, so it is best raised before the work begins.
    Only the exception's type reaches the caller.
    """

    @_interrupts.promptly
    def callback(*arguments: int) -> None:
        try:
            threading.get_ident()
        except BaseException as raised:
            error: Any = type(raised)
        else:
            error = None
        try:
            work(*arguments)
        except (MemoryError, RecursionError):
            pass
        except BaseException as raised:
            error = type(raised)
        if error is not None:
            # The assignment makes the call, and nothing checks for exceptions between it and the return.
            _delivered[:] = itertools.starmap(_set_async_exc, ((threading.get_ident(), error),))

    return callback


def _missing() -> str | None:
    if os.name != "posix":
        return "the hook is machine code for the calling convention of POSIX"
    if platform.machine() != "x86_64" or sys.maxsize < 2**32:
        return f"the hook is written for x86-64, and this is {platform.machine()}"
    if IS_FREE_THREADED:
        return "the hook relies on the GIL, and this Python is a free-threaded build"
    return None


class Hook:
    """NumPy's hook for one version of NumPy. Never collected.

    Raises:
        LookupError: The hook cannot be used here; the argument is the reason.
    """

    def __init__(self, table: Any) -> None:
        if missing := _missing():
            raise LookupError(missing)
        if not _in_main_interpreter():
            raise LookupError("NumPy cannot call Python in a subinterpreter")
        functions = _capsule_pointer(table, None)
        address = _word(functions + _WORD * _SET_HANDLER).value
        default = _word(functions + _WORD * _DEFAULT_HANDLER).value
        self._set = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.py_object)(address)
        # The capsule of NumPy's own handler.
        self.default: Any = ctypes.cast(default, ctypes.POINTER(ctypes.py_object)).contents.value
        own = _capsule_pointer(self.default, b"mem_handler")
        context, *self._own = (_word(own + _CONTEXT + _WORD * field).value for field in range(5))
        if context:
            raise LookupError("the memory functions of this NumPy have a context of their own")
        self.own_malloc = _Malloc(self._own[0])
        self.own_realloc = _Realloc(self._own[2])
        self.own_free = _Free(self._own[3])
        try:
            self._code = _load_code()
        except OSError as error:
            raise LookupError(f"the kernel refused memory for its code ({error})") from error
        self._handlers: list[int] = []
        self._keep: list[Any] = []
        # Until atexit functions have run, code allocates as usual; afterwards, modules are torn down.
        atexit.register(self._retire)

    def set(self, handler: Any) -> Any:
        """Set the source of memory for arrays of this thread (or asyncio task); return the previous one."""
        return self._set(handler)

    def new_handler(
        self,
        min_bytes: int,
        allocate: Callable[[int, bool], int],
        reallocate: Callable[[int, int, Any], None],
        release: Callable[[int], None],
    ) -> Any:
        """Return a handler for `set`. It is never collected, because each array remembers its handler.

        Args:
            min_bytes: Smaller arrays are NumPy's own business.
            allocate: Given bytes, and whether they have to be zeros, return the address
                of the first, at the start of a page; or 0: let NumPy do it.
            reallocate: Given an address, bytes, and an object for the answer, store
                another address in its ``value`` before the old one is released. It
                holds 0: no memory.
            release: Given an address at the start of a page that is no longer used.
        """

        def on_allocate(_: int, size: int, zeroed: int, answer: int) -> None:
            word = _word(answer)
            # No call between the return and the store, so no memory is lost.
            word.value = allocate(size, zeroed != 0)

        def on_reallocate(_: int, old: int, size: int, answer: int) -> None:
            reallocate(old, size, _word(answer))

        @_interrupts.promptly
        def on_release(_: int, old: int) -> None:
            release(old)

        callbacks = (
            _Allocate(_callback(on_allocate)),
            _Allocate(_callback(on_reallocate)),
            _Release(_callback(on_release)),
        )
        self._keep.append(callbacks)
        page = _new_page()
        code = self._code
        fields = [
            min_bytes,
            *self._own,
            *(ctypes.cast(one, ctypes.c_void_p).value for one in callbacks),
            code["call"],
            *(ctypes.cast(getattr(ctypes.pythonapi, name), ctypes.c_void_p).value for name in _PYTHON),
        ]
        for position, value in enumerate(fields):
            _word(page + _WORD * position).value = value
        handler = page + _HANDLER
        ctypes.memmove(handler, b"forkshm", 7)
        ctypes.memmove(handler + 127, b"\1", 1)
        structure = [page, code["malloc"], code["calloc"], code["realloc"], code["free"]]
        for position, value in enumerate(structure):
            _word(handler + _CONTEXT + _WORD * position).value = value
        ctypes.memmove(page + _NAME, b"mem_handler", 11)
        self._handlers.append(page)
        return _new_capsule(handler, page + _NAME, 0)

    def _retire(self) -> None:
        # Python must not be called from here on: forkshm's memory stays until the process ends.
        for page in self._handlers:
            _word(page + _WORD * _MIN_BYTES).value = _NEVER
            _word(page + _WORD * _CALL).value = self._code["nothing"]
