"""Windows calls through ctypes, beyond those in CPython's ``_winapi``: prototypes, and error codes to ``OSError``."""

from __future__ import annotations

import ctypes
import errno
import sys
from typing import Any, NamedTuple

from forkshm import _interrupts

assert sys.platform == "win32"  # type checkers leave out the rest on other systems

_kernel32 = ctypes.WinDLL("kernel32", use_last_error=True)
_ntdll = ctypes.WinDLL("ntdll")
_advapi32 = ctypes.WinDLL("advapi32", use_last_error=True)

_HANDLE, _BOOL, _DWORD, _SIZE = ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32, ctypes.c_size_t
_POINTER, _TEXT, _LARGE = ctypes.c_void_p, ctypes.c_wchar_p, ctypes.c_int64

INVALID_HANDLE = 2 ** (8 * ctypes.sizeof(ctypes.c_void_p)) - 1

# <winnt.h>, <memoryapi.h>, <fileapi.h>
PAGE_READONLY, PAGE_READWRITE, PAGE_WRITECOPY = 0x02, 0x04, 0x08
SECTION_QUERY, SECTION_MAP_WRITE, SECTION_MAP_READ = 0x1, 0x2, 0x4
SECTION_ALL = 0xF001F
FILE_MAP_COPY, FILE_MAP_WRITE, FILE_MAP_READ = 0x1, 0x2, 0x4
GENERIC_READ, GENERIC_WRITE, DELETE, READ_CONTROL = 0x80000000, 0x40000000, 0x00010000, 0x00020000
SHARE_ALL = 0x7
CREATE_NEW, OPEN_EXISTING = 1, 3
FILE_FLAG_OPEN_REPARSE_POINT, FILE_FLAG_BACKUP_SEMANTICS = 0x00200000, 0x02000000
FILE_ATTRIBUTE_DIRECTORY, FILE_ATTRIBUTE_REPARSE_POINT, FILE_ATTRIBUTE_TEMPORARY = 0x10, 0x400, 0x100
DUPLICATE_SAME_ACCESS = 0x2
PROCESS_TERMINATE, PROCESS_DUP_HANDLE, PROCESS_SUSPEND, PROCESS_QUERY, SYNCHRONIZE = 0x1, 0x40, 0x800, 0x1000, 0x100000
WAIT_OBJECT_0, WAIT_ABANDONED, WAIT_TIMEOUT = 0, 0x80, 0x102
ALREADY_EXISTS, MORE_DATA, BROKEN_PIPE, NO_DATA, INVALID_PARAMETER = 183, 234, 109, 232, 87
NO_SUCH_FUNCTION, NO_SUCH_HANDLE = 1, 6
_PIPE_TYPE_MESSAGE = 0x4
SHARING_VIOLATION, USER_MAPPED_FILE, INVALID_ADDRESS, ACCESS_DENIED = 32, 1224, 487, 5

# Error codes that the C library, and therefore ``OSError``, translates to EINVAL.
_ERRNO = {
    8: errno.ENOMEM,  # NOT_ENOUGH_MEMORY
    14: errno.ENOMEM,  # OUTOFMEMORY
    1450: errno.ENOMEM,  # NO_SYSTEM_RESOURCES
    1455: errno.ENOMEM,  # COMMITMENT_LIMIT
    39: errno.ENOSPC,  # HANDLE_DISK_FULL
    USER_MAPPED_FILE: errno.EBUSY,
    SHARING_VIOLATION: errno.EACCES,
    INVALID_ADDRESS: errno.EEXIST,
    BROKEN_PIPE: errno.EPIPE,
    NO_DATA: errno.EPIPE,
}


def refused(call: str, code: int) -> OSError:
    """Return the exception for an error code, with the class and errno that POSIX has for it."""
    plain = ctypes.WinError(code)
    number = _ERRNO.get(code, plain.errno or errno.EINVAL)
    error = OSError(number, f"{call}: {plain.strerror or 'refused'} (error {code} of Windows)")
    error.winerror = code
    return error


def _last(call: str) -> OSError:
    return refused(call, ctypes.get_last_error())


def _prototype(library: Any, name: str, result: Any, *arguments: Any) -> Any:
    function = library[name]  # an object of its own, because it gets its own prototype
    function.restype = result
    function.argtypes = arguments
    return function


_CloseHandle = _prototype(_kernel32, "CloseHandle", _BOOL, _HANDLE)
_CreateFileMapping = _prototype(
    _kernel32, "CreateFileMappingW", _HANDLE, _HANDLE, _POINTER, _DWORD, _DWORD, _DWORD, _TEXT
)
_OpenFileMapping = _prototype(_kernel32, "OpenFileMappingW", _HANDLE, _DWORD, _BOOL, _TEXT)
_MapViewOfFileEx = _prototype(_kernel32, "MapViewOfFileEx", _POINTER, _HANDLE, _DWORD, _DWORD, _DWORD, _SIZE, _POINTER)
_UnmapViewOfFile = _prototype(_kernel32, "UnmapViewOfFile", _BOOL, _POINTER)
_FlushViewOfFile = _prototype(_kernel32, "FlushViewOfFile", _BOOL, _POINTER, _SIZE)
_FlushFileBuffers = _prototype(_kernel32, "FlushFileBuffers", _BOOL, _HANDLE)
_DuplicateHandle = _prototype(
    _kernel32, "DuplicateHandle", _BOOL, _HANDLE, _HANDLE, _HANDLE, _POINTER, _DWORD, _BOOL, _DWORD
)
_CreateFile = _prototype(_kernel32, "CreateFileW", _HANDLE, _TEXT, _DWORD, _DWORD, _POINTER, _DWORD, _DWORD, _HANDLE)
_CreateDirectory = _prototype(_kernel32, "CreateDirectoryW", _BOOL, _TEXT, _POINTER)
_GetFileType = _prototype(_kernel32, "GetFileType", _DWORD, _HANDLE)
_GetNamedPipeInfo = _prototype(_kernel32, "GetNamedPipeInfo", _BOOL, _HANDLE, _POINTER, _POINTER, _POINTER, _POINTER)
_GetFileInformation = _prototype(_kernel32, "GetFileInformationByHandle", _BOOL, _HANDLE, _POINTER)
_SetFileInformation = _prototype(
    _kernel32, "SetFileInformationByHandle", _BOOL, _HANDLE, ctypes.c_int, _POINTER, _DWORD
)
_OpenProcess = _prototype(_kernel32, "OpenProcess", _HANDLE, _DWORD, _BOOL, _DWORD)
_GetProcessTimes = _prototype(_kernel32, "GetProcessTimes", _BOOL, _HANDLE, _POINTER, _POINTER, _POINTER, _POINTER)
_TerminateProcess = _prototype(_kernel32, "TerminateProcess", _BOOL, _HANDLE, _DWORD)
_NtSuspendProcess = _prototype(_ntdll, "NtSuspendProcess", ctypes.c_int32, _HANDLE)
_NtResumeProcess = _prototype(_ntdll, "NtResumeProcess", ctypes.c_int32, _HANDLE)
_WaitForSingleObject = _prototype(_kernel32, "WaitForSingleObject", _DWORD, _HANDLE, _DWORD)
_RegisterWait = _prototype(
    _kernel32, "RegisterWaitForSingleObject", _BOOL, _POINTER, _HANDLE, _POINTER, _POINTER, _DWORD, _DWORD
)
_CreateSemaphore = _prototype(_kernel32, "CreateSemaphoreW", _HANDLE, _POINTER, ctypes.c_int32, ctypes.c_int32, _TEXT)
_ReleaseSemaphore = _prototype(_kernel32, "ReleaseSemaphore", _BOOL, _HANDLE, ctypes.c_int32, _POINTER)
_CreateMutex = _prototype(_kernel32, "CreateMutexW", _HANDLE, _POINTER, _BOOL, _TEXT)
_ReleaseMutex = _prototype(_kernel32, "ReleaseMutex", _BOOL, _HANDLE)
_GetTickCount64 = _prototype(_kernel32, "GetTickCount64", ctypes.c_uint64)
_GlobalMemoryStatus = _prototype(_kernel32, "GlobalMemoryStatusEx", _BOOL, _POINTER)
_GetSystemInfo = _prototype(_kernel32, "GetSystemInfo", None, _POINTER)
_LocalFree = _prototype(_kernel32, "LocalFree", _HANDLE, _HANDLE)
_GetLastError = ctypes.get_last_error
_FlushProcessWriteBuffers = _prototype(_kernel32, "FlushProcessWriteBuffers", None)
_PrefetchVirtualMemory = _prototype(_kernel32, "PrefetchVirtualMemory", _BOOL, _HANDLE, _SIZE, _POINTER, _DWORD)

_NtQuerySection = _prototype(_ntdll, "NtQuerySection", ctypes.c_int32, _HANDLE, ctypes.c_int, _POINTER, _SIZE, _POINTER)
_NtQueryObject = _prototype(_ntdll, "NtQueryObject", ctypes.c_int32, _HANDLE, ctypes.c_int, _POINTER, _DWORD, _POINTER)
_NtQuerySemaphore = _prototype(
    _ntdll, "NtQuerySemaphore", ctypes.c_int32, _HANDLE, ctypes.c_int, _POINTER, _DWORD, _POINTER
)
_RtlNtStatusToDosError = _prototype(_ntdll, "RtlNtStatusToDosError", _DWORD, ctypes.c_int32)

_OpenProcessToken = _prototype(_advapi32, "OpenProcessToken", _BOOL, _HANDLE, _DWORD, _POINTER)
_GetTokenInformation = _prototype(
    _advapi32, "GetTokenInformation", _BOOL, _HANDLE, ctypes.c_int, _POINTER, _DWORD, _POINTER
)
_ConvertSidToStringSid = _prototype(_advapi32, "ConvertSidToStringSidW", _BOOL, _POINTER, _POINTER)
_ConvertStringDescriptor = _prototype(
    _advapi32, "ConvertStringSecurityDescriptorToSecurityDescriptorW", _BOOL, _TEXT, _DWORD, _POINTER, _POINTER
)

SELF = INVALID_HANDLE
"""The pseudo handle of this process."""


class _SystemInfo(ctypes.Structure):
    _fields_ = (
        ("architecture", ctypes.c_uint32),
        ("page_size", ctypes.c_uint32),
        ("lowest", _POINTER),
        ("highest", _POINTER),
        ("mask", _SIZE),
        ("processors", ctypes.c_uint32),
        ("kind", ctypes.c_uint32),
        ("granularity", ctypes.c_uint32),
        ("level", ctypes.c_uint16),
        ("revision", ctypes.c_uint16),
    )


def page_sizes() -> tuple[int, int]:
    """Return the page size, and the granularity of mappings."""
    info = _SystemInfo()
    _GetSystemInfo(ctypes.addressof(info))
    return info.page_size, info.granularity


class _MemoryStatus(ctypes.Structure):
    _fields_ = (
        ("length", _DWORD),
        ("load", _DWORD),
        ("memory", ctypes.c_uint64),
        ("memory_available", ctypes.c_uint64),
        ("commit", ctypes.c_uint64),
        ("commit_available", ctypes.c_uint64),
        ("addresses", ctypes.c_uint64),
        ("addresses_available", ctypes.c_uint64),
        ("unused", ctypes.c_uint64),
    )


class MemoryStatus(NamedTuple):
    """Bytes of physical memory and of committable memory (with paging files): of each, the free and the total."""

    available: int
    total: int
    commit_available: int
    commit_total: int


def memory_status() -> MemoryStatus:
    """GlobalMemoryStatusEx."""
    status = _MemoryStatus(length=ctypes.sizeof(_MemoryStatus))
    if not _GlobalMemoryStatus(ctypes.addressof(status)):
        raise _last("GlobalMemoryStatusEx")
    return MemoryStatus(status.memory_available, status.memory, status.commit_available, status.commit)


# -- owners and access rights --------------------------------------------------------


class _SecurityAttributes(ctypes.Structure):
    _fields_ = (("length", _DWORD), ("descriptor", _POINTER), ("inherit", _BOOL))


def own_sid() -> str:
    """Return the security identifier of this process's user, as text."""
    token = _HANDLE()
    if not _OpenProcessToken(SELF, 0x8, ctypes.addressof(token)):
        raise _last("OpenProcessToken")
    try:
        buffer = ctypes.create_string_buffer(1024)
        length = _DWORD()
        if not _GetTokenInformation(token, 1, ctypes.addressof(buffer), len(buffer), ctypes.addressof(length)):
            raise _last("GetTokenInformation")
        sid = ctypes.c_void_p.from_buffer(buffer)  # TOKEN_USER begins with the address of the SID
        text = ctypes.c_wchar_p()
        if not _ConvertSidToStringSid(sid, ctypes.addressof(text)):
            raise _last("ConvertSidToStringSid")
        try:
            return str(text.value)
        finally:
            _LocalFree(ctypes.cast(text, _HANDLE))
    finally:
        _CloseHandle(token)


class _Private:
    """Security attributes; created on first use, never freed."""

    def __init__(self, everybody: str = "") -> None:
        self._made: _SecurityAttributes | None = None
        self._everybody = everybody

    def where(self) -> int:
        if self._made is None:
            descriptor = _POINTER()
            # Protected from inherited entries of a folder; full access for the user, inherited by a folder's content.
            text = f"D:P(A;OICI;GA;;;{own_sid()}){self._everybody}"
            if not _ConvertStringDescriptor(text, 1, ctypes.addressof(descriptor), None):
                raise _last("ConvertStringSecurityDescriptorToSecurityDescriptor")
            self._made = _SecurityAttributes(ctypes.sizeof(_SecurityAttributes), descriptor, 0)
        return ctypes.addressof(self._made)


_private = _Private()
_of_permissions = {
    0o600: _private,
    0o644: _Private("(A;;GR;;;WD)"),
    0o666: _Private("(A;;GR;;;WD)(A;;GW;;;WD)"),
}


# -- handles --------------------------------------------------------------------------


# With a default, because the name may be gone when the program ends.
@_interrupts.promptly
def close(handle: int, close_handle: Any = _CloseHandle) -> None:
    """CloseHandle."""
    if not close_handle(handle):
        raise _last("CloseHandle")


def duplicate(handle: int, access: int | None = None, *, source: int = SELF, target: int = SELF) -> int:
    """DuplicateHandle: from the process *source* to the process *target*; by default with the same access."""
    made = _HANDLE()
    options = DUPLICATE_SAME_ACCESS if access is None else 0
    if not _DuplicateHandle(source, handle, target, ctypes.addressof(made), access or 0, 0, options):
        raise _last("DuplicateHandle")
    return int(made.value or 0)


class ObjectInfo(NamedTuple):
    """The result of NtQueryObject for the object behind a handle."""

    access: int
    handles: int
    """Open handles of the object, in all processes."""


class _ObjectBasicInformation(ctypes.Structure):
    _fields_ = (
        ("attributes", _DWORD),
        ("access", _DWORD),
        ("handles", _DWORD),
        ("pointers", _DWORD),
        ("rest", _DWORD * 10),
    )


def query_object(handle: int) -> ObjectInfo:
    """NtQueryObject."""
    info = _ObjectBasicInformation()
    status = _NtQueryObject(handle, 0, ctypes.addressof(info), ctypes.sizeof(info), None)
    if status < 0:
        raise refused("NtQueryObject", _RtlNtStatusToDosError(status))
    return ObjectInfo(info.access, info.handles)


def object_name(handle: int) -> str | None:
    """Return the kernel's name of the object behind a handle, or None."""
    buffer = ctypes.create_string_buffer(2048)
    status = _NtQueryObject(handle, 1, ctypes.addressof(buffer), len(buffer), None)
    if status < 0:
        return None
    length = ctypes.c_uint16.from_buffer(buffer).value
    where = ctypes.c_void_p.from_buffer(buffer, 8).value
    return ctypes.wstring_at(where, length // 2) if length and where else None


# -- sections and views ---------------------------------------------------------------


class _SectionBasicInformation(ctypes.Structure):
    _fields_ = (("base", _POINTER), ("attributes", _DWORD), ("size", _LARGE))


def section_size(handle: int) -> int | None:
    """Return the bytes of a section, a multiple of the page size; None if the handle is not of a section."""
    info = _SectionBasicInformation()
    status = _NtQuerySection(handle, 0, ctypes.addressof(info), ctypes.sizeof(info), None)
    if status < 0:
        code = _RtlNtStatusToDosError(status)
        if status & 0xFFFFFFFF == 0xC0000024:  # STATUS_OBJECT_TYPE_MISMATCH
            return None
        raise refused("NtQuerySection", code)
    return int(info.size)


def create_section(
    size: int,
    name: str | None = None,
    *,
    file: int = INVALID_HANDLE,
    protection: int = PAGE_READWRITE,
    permissions: int = 0o600,
) -> tuple[int, bool]:
    """CreateFileMapping; return the handle, and whether the section existed."""
    ctypes.set_last_error(0)
    attributes = _of_permissions[permissions].where()
    handle = _CreateFileMapping(file, attributes, protection, size >> 32, size & 0xFFFFFFFF, name)
    if not handle:
        raise _last("CreateFileMapping")
    return int(handle), _GetLastError() == ALREADY_EXISTS


def open_section(name: str, access: int) -> int:
    """OpenFileMapping."""
    handle = _OpenFileMapping(access, 0, name)
    if not handle:
        raise _last("OpenFileMapping")
    return int(handle)


def map_view(handle: int, access: int, offset: int, size: int, address: int | None = None) -> int:
    """MapViewOfFileEx; a *size* of 0 reaches to the end."""
    where = _MapViewOfFileEx(handle, access, offset >> 32, offset & 0xFFFFFFFF, size, address)
    if not where:
        raise _last("MapViewOfFileEx")
    return int(where)


def unmap_view(address: int) -> None:
    """UnmapViewOfFile."""
    if not _UnmapViewOfFile(address):
        raise _last("UnmapViewOfFile")


def flush_view(address: int, size: int) -> None:
    """FlushViewOfFile."""
    if not _FlushViewOfFile(address, size):
        raise _last("FlushViewOfFile")


def flush_file(handle: int) -> None:
    """FlushFileBuffers."""
    if not _FlushFileBuffers(handle):
        raise _last("FlushFileBuffers")


def prefetch(address: int, size: int) -> None:
    """PrefetchVirtualMemory."""
    entry = (_SIZE * 2)(address, size)
    if not _PrefetchVirtualMemory(SELF, 1, ctypes.addressof(entry), 0):
        raise _last("PrefetchVirtualMemory")


# -- files ----------------------------------------------------------------------------


class FileInfo(NamedTuple):
    """The result of GetFileInformationByHandle."""

    attributes: int
    volume: int
    number: int
    size: int


def is_pipe(handle: int) -> bool:
    """Return whether a handle is of a pipe with message boundaries, which excludes sockets.

    Raises:
        OSError: The handle is invalid.
    """
    flags = _DWORD()
    if _GetNamedPipeInfo(handle, ctypes.addressof(flags), None, None, None):
        return bool(flags.value & _PIPE_TYPE_MESSAGE)
    query_object(handle)
    return False


def is_on_disk(handle: int) -> bool:
    """Return whether a handle of a file object is of a file or folder. For other handles the result is meaningless."""
    return bool(_GetFileType(handle) == 1)


def file_info(handle: int) -> FileInfo:
    """GetFileInformationByHandle."""
    words = (_DWORD * 13)()
    if not _GetFileInformation(handle, ctypes.addressof(words)):
        raise _last("GetFileInformationByHandle")
    # Attributes, three times of two words each, volume, size, links, index.
    return FileInfo(words[0], words[7], words[11] << 32 | words[12], words[8] << 32 | words[9])


def create_file(path: str, access: int, disposition: int, attributes: int) -> int:
    """CreateFile with full sharing; a new file is accessible to this user only."""
    handle = _CreateFile(path, access, SHARE_ALL, _private.where(), disposition, attributes, None)
    if handle is None or handle == INVALID_HANDLE:
        raise _last("CreateFile")
    return int(handle)


def create_directory(path: str) -> bool:
    """Create a folder that only this user can access; return False if the name is taken."""
    if _CreateDirectory(path, _private.where()):
        return True
    if _GetLastError() == ALREADY_EXISTS:
        return False
    raise _last("CreateDirectory")


def set_file_size(handle: int, size: int) -> None:
    """Set the size of a file, and allocate its space; new bytes are zero."""
    # FileAllocationInfo allocates the space, and fails if there is none. FileEndOfFileInfo sets the size.
    value = _LARGE(size)
    if not _SetFileInformation(handle, 6, ctypes.addressof(value), 8):
        raise _last("SetFileInformationByHandle")


def delete_file(handle: int) -> None:
    """Mark an open file for deletion when its last handle is closed."""
    value = ctypes.c_ubyte(1)
    if not _SetFileInformation(handle, 4, ctypes.addressof(value), 1):
        raise _last("SetFileInformationByHandle")


def milliseconds_since_boot() -> int:
    """GetTickCount64."""
    return int(_GetTickCount64())


# -- processes ------------------------------------------------------------------------


def open_process(pid: int, access: int) -> int:
    """OpenProcess; ``ProcessLookupError`` if there is no such process."""
    handle = _OpenProcess(access, 0, pid)
    if not handle:
        code = _GetLastError()
        if code == INVALID_PARAMETER:
            raise ProcessLookupError(errno.ESRCH, f"OpenProcess: there is no process {pid}")
        raise refused("OpenProcess", code)
    return int(handle)


def process_start(handle: int) -> int:
    """Return the start time of a process, in units of 100 ns."""
    times = (ctypes.c_uint64 * 4)()
    where = ctypes.addressof(times)
    if not _GetProcessTimes(handle, where, where + 8, where + 16, where + 24):
        raise _last("GetProcessTimes")
    return int(times[0])


def terminate(handle: int, code: int) -> None:
    """TerminateProcess; succeeds if the process has already ended."""
    if not _TerminateProcess(handle, code) and wait(handle, 0) != WAIT_OBJECT_0:
        raise _last("TerminateProcess")


def suspend(handle: int) -> None:
    """NtSuspendProcess: stop all threads of the process."""
    status = _NtSuspendProcess(handle)
    if status < 0:
        raise refused("NtSuspendProcess", _RtlNtStatusToDosError(status))


def resume(handle: int) -> None:
    """NtResumeProcess."""
    status = _NtResumeProcess(handle)
    if status < 0:
        raise refused("NtResumeProcess", _RtlNtStatusToDosError(status))


def wait(handle: int, milliseconds: int) -> int:
    """WaitForSingleObject."""
    result = int(_WaitForSingleObject(handle, milliseconds))
    if result == 0xFFFFFFFF:
        raise _last("WaitForSingleObject")
    return result


def end_with(process: int) -> None:
    """Arrange that this process ends when another one does, whose handle stays open.

    A thread of the system waits, and calls TerminateProcess itself. It passes the pseudo handle of this process, and
    FALSE, which becomes the exit code. So this works whatever Python code is running.
    """
    made = _HANDLE()
    function = ctypes.cast(_TerminateProcess, _POINTER)
    once_and_there = 0x8 | 0x4
    if not _RegisterWait(ctypes.addressof(made), process, function, SELF, 0xFFFFFFFF, once_and_there):
        raise _last("RegisterWaitForSingleObject")


# -- semaphores and mutexes -----------------------------------------------------------

_MOST = 2**31 - 1


def create_semaphore() -> int:
    """Create a semaphore without a name, with a count of 0."""
    handle = _CreateSemaphore(_private.where(), 0, _MOST, None)
    if not handle:
        raise _last("CreateSemaphore")
    return int(handle)


def release_semaphore(handle: int, count: int) -> int:
    """ReleaseSemaphore; return the previous count."""
    before = ctypes.c_int32()
    if not _ReleaseSemaphore(handle, count, ctypes.addressof(before)):
        raise _last("ReleaseSemaphore")
    return before.value


def semaphore_value(handle: int) -> int:
    """NtQuerySemaphore."""
    values = (ctypes.c_int32 * 2)()
    status = _NtQuerySemaphore(handle, 0, ctypes.addressof(values), 8, None)
    if status < 0:
        raise refused("NtQuerySemaphore", _RtlNtStatusToDosError(status))
    return values[0]


def create_mutex(name: str) -> int:
    """Create or open the mutex with that name."""
    handle = _CreateMutex(_private.where(), 0, name)
    if not handle:
        raise _last("CreateMutex")
    return int(handle)


def release_mutex(handle: int) -> bool:
    """ReleaseMutex; return False if this thread does not own it."""
    return bool(_ReleaseMutex(handle))


def full_barrier() -> None:
    """FlushProcessWriteBuffers: make earlier writes visible before anything later is read."""
    _FlushProcessWriteBuffers()


def private_attributes() -> int:
    """Return the address of security attributes that admit only this user."""
    return _private.where()


# -- words in shared memory -----------------------------------------------------------


def load(address: int) -> int:
    """Read a word of 4 bytes."""
    return ctypes.c_uint32.from_address(address).value


def store(address: int, value: int) -> None:
    """Write a word of 4 bytes."""
    ctypes.c_uint32.from_address(address).value = value


def load_long(address: int) -> int:
    """Read a word of 8 bytes."""
    return ctypes.c_uint64.from_address(address).value


def store_long(address: int, value: int) -> None:
    """Write a word of 8 bytes."""
    ctypes.c_uint64.from_address(address).value = value


# -- handles of a process --------------------------------------------------------------

_NtQuerySystemInformation = _prototype(
    _ntdll, "NtQuerySystemInformation", ctypes.c_int32, ctypes.c_int, _POINTER, _DWORD, _POINTER
)
_INFO_LENGTH_MISMATCH = 0xC0000004


def open_handles(pid: int) -> list[int]:
    """NtQuerySystemInformation(SystemExtendedHandleInformation): return the handles of a process."""
    size = 2**16
    while True:
        buffer = ctypes.create_string_buffer(size)
        status = _NtQuerySystemInformation(64, ctypes.addressof(buffer), size, None)
        if status >= 0:
            break
        if status & 0xFFFFFFFF != _INFO_LENGTH_MISMATCH:
            raise refused("NtQuerySystemInformation", _RtlNtStatusToDosError(status))
        size *= 2
    # A count and a reserved word; then for each handle 40 bytes: object, pid, handle, and more.
    count = ctypes.c_size_t.from_buffer(buffer).value
    words = (ctypes.c_size_t * (2 + count * 5)).from_buffer(buffer)
    return [words[2 + 5 * i + 2] for i in range(count) if words[2 + 5 * i + 1] == pid]


def object_type(handle: int) -> str | None:
    """Return the type of the object behind a handle, for example ``"Section"``, or None."""
    buffer = ctypes.create_string_buffer(1024)
    status = _NtQueryObject(handle, 2, ctypes.addressof(buffer), len(buffer), None)
    if status < 0:
        return None
    length = ctypes.c_uint16.from_buffer(buffer).value
    where = ctypes.c_void_p.from_buffer(buffer, 8).value
    return ctypes.wstring_at(where, length // 2) if length and where else None
