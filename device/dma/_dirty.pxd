from libc.stdint cimport uint8_t, uint64_t


cdef enum:
    LOG_PAGE_SHIFT = 12
    CHUNK_SHIFT = 15                        # pages of a chunk: 128 MiB, in a bitmap of 4 KiB
    CHUNK_WORDS = 1 << (CHUNK_SHIFT - 6)
    CHUNK_LIMIT = 1 << 13
    SLOTS = 2 * CHUNK_LIMIT                 # half of them stay empty, so that a search ends soon


cdef struct Chunk:
    uint64_t number                         # of the first page >> CHUNK_SHIFT
    uint64_t *bits                          # NULL: the slot is empty


cdef class WriteLog:
    cdef void mark(self, uint64_t iova, uint64_t length) noexcept nogil
    cdef bint owes(self) noexcept nogil
    cdef int settle(self) noexcept nogil
    cdef bint drop(self) noexcept nogil


cdef class DirtyLog(WriteLog):
    cdef Chunk _slots[SLOTS]
    cdef Chunk *_recent
    cdef readonly size_t chunks
    cdef bint _everything

    cdef Chunk *_slot(self, uint64_t number) noexcept nogil
    cdef uint64_t *_bits(self, uint64_t number) noexcept nogil
    cdef void _move(self, Chunk *chunk, uint64_t first, uint64_t last, int shift, uint8_t *out) noexcept nogil


cdef class Marking:
    cdef readonly bint logging              # for the client
    cdef bint marking                       # every write to the client's memory is to be marked, for anybody
    cdef DirtyLog _log
    cdef WriteLog _guest_log
    cdef WriteLog _last_guest_log           # the same, or when that is off the one that was on last

    cdef void mark(self, uint64_t iova, uint64_t length) noexcept nogil
    cdef void mark_for_client(self, uint64_t iova, uint64_t length) noexcept nogil
    cdef void mark_answered(self, uint64_t iova, uint64_t length, bint written) noexcept nogil
    cdef void log_for_client(self, DirtyLog log) noexcept
    cdef bint owes_log(self) noexcept nogil
    cdef int settle_log(self) noexcept nogil
    cdef void drop_log(self) noexcept nogil
