# cython: language_level=3
"""The log of written pages that a card keeps in its guest's memory, as the live-migration block asks for it.

One bit for each page of 4 KiB by I/O virtual address, from 0 on: page n's is bit n & 7 of byte n >> 3, as
vhost's log has it (linux/vhost.h, VHOST_SET_LOG_BASE). It is set after the bytes are written, so whoever takes
a bit out and then copies the page misses nothing. Bits are set for nothing else; neither writes of the log
itself are in it, nor what is written through the views of a pin.

Where the log's memory is in this process a bit is set at once, by an access that nobody comes between who
takes bits out at the same time. Where the client has to be asked, bits are owed until `settle`, which is for
whoever wrote to call when he is done, for it lets the gate go: what lies within 4 KiB of the log is read and
written back in one piece. Nothing makes these two steps one. A bit that the guest takes out between them may
be set again; one that somebody else sets there is lost, so with such a log only the card may set bits.

Where the log is not to be reached, or is too short, bits are left out, and the flags say so.
"""

from libc.errno cimport ETIMEDOUT
from libc.stdint cimport int32_t, uint8_t, uint64_t
from libc.stdlib cimport free, malloc, qsort
from libc.string cimport memset

from device._atomic cimport load_int, or8
from device.dma._dirty cimport LOG_PAGE_SHIFT
from device.dma._windows cimport (
    DMA_READ,
    DMA_WRITE,
    FAULT_DISTURBED,
    FAULT_MESSAGE_ONLY,
    FAULT_NONE,
    FAULT_REFUSED,
    DmaWindows,
)


# Bits that can wait for `settle`. A burst of 64 frames of 64 KiB in buffers of 1.5 KiB that all lie across two
# pages has 5632, and the rings a few; what a driver does to have more is its own loss (`unreachable`).
MAX_OWED = OWED_LIMIT


cdef int _by_page(const void *one, const void *other) noexcept nogil:
    cdef uint64_t a = (<const uint64_t *> one)[0], b = (<const uint64_t *> other)[0]
    return (a > b) - (a < b)


cdef class GuestLog(WriteLog):
    """That of the card behind `dma`, which is off at first. Callers hold the card's gate.

    `unreachable`: a bit's place was not in a window that may be read and written, or the client did not let
    the card do so, or too many bits waited for it. `too_small`: a page's bit would have been at `end` or
    beyond. Both since the last start.
    """

    def __cinit__(self, *args, **kwargs):
        self._owed = <uint64_t *> malloc(OWED_LIMIT * sizeof(uint64_t))
        if self._owed == NULL:
            raise MemoryError

    def __init__(self, DmaWindows dma not None):
        self._dma = dma

    def __dealloc__(self):
        free(self._owed)

    @property
    def active(self):
        """Whether writes are logged."""
        return self._dma.guest_log is self

    @property
    def owing(self):
        """Whether bits for writes of before are still on their way into the log."""
        return bool(self.owes())

    def start(self, uint64_t base, uint64_t end):
        """Log from now on in the bytes from `base` up to but not including `end`, I/O virtual addresses.

        Bits that the log before is still owed are left out.
        """
        self.unreachable = self.drop()
        self.too_small = self._over = False
        self.base, self.end = base, end
        self._dma.guest_log = self

    def stop(self):
        """Log no more. The flags stay, and bits for what was written before are set still."""
        self._dma.guest_log = None

    def reset(self):
        """`stop`, and the flags are for nobody any more."""
        self.stop()
        self.unreachable = self.too_small = False
        self._over = True

    cdef void mark(self, uint64_t iova, uint64_t length) noexcept nogil:
        """These bytes, at least one, were written to."""
        cdef uint64_t page = iova >> LOG_PAGE_SHIFT
        cdef uint64_t last = (iova + (length - 1)) >> LOG_PAGE_SHIFT
        while page < last:
            self._set(page)
            page += 1
        self._set(last)

    cdef uint64_t _place(self, uint64_t page) noexcept nogil:
        """The address of the byte with a page's bit."""
        return self.base + (page >> 3)

    cdef void _set(self, uint64_t page) noexcept nogil:
        cdef uint64_t run
        cdef uint8_t *where
        cdef int32_t losses = load_int(self._dma.losses)
        cdef int fault
        if self.end <= self.base or page >> 3 >= self.end - self.base:
            self.too_small = True
            return
        fault = self._dma.span(self._place(page), 1, DMA_READ | DMA_WRITE, &where, &run)
        if fault == FAULT_NONE:
            or8(where, <uint8_t> (1 << (page & 7)))
            fault = self._dma.unless_lost(losses, self._place(page), 1, DMA_READ | DMA_WRITE)
            self._dma.mark_for_client(self._place(page), 1)
        elif fault == FAULT_MESSAGE_ONLY and self._dma._answering:
            self._owe(page)
            return
        if fault != FAULT_NONE:
            self._lose()

    cdef void _lose(self) noexcept nogil:
        self.unreachable |= not self._over

    # --- by message

    cdef bint owes(self) noexcept nogil:
        """See WriteLog."""
        return self._owed_count > 0 or self._settling

    cdef void _owe(self, uint64_t page) noexcept nogil:
        cdef uint64_t *remembered = &self._remembered[page & (REMEMBERED - 1)]
        if remembered[0] == page + 1:
            return
        if self._owed_count == OWED_LIMIT:
            self._lose()
            return
        remembered[0] = page + 1
        self._owed[self._owed_count] = page
        self._owed_count += 1

    cdef bint drop(self) noexcept nogil:
        """See WriteLog."""
        cdef bint owed = self.owes()
        self._epoch += 1
        self._owed_count = 0
        memset(self._remembered, 0, sizeof(self._remembered))
        return owed

    cdef int settle(self) noexcept nogil:
        """See WriteLog. FAULT_DISTURBED also when others wrote so much meanwhile that it would have no end."""
        cdef size_t left = self._owed_count
        cdef int fault = FAULT_NONE
        if self._settling:
            return FAULT_NONE               # by another thread, whose caller sees to what is new as well
        self._settling = True
        qsort(self._owed, self._owed_count, sizeof(uint64_t), _by_page)
        while self._owed_count and left and fault == FAULT_NONE:
            fault = self._settle_block()
            left -= 1
        self._settling = False
        return FAULT_DISTURBED if self._owed_count else fault

    cdef int _settle_block(self) noexcept nogil:
        """Set the last bits that are owed, and those that lie with them: FAULT_NONE, FAULT_DISTURBED."""
        cdef uint8_t bits[BLOCK]
        cdef uint64_t epoch = self._epoch
        cdef uint64_t block = self._place(self._owed[self._owed_count - 1]) & ~<uint64_t> (BLOCK - 1)
        cdef uint64_t first = BLOCK, last = 0, page, at
        cdef uint64_t *remembered
        cdef int fault, bit
        memset(bits, 0, BLOCK)
        while self._owed_count:
            page = self._owed[self._owed_count - 1]
            at = self._place(page) - block
            if at >= BLOCK:
                break
            self._owed_count -= 1
            remembered = &self._remembered[page & (REMEMBERED - 1)]
            if remembered[0] == page + 1:
                remembered[0] = 0
            bits[at] |= <uint8_t> (1 << (page & 7))
            first, last = min(first, at), max(last, at)
        fault = self._merge(block + first, bits + first, last - first + 1)
        if self._epoch != epoch:
            return FAULT_DISTURBED
        if fault == FAULT_DISTURBED:
            for at in range(first, last + 1):
                for bit in range(8):
                    if bits[at] >> bit & 1:
                        self._owe((block + at - self.base << 3) + bit)
            return FAULT_DISTURBED
        if fault != FAULT_NONE:
            self._lose()
        if fault == FAULT_REFUSED - ETIMEDOUT:
            self.drop()                     # else each block would wait as long for who does not answer
        return FAULT_NONE

    cdef int _merge(self, uint64_t address, const uint8_t *bits, uint64_t length) noexcept nogil:
        """Set these bits in the bytes at `address`, which are in one window; a FAULT."""
        cdef uint8_t merged[BLOCK]
        cdef uint8_t *where
        cdef uint64_t run, i
        cdef uint64_t epoch = self._epoch
        cdef bint news = False
        cdef int32_t losses = load_int(self._dma.losses)
        cdef int fault = self._dma.span(address, length, DMA_READ | DMA_WRITE, &where, &run)
        if fault == FAULT_NONE:             # its memory has come meanwhile
            for i in range(length):
                if bits[i]:
                    or8(where + i, bits[i])
            self._dma.mark_for_client(address, length)
            return self._dma.unless_lost(losses, address, length, DMA_READ | DMA_WRITE)
        if fault != FAULT_MESSAGE_ONLY:
            return fault
        fault = self._dma.copy_in(merged, address, length)
        if fault != FAULT_NONE:
            return fault
        if self._epoch != epoch:
            return FAULT_DISTURBED          # the log has another place, and this memory another use
        for i in range(length):
            news |= (bits[i] & ~merged[i]) != 0
            merged[i] |= bits[i]
        return self._write(address, merged, length) if news else FAULT_NONE

    cdef int _write(self, uint64_t address, const uint8_t *bits, uint64_t length) noexcept nogil:
        """Have the client write a part of the log, which is not told of that."""
        cdef uint8_t *part
        cdef uint64_t run, done = 0
        cdef int fault
        while done < length:
            fault = self._dma.span(address + done, length - done, DMA_WRITE, &part, &run)
            if fault != FAULT_MESSAGE_ONLY:
                return FAULT_DISTURBED if fault == FAULT_NONE else fault
            fault = self._dma._by_message(address + done, &run, NULL, bits + done, False)
            if fault != FAULT_NONE:
                return fault
            done += run
        return FAULT_NONE
