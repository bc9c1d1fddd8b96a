# cython: language_level=3
"""DMA windows: which I/O virtual addresses the client has mapped, and where their bytes are in this process.

A sorted table (see _table) answers by containment of the whole span, in arithmetic that cannot wrap. Each
file behind the windows is mapped once, whole, however many windows point into it: mapping a 4 KiB window
costs a table insertion and no system call but those that look at the file, and windows that adjoin in the
file adjoin in memory.

What lies in windows without memory here is asked of the client, by whatever `remote` knows to send it. Such
an access lets the gate go while it waits, and so must never be made for the sake of a reply that the client
waits for. When the answer comes the card may be another one: `epoch` tells, and the access is
FAULT_DISTURBED.

Callers hold the card's gate. Pointers are good until the gate is left or a copy is made.
"""

import errno
import logging
from functools import partial

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy

from device._atomic cimport load_int, load_int_after
from device._gate cimport Gate
from device.dma._dirty cimport DirtyLog, Marking
from device.dma._files cimport Backing, SharedFiles
from device.dma._pins cimport Pin, Pins
from device.dma._table cimport Place, Window, WindowTable

from device.dma.remote import UnwantedError, errno_of
from device.errors import DeviceError


PAGE_SIZE = 4096                # what vfio-user's pgsizes capability must include; windows are aligned to it

# A vIOMMU with 4 KiB pages does reach hundreds of thousands. 40 MiB of table if they come in order, 58 MiB at
# random, and never more than 160 MiB.
MAX_WINDOWS = 1 << 20

# Bytes asked of the client at once: vfio-user's max_data_xfer_size, which every peer grants by default.
DEFAULT_REMOTE_LIMIT = 1 << 20
MAX_REMOTE_LIMIT = 1 << 24      # each message is a bytes object, whatever a peer grants

PROT_DMA_READ = DMA_READ
PROT_DMA_WRITE = DMA_WRITE

log = logging.getLogger(__name__)


def _error(int fault, refusal):
    if fault == FAULT_DISTURBED:
        return DeviceError(errno.ECANCELED, "the card was reset or halted while the client was asked")
    if fault == FAULT_GONE:
        return DeviceError(errno.ENOTCONN, "the client is gone")
    if fault <= FAULT_REFUSED:
        return DeviceError(FAULT_REFUSED - fault, f"{refusal}, by the client's answer")
    return DeviceError(errno.EFAULT, refusal)


cdef class DmaWindows(Marking):
    """The table of one card's windows; at most `limit` of them. `on_map()` is called after each new one."""

    def __cinit__(self, size_t limit=MAX_WINDOWS):
        self.limit = limit
        self._remote_limit = DEFAULT_REMOTE_LIMIT
        self._files = SharedFiles()
        self._backings = self._files.backings
        self.losses = self._files.losses
        self._table = WindowTable()
        self.pins = Pins(self._table, self._files)

    @property
    def gate(self):
        """The card's, or None while there is no card."""
        return self.pins.gate

    @gate.setter
    def gate(self, Gate gate):
        self.pins.gate = gate

    def __len__(self):
        return self._table.count

    def windows(self):
        """The windows as (iova, size, prot, has_memory), in order of address."""
        cdef Place at = self._table.place(0)
        cdef Window *w = self._table.row(&at)
        listed = []
        while w != NULL:
            listed.append((w.iova, w.last - w.iova + 1, w.prot, w.backing != NO_BACKING))
            w = self._table.after(&at)
        return listed

    @property
    def table_bytes(self):
        """Memory that the table takes."""
        return self._table.bytes()

    @property
    def moved(self):
        """Rows and blocks of the table that changes have moved so far, to keep it in order."""
        return self._table.moved

    # --- changes

    def map(self, uint64_t iova, uint64_t size, uint32_t prot, fd=None, uint64_t fd_offset=0):
        """Map `size` bytes at `iova` to `fd` at `fd_offset`; `fd` is borrowed, None: message-only.

        Raises DeviceError: EINVAL (empty, unaligned, wrapping, no permission bits, beyond the end of the
        file), EEXIST (overlaps a window), ENOSPC (table full), EACCES (write permission asked of a read-only
        fd), or what mmap says.
        """
        cdef int backing = NO_BACKING
        self._check(iova, size, prot)
        if fd_offset & (PAGE_SIZE - 1):
            raise DeviceError(errno.EINVAL, f"file offset {fd_offset:#x}: not aligned to {PAGE_SIZE}")
        if fd is not None:
            backing = self._files.acquire(fd, fd_offset, size, prot & DMA_WRITE)
        self._insert(Window(iova=iova, last=iova + size - 1, offset=fd_offset, prot=prot, backing=backing))

    def map_memory(self, uint64_t iova, uint64_t size, uint32_t prot, uint64_t address,
                   size_t page_size=PAGE_SIZE):
        """Map `size` bytes at `iova` to memory at `address` of this process, mapped and unmapped by others.

        It must stay until `unmap` has returned. `page_size` is that of its file, which its owner may
        truncate. Raises DeviceError as `map` does.
        """
        self._check(iova, size, prot)
        if address == 0 or address & (PAGE_SIZE - 1) or address + size < address:
            raise DeviceError(errno.EINVAL, f"memory at {address:#x}+{size:#x} is no whole pages")
        if page_size < PAGE_SIZE or page_size & (page_size - 1):
            raise DeviceError(errno.EINVAL, f"pages of {page_size} bytes")
        guard = self._files.guard(<void *> address, size, page_size)
        self._insert(
            Window(iova=iova, last=iova + size - 1, offset=address, prot=prot, backing=BORROWED - guard))

    cdef int _check(self, uint64_t iova, uint64_t size, uint32_t prot) except -1:
        """DeviceError if a new window cannot be there."""
        cdef uint64_t last = iova + size - 1
        cdef Window *w
        if size == 0 or last < iova:
            raise DeviceError(errno.EINVAL, f"a window of {size:#x} bytes at {iova:#x} is empty or wraps")
        if (iova | size) & (PAGE_SIZE - 1):
            raise DeviceError(errno.EINVAL, f"window {iova:#x}+{size:#x}: not aligned to {PAGE_SIZE}")
        if prot == 0 or prot & ~<uint32_t> (DMA_READ | DMA_WRITE):
            raise DeviceError(errno.EINVAL, f"window permissions {prot:#x}: read (1) and write (2) are known")
        if self._table.count >= self.limit:
            raise DeviceError(errno.ENOSPC, f"the table holds {self.limit} windows and is full")
        w = self._table.find(iova)
        if w != NULL and w.iova <= last:
            raise DeviceError(errno.EEXIST, f"window {iova:#x}+{size:#x} overlaps one at {w.iova:#x}")
        return 0

    cdef int _insert(self, Window window) except -1:
        self.generation += 1            # first: the file may have been mapped anew for it
        try:
            self._table.insert(window)
        except MemoryError:
            self._release(window.backing)
            raise
        self._hit = NULL
        self._without_backing += window.backing == NO_BACKING
        if self.on_map is not None:
            self.on_map()
        return 0

    def pin(self, uint64_t iova, uint64_t length, uint32_t prot, str who not None):
        """Hold these bytes for `who` (a name for people) to read (1) or write (2): a Pin with views of them.

        Until it is released nothing of it is unmapped; a holder who waits for the client meanwhile waits for
        one that waits for him. Raises DeviceError: EINVAL (no bytes, no permissions), EFAULT (not in windows
        that allow it), EOPNOTSUPP (in windows without memory here, or memory that others mapped and that
        cannot be kept), EAGAIN (about to go), ENOSPC and ENOMEM (MAX_PINS, MAX_PINNED_PAGES).
        """
        cdef Pin pin = self.pins.take([(iova, length, prot)], who)
        self.pins.lend_views(pin)
        return pin

    def unmap(self, uint64_t iova, uint64_t size):
        """Remove every window inside the span; returns the number of bytes that were mapped.

        A span that matches nothing removes nothing and is no error: clients with a vIOMMU send such spans.
        Raises DeviceError(EINVAL) when the span is empty, wraps, or would cut a window in two; PinnedError
        while something in it is pinned.
        """
        cdef uint64_t last = iova + size - 1
        cdef uint64_t total = 0
        cdef Place start, end
        cdef Window *w
        cdef Window *at_last
        if size == 0 or last < iova:
            raise DeviceError(errno.EINVAL, f"a span of {size:#x} bytes at {iova:#x} is empty or wraps")
        start = self._table.place(iova)
        w = self._table.row(&start)
        if w == NULL or w.iova > last:
            return 0
        at_last = self._table.find(last)
        if at_last == NULL or at_last.iova > last or at_last.last == last:
            at_last = w                 # nothing is cut there
        if w.iova < iova or at_last.last > last:
            cut = w.iova if w.iova < iova else at_last.iova
            raise DeviceError(errno.EINVAL, f"unmapping {iova:#x}+{size:#x} would cut the window at {cut:#x}")
        self.pins.check(iova, last)
        end = start
        while w != NULL and w.iova <= last:
            total += w.last - w.iova + 1
            self._forget(w)
            w = self._table.after(&end)
        self._table.remove(start, end)
        self._hit = NULL
        self.generation += 1
        return total

    def unmap_all(self):
        """Remove every window, and revoke the pins; returns how many windows there were."""
        cdef Place at = self._table.place(0)
        cdef Window *w = self._table.row(&at)
        count = self._table.count
        self.pins.revoke()
        while w != NULL:
            self._forget(w)
            w = self._table.after(&at)
        self._table.clear()
        self._hit = NULL
        self.generation += 1
        self.disturb()
        return count

    cdef void _forget(self, Window *w) noexcept:
        """It is about to be removed."""
        self._without_backing -= w.backing == NO_BACKING
        self._release(w.backing)

    cdef void _release(self, int backing) noexcept:
        if backing <= BORROWED:
            self._files.unguard(BORROWED - backing)
        elif backing >= 0:
            self._files.release(backing)

    # --- the client's answers

    @property
    def remote(self):
        """The RemoteMemory behind windows without memory here, or None: then they cannot be reached."""
        return self._remote

    @remote.setter
    def remote(self, remote):
        self._remote = remote
        self._answering = remote is not None
        self.generation += 1
        if self._answering and self.on_map is not None:
            self.on_map()

    @property
    def remote_limit(self):
        """Bytes of the longest message, at most MAX_REMOTE_LIMIT; longer accesses take several."""
        return self._remote_limit

    @remote_limit.setter
    def remote_limit(self, uint64_t limit):
        if limit == 0:
            raise ValueError("messages of no bytes")
        self._remote_limit = min(limit, MAX_REMOTE_LIMIT)

    @property
    def by_message(self):
        """Whether some of the client's memory is reached only by asking it."""
        return self._answering and self._without_backing > 0

    cpdef void disturb(self) noexcept:
        """What was asked of the client before comes too late: whoever waits finds that out and gives up."""
        self.epoch += 1

    # --- the log of writes

    def log_start(self, uint64_t page_size):
        """Log which pages are written to from now on, and forget earlier logs.

        DeviceError(EINVAL) for pages that cannot be reported later: see DirtyLog.report.
        """
        log = DirtyLog()
        log.report(0, page_size, page_size)
        self.pins.log = log
        self.log_for_client(log)

    def log_stop(self):
        """Log no more, and forget what was logged."""
        self.pins.log = None
        self.log_for_client(None)

    def log_report(self, uint64_t iova, uint64_t length, uint64_t page_size):
        """DirtyLog.report; DeviceError(EINVAL) also while nothing is logged."""
        if not self.logging:
            raise DeviceError(errno.EINVAL, "no writes are logged")
        self.pins.mark_held()
        return self._log.report(iova, length, page_size)

    # --- accesses from Python

    def read(self, uint64_t iova, size_t length):
        """Read `length` bytes; raises DeviceError.

        EFAULT unless readable windows hold them all. By message also: ECANCELED when the card was reset or
        halted meanwhile, and what RemoteMemory raises.
        """
        data = PyBytes_FromStringAndSize(NULL, length)
        cdef int fault = self.copy_in(PyBytes_AS_STRING(data), iova, length)
        if fault != FAULT_NONE:
            raise _error(fault, f"DMA read of {length} bytes at {iova:#x}: not in readable windows")
        return data

    def write(self, uint64_t iova, data):
        """Write `data`; raises DeviceError(EFAULT), with nothing written, unless writable windows hold it.

        By message also the errors of `read`, and then a part may be written.
        """
        cdef const uint8_t[::1] view = data
        cdef uint64_t length = view.shape[0]
        cdef int fault = self.copy_out(iova, &view[0], length) if length else FAULT_NONE
        if fault != FAULT_NONE:
            raise _error(fault, f"DMA write of {length} bytes at {iova:#x}: not in writable windows")

    def lost_backings(self):
        """How many files lost pages because the client truncated them; their windows are served no more."""
        return self._files.lost()

    # --- lookups without the GIL

    cdef int span(self, uint64_t iova, uint64_t length, uint32_t prot,
                  uint8_t **where, uint64_t *run) noexcept nogil:
        """Where `iova` is, and how many of `length` bytes its window holds; or a FAULT.

        With FAULT_MESSAGE_ONLY the number is right, too.
        """
        cdef Window *w = self._hit
        cdef Backing *b
        cdef uint64_t left
        if w == NULL or iova < w.iova or iova > w.last:
            w = self._table.find(iova)
            if w == NULL or iova < w.iova:
                return FAULT_UNMAPPED
            self._hit = w
        if (w.prot & prot) != prot:
            return FAULT_PROTECTION
        left = w.last - iova            # bytes after this one
        run[0] = length if length == 0 or length - 1 <= left else left + 1
        if w.backing >= 0:
            b = &self._backings[w.backing]
            where[0] = b.start + (w.offset - b.first) + (iova - w.iova)
            return FAULT_UNMAPPED if b.lost[0] else FAULT_NONE
        if w.backing == NO_BACKING:
            return FAULT_MESSAGE_ONLY
        where[0] = <uint8_t *> w.offset + (iova - w.iova)
        return FAULT_UNMAPPED if self._files.lost_flag(BORROWED - w.backing)[0] else FAULT_NONE

    cdef uint8_t *contiguous(self, uint64_t iova, uint64_t length, uint32_t prot) noexcept nogil:
        """A pointer through which all `length` bytes can be reached, or NULL."""
        cdef uint8_t *start
        cdef uint8_t *part
        cdef uint64_t run, done
        if length == 0 or self.span(iova, length, prot, &start, &run) != FAULT_NONE:
            return NULL
        done = run
        while done < length:
            if (iova + done < iova
                    or self.span(iova + done, length - done, prot, &part, &run) != FAULT_NONE
                    or part != start + done):
                return NULL
            done += run
        return start

    cdef int reach(self, uint64_t iova, uint64_t length, uint32_t prot) noexcept nogil:
        """FAULT_NONE if all `length` bytes can be reached somehow, in pieces or by asking the client."""
        cdef uint8_t *part
        cdef uint64_t run, done = 0
        cdef int fault
        while done < length:
            if iova + done < iova:
                return FAULT_UNMAPPED
            fault = self.span(iova + done, length - done, prot, &part, &run)
            if fault != FAULT_NONE and (fault != FAULT_MESSAGE_ONLY or not self._answering):
                return fault
            done += run
        return FAULT_NONE

    cdef int unless_lost(self, int32_t before, uint64_t iova, uint64_t length, uint32_t prot) noexcept nogil:
        """A FAULT if these bytes were accessed since there were so many `losses`, and are lost now."""
        return FAULT_NONE if load_int_after(self.losses) == before else self.reach(iova, length, prot)

    cdef int copy_in(self, void *target, uint64_t iova, uint64_t length) noexcept nogil:
        cdef uint8_t *part
        cdef uint64_t run, done = 0
        cdef int fault
        cdef int32_t losses = load_int(self.losses)
        while done < length:
            if iova + done < iova:
                return FAULT_UNMAPPED
            fault = self.span(iova + done, length - done, DMA_READ, &part, &run)
            if fault == FAULT_NONE:
                memcpy(<uint8_t *> target + done, part, run)
            else:
                if fault == FAULT_MESSAGE_ONLY:
                    fault = self._by_message(iova + done, &run, <uint8_t *> target + done, NULL, True)
                if fault != FAULT_NONE:
                    return fault
            done += run
        return self.unless_lost(losses, iova, length, DMA_READ)

    cdef int copy_out(self, uint64_t iova, const void *source, uint64_t length) noexcept nogil:
        cdef uint8_t *part
        cdef uint64_t run, done = 0
        cdef int32_t losses = load_int(self.losses)
        cdef int fault = self.reach(iova, length, DMA_WRITE)
        if fault != FAULT_NONE:
            return fault
        while done < length:
            fault = self.span(iova + done, length - done, DMA_WRITE, &part, &run)
            if fault == FAULT_NONE:
                memcpy(part, <const uint8_t *> source + done, run)
                if self.marking:
                    self.mark(iova + done, run)
            else:
                if fault == FAULT_MESSAGE_ONLY:
                    fault = self._by_message(iova + done, &run, NULL, <const uint8_t *> source + done, True)
                if fault != FAULT_NONE:
                    return fault
            done += run
        return self.unless_lost(losses, iova, length, DMA_WRITE)

    cdef int _by_message(self, uint64_t iova, uint64_t *run, uint8_t *target, const uint8_t *source,
                         bint logged) noexcept nogil:
        """Have the client's bytes in `target`, or give it those in `source`; `run` shrinks to one message.

        `logged`: the guest's log is to hear of what is written.
        """
        if not self._answering:
            return FAULT_MESSAGE_ONLY
        run[0] = min(run[0], self._remote_limit)
        with gil:
            try:
                return self._ask(iova, run[0], target, source, logged)
            except BaseException:
                log.exception("DMA by message, %d bytes at %#x", run[0], iova)
                return FAULT_REFUSED - errno.EIO

    def still_asked(self, uint64_t epoch, uint64_t iova, uint64_t length, uint32_t prot):
        """Whether these bytes of one window are to be asked for as they were in that epoch."""
        cdef uint8_t *part
        cdef uint64_t run
        return (self.epoch == epoch and self.span(iova, length, prot, &part, &run) == FAULT_MESSAGE_ONLY
                and run >= length)

    cdef int _ask(self, uint64_t iova, uint64_t length, uint8_t *target, const uint8_t *source,
                  bint logged) except 1:
        cdef uint64_t epoch = self.epoch
        cdef Gate gate = self.pins.gate
        cdef int depth, fault = FAULT_NONE
        remote = self._remote
        data = None if source == NULL else PyBytes_FromStringAndSize(<const char *> source, length)
        if source != NULL:
            self.mark_for_client(iova, length)      # who asks while the message is on its way must know
        wanted = partial(self.still_asked, epoch, iova, length, DMA_READ if source == NULL else DMA_WRITE)
        self.unanswered += 1
        depth = gate.suspend() if gate is not None else 0
        try:
            if source == NULL:
                data = remote.read(iova, length, wanted)
            else:
                remote.write(iova, data, wanted)
        except UnwantedError:
            fault = FAULT_DISTURBED
        except DeviceError as error:
            fault = FAULT_GONE if error.errno == errno.ENOTCONN else FAULT_REFUSED - errno_of(error)
            log.debug("DMA by message, %d bytes at %#x: %s", length, iova, error)
        finally:
            if depth:
                with nogil:
                    gate.resume(depth)
            self.unanswered -= 1
        if source != NULL:
            self.mark_answered(iova, length, logged and fault == FAULT_NONE)
        if fault == FAULT_GONE and remote is self._remote and self._answering:
            self._answering = False
            self.generation += 1
        if self.epoch != epoch:
            return FAULT_DISTURBED
        if fault == FAULT_NONE and source == NULL:
            if not isinstance(data, bytes) or len(data) != length:
                return FAULT_REFUSED - errno.EIO
            memcpy(target, PyBytes_AS_STRING(data), length)
        return fault
