# cython: language_level=3
"""Which pages of the client's memory the card has written to, by I/O virtual address.

Pages are 4 KiB here, whatever size they are reported in, so that a report of other pages takes away no more
than it tells. Memory is used only for what is written to; where it would be too much, all is reported as
written to from then on: never less than was.
"""

import errno

from cpython.bytes cimport PyBytes_AS_STRING
from libc.stdint cimport uint8_t, uint64_t
from libc.stdlib cimport calloc, free

from device.errors import DeviceError


LOG_PAGE = 1 << LOG_PAGE_SHIFT

MAX_CHUNKS = CHUNK_LIMIT        # 1 TiB of memory, in 32 MiB of bitmaps

# Bytes of one report: what vfio-user's max_data_xfer_size is by default. 32 GiB of 4 KiB pages.
MAX_REPORT = 1 << 20


cdef extern from *:
    """
    #define trionic_first_bit(word) __builtin_ctzll(word)
    """
    int trionic_first_bit(uint64_t word) noexcept nogil


cdef class WriteLog:
    """Who is to hear of each write to the client's memory."""

    cdef void mark(self, uint64_t iova, uint64_t length) noexcept nogil:
        pass

    cdef bint owes(self) noexcept nogil:
        """Whether some of what was marked is not told yet."""
        return False

    cdef int settle(self) noexcept nogil:
        """Tell it, and let the gate go meanwhile: FAULT_NONE, or FAULT_DISTURBED and it is to be done again."""
        return 0

    cdef bint drop(self) noexcept nogil:
        """Never tell it; whether there was something."""
        return False


cdef class DirtyLog:
    """Nothing is marked at first."""

    def __dealloc__(self):
        cdef size_t i
        for i in range(SLOTS):
            free(self._slots[i].bits)

    cdef void mark(self, uint64_t iova, uint64_t length) noexcept nogil:
        """These bytes, at least one, were written to."""
        cdef uint64_t page = iova >> LOG_PAGE_SHIFT
        cdef uint64_t last = (iova + (length - 1)) >> LOG_PAGE_SHIFT
        cdef uint64_t *bits
        cdef uint64_t at
        while not self._everything:
            bits = self._bits(page >> CHUNK_SHIFT)
            if bits == NULL:
                self._everything = True
                return
            at = page & ((1 << CHUNK_SHIFT) - 1)
            bits[at >> 6] |= <uint64_t> 1 << (at & 63)
            if page == last:
                return
            page += 1

    cdef Chunk *_slot(self, uint64_t number) noexcept nogil:
        """The chunk with this number, or the empty slot where it belongs."""
        cdef size_t at = <size_t> ((number * <uint64_t> 0x9E3779B97F4A7C15) >> 50) & (SLOTS - 1)
        while self._slots[at].bits != NULL and self._slots[at].number != number:
            at = (at + 1) & (SLOTS - 1)
        return &self._slots[at]

    cdef uint64_t *_bits(self, uint64_t number) noexcept nogil:
        """The bitmap of a chunk, made if need be; NULL when it cannot be."""
        cdef Chunk *chunk = self._recent
        if chunk != NULL and chunk.number == number:
            return chunk.bits
        chunk = self._slot(number)
        if chunk.bits == NULL:
            if self.chunks == CHUNK_LIMIT:
                return NULL
            chunk.bits = <uint64_t *> calloc(CHUNK_WORDS, 8)
            if chunk.bits == NULL:
                return NULL
            chunk.number = number
            self.chunks += 1
        self._recent = chunk
        return chunk.bits

    def report(self, uint64_t iova, uint64_t length, uint64_t page_size):
        """A bit for each page from `iova` on, set if it was written to since the last report of it.

        Bit 0 of byte 0 is the first page; the bytes are a multiple of 8, as VFIO has it. Raises
        DeviceError(EINVAL) for pages that are no power of two or less than 4 KiB, for an address or a
        length that is not in whole pages, for none, and for more than MAX_REPORT bytes of them.
        """
        cdef uint64_t last = iova + (length - 1)
        cdef uint64_t pages, first_chunk, last_chunk, number
        cdef size_t i
        cdef uint8_t *out
        cdef int shift
        if page_size < LOG_PAGE or page_size & (page_size - 1):
            raise DeviceError(errno.EINVAL, f"dirty pages of {page_size} bytes")
        if length == 0 or last < iova or (iova | length) & (page_size - 1):
            raise DeviceError(
                errno.EINVAL, f"{iova:#x}+{length:#x} is no range of pages of {page_size:#x} bytes")
        shift = trionic_first_bit(page_size)
        pages = ((length - 1) >> shift) + 1
        if pages > 8 * MAX_REPORT:
            raise DeviceError(errno.EINVAL, f"{pages} pages; {8 * MAX_REPORT} at most are reported at once")
        bitmap = bytes((pages + 63) // 64 * 8)
        out = <uint8_t *> PyBytes_AS_STRING(bitmap)
        if self._everything:
            for number in range(pages):
                out[number >> 3] |= 1 << (number & 7)
            return bitmap
        first_chunk = iova >> (LOG_PAGE_SHIFT + CHUNK_SHIFT)
        last_chunk = last >> (LOG_PAGE_SHIFT + CHUNK_SHIFT)
        for i in range(SLOTS):
            if self._slots[i].bits != NULL and first_chunk <= self._slots[i].number <= last_chunk:
                self._move(&self._slots[i], iova >> LOG_PAGE_SHIFT, last >> LOG_PAGE_SHIFT,
                           shift - LOG_PAGE_SHIFT, out)
        return bitmap

    cdef void _move(self, Chunk *chunk, uint64_t first, uint64_t last, int shift,
                    uint8_t *out) noexcept nogil:
        """Set the bits of `out` for what is marked of pages first..last, and clear the marks."""
        cdef uint64_t base = chunk.number << CHUNK_SHIFT
        cdef uint64_t word, left, page, bit
        for word in range(CHUNK_WORDS):
            left = chunk.bits[word]
            while left:
                bit = left & -left
                page = base + 64 * word + trionic_first_bit(left)
                left ^= bit
                if first <= page <= last:
                    chunk.bits[word] ^= bit
                    page = (page - first) >> shift
                    out[page >> 3] |= 1 << (page & 7)


cdef class Marking:
    """Who hears of what is written: the client, and its guest."""

    cdef void mark(self, uint64_t iova, uint64_t length) noexcept nogil:
        """These bytes were written to; only while `marking`."""
        self.mark_for_client(iova, length)
        if self._guest_log is not None:
            self._guest_log.mark(iova, length)

    cdef void mark_for_client(self, uint64_t iova, uint64_t length) noexcept nogil:
        """These bytes were written to, or may have been."""
        if self.logging:
            self._log.mark(iova, length)

    cdef void mark_answered(self, uint64_t iova, uint64_t length, bint written) noexcept nogil:
        """The client was asked to write these bytes, and marked before; `written` says whether it did, and
        the guest's log is to hear of it.

        The client is told again, for it may have asked for its log meanwhile, and before it wrote.
        """
        self.mark_for_client(iova, length)
        if written and self._guest_log is not None:
            self._guest_log.mark(iova, length)

    cdef void log_for_client(self, DirtyLog log) noexcept:
        """What the client hears of from now on, or None."""
        self._log = log
        self.logging = log is not None
        self.marking = self.logging or self._guest_log is not None

    @property
    def guest_log(self):
        """The GuestLog that hears of writes, or None."""
        return self._guest_log

    @guest_log.setter
    def guest_log(self, WriteLog log):
        self._guest_log = log
        self.marking = self.logging or log is not None
        if log is not None:
            self._last_guest_log = log

    @property
    def guest_log_owed(self):
        """Whether the guest's log has not heard of all writes yet; see `settle_guest_log`."""
        return bool(self.owes_log())

    def settle_guest_log(self):
        """Let the guest's log hear of all writes, for whoever wrote by himself; the gate is free meanwhile.

        Whether it has: what the card was stopped, reset or changed in the middle of is to be done again.
        """
        return self.settle_log() == 0

    cdef bint owes_log(self) noexcept nogil:
        return self._last_guest_log is not None and self._last_guest_log.owes()

    cdef int settle_log(self) noexcept nogil:
        """Tell the guest's log what it is owed, as WriteLog.settle; for whoever wrote, when he is done."""
        return self._last_guest_log.settle() if self.owes_log() else 0

    cdef void drop_log(self) noexcept nogil:
        """Nobody is left who could be told."""
        if self.owes_log():
            self._last_guest_log.drop()
