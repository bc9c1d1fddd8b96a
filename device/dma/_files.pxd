from libc.stdint cimport int32_t, uint8_t, uint64_t


cdef struct Backing:
    uint64_t device
    uint64_t inode
    int access              # O_RDONLY, O_RDWR
    uint8_t *start
    uint64_t length
    uint64_t first          # file offset of `start`
    uint64_t references
    int guard
    const int *lost         # not zero once the client has truncated the file


cdef class Mapping:
    cdef uint8_t *start
    cdef uint64_t length
    cdef int guard


cdef class SharedFiles:
    cdef Backing *backings
    cdef const int32_t *losses      # grows before what was truncated is replaced, anywhere in the process
    cdef size_t _count
    cdef dict _kept         # index of a backing to the Mapping that owns its memory
    cdef set _guards        # of memory that somebody else mapped

    cdef int acquire(self, int fd, uint64_t offset, uint64_t size, bint writable) except -2
    cdef void release(self, int index) noexcept
    cdef int guard(self, void *start, uint64_t length, size_t page) except -1
    cdef void unguard(self, int guard) noexcept
    cdef const int *lost_flag(self, int guard) noexcept nogil
    cdef size_t page_size(self, int guard) noexcept
    cdef int lost(self)
    cdef Mapping keep(self, int index)
    cdef Mapping keep_copy(self, uint8_t *start, uint64_t length, size_t page)
    cdef void _let_go(self, int index) noexcept
    cdef void *_mmap(self, int fd, uint64_t first, uint64_t length, int access) except NULL
    cdef int _remap(self, int index, int fd, uint64_t length) except -1
    cdef uint64_t _mapped(self) noexcept
