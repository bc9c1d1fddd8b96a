from libc.stdint cimport uint32_t, uint64_t


cdef struct Window:
    uint64_t iova
    uint64_t last           # address of the last byte, so that a window may end at 2^64
    uint64_t offset         # into the backing; of borrowed memory its address
    uint32_t prot
    int backing             # index, or a number below 0 that DmaWindows knows


cdef enum:
    BLOCK_ROWS = 256        # 10 KiB: what one insertion may have to move


cdef struct Block:
    size_t count
    uint64_t lasts[BLOCK_ROWS]      # of the rows: a search looks at nothing else
    Window rows[BLOCK_ROWS]


cdef struct Place:
    size_t block
    size_t row


cdef class WindowTable:
    cdef readonly size_t count
    cdef readonly uint64_t moved        # rows and blocks moved so far to keep the order
    cdef Block **_blocks
    cdef uint64_t *_lasts               # of each block, that of its last row
    cdef size_t _used, _room

    cdef Window *find(self, uint64_t iova) noexcept nogil
    cdef Place place(self, uint64_t iova) noexcept nogil
    cdef Window *row(self, Place *place) noexcept nogil
    cdef Window *after(self, Place *place) noexcept nogil
    cdef size_t bytes(self) noexcept nogil
    cdef int insert(self, Window window) except -1
    cdef void remove(self, Place start, Place end) noexcept
    cdef void clear(self) noexcept
    cdef Block *_new_block(self, size_t at) except NULL
    cdef int _grow(self) except -1
    cdef void _close(self, size_t start, size_t end) noexcept
    cdef void _move(self, Block *to, size_t at, Block *source, size_t first) noexcept
    cdef void _see_last(self, size_t at) noexcept
    cdef void _join_around(self, size_t at) noexcept
