from libc.stdint cimport uint8_t, uint32_t, uint64_t

from device._gate cimport Gate
from device.dma._counts cimport PinnedPages
from device.dma._dirty cimport DirtyLog
from device.dma._files cimport Mapping, SharedFiles
from device.dma._table cimport Window, WindowTable


cdef struct Piece:              # what of a pin lies in one window
    uint64_t iova
    uint64_t length
    uint64_t offset             # of the file, or of borrowed memory the address
    uint32_t prot
    int backing


cdef class Part:
    cdef Mapping _mapping
    cdef uint8_t *_start
    cdef uint64_t _length
    cdef bint _readonly


cdef class Pin:
    cdef Pins _pins
    cdef Piece *_pieces
    cdef size_t _count
    cdef readonly uint64_t pages
    cdef readonly str who
    cdef readonly bint revoked
    cdef readonly bint released
    cdef readonly list views

    cdef bint _overlaps(self, uint64_t first, uint64_t last) noexcept


cdef class Pins:
    cdef WindowTable _table
    cdef SharedFiles _files
    cdef dict _pages            # the PinnedPages of a backing
    cdef dict _held             # every Pin that is not released, in order
    cdef Gate gate
    cdef DirtyLog log           # of writes, or None
    cdef readonly uint64_t acquired, released
    cdef readonly size_t spans
    cdef size_t _in_windows     # those of pins that are not revoked
    cdef uint64_t _leaving_first, _leaving_last
    cdef object _told           # not None while windows are leaving
    cdef size_t _in_the_way     # pins there

    cdef Pin take(self, list spans, str who)
    cdef int lend_views(self, Pin pin) except -1
    cdef void release(self, Pin pin) noexcept
    cdef void revoke(self) noexcept
    cdef void mark_held(self) noexcept
    cdef int _find(self, Pin pin, uint64_t iova, uint64_t length, uint32_t prot) except -1
    cdef int _count_pages(self, Pin pin) except -1
    cdef PinnedPages _pages_of(self, int backing)
    cdef void _uncount(self, Pin pin, size_t pieces) noexcept
    cdef void _mark(self, Pin pin) noexcept
    cdef list _held_in(self, uint64_t first, uint64_t last)
    cdef void _forget_unused(self, int backing) noexcept
    cdef Part _part(self, Piece *piece)
    cpdef int check(self, uint64_t first=*, uint64_t last=*) except -1
