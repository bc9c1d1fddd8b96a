from libc.stdint cimport uint8_t, uint64_t

from device.dma._dirty cimport WriteLog
from device.dma._windows cimport DmaWindows


cdef enum:
    OWED_LIMIT = 1 << 14
    REMEMBERED = 1 << 10
    BLOCK = 4096                            # of a window: it has memory here as a whole, or has none


cdef class GuestLog(WriteLog):
    cdef DmaWindows _dma
    cdef readonly uint64_t base, end
    cdef public bint unreachable, too_small
    # bits to be written by message
    cdef uint64_t *_owed                    # pages, some perhaps twice
    cdef size_t _owed_count
    cdef uint64_t _remembered[REMEMBERED]   # page + 1 of some that are owed
    cdef bint _settling                     # the client is being asked
    cdef uint64_t _epoch                    # grows when what was owed is owed no more
    cdef bint _over                         # nobody asks for the flags any more

    cdef void _set(self, uint64_t page) noexcept nogil
    cdef void _owe(self, uint64_t page) noexcept nogil
    cdef uint64_t _place(self, uint64_t page) noexcept nogil
    cdef int _settle_block(self) noexcept nogil
    cdef int _merge(self, uint64_t address, const uint8_t *bits, uint64_t length) noexcept nogil
    cdef int _write(self, uint64_t address, const uint8_t *bits, uint64_t length) noexcept nogil
    cdef void _lose(self) noexcept nogil
