"""Pointers that hold a distance instead of an address, and C structures placed in a region."""

from forkshm._help import publish
from forkshm.region.pointers._offset_ptr import OffsetPtr, Pointer
from forkshm.region.pointers._place import aligned, assign, construct, place

__all__ = ("OffsetPtr", "Pointer", "aligned", "assign", "construct", "place")

publish(globals())
