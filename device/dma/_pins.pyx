# cython: language_level=3
"""Pins: memory of the client's that a holder uses over time, and that does not go while it does.

A pin holds the windows that its bytes lie in. They can be unmapped when nobody holds them any more, and only
`revoke` takes them away before: then the client is gone, and what it shared stays mapped here until the
holder lets go. Pages that are pinned to be written to count as written from then until they are released,
for who knows when the holder writes.

Holders are named, and may be in any thread. All of this happens within the card's gate.
"""

import errno
from contextlib import contextmanager
from dataclasses import dataclass

from cpython.buffer cimport PyBuffer_FillInfo
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, realloc

from device._gate cimport Gate
from device.dma._counts cimport SUBPAGE_SHIFT, PinnedPages
from device.dma._dirty cimport DirtyLog
from device.dma._files cimport Mapping, SharedFiles
from device.dma._table cimport Window, WindowTable

from device.errors import DeviceError


# Spans of windows that pins hold at a time: 64 of the chains with most descriptors. Whoever unmaps looks at
# each of them.
MAX_PINS = 1 << 16

# Pages of 4 KiB that they hold: 8 GiB, two of the longest chains that virtio knows. Each is marked in the log
# of writes whenever that is reported.
MAX_PINNED_PAGES = 1 << 21

# Names of holders that a refusal tells.
MAX_TOLD = 4

cdef enum:
    READ = 1                    # DMA_READ and DMA_WRITE of _windows
    WRITE = 2
    HERE = 0                    # backings of files; below -1 those of borrowed memory
    NOWHERE = -1

cdef uint64_t LAST = <uint64_t> -1
cdef uint64_t SUBPAGE = 1 << SUBPAGE_SHIFT


class PinnedError(DeviceError):
    """EBUSY: what is to go is pinned. `first` to `last` are the addresses that are to go."""

    def __init__(self, first, last, holders):
        super().__init__(errno.EBUSY, f"memory at {first:#x} to {last:#x} is held by {holders}")
        self.first, self.last, self.holders = first, last, holders


@dataclass(frozen=True, slots=True)
class PinCounters:
    """Pages of 4 KiB pinned and released so far, a page as often as that happened to it; a huge page counts
    as what it consists of (vmstat's nr_foll_pin_acquired and nr_foll_pin_released). Equal when nothing is
    pinned.
    """

    acquired: int
    released: int


cdef class Part:
    """Bytes of a mapping, which stays for as long as somebody looks at them."""

    def __getbuffer__(self, Py_buffer *buffer, int flags):
        PyBuffer_FillInfo(buffer, self, self._start, self._length, self._readonly, flags)


cdef class Pin:
    """Memory that is held until `release`, or the end of the block.

    `views` are its bytes in order, a memoryview for each window that they lie in; empty for a pin that was
    taken without. `revoked`: the client is gone, whose memory this was; nobody looks at it any more.
    """

    def __init__(self):
        raise TypeError("DmaWindows.pin makes pins")

    def __dealloc__(self):
        free(self._pieces)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.release()

    @property
    def spans(self):
        """What is held, as (iova, length) for each window."""
        return [(self._pieces[i].iova, self._pieces[i].length) for i in range(self._count)]

    def release(self):
        """Hold it no longer: the views are of no use from now on. Any thread may; twice is once."""
        gate = self._pins.gate
        if gate is None:
            self._pins.release(self)
        else:
            with gate:
                self._pins.release(self)

    cdef bint _overlaps(self, uint64_t first, uint64_t last) noexcept:
        cdef size_t i
        for i in range(self._count):
            if self._pieces[i].iova <= last and self._pieces[i].iova + (self._pieces[i].length - 1) >= first:
                return True
        return False


cdef class Pins:
    """Those of one card's windows. Callers hold the card's gate.

    `spans` are held, by pins that are revoked as well.
    """

    def __cinit__(self, WindowTable table not None, SharedFiles files not None):
        self._table, self._files = table, files
        self._pages = {}
        self._held = {}

    @property
    def counters(self):
        """PinCounters of this moment."""
        return PinCounters(self.acquired, self.released)

    def __len__(self):
        """Pins that are not released."""
        return len(self._held)

    def maybe_pinned(self, uint64_t iova):
        """Whether the page at `iova` may be pinned, through whatever window of the same file; never False for
        one that is. False where there is no window with memory.
        """
        cdef Window *w = self._table.find(iova)
        if w == NULL or iova < w.iova or w.backing == NOWHERE:
            return False
        pages = self._pages.get(w.backing)
        return pages is not None and (<PinnedPages> pages).maybe_pinned(w.offset + (iova - w.iova))

    # --- what is to go

    cpdef int check(self, uint64_t first=0, uint64_t last=LAST) except -1:
        """PinnedError if something is pinned that these addresses have."""
        if self._in_windows and (pins := self._held_in(first, last)):
            names = list(dict.fromkeys([(<Pin> pin).who for pin in pins]))
            more = f" and {len(names) - MAX_TOLD} more" if len(names) > MAX_TOLD else ""
            raise PinnedError(first, last, ", ".join(names[:MAX_TOLD]) + more)
        return 0

    @contextmanager
    def leaving(self, uint64_t first, uint64_t last, told):
        """Within the block nothing new is pinned at these addresses (EAGAIN).

        `told()` is called, with the gate held and by any thread, once nothing is pinned there any more. One
        such block at a time: RuntimeError.
        """
        gate = self.gate
        if gate is None:
            self._leave(first, last, told)
        else:
            with gate:
                self._leave(first, last, told)
        try:
            yield
        finally:
            if gate is None:
                self._told = None
            else:
                with gate:
                    self._told = None

    def _leave(self, uint64_t first, uint64_t last, told):
        if self._told is not None:
            raise RuntimeError("windows are leaving already")
        self._leaving_first, self._leaving_last, self._told = first, last, told
        self._in_the_way = len(self._held_in(first, last))
        if self._in_the_way == 0:
            told()

    cdef list _held_in(self, uint64_t first, uint64_t last):
        """The pins in windows that have some of these addresses."""
        return [
            pin for pin in self._held if not (<Pin> pin).revoked and (<Pin> pin)._overlaps(first, last)]

    # --- pins

    cdef Pin take(self, list spans, str who):
        """Pin what `spans` (iova, length, prot) have, all or nothing; DeviceError as DmaWindows.pin says."""
        cdef Pin pin = Pin.__new__(Pin)
        pin._pins, pin.who, pin.views = self, who, []
        for iova, length, prot in spans:
            self._find(pin, iova, length, prot)
        if self._told is not None and pin._overlaps(self._leaving_first, self._leaving_last):
            raise DeviceError(errno.EAGAIN, f"{who}: this memory is about to go")
        if self.spans + pin._count > MAX_PINS:
            raise DeviceError(errno.ENOSPC, f"{who}: pins hold {MAX_PINS} spans at most")
        if self.acquired - self.released + pin.pages > MAX_PINNED_PAGES:
            raise DeviceError(errno.ENOMEM, f"{who}: pins hold {MAX_PINNED_PAGES} pages at most")
        self._count_pages(pin)
        self._held[pin] = None
        self.acquired += pin.pages
        self.spans += pin._count
        self._in_windows += pin._count
        self._mark(pin)
        return pin

    cdef int _find(self, Pin pin, uint64_t iova, uint64_t length, uint32_t prot) except -1:
        """Add the pieces of a span to a pin that is being made."""
        cdef uint64_t last = iova + (length - 1), run, at = iova
        cdef Piece *pieces
        cdef Window *w
        if length == 0 or prot == 0 or prot & ~<uint32_t> (READ | WRITE):
            raise DeviceError(errno.EINVAL, f"pinning {length:#x} bytes with permissions {prot:#x}")
        while True:
            w = self._table.find(at)
            if last < iova or w == NULL or at < w.iova or (w.prot & prot) != prot:
                raise DeviceError(
                    errno.EFAULT, f"pinning {length:#x} bytes at {iova:#x}: not in windows that allow it")
            if w.backing == NOWHERE:
                raise DeviceError(errno.EOPNOTSUPP, f"the memory at {at:#x} is reached by message only")
            if (self._files.backings[w.backing].lost[0] if w.backing >= HERE
                    else self._files.lost_flag(-2 - w.backing)[0]):
                raise DeviceError(errno.EFAULT, f"the client has truncated the file of the memory at {at:#x}")
            run = min(last, w.last) - at + 1
            if pin._count & (pin._count - 1) == 0:      # a power of two, or none: there is no room left
                pieces = <Piece *> realloc(pin._pieces, max(2 * pin._count, 1) * sizeof(Piece))
                if pieces == NULL:
                    raise MemoryError
                pin._pieces = pieces
            pin._pieces[pin._count] = Piece(
                iova=at, length=run, offset=w.offset + (at - w.iova), prot=prot, backing=w.backing)
            pin._count += 1
            pin.pages += ((at + (run - 1)) >> SUBPAGE_SHIFT) - (at >> SUBPAGE_SHIFT) + 1
            if w.last >= last:
                return 0
            if pin._count > MAX_PINS:
                raise DeviceError(errno.ENOSPC, f"{pin.who}: pins hold {MAX_PINS} spans at most")
            at = w.last + 1

    cdef int _count_pages(self, Pin pin) except -1:
        cdef size_t i
        for i in range(pin._count):
            try:
                self._pages_of(pin._pieces[i].backing).pin(pin._pieces[i].offset, pin._pieces[i].length)
            except BaseException:
                self._forget_unused(pin._pieces[i].backing)
                self._uncount(pin, i)
                raise
        return 0

    cdef PinnedPages _pages_of(self, int backing):
        pages = self._pages.get(backing)
        if pages is None:
            pages = self._pages[backing] = PinnedPages(self._files.page_size(
                self._files.backings[backing].guard if backing >= HERE else -2 - backing))
        return pages

    cdef void _uncount(self, Pin pin, size_t pieces) noexcept:
        """The first pieces of a pin."""
        cdef size_t i
        for i in range(pieces):
            self._pages_of(pin._pieces[i].backing).unpin(pin._pieces[i].offset, pin._pieces[i].length)
            self._forget_unused(pin._pieces[i].backing)

    cdef void _forget_unused(self, int backing) noexcept:
        """A backing without pins: its number may be given to another one."""
        cdef PinnedPages pages = self._pages.get(backing)
        if pages is not None and pages.spans == 0:
            del self._pages[backing]

    cdef void release(self, Pin pin) noexcept:
        if pin.released:
            return
        for view in pin.views:
            try:
                view.release()
            except BufferError:
                pass                    # somebody looks at it still; the memory stays for as long
        pin.views, pin.released = [], True
        del self._held[pin]
        self.released += pin.pages
        self.spans -= pin._count
        if pin.revoked:
            return
        self._mark(pin)
        self._uncount(pin, pin._count)
        self._in_windows -= pin._count
        if self._told is not None and pin._overlaps(self._leaving_first, self._leaving_last):
            self._in_the_way -= 1
            if self._in_the_way == 0:
                self._told()

    cdef void revoke(self) noexcept:
        """All windows are about to go, held or not: whoever waits for that need not any more."""
        for pin in self._held:
            (<Pin> pin).revoked = True
        self._pages.clear()
        self._in_windows = 0
        if self._told is not None and self._in_the_way:
            self._in_the_way = 0
            self._told()

    # --- what is written to

    cdef void mark_held(self) noexcept:
        """What is pinned to be written to may have been."""
        for pin in self._held:
            if not (<Pin> pin).revoked:
                self._mark(pin)

    cdef void _mark(self, Pin pin) noexcept:
        cdef size_t i
        if self.log is not None:
            for i in range(pin._count):
                if pin._pieces[i].prot & WRITE:
                    self.log.mark(pin._pieces[i].iova, pin._pieces[i].length)

    # --- views

    cdef int lend_views(self, Pin pin) except -1:
        """Give a new pin its views, or take it back."""
        cdef size_t i
        try:
            for i in range(pin._count):
                pin.views.append(memoryview(self._part(&pin._pieces[i])))
        except BaseException:
            self.release(pin)
            raise
        return 0

    cdef Part _part(self, Piece *piece):
        cdef Part part = Part.__new__(Part)
        cdef uint64_t start, end
        part._length, part._readonly = piece.length, not piece.prot & WRITE
        if piece.backing >= HERE:
            part._mapping = self._files.keep(piece.backing)
            part._start = part._mapping.start + (piece.offset - self._files.backings[piece.backing].first)
        else:
            start = piece.offset & ~(SUBPAGE - 1)
            end = (piece.offset + piece.length + SUBPAGE - 1) & ~(SUBPAGE - 1)
            part._mapping = self._files.keep_copy(
                <uint8_t *> start, end - start, self._files.page_size(-2 - piece.backing))
            part._start = part._mapping.start + (piece.offset - start)
        return part
