# cython: language_level=3, boundscheck=False, wraparound=False
"""Times device.dma from within: the loops that Python would be too slow for, each beside one of its C twin.

Built when it is first used; see bench/_in_process/__init__.py. Every function answers in nanoseconds.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

from device.dma._windows cimport DMA_READ, DMA_WRITE, FAULT_NONE, DmaWindows


cdef extern from "windows_twin.h" nogil:
    struct twin_window:
        uint64_t iova
        uint64_t last
        uint8_t *memory
        uint32_t prot
    uint8_t *twin_find(const twin_window *windows, size_t count, uint64_t iova, uint64_t length, uint32_t prot)
    void twin_copy(uint8_t *target, const uint8_t *source, size_t size)


cdef uint64_t now() noexcept nogil:
    cdef timespec time
    clock_gettime(CLOCK_MONOTONIC, &time)
    return <uint64_t> time.tv_sec * 1000000000 + <uint64_t> time.tv_nsec


cdef class Twin:
    """The same windows, of memory that DmaWindows has mapped, in one C array."""

    cdef twin_window *_windows
    cdef size_t _count

    def __cinit__(self, DmaWindows dma):
        cdef uint64_t run
        listed = dma.windows()
        self._windows = <twin_window *> calloc(max(1, len(listed)), sizeof(twin_window))
        if self._windows == NULL:
            raise MemoryError
        for iova, size, prot, _ in listed:
            window = &self._windows[self._count]
            window.iova, window.last, window.prot = iova, iova + size - 1, prot
            if dma.span(iova, size, prot, &window.memory, &run) != FAULT_NONE:
                raise ValueError(f"the window at {iova:#x} has no memory")
            self._count += 1

    def __dealloc__(self):
        free(self._windows)


def find_ours(DmaWindows dma, const uint64_t[::1] addresses, uint64_t length):
    """Look all addresses up, one after the other."""
    cdef uint8_t *where
    cdef uint64_t run, start
    cdef Py_ssize_t i, missed = 0
    with nogil:
        start = now()
        for i in range(addresses.shape[0]):
            missed += dma.span(addresses[i], length, DMA_READ | DMA_WRITE, &where, &run) != FAULT_NONE
        start = now() - start
    if missed:
        raise ValueError(f"{missed} addresses are in no window")
    return start


def find_theirs(Twin twin, const uint64_t[::1] addresses, uint64_t length):
    """The same in the twin."""
    cdef uint64_t start
    cdef Py_ssize_t i, missed = 0
    with nogil:
        start = now()
        for i in range(addresses.shape[0]):
            missed += twin_find(twin._windows, twin._count, addresses[i], length, DMA_READ | DMA_WRITE) == NULL
        start = now() - start
    if missed:
        raise ValueError(f"{missed} addresses are in no window")
    return start


def copy_ours(DmaWindows dma, uint64_t target, uint64_t source, uint64_t size, int times):
    """Copy from window to window as the device does: found, checked, copied."""
    cdef const uint8_t *data
    cdef uint64_t start
    cdef int i, missed = 0
    with nogil:
        start = now()
        for i in range(times):
            data = dma.contiguous(source, size, DMA_READ)
            missed += data == NULL or dma.copy_out(target, data, size) != FAULT_NONE
        start = now() - start
    if missed:
        raise ValueError("the memory is in no window")
    return start


def copy_theirs(DmaWindows dma, uint64_t target, uint64_t source, uint64_t size, int times):
    """The same bytes by memcpy alone."""
    cdef uint8_t *out = dma.contiguous(target, size, DMA_WRITE)
    cdef const uint8_t *data = dma.contiguous(source, size, DMA_READ)
    cdef uint64_t start
    cdef int i
    if out == NULL or data == NULL:
        raise ValueError("the memory is in no window")
    with nogil:
        start = now()
        for i in range(times):
            twin_copy(out, data, size)
        start = now() - start
    return start
