# cython: language_level=3, boundscheck=False, wraparound=False
"""Address space into which a device's memory is mapped, taken away and mapped again, in place; `_pages.pyi`
tells the promises.

All of it stays reserved from construction to `close`. A mapping is replaced by MAP_FIXED, which the kernel
does at once for every thread: whoever touches it meanwhile finds the one or the other.
"""

import errno
import mmap as _mmap
import os
from fcntl import F_ADD_SEALS, F_SEAL_GROW, F_SEAL_SEAL, F_SEAL_SHRINK, F_SEAL_WRITE, fcntl
from weakref import WeakValueDictionary

from cpython.buffer cimport PyBuffer_FillInfo
from libc.errno cimport errno as c_errno
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport free, realloc
from posix.mman cimport (
    MAP_ANONYMOUS,
    MAP_FAILED,
    MAP_FIXED,
    MAP_PRIVATE,
    MAP_SHARED,
    PROT_NONE,
    PROT_READ,
    PROT_WRITE,
    mmap,
    munmap,
)
from posix.types cimport off_t
from posix.unistd cimport close


cdef extern from "<sys/mman.h>" nogil:
    int MAP_NORESERVE

cdef extern from "_sigbus.h" nogil:
    int BAR_SLOTS
    int bar_zap(uintptr_t start, uintptr_t end, int ones, size_t chunk)
    int bar_watch(uintptr_t start, size_t length, size_t page, int ones, size_t chunk)
    void bar_unwatch(int slot)
    void bar_found(int slot)
    void bar_not_found(int slot)
    uintptr_t bar_lost(int slot)
    size_t bar_page_of(int fd)

cdef extern from *:
    """
    #define pages_load(type, p)      __atomic_load_n((const type *)(p), __ATOMIC_RELAXED)
    #define pages_store(type, p, v)  __atomic_store_n((type *)(p), (v), __ATOMIC_RELAXED)
    #define pages_load8(p)       pages_load(uint8_t, p)
    #define pages_load16(p)      pages_load(uint16_t, p)
    #define pages_load32(p)      pages_load(uint32_t, p)
    #define pages_load64(p)      pages_load(uint64_t, p)
    #define pages_store8(p, v)   pages_store(uint8_t, p, v)
    #define pages_store16(p, v)  pages_store(uint16_t, p, v)
    #define pages_store32(p, v)  pages_store(uint32_t, p, v)
    #define pages_store64(p, v)  pages_store(uint64_t, p, v)
    """
    uint8_t pages_load8(const uint8_t *p) noexcept nogil
    uint16_t pages_load16(const uint8_t *p) noexcept nogil
    uint32_t pages_load32(const uint8_t *p) noexcept nogil
    uint64_t pages_load64(const uint8_t *p) noexcept nogil
    void pages_store8(uint8_t *p, uint8_t v) noexcept nogil
    void pages_store16(uint8_t *p, uint16_t v) noexcept nogil
    void pages_store32(uint8_t *p, uint32_t v) noexcept nogil
    void pages_store64(uint8_t *p, uint64_t v) noexcept nogil


PAGE = _mmap.PAGESIZE
MAX_SIZE = 1 << 40
MAX_ONES_MAPS = 4096
ONES_CHUNK = 2 << 20
SLOTS = BAR_SLOTS


def place(base, align, offset):
    short = align - offset
    return (base + short + align - 1) // align * align - short


def chunk_for(size):
    least = -(-size // MAX_ONES_MAPS)
    wanted = max(least, min(size, ONES_CHUNK), PAGE)
    return 1 << (wanted - 1).bit_length()


cdef class _Ones:
    """A sealed file full of ones."""

    cdef object __weakref__
    cdef readonly int fd
    cdef readonly size_t size

    def __cinit__(self, size):
        self.fd = -1
        self.fd = os.memfd_create("ones", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        self.size = size
        piece = b"\xff" * min(size, ONES_CHUNK)
        for at in range(0, size, len(piece)):
            if os.pwrite(self.fd, piece, at) != len(piece):
                raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        fcntl(self.fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE | F_SEAL_SEAL)

    def __dealloc__(self):
        if self.fd >= 0:
            close(self.fd)


_all_ones = WeakValueDictionary()   # by size: one file serves everybody who can use it


cdef struct Range:
    size_t at
    size_t length
    int slot


cdef class Pages:
    cdef uint8_t *_start
    cdef readonly size_t size
    cdef Py_ssize_t _length
    cdef Py_ssize_t _exports
    cdef Range *_ranges
    cdef size_t _count
    cdef _Ones _ones

    def __cinit__(self, size, align=PAGE, offset=0):
        if size <= 0 or size % PAGE:
            raise OSError(errno.EINVAL, f"{size:#x} bytes are not whole pages")
        if align < PAGE or align & (align - 1) or offset % PAGE or not 0 <= offset < align:
            raise OSError(errno.EINVAL, f"addresses cannot be {offset:#x} modulo {align:#x}")
        if size > MAX_SIZE or align > MAX_SIZE:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        cdef size_t whole = size + align
        cdef void *base = mmap(NULL, whole, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
        if base == MAP_FAILED:
            raise OSError(c_errno, os.strerror(c_errno))
        cdef uintptr_t first = <uintptr_t>base, start = place(<uintptr_t>base, align, offset)
        cdef uintptr_t end = start + <size_t>size
        if start > first:
            munmap(base, start - first)
        if first + whole > end:
            munmap(<void *>end, first + whole - end)
        self._start = <uint8_t *>start
        self.size = size
        self._length = size

    def __dealloc__(self):
        self._unmap()
        free(self._ranges)

    cdef void _unmap(self) noexcept:
        cdef size_t i
        for i in range(self._count):
            bar_unwatch(self._ranges[i].slot)
        self._count = 0
        if self._start != NULL:
            munmap(self._start, self.size)
            self._start = NULL

    @property
    def address(self):
        return <uintptr_t>self._start

    def close(self):
        if self._exports:
            raise BufferError("somebody holds a view of these pages")
        self._unmap()
        self._ones = None

    # mapping

    cdef int _check(self, at, length, page) except -1:
        if self._start == NULL:
            raise OSError(errno.EINVAL, "these pages are closed")
        if at < 0 or length <= 0 or at + length > self.size or (at | length | <uintptr_t>self._start) % page:
            raise OSError(errno.EINVAL, f"{at:#x}+{length:#x} of {self.size:#x} bytes in pages of {page:#x}")
        return 0

    def map(self, at, int fd, fd_offset, length, *, bint writable):
        cdef size_t page = bar_page_of(fd)
        self._check(at, length, page)
        cdef Range *found = self._range(at, length, page)
        cdef int failure, protection = PROT_READ | (PROT_WRITE if writable else 0)
        bar_found(found.slot)
        if mmap(self._start + found.at, found.length, protection, MAP_FIXED | MAP_SHARED | MAP_NORESERVE, fd,
                <off_t>fd_offset) == MAP_FAILED:
            failure = c_errno
            bar_not_found(found.slot)
            raise OSError(failure, os.strerror(failure))

    cdef Range *_range(self, size_t at, size_t length, size_t page) except NULL:
        """What is known of a range that is mapped now or was before; a new one overlaps with none."""
        cdef size_t i
        cdef Range *r
        for i in range(self._count):
            r = &self._ranges[i]
            if r.at == at and r.length == length:
                return r
            if r.at < at + length and at < r.at + r.length:
                raise OSError(errno.EINVAL, f"{at:#x}+{length:#x} is mapped in other pieces")
        self._need_ones()
        r = <Range *>realloc(self._ranges, (self._count + 1) * sizeof(Range))
        if r == NULL:
            raise MemoryError
        self._ranges = r
        r = &self._ranges[self._count]
        r.at, r.length = at, length
        r.slot = bar_watch(<uintptr_t>self._start + at, length, page, self._ones.fd, self._ones.size)
        if r.slot < 0:
            raise OSError(errno.ENOSPC, f"{SLOTS} pieces of regions are mapped already")
        self._count += 1
        return r

    cdef int _need_ones(self) except -1:
        if self._ones is None:
            chunk = chunk_for(self.size)
            ones = _all_ones.get(chunk)
            if ones is None:
                ones = _all_ones[chunk] = _Ones(chunk)
            self._ones = ones
        return 0

    def zap(self, at, length):
        self._check(at, length, PAGE)
        self._need_ones()
        cdef uintptr_t start = <uintptr_t>self._start + <size_t>at
        if bar_zap(start, start + <size_t>length, self._ones.fd, self._ones.size) != 0:
            raise OSError(c_errno, os.strerror(c_errno))

    def lost(self, at, length):
        self._check(at, length, 1)
        return self._is_lost(at, length)

    cdef bint _is_lost(self, size_t at, size_t length) noexcept:
        cdef size_t i
        cdef Range *r
        for i in range(self._count):
            r = &self._ranges[i]
            if r.at < at + length and at < r.at + r.length and bar_lost(r.slot) < <uintptr_t>self._start + at + length:
                return True
        return False

    # access

    cdef uint8_t *_number(self, Py_ssize_t at, int width) except NULL:
        if self._start == NULL or at < 0 or at > self._length - width or width not in (1, 2, 4, 8):
            raise ValueError(f"{width} bytes at {at:#x} of {self.size:#x}")
        return self._start + at

    def load(self, Py_ssize_t at, int width):
        cdef uint8_t *p = self._number(at, width)
        cdef uint64_t value
        if width == 4:
            value = pages_load32(p)
        elif width == 8:
            value = pages_load64(p)
        elif width == 2:
            value = pages_load16(p)
        else:
            value = pages_load8(p)
        return None if self._is_lost(at, width) else value

    cdef void _put(self, uint8_t *p, int width, uint64_t value) noexcept:
        if width == 4:
            pages_store32(p, <uint32_t>value)
        elif width == 8:
            pages_store64(p, value)
        elif width == 2:
            pages_store16(p, <uint16_t>value)
        else:
            pages_store8(p, <uint8_t>value)

    def store(self, Py_ssize_t at, int width, uint64_t value):
        cdef uint8_t *p = self._number(at, width)
        if width < 8 and value >> 8 * width:
            raise OverflowError(f"{value:#x} in {width} bytes")
        self._put(p, width, value)
        if not self._is_lost(at, width):
            return True
        self._put(p, width, <uint64_t>-1)   # it went to private memory, which is to read as ones
        return False

    def __getbuffer__(self, Py_buffer *buffer, int flags):
        if self._start == NULL:
            raise BufferError("these pages are closed")
        PyBuffer_FillInfo(buffer, self, self._start, self._length, False, flags)
        self._exports += 1

    def __releasebuffer__(self, Py_buffer *buffer):
        self._exports -= 1
