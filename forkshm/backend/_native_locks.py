"""Acquire and release a lock word without running Python: some 600 bytes of machine code for x86-64.

The word holds the token of the process that has the lock, so taking the lock and noting its owner is one instruction
(``lock cmpxchg``). A killed process has the lock or does not have it; there is no state in between. Python has no such
instruction, and a call through ctypes takes twice as long as the whole acquisition. So the two functions are C
functions to Python, made from a ``PyMethodDef`` that points at the code below. They handle the uncontended case and the
first 10 ms of waiting, so that a contended lock costs what a semaphore costs. A Python function does the rest: it
checks whether the owner is alive, counts the time, and lets signal handlers run.

Where this code cannot run, `forkshm.sync` does the same under a robust mutex, ten times as slowly.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import struct
import sys
import sysconfig
from typing import TYPE_CHECKING, Any

assert sys.platform != "win32"  # type checkers leave out the rest on Windows

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ("NativeLocks",)

# Each function receives (self, args, nargs, kwnames), as METH_FASTCALL | METH_KEYWORDS specifies. `self` is a tuple of
# a Python function for the cases not handled here, and bytes that hold the parameters: 0   address of the word: token
# of the owner, bit 31 set if a process may be asleep; 0 when the lock is free 8   address of the state in this process:
# recursion count, thread, token 16  whether the owning thread may acquire the lock again Names in capitals are replaced
# by addresses, and I0 to P2 by offsets in tuples and bytes.
_ACQUIRE = (
    "48 85 c9"  #                            test rcx,rcx                      keyword arguments?
    "75 71"  #                               jne python
    "48 83 fa 01"  #                         cmp rdx,0x1                       more than one argument?
    "77 6b"  #                               ja python
    "4c 8b 47 I1"  #                         mov r8,[rdi+item 1]
    "4d 8b 48 P0"  #                         mov r9,[r8+word]
    "4d 8b 58 P1"  #                         mov r11,[r8+state]
    "49 ba TOKEN___"  #                      movabs r10,&token
    "4d 8b 12"  #                            mov r10,[r10]
    "4d 85 d2"  #                            test r10,r10                      token not set in this process?
    "74 4d"  #                               je python
    "64 48 8b 0c 25 00 00 00 00"  #          mov rcx,fs:0x0                    this thread
    "49 83 78 P2 00"  #                      cmp [r8+recursive],0x0
    "74 17"  #                               je try
    "49 39 4b 08"  #                         cmp [r11+0x8],rcx
    "75 11"  #                               jne try
    "4d 39 53 10"  #                         cmp [r11+0x10],r10
    "75 0b"  #                               jne try
    "49 83 3b 00"  #                         cmp [r11],0x0
    "74 05"  #                               je try
    "49 ff 03"  #                            inc [r11]                         acquired once more
    "eb 18"  #                               jmp done
    "31 c0"  #                       try:    xor eax,eax
    "f0 4d 0f b1 11"  #                      lock cmpxchg [r9],r10
    "75 2d"  #                               jne held
    "49 89 4b 08"  #                         mov [r11+0x8],rcx
    "4d 89 53 10"  #                         mov [r11+0x10],r10
    "49 c7 03 01 00 00 00"  #                mov [r11],0x1
    "48 b8 TRUE____"  #              done:   movabs rax,True
    "COUNT_"  #                              inc [rax]                         its references, before Python 3.12
    "c3"  #                                  ret
    "48 8b 7f I0"  #                 python: mov rdi,[rdi+item 0]
    "48 b8 CALL____"  #                      movabs rax,PyObject_Vectorcall
    "ff e0"  #                               jmp rax
    "31 c9"  #                       held:   xor ecx,ecx
    "48 85 d2"  #                            test rdx,rdx                      acquire() and acquire(True) wait
    "74 0f"  #                               je wait
    "48 b8 TRUE____"  #                      movabs rax,True
    "48 39 06"  #                            cmp [rsi],rax
    "75 da"  #                               jne python
    "53"  #                          wait:   push rbx
    "55"  #                                  push rbp
    "41 54"  #                               push r12
    "41 55"  #                               push r13
    "41 56"  #                               push r14
    "48 83 ec 20"  #                         sub rsp,0x20
    "48 89 fb"  #                            mov rbx,rdi
    "48 89 f5"  #                            mov rbp,rsi
    "49 89 d4"  #                            mov r12,rdx
    "4d 89 cd"  #                            mov r13,r9
    "4d 89 d6"  #                            mov r14,r10
    "49 8b 45 00"  #                 mark:   mov rax,[r13+0x0]
    "48 85 c0"  #                            test rax,rax
    "74 5b"  #                               je again
    "48 89 c1"  #                            mov rcx,rax
    "48 0f ba e9 1f"  #                      bts rcx,0x1f                      a waiter sleeps
    "f0 49 0f b1 4d 00"  #                   lock cmpxchg [r13+0x0],rcx
    "75 e7"  #                               jne mark
    "48 c7 04 24 00 00 00 00"  #             mov [rsp],0x0
    "48 c7 44 24 08 80 96 98 00"  #          mov [rsp+0x8],0x989680            for 10 ms
    "48 89 4c 24 10"  #                      mov [rsp+0x10],rcx
    "48 b8 SAVE____"  #                      movabs rax,PyEval_SaveThread      without the GIL
    "ff d0"  #                               call rax
    "48 89 44 24 18"  #                      mov [rsp+0x18],rax
    "4c 89 ef"  #                            mov rdi,r13
    "31 f6"  #                               xor esi,esi                       FUTEX_WAIT
    "8b 54 24 10"  #                         mov edx,[rsp+0x10]
    "49 89 e2"  #                            mov r10,rsp
    "b8 ca 00 00 00"  #                      mov eax,0xca                      futex
    "0f 05"  #                               syscall
    "48 8b 7c 24 18"  #                      mov rdi,[rsp+0x18]
    "48 b8 RESTORE_"  #                      movabs rax,PyEval_RestoreThread
    "ff d0"  #                               call rax
    "31 c0"  #                       again:  xor eax,eax
    "4c 89 f1"  #                            mov rcx,r14
    "48 0f ba e9 1f"  #                      bts rcx,0x1f                      others may sleep, too
    "f0 49 0f b1 4d 00"  #                   lock cmpxchg [r13+0x0],rcx
    "74 1c"  #                               je got
    "48 89 df"  #                            mov rdi,rbx                       held again, too late, a signal
    "48 89 ee"  #                            mov rsi,rbp
    "4c 89 e2"  #                            mov rdx,r12
    "31 c9"  #                               xor ecx,ecx
    "48 83 c4 20"  #                         add rsp,0x20
    "41 5e"  #                               pop r14
    "41 5d"  #                               pop r13
    "41 5c"  #                               pop r12
    "5d"  #                                  pop rbp
    "5b"  #                                  pop rbx
    "e9 2d ff ff ff"  #                      jmp python
    "4c 8b 43 I1"  #                 got:    mov r8,[rbx+item 1]
    "4d 8b 58 P1"  #                         mov r11,[r8+state]
    "64 48 8b 0c 25 00 00 00 00"  #          mov rcx,fs:0x0
    "49 89 4b 08"  #                         mov [r11+0x8],rcx
    "4d 89 73 10"  #                         mov [r11+0x10],r14
    "49 c7 03 01 00 00 00"  #                mov [r11],0x1
    "48 83 c4 20"  #                         add rsp,0x20
    "41 5e"  #                               pop r14
    "41 5d"  #                               pop r13
    "41 5c"  #                               pop r12
    "5d"  #                                  pop rbp
    "5b"  #                                  pop rbx
    "e9 ee fe ff ff"  #                      jmp done
)
_RELEASE = (
    "4c 8b 47 I1"  #                         mov r8,[rdi+item 1]
    "4d 8b 48 P0"  #                         mov r9,[r8+word]
    "4d 8b 58 P1"  #                         mov r11,[r8+state]
    "49 ba TOKEN___"  #                      movabs r10,&token
    "4d 8b 12"  #                            mov r10,[r10]
    "4d 85 d2"  #                            test r10,r10
    "74 74"  #                               je python
    "49 83 78 P2 00"  #                      cmp [r8+recursive],0x0
    "74 22"  #                               je free
    "64 48 8b 04 25 00 00 00 00"  #          mov rax,fs:0x0
    "49 39 43 08"  #                         cmp [r11+0x8],rax                 held by another thread?
    "75 5e"  #                               jne python
    "4d 39 53 10"  #                         cmp [r11+0x10],r10                or by the parent, before a fork?
    "75 58"  #                               jne python
    "49 83 3b 01"  #                         cmp [r11],0x1
    "72 52"  #                               jb python
    "74 05"  #                               je free
    "49 ff 0b"  #                            dec [r11]
    "eb 3d"  #                               jmp done
    "49 8b 01"  #                    free:   mov rax,[r9]
    "48 85 c0"  #                            test rax,rax                      the lock is free
    "74 43"  #                               je python
    "49 89 c0"  #                            mov r8,rax
    "49 0f ba f0 1f"  #                      btr r8,0x1f
    "4d 39 d0"  #                            cmp r8,r10                        acquired by another process?
    "75 07"  #                               jne any
    "49 c7 03 00 00 00 00"  #                mov [r11],0x0
    "31 c9"  #                       any:    xor ecx,ecx
    "f0 49 0f b1 09"  #                      lock cmpxchg [r9],rcx             if it is unchanged
    "75 db"  #                               jne free
    "85 c0"  #                               test eax,eax
    "79 14"  #                               jns done                          no waiter sleeps
    "4c 89 cf"  #                            mov rdi,r9
    "be 01 00 00 00"  #                      mov esi,0x1                       FUTEX_WAKE
    "ba 01 00 00 00"  #                      mov edx,0x1
    "b8 ca 00 00 00"  #                      mov eax,0xca                      futex
    "0f 05"  #                               syscall
    "48 b8 NONE____"  #              done:   movabs rax,None
    "COUNT_"  #                              inc [rax]
    "c3"  #                                  ret
    "48 8b 7f I0"  #                 python: mov rdi,[rdi+item 0]
    "48 b8 CALL____"  #                      movabs rax,PyObject_Vectorcall
    "ff e0"  #                               jmp rax
)
_EXCHANGE = (
    "48 89 f0"  #                       mov  rax, rsi
    "f0 48 0f b1 17"  #                 lock cmpxchg [rdi], rdx
    "c3"  #                             ret
)

_FASTCALL_WITH_KEYWORDS = 0x0080 | 0x0002
_PAGE = mmap.PAGESIZE
_TOKEN, _METHODS, _NAMES = 0, 64, 256
_long = ctypes.c_size_t


class _Method(ctypes.Structure):
    """``PyMethodDef`` of the C API."""

    _fields_ = (("name", _long), ("function", _long), ("flags", ctypes.c_int), ("doc", _long))


def _missing() -> str | None:
    if platform.system() != "Linux":
        return "the code is for Linux"
    if platform.machine() != "x86_64" or sys.maxsize < 2**32:
        return f"the code is for x86-64, and this is {platform.machine()}"
    if (
        sys.implementation.name != "cpython"
        or object.__basicsize__ != 16
        or sysconfig.get_config_var("Py_GIL_DISABLED")
    ):
        return "the code is for CPython with the GIL"
    if os.environ.get("FORKSHM_NATIVE_LOCKS", "1") == "0":
        return "the environment variable FORKSHM_NATIVE_LOCKS is 0"
    return None


class NativeLocks:
    """The loaded functions. Never collected: locks made from them may be used until the process ends.

    Raises:
        LookupError: The code cannot be used here; the argument is the reason.
    """

    def __init__(self) -> None:
        if missing := _missing():
            raise LookupError(missing)
        try:
            code, data = _new_page(), _new_page()
            exchange = self._load(code, data)
        except OSError as error:
            raise LookupError(f"the kernel refused memory for the code ({error})") from error
        self._token = ctypes.c_uint64.from_address(data + _TOKEN)
        # compare_exchange(address, expected, new) stores *new* if the word is *expected*; it returns the previous word.
        self.compare_exchange: Callable[[int, int, int], int] = ctypes.PYFUNCTYPE(
            ctypes.c_uint64, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_uint64
        )(exchange)
        new = ctypes.pythonapi["PyCFunction_NewEx"]
        new.argtypes = (_long, ctypes.py_object, _long)
        new.restype = ctypes.py_object
        self._new = new
        self._acquire, self._release = (data + _METHODS + number * ctypes.sizeof(_Method) for number in range(2))

    def _load(self, code: int, data: int) -> int:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mprotect.argtypes = (_long, _long, ctypes.c_int)
        bytes_at = bytes.__basicsize__ - 1
        # Since Python 3.12, True and None are not reference-counted: the increment becomes an instruction without
        # effect.
        replaced = {
            "TOKEN___": _hex(data + _TOKEN),
            "TRUE____": _hex(id(True)),
            "NONE____": _hex(id(None)),
            "CALL____": _hex(_address("PyObject_Vectorcall")),
            "SAVE____": _hex(_address("PyEval_SaveThread")),
            "RESTORE_": _hex(_address("PyEval_RestoreThread")),
            "COUNT_": "48ff00" if sys.version_info < (3, 12) else "0f1f00",
            **{f"I{number}": f"{tuple.__basicsize__ + 8 * number:02x}" for number in range(2)},
            **{f"P{number}": f"{bytes_at + 8 * number:02x}" for number in range(3)},
        }
        starts = []
        where = code
        for text in (_ACQUIRE, _RELEASE, _EXCHANGE):
            for name, value in replaced.items():
                text = text.replace(name, value)  # noqa: PLW2901
            instructions = bytes.fromhex(text)
            ctypes.memmove(where, instructions, len(instructions))
            starts.append(where)
            where += -(-len(instructions) // 64) * 64
        if libc.mprotect(code, _PAGE, mmap.PROT_READ | mmap.PROT_EXEC) != 0:
            raise OSError(ctypes.get_errno(), f"mprotect: {os.strerror(ctypes.get_errno())}")
        for number, letters in enumerate((b"acquire", b"release")):
            ctypes.memmove(data + _NAMES + 16 * number, letters, len(letters))
            method = _Method.from_address(data + _METHODS + number * ctypes.sizeof(_Method))
            method.name = data + _NAMES + 16 * number
            method.function = starts[number]
            method.flags = _FASTCALL_WITH_KEYWORDS
        return starts[2]

    def set_token(self, token: int) -> None:
        """Set the token that this process writes to locks it takes; 0 passes every call on to Python functions."""
        self._token.value = token

    def functions(
        self,
        word: int,
        state: int,
        recursive: bool,
        acquire: Any,
        release: Any,
        made_of: Callable[[tuple[Any, ...]], tuple[Any, ...]],
    ) -> tuple[Callable[..., bool], Callable[..., None]]:
        """Return ``acquire`` and ``release`` of a lock.

        Args:
            word: Address of the lock's word.
            state: Address of this process's three words about the lock.
            recursive: Whether the owning thread may acquire the lock again.
            acquire: Called when the lock is held, or when there are arguments other than one positional.
            release: Called when another thread or process holds the lock.
            made_of: Returns a tuple of these two functions and the object that keeps the memory. The tuple may be of a
                subclass without attributes; when the functions are pickled, the tuple is their ``__self__``.
        """
        parameters = struct.pack("QQQ", word, state, recursive)
        return (
            self._new(self._acquire, made_of((acquire, parameters)), 0),
            self._new(self._release, made_of((release, parameters)), 0),
        )


def _address(function: str) -> int:
    return ctypes.cast(getattr(ctypes.pythonapi, function), ctypes.c_void_p).value or 0


def _hex(number: int) -> str:
    return number.to_bytes(8, "little").hex()


def _new_page() -> int:
    """Return the address of a page of zeros, which is never unmapped."""
    page = mmap.mmap(-1, _PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(page))
    return ctypes.addressof(ctypes.c_char.from_buffer(page))
