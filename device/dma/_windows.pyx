# cython: language_level=3
"""DMA windows: which I/O virtual addresses the client has mapped, and where their bytes are in this process.

A sorted table answers by containment of the whole span, in arithmetic that cannot wrap. Each file behind the
windows is mapped once, whole, however many windows point into it: mapping a 4 KiB window costs a table
insertion and no system call but fstat, and windows that adjoin in the file adjoin in memory.

Callers hold the card's gate. Pointers are good until the gate is left.
"""

import errno
import fcntl
import os
import stat

from libc.errno cimport errno as c_errno
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, realloc
from libc.string cimport memcpy, memmove
from posix.mman cimport MAP_FAILED, MAP_SHARED, PROT_READ, PROT_WRITE, mmap, munmap
from posix.types cimport off_t

from device.errors import DeviceError


cdef extern from "<sys/mman.h>" nogil:
    int MAP_NORESERVE

cdef extern from "_sigbus.h" nogil:
    int trionic_guard_add(void *start, size_t length, size_t page)
    void trionic_guard_remove(int slot)
    int trionic_guard_lost(int slot)
    size_t trionic_page_of(int fd)


PAGE_SIZE = 4096                # what vfio-user's pgsizes capability must include; windows are aligned to it

MAX_WINDOWS = 1 << 20           # 48 MB of table; a vIOMMU with 4 KiB pages does reach hundreds of thousands
MAX_BACKINGS = 1024             # distinct files; a machine has a handful, and each is mapped whole

PROT_DMA_READ = DMA_READ
PROT_DMA_WRITE = DMA_WRITE


cdef class DmaWindows:
    """The table of one card's windows; at most `limit` of them. `on_map()` is called after each new one."""

    def __cinit__(self, size_t limit=MAX_WINDOWS):
        self.limit = limit
        self._backings = <Backing *> calloc(MAX_BACKINGS, sizeof(Backing))
        if self._backings == NULL:
            raise MemoryError

    def __dealloc__(self):
        cdef size_t i
        if self._backings != NULL:
            for i in range(self._backing_count):
                if self._backings[i].references:
                    self._backings[i].references = 1
                    self._release_backing(<int> i)
        free(self._backings)
        free(self._windows)

    def __len__(self):
        return self._count

    def windows(self):
        """The windows as (iova, size, prot, has_fd), in order of address."""
        return [(w.iova, w.last - w.iova + 1, w.prot, w.backing >= 0) for w in self._windows[:self._count]]

    # --- changes

    def map(self, uint64_t iova, uint64_t size, uint32_t prot, fd=None, uint64_t fd_offset=0):
        """Map `size` bytes at `iova` to `fd` at `fd_offset`; `fd` is borrowed, None: message-only.

        Raises DeviceError: EINVAL (empty, unaligned, wrapping, no permission bits, beyond the end of the
        file), EEXIST (overlaps a window), ENOSPC (table full), EACCES (write permission asked of a read-only
        fd), or what mmap says.
        """
        cdef uint64_t last = iova + size - 1
        cdef Py_ssize_t at
        cdef int backing = -1
        cdef Window *grown
        if size == 0 or last < iova:
            raise DeviceError(errno.EINVAL, f"a window of {size:#x} bytes at {iova:#x} is empty or wraps")
        if (iova | size | fd_offset) & (PAGE_SIZE - 1):
            raise DeviceError(
                errno.EINVAL,
                f"window {iova:#x}+{size:#x}, file offset {fd_offset:#x}: not aligned to {PAGE_SIZE}")
        if prot == 0 or prot & ~<uint32_t> (DMA_READ | DMA_WRITE):
            raise DeviceError(errno.EINVAL, f"window permissions {prot:#x}: read (1) and write (2) are known")
        if self._count >= self.limit:
            raise DeviceError(errno.ENOSPC, f"the table holds {self.limit} windows and is full")
        at = self._find(iova)           # the first window that ends at or after iova
        if at < <Py_ssize_t> self._count and self._windows[at].iova <= last:
            raise DeviceError(
                errno.EEXIST, f"window {iova:#x}+{size:#x} overlaps one at {self._windows[at].iova:#x}")
        if self._count == self._capacity:
            grown = <Window *> realloc(self._windows, max(64, 2 * self._capacity) * sizeof(Window))
            if grown == NULL:
                raise MemoryError
            self._windows = grown
            self._capacity = max(64, 2 * self._capacity)
        if fd is not None:
            backing = self._acquire_backing(fd, fd_offset, size, prot)
        memmove(&self._windows[at + 1], &self._windows[at], (self._count - at) * sizeof(Window))
        self._windows[at] = Window(iova=iova, last=last, offset=fd_offset, prot=prot, backing=backing)
        self._count += 1
        self.generation += 1
        if self.on_map is not None:
            self.on_map()

    def unmap(self, uint64_t iova, uint64_t size):
        """Remove every window inside the span; returns the number of bytes that were mapped.

        A span that matches nothing removes nothing and is no error: clients with a vIOMMU send such spans.
        Raises DeviceError(EINVAL) when the span is empty, wraps, or would cut a window in two.
        """
        cdef uint64_t last = iova + size - 1
        cdef uint64_t total = 0
        cdef Py_ssize_t first, end, i
        if size == 0 or last < iova:
            raise DeviceError(errno.EINVAL, f"a span of {size:#x} bytes at {iova:#x} is empty or wraps")
        first = self._find(iova)
        end = first
        while end < <Py_ssize_t> self._count and self._windows[end].iova <= last:
            if self._windows[end].iova < iova or self._windows[end].last > last:
                raise DeviceError(
                    errno.EINVAL,
                    f"unmapping {iova:#x}+{size:#x} would cut the window at {self._windows[end].iova:#x}")
            end += 1
        if end == first:
            return 0
        for i in range(first, end):
            total += self._windows[i].last - self._windows[i].iova + 1
            self._release_backing(self._windows[i].backing)
        memmove(&self._windows[first], &self._windows[end], (self._count - end) * sizeof(Window))
        self._count -= end - first
        self._hit = 0
        self.generation += 1
        return total

    def unmap_all(self):
        """Remove every window; returns how many there were."""
        cdef size_t i
        count = self._count
        for i in range(self._count):
            self._release_backing(self._windows[i].backing)
        self._count = 0
        self._hit = 0
        self.generation += 1
        return count

    # --- accesses from Python

    def read(self, uint64_t iova, size_t length):
        """Read `length` bytes; raises DeviceError(EFAULT) unless readable windows hold them all."""
        data = PyBytes_FromStringAndSize(NULL, length)
        if self.copy_in(PyBytes_AS_STRING(data), iova, length) != FAULT_NONE:
            raise DeviceError(
                errno.EFAULT, f"DMA read of {length} bytes at {iova:#x}: not in readable windows")
        return data

    def write(self, uint64_t iova, data):
        """Write `data`; raises DeviceError(EFAULT), with nothing written, unless writable windows hold it."""
        cdef const uint8_t[::1] view = data
        cdef uint64_t length = view.shape[0]
        if length and self.copy_out(iova, &view[0], length) != FAULT_NONE:
            raise DeviceError(
                errno.EFAULT, f"DMA write of {length} bytes at {iova:#x}: not in writable windows")

    def lost_backings(self):
        """How many files lost pages under us because the peer truncated them; those bytes read as zero."""
        cdef size_t i
        return sum(1 for i in range(self._backing_count)
                   if self._backings[i].references and trionic_guard_lost(self._backings[i].guard))

    # --- lookups without the GIL

    cdef Py_ssize_t _find(self, uint64_t iova) noexcept nogil:
        """Index of the first window whose last byte is at or after `iova`."""
        cdef size_t low = 0, high = self._count, middle
        while low < high:
            middle = (low + high) // 2
            if self._windows[middle].last < iova:
                low = middle + 1
            else:
                high = middle
        return low

    cdef int span(self, uint64_t iova, uint64_t length, uint32_t prot,
                  uint8_t **where, uint64_t *run) noexcept nogil:
        """Where `iova` is, and how many of `length` bytes its window holds; or a FAULT."""
        cdef Window *w
        cdef uint64_t left
        cdef size_t at = self._hit
        if at >= self._count or iova < self._windows[at].iova or iova > self._windows[at].last:
            at = self._find(iova)
            if at >= self._count or iova < self._windows[at].iova:
                return FAULT_UNMAPPED
            self._hit = at
        w = &self._windows[at]
        if (w.prot & prot) != prot:
            return FAULT_PROTECTION
        if w.backing < 0:
            return FAULT_MESSAGE_ONLY
        left = w.last - iova            # bytes after this one
        run[0] = length if length == 0 or length - 1 <= left else left + 1
        where[0] = (self._backings[w.backing].start
                    + (w.offset - self._backings[w.backing].first) + (iova - w.iova))
        return FAULT_NONE

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

    cdef int copy_in(self, void *target, uint64_t iova, uint64_t length) noexcept nogil:
        cdef uint8_t *part
        cdef uint64_t run, done = 0
        cdef int fault
        while done < length:
            if iova + done < iova:
                return FAULT_UNMAPPED
            fault = self.span(iova + done, length - done, DMA_READ, &part, &run)
            if fault != FAULT_NONE:
                return fault
            memcpy(<uint8_t *> target + done, part, run)
            done += run
        return FAULT_NONE

    cdef int copy_out(self, uint64_t iova, const void *source, uint64_t length) noexcept nogil:
        cdef uint8_t *part
        cdef uint64_t run, done = 0
        cdef int fault
        while done < length:
            if iova + done < iova:
                return FAULT_UNMAPPED
            fault = self.span(iova + done, length - done, DMA_WRITE, &part, &run)
            if fault != FAULT_NONE:
                return fault
            done += run
        done = 0
        while done < length:
            self.span(iova + done, length - done, DMA_WRITE, &part, &run)
            memcpy(part, <const uint8_t *> source + done, run)
            done += run
        return FAULT_NONE

    # --- files

    cdef int _acquire_backing(self, int fd, uint64_t offset, uint64_t size, uint32_t prot) except -2:
        cdef Backing *b
        cdef Backing *slot = NULL
        cdef size_t i
        cdef int index = -1
        cdef uint64_t first = 0, length
        cdef void *start
        try:
            info = os.fstat(fd)
            access = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
        except OSError as error:
            raise DeviceError(error.errno, f"the window's file descriptor: {error.strerror}") from None
        if access == os.O_WRONLY or (prot & DMA_WRITE and access != os.O_RDWR):
            raise DeviceError(
                errno.EACCES, "the window's file descriptor does not allow the access the window promises")
        whole = stat.S_ISREG(info.st_mode)
        if whole:
            length = info.st_size
            if size > length or offset > length - size:
                raise DeviceError(
                    errno.EINVAL,
                    f"the window needs the file up to {offset + size:#x}; it ends at {length:#x}")
        elif stat.S_ISCHR(info.st_mode) or stat.S_ISBLK(info.st_mode):
            first, length = offset, size        # a device file has no size to map whole
        else:
            raise DeviceError(
                errno.EINVAL, "the window's file descriptor is not something that can be mapped")
        for i in range(self._backing_count):
            b = &self._backings[i]
            if b.references == 0:
                slot = b if slot == NULL else slot
            elif whole and b.device == info.st_dev and b.inode == info.st_ino and b.access == access:
                if b.length < length:
                    self._remap(<int> i, fd, length)
                b.references += 1
                return <int> i
        if slot == NULL:
            if self._backing_count == MAX_BACKINGS:
                raise DeviceError(errno.ENOSPC, f"windows already use {MAX_BACKINGS} different files")
            slot = &self._backings[self._backing_count]
            self._backing_count += 1
        start = self._mmap(fd, first, length, access)
        slot.device = info.st_dev if whole else 0
        slot.inode = info.st_ino if whole else 0
        slot.access = access
        slot.start, slot.first, slot.length = <uint8_t *> start, first, length
        slot.references = 1
        slot.guard = trionic_guard_add(start, length, trionic_page_of(fd))
        if slot.guard < 0:
            slot.references = 0
            munmap(start, length)
            raise DeviceError(errno.ENOSPC, "no guard left for another shared file")
        return <int> (slot - self._backings)

    cdef void *_mmap(self, int fd, uint64_t first, uint64_t length, int access) except NULL:
        cdef int protection = PROT_READ | (PROT_WRITE if access == os.O_RDWR else 0)
        cdef void *start = mmap(NULL, length, protection, MAP_SHARED | MAP_NORESERVE, fd, <off_t> first)
        if start == MAP_FAILED:
            raise DeviceError(
                c_errno, f"mapping {length:#x} bytes of a window's file failed: {os.strerror(c_errno)}")
        return start

    cdef int _remap(self, int index, int fd, uint64_t length) except -1:
        """The file has grown: map it whole again; windows refer to it by index, so they follow."""
        cdef Backing *b = &self._backings[index]
        cdef void *start = self._mmap(fd, 0, length, b.access)
        cdef int guard = trionic_guard_add(start, length, trionic_page_of(fd))
        if guard < 0:
            munmap(start, length)
            raise DeviceError(errno.ENOSPC, "no guard left for another shared file")
        trionic_guard_remove(b.guard)
        munmap(b.start, b.length)
        b.start, b.length, b.guard = <uint8_t *> start, length, guard
        return 0

    cdef void _release_backing(self, int index) noexcept:
        cdef Backing *b
        if index < 0:
            return
        b = &self._backings[index]
        b.references -= 1
        if b.references == 0:
            trionic_guard_remove(b.guard)
            munmap(b.start, b.length)
            b.start = NULL
