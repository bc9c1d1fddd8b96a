from libc.stdint cimport int64_t, uint32_t, uint64_t


cdef enum:
    BIAS = 1 << 10              # GUP_PIN_COUNTING_BIAS
    SUBPAGE_SHIFT = 12


cdef class BiasedCount:
    cdef readonly uint32_t references
    cdef bint _zero_page


cdef class ExactCount:
    cdef readonly uint64_t references
    cdef readonly uint64_t pins


cdef struct Run:                # of pages with the same count, up to where the next one begins
    uint64_t first
    uint64_t count


cdef class PinnedPages:
    cdef readonly uint64_t page_size
    cdef int _shift
    cdef Run *_runs
    cdef size_t _used, _room
    cdef readonly size_t spans

    cpdef int pin(self, uint64_t offset, uint64_t length) except -1
    cpdef int unpin(self, uint64_t offset, uint64_t length) except -1
    cpdef bint maybe_pinned(self, uint64_t offset) noexcept
    cdef size_t _run_of(self, uint64_t page) noexcept
    cdef void _count(self, uint64_t offset, uint64_t length, int64_t sign) noexcept
    cdef void _add(self, uint64_t first, uint64_t last, int64_t delta) noexcept
    cdef size_t _split(self, uint64_t page) noexcept
    cdef void _join(self, size_t at) noexcept
    cdef int _make_room(self) except -1
    cdef bint _full(self, uint64_t first, uint64_t last) noexcept
