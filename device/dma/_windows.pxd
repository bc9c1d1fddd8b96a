from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t

from device._gate cimport Gate
from device.dma._dirty cimport Marking
from device.dma._files cimport Backing, SharedFiles
from device.dma._pins cimport Pins
from device.dma._table cimport Window, WindowTable


cdef enum:
    DMA_READ = 1
    DMA_WRITE = 2


cdef enum:
    FAULT_NONE = 0
    FAULT_UNMAPPED = -1
    FAULT_PROTECTION = -2
    FAULT_MESSAGE_ONLY = -3     # and there is nobody to send messages to, unless span() says it
    FAULT_DISTURBED = -4        # the card was reset or halted, or a queue changed, while the client was asked
    FAULT_GONE = -5             # the client has left
    FAULT_REFUSED = -1000       # less an errno: what the client's answer came to


cdef enum:                  # the backing of a Window is an index, or one of these
    NO_BACKING = -1         # no file descriptor came with it
    BORROWED = -2           # less a guard: memory that somebody else mapped


cdef class DmaWindows(Marking):
    cdef WindowTable _table
    cdef Window *_hit                       # the last one that was found, or NULL
    cdef SharedFiles _files
    cdef Backing *_backings                 # those of `_files`
    cdef const int32_t *losses              # SharedFiles.losses: who looks before and after sees what he read
    cdef readonly uint64_t generation       # grows with every change of the table
    cdef readonly uint64_t epoch            # grows with whatever makes an answer of the client come too late
    cdef readonly size_t limit
    cdef public object on_map
    cdef readonly Pins pins
    # by message
    cdef object _remote
    cdef bint _answering                    # there is a remote, and it has not said that its client is gone
    cdef uint64_t _remote_limit
    cdef size_t _without_backing            # windows
    cdef readonly size_t unanswered         # accesses that the client is being asked for

    cdef int span(self, uint64_t iova, uint64_t length, uint32_t prot,
                  uint8_t **where, uint64_t *run) noexcept nogil
    cdef uint8_t *contiguous(self, uint64_t iova, uint64_t length, uint32_t prot) noexcept nogil
    cdef int reach(self, uint64_t iova, uint64_t length, uint32_t prot) noexcept nogil
    cdef int unless_lost(self, int32_t before, uint64_t iova, uint64_t length, uint32_t prot) noexcept nogil
    cdef int copy_in(self, void *target, uint64_t iova, uint64_t length) noexcept nogil
    cdef int copy_out(self, uint64_t iova, const void *source, uint64_t length) noexcept nogil
    cdef int _by_message(self, uint64_t iova, uint64_t *run, uint8_t *target, const uint8_t *source,
                         bint logged) noexcept nogil
    cdef int _ask(self, uint64_t iova, uint64_t length, uint8_t *target, const uint8_t *source,
                  bint logged) except 1
    cpdef void disturb(self) noexcept
    cdef int _check(self, uint64_t iova, uint64_t size, uint32_t prot) except -1
    cdef int _insert(self, Window window) except -1
    cdef void _forget(self, Window *w) noexcept
    cdef void _release(self, int backing) noexcept
