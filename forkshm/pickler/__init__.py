"""Layer 3 of 6. Takes objects, hands on parcels: payload and descriptors; and back.

`pack` makes a `Parcel`, `receive` an `Arrival`. Which buffers are copied and which cross
as descriptors is decided in `_policy`.
"""

from forkshm.pickler import _files  # noqa: F401 - registers how mappings cross
from forkshm.pickler._collect import RecentCopies
from forkshm.pickler._culprit import explain
from forkshm.pickler._foreign import forget_received
from forkshm.pickler._names import Known, known_after_import, known_now, known_to_children, register_named
from forkshm.pickler._pack import (
    Packing,
    Parcel,
    Repeats,
    begin,
    is_name,
    pack,
    pack_by_name,
    still_by_name,
    tiny_parcel,
)
from forkshm.pickler._reducers import register, register_lazy
from forkshm.pickler._repeat import mark, repeated
from forkshm.pickler._unpack import Arrival, open_plain, plain_pair, receive, skip
from forkshm.pickler._view import View, view

__all__ = (
    "Arrival",
    "Known",
    "Packing",
    "Parcel",
    "RecentCopies",
    "Repeats",
    "View",
    "begin",
    "explain",
    "forget_received",
    "is_name",
    "known_after_import",
    "known_now",
    "known_to_children",
    "mark",
    "open_plain",
    "pack",
    "pack_by_name",
    "plain_pair",
    "receive",
    "register",
    "register_lazy",
    "register_named",
    "repeated",
    "skip",
    "still_by_name",
    "tiny_parcel",
    "view",
)
