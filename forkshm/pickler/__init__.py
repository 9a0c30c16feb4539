"""Layer 3 of 6. Turns objects into payloads with descriptors, and payloads into objects.

`pack` makes a `Payload`, and `receive` a `ReceivedPayload`. `_policy` decides which buffers are copied and which are
sent as descriptors.
"""

from forkshm._help import publish
from forkshm.pickler import _ctypes, _files  # noqa: F401 - register how ctypes objects and mappings cross
from forkshm.pickler._attributes import attribute_of, name_of
from forkshm.pickler._code import reduce_array_type, reduce_code, with_slots
from forkshm.pickler._collect import RecentCopies
from forkshm.pickler._exceptions import reduce_exception, without_unpicklable
from forkshm.pickler._files import (
    NamedMapping,
    SendableMapping,
    Snapshot,
    files_kept,
    find_named,
    forget_files,
    sendable,
)
from forkshm.pickler._foreign import Passage, forget_received, register_foreign, send_region, take_region
from forkshm.pickler._handles import Handle, ReceivedFd
from forkshm.pickler._names import (
    ImportableNames,
    file_of_main,
    importable_after_import,
    importable_in_children,
    importable_now,
    is_of_unimported_module,
    register_named,
)
from forkshm.pickler._pack import (
    REFUSED,
    Payload,
    PendingPayload,
    Repeats,
    begin,
    is_name,
    pack,
    pack_by_name,
    still_by_name,
    tiny_stream,
)
from forkshm.pickler._policy import OUT_OF_BAND
from forkshm.pickler._reducers import (
    MIN_BUNDLE,
    register,
    register_bundler,
    register_family,
    register_lazy,
    register_plain,
    register_simple,
)
from forkshm.pickler._repeat import mark, repeated
from forkshm.pickler._taken import Taken, take_small
from forkshm.pickler._unpack import ReceivedPayload, open_plain, plain_pair, receive, skip
from forkshm.pickler._unpicklable import explain, pack_exception
from forkshm.pickler._view import View, view

__all__ = [
    "ImportableNames",
    "Payload",
    "PendingPayload",
    "ReceivedPayload",
    "RecentCopies",
    "Repeats",
    "Taken",
    "View",
    "begin",
    "explain",
    "file_of_main",
    "files_kept",
    "forget_files",
    "forget_received",
    "importable_after_import",
    "importable_in_children",
    "importable_now",
    "is_name",
    "mark",
    "open_plain",
    "pack",
    "pack_by_name",
    "pack_exception",
    "plain_pair",
    "receive",
    "register",
    "register_lazy",
    "register_named",
    "repeated",
    "skip",
    "still_by_name",
    "take_small",
    "tiny_stream",
    "view",
]
# For the other packages of forkshm.
__all__ += [
    "MIN_BUNDLE",
    "OUT_OF_BAND",
    "REFUSED",
    "Handle",
    "NamedMapping",
    "Passage",
    "ReceivedFd",
    "SendableMapping",
    "Snapshot",
    "attribute_of",
    "find_named",
    "is_of_unimported_module",
    "name_of",
    "reduce_array_type",
    "reduce_code",
    "reduce_exception",
    "register_bundler",
    "register_family",
    "register_foreign",
    "register_plain",
    "register_simple",
    "send_region",
    "sendable",
    "take_region",
    "with_slots",
    "without_unpicklable",
]

publish(globals())
