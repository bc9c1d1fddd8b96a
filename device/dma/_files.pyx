# cython: language_level=3
"""The files behind DMA windows: each is mapped once, whole, however many windows point into it.

A client may truncate a file that it shares: see _sigbus.h. What it has truncated is lost, and says so.

A mapping goes with the last window on it, unless somebody keeps it: then it stays, guarded, until nobody
does.
"""

import errno
import os

cimport cython
from libc.errno cimport errno as c_errno
from libc.stdint cimport int32_t, uint8_t, uint64_t
from libc.stdlib cimport calloc, free
from posix.fcntl cimport F_GETFL, fcntl
from posix.mman cimport MAP_FAILED, MAP_SHARED, PROT_READ, PROT_WRITE, mmap, munmap
from posix.stat cimport S_ISBLK, S_ISCHR, S_ISREG, fstat, struct_stat
from posix.types cimport off_t

from device.errors import DeviceError


cdef extern from "<sys/mman.h>" nogil:
    int MAP_NORESERVE
    int MREMAP_MAYMOVE
    void *mremap(void *start, size_t length, size_t new_length, int flags)

cdef extern from "_sigbus.h" nogil:
    int trionic_guard_add(void *start, size_t length, size_t page)
    void trionic_guard_remove(int slot)
    const int *trionic_guard_lost(int slot)
    size_t trionic_guard_page(int slot)
    const int32_t *trionic_losses_so_far()

cdef extern from "_filesystems.h" nogil:
    bint trionic_is_local(int fd)
    size_t trionic_page_of(int fd)


MAX_BACKINGS = 1024             # distinct files; a machine has a handful, and each is mapped whole
MAX_MAPPED = 1 << 43            # bytes of them: 8 TiB, of the 128 TiB that a process has for all its cards

NO_GUARD = "no guard left for more shared memory"


cdef class Mapping:
    """Memory that is unmapped with this object."""

    def __dealloc__(self):
        trionic_guard_remove(self.guard)
        munmap(self.start, self.length)


cdef Mapping _mapping(uint8_t *start, uint64_t length, int guard):
    """Which owns the memory and its guard from now on."""
    mapping = Mapping()
    mapping.start, mapping.length, mapping.guard = start, length, guard
    return mapping


@cython.no_gc
cdef class SharedFiles:
    """Those of one card's windows."""

    def __cinit__(self):
        self._kept = {}
        self._guards = set()
        self.losses = trionic_losses_so_far()
        self.backings = <Backing *> calloc(MAX_BACKINGS, sizeof(Backing))
        if self.backings == NULL:
            raise MemoryError

    def __dealloc__(self):
        cdef size_t i
        for i in range(self._count):
            if self.backings[i].references:
                self.backings[i].references = 1
                self.release(<int> i)
        free(self.backings)
        for guard in self._guards:      # it would answer for whatever is mapped there next
            trionic_guard_remove(guard)

    cdef int acquire(self, int fd, uint64_t offset, uint64_t size, bint writable) except -2:
        """The index of a backing that holds these bytes of the file; DeviceError as DmaWindows.map says."""
        cdef Backing *b
        cdef Backing *slot = NULL
        cdef size_t i
        cdef int index = -1
        cdef uint64_t first = 0, length
        cdef void *start
        cdef struct_stat info
        cdef int access
        cdef bint whole
        if not trionic_is_local(fd):
            self._refuse(fd)
        access = fcntl(fd, F_GETFL)
        if access < 0 or fstat(fd, &info) < 0:
            raise DeviceError(c_errno, f"the window's file descriptor: {os.strerror(c_errno)}")
        access &= os.O_ACCMODE
        if access == os.O_WRONLY or (writable and access != os.O_RDWR):
            raise DeviceError(
                errno.EACCES, "the window's file descriptor does not allow the access the window promises")
        whole = S_ISREG(info.st_mode)
        if whole:
            length = info.st_size
            if size > length or offset > length - size:
                raise DeviceError(
                    errno.EINVAL,
                    f"the window needs the file up to {offset + size:#x}; it ends at {length:#x}")
        elif S_ISCHR(info.st_mode) or S_ISBLK(info.st_mode):
            first, length = offset, size        # a device file has no size to map whole
        else:
            raise DeviceError(
                errno.EINVAL, "the window's file descriptor is not something that can be mapped")
        for i in range(self._count):
            b = &self.backings[i]
            if b.references == 0:
                slot = b if slot == NULL else slot
            elif whole and b.device == info.st_dev and b.inode == info.st_ino and b.access == access:
                if b.length < length or b.lost[0]:
                    self._remap(<int> i, fd, max(b.length, length))
                b.references += 1
                return <int> i
        if slot == NULL:
            if self._count == MAX_BACKINGS:
                raise DeviceError(errno.ENOSPC, f"windows already use {MAX_BACKINGS} different files")
            slot = &self.backings[self._count]
            self._count += 1
        start = self._mmap(fd, first, length, access)
        slot.device = info.st_dev if whole else 0
        slot.inode = info.st_ino if whole else 0
        slot.access = access
        slot.start, slot.first, slot.length = <uint8_t *> start, first, length
        slot.guard = trionic_guard_add(start, length, trionic_page_of(fd))
        if slot.guard < 0:
            munmap(start, length)
            raise DeviceError(errno.ENOSPC, NO_GUARD)
        slot.lost = trionic_guard_lost(slot.guard)
        slot.references = 1
        return <int> (slot - self.backings)

    cdef void *_mmap(self, int fd, uint64_t first, uint64_t length, int access) except NULL:
        cdef int protection = PROT_READ | (PROT_WRITE if access == os.O_RDWR else 0)
        cdef void *start
        if length > MAX_MAPPED or self._mapped() > MAX_MAPPED - length:
            raise DeviceError(errno.ENOMEM, f"windows may use files of {MAX_MAPPED:#x} bytes together")
        start = mmap(NULL, length, protection, MAP_SHARED | MAP_NORESERVE, fd, <off_t> first)
        if start == MAP_FAILED:
            raise DeviceError(
                c_errno, f"mapping {length:#x} bytes of a window's file failed: {os.strerror(c_errno)}")
        return start

    cdef uint64_t _mapped(self) noexcept:
        cdef size_t i
        cdef uint64_t total = 0
        for i in range(self._count):
            if self.backings[i].references:
                total += self.backings[i].length
        return total

    def _refuse(self, int fd):
        try:
            os.fstatvfs(fd)
        except OSError as error:
            raise DeviceError(error.errno, f"the window's file descriptor: {error.strerror}") from None
        raise DeviceError(
            errno.EINVAL, "the window's file is neither memory nor on a disk of this machine")

    cdef int _remap(self, int index, int fd, uint64_t length) except -1:
        """The file has grown, or was truncated and has pages again: map it anew, no shorter than before.
        Windows refer to it by index, so they follow.
        """
        cdef Backing *b = &self.backings[index]
        cdef void *start = self._mmap(fd, 0, length, b.access)
        cdef int guard = trionic_guard_add(start, length, trionic_page_of(fd))
        if guard < 0:
            munmap(start, length)
            raise DeviceError(errno.ENOSPC, NO_GUARD)
        self._let_go(index)
        b.start, b.length, b.guard, b.lost = <uint8_t *> start, length, guard, trionic_guard_lost(guard)
        return 0

    cdef void release(self, int index) noexcept:
        """One window less uses this backing."""
        cdef Backing *b = &self.backings[index]
        b.references -= 1
        if b.references == 0:
            self._let_go(index)
            b.start = NULL

    cdef void _let_go(self, int index) noexcept:
        """Of the backing's memory, which is another one from now on, or none."""
        cdef Backing *b = &self.backings[index]
        if index in self._kept:
            del self._kept[index]
        else:
            trionic_guard_remove(b.guard)
            munmap(b.start, b.length)

    cdef Mapping keep(self, int index):
        """The backing's memory, which stays for as long as the object does."""
        cdef Backing *b = &self.backings[index]
        if index not in self._kept:
            self._kept[index] = _mapping(b.start, b.length, b.guard)
        return self._kept[index]

    # --- memory that somebody else mapped

    cdef int guard(self, void *start, uint64_t length, size_t page) except -1:
        """Have faults in this memory caught, too; returns what `unguard` needs."""
        cdef int guard = trionic_guard_add(start, length, page)
        if guard < 0:
            raise DeviceError(errno.ENOSPC, NO_GUARD)
        self._guards.add(guard)
        return guard

    cdef void unguard(self, int guard) noexcept:
        self._guards.discard(guard)
        trionic_guard_remove(guard)

    cdef const int *lost_flag(self, int guard) noexcept nogil:
        return trionic_guard_lost(guard)

    cdef size_t page_size(self, int guard) noexcept:
        """Bytes of a page of what is guarded."""
        return trionic_guard_page(guard)

    cdef Mapping keep_copy(self, uint8_t *start, uint64_t length, size_t page):
        """The same pages, whole ones, mapped a second time. DeviceError(EOPNOTSUPP) where Linux cannot:
        memory that is not shared, and huge pages (mm/mremap.c).
        """
        cdef void *copy = mremap(start, 0, length, MREMAP_MAYMOVE)
        cdef int guard
        if copy == MAP_FAILED:
            raise DeviceError(errno.EOPNOTSUPP, f"memory that is lent cannot be kept: {os.strerror(c_errno)}")
        guard = trionic_guard_add(copy, length, page)
        if guard < 0:
            munmap(copy, length)
            raise DeviceError(errno.ENOSPC, NO_GUARD)
        return _mapping(<uint8_t *> copy, length, guard)

    cdef int lost(self):
        """How many files have lost pages."""
        cdef size_t i
        return sum(1 for i in range(self._count) if self.backings[i].references and self.backings[i].lost[0])
