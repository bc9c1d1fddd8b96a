# cython: language_level=3
"""The log of written pages that a card keeps in its guest's memory, as the live-migration block asks for it.

One bit for each page of 4 KiB by I/O virtual address, from 0 on: page n's is bit n & 7 of byte n >> 3, as
vhost's log has it (linux/vhost.h, VHOST_SET_LOG_BASE). It is set after the bytes are written, by an access
that nobody comes between who takes bits out at the same time; so who takes a bit out and then copies the page
misses nothing. Bits are set for nothing else; neither writes of the log itself are in it, nor what is written
through the views of a pin.

The log has to lie in memory that is here: where it does not, or is too short, bits are left out, and the
flags say so.
"""

from libc.stdint cimport int32_t, uint8_t, uint64_t

from device._atomic cimport load_int, or8
from device.dma._dirty cimport LOG_PAGE_SHIFT
from device.dma._windows cimport DMA_READ, DMA_WRITE, FAULT_NONE, DmaWindows


cdef class GuestLog:
    """That of the card behind `dma`, which is off at first. Callers hold the card's gate.

    `unreachable`: a bit's place was not in a window with memory here that may be read and written.
    `too_small`: a page's bit would have been at `end` or beyond. Both since the last start.
    """

    def __init__(self, DmaWindows dma not None):
        self._dma = dma

    @property
    def active(self):
        """Whether writes are logged."""
        return self._dma.guest_log is self

    def start(self, uint64_t base, uint64_t end):
        """Log from now on in the bytes from `base` up to but not including `end`, I/O virtual addresses."""
        self.base, self.end = base, end
        self.unreachable = self.too_small = False
        self._dma.guest_log = self

    def stop(self):
        """Log no more; the flags stay."""
        self._dma.guest_log = None

    cdef void mark(self, uint64_t iova, uint64_t length) noexcept nogil:
        """These bytes, at least one, were written to."""
        cdef uint64_t page = iova >> LOG_PAGE_SHIFT
        cdef uint64_t last = (iova + (length - 1)) >> LOG_PAGE_SHIFT
        while page < last:
            self._set(page)
            page += 1
        self._set(last)

    cdef void _set(self, uint64_t page) noexcept nogil:
        cdef uint64_t at = page >> 3
        cdef uint64_t run
        cdef uint8_t *where
        cdef int32_t losses = load_int(self._dma.losses)
        if self.end <= self.base or at >= self.end - self.base:
            self.too_small = True
        elif self._dma.span(self.base + at, 1, DMA_READ | DMA_WRITE, &where, &run) != FAULT_NONE:
            self.unreachable = True
        else:
            or8(where, <uint8_t> (1 << (page & 7)))
            if self._dma.unless_lost(losses, self.base + at, 1, DMA_READ | DMA_WRITE) != FAULT_NONE:
                self.unreachable = True
            self._dma.mark_for_client(self.base + at, 1)
