"""Layer 2 of 6. Turns mapped bytes into small values that name them.

In forkshm's own messages the kernel carries the fds, and the descriptor is an index
into them (`_tables`). A `RegionDescriptor` stands alone: it can go through any channel,
and raises an error when its memory is gone.
"""

from forkshm._help import publish
from forkshm.descriptor._file import FileExtent, file_at
from forkshm.descriptor._region import RegionDescriptor, describe
from forkshm.descriptor._tables import (
    BLOCK,
    COPIED_IN,
    HANDLE,
    IDENTITY_SIZE,
    INLINE,
    LOOSE,
    MANY_FILES,
    READ_ONLY,
    Bare,
    BlockRef,
    Head,
    Tables,
    body_tables,
    is_plain,
    plain_body,
    read_head,
    read_one_region,
    read_tables,
    size_of_tables,
    write_one_region,
    write_plain,
    write_tables,
)

__all__ = ["RegionDescriptor", "describe"]
# Used by other packages of forkshm.
__all__ += [
    "BLOCK",
    "COPIED_IN",
    "HANDLE",
    "IDENTITY_SIZE",
    "INLINE",
    "LOOSE",
    "MANY_FILES",
    "READ_ONLY",
    "Bare",
    "BlockRef",
    "FileExtent",
    "Head",
    "Tables",
    "body_tables",
    "file_at",
    "is_plain",
    "plain_body",
    "read_head",
    "read_one_region",
    "read_tables",
    "size_of_tables",
    "write_one_region",
    "write_plain",
    "write_tables",
]

publish(globals())
