from libc.stdint cimport uint64_t

from device.dma._dirty cimport WriteLog
from device.dma._windows cimport DmaWindows


cdef class GuestLog(WriteLog):
    cdef DmaWindows _dma
    cdef readonly uint64_t base, end
    cdef public bint unreachable, too_small

    cdef void _set(self, uint64_t page) noexcept nogil
