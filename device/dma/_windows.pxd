from libc.stdint cimport uint8_t, uint32_t, uint64_t


cdef enum:
    DMA_READ = 1
    DMA_WRITE = 2


cdef enum:
    FAULT_NONE = 0
    FAULT_UNMAPPED = -1
    FAULT_PROTECTION = -2
    FAULT_MESSAGE_ONLY = -3


cdef struct Window:
    uint64_t iova
    uint64_t last           # address of the last byte, so that a window may end at 2^64
    uint64_t offset         # into the backing
    uint32_t prot
    int backing             # index, or -1: no file descriptor came with it


cdef struct Backing:
    uint64_t device
    uint64_t inode
    int access              # O_RDONLY, O_RDWR
    uint8_t *start
    uint64_t length
    uint64_t first          # file offset of `start`
    uint64_t references
    int guard


cdef class DmaWindows:
    cdef Window *_windows
    cdef size_t _count, _capacity, _hit
    cdef Backing *_backings
    cdef size_t _backing_count
    cdef readonly uint64_t generation       # grows with every change of the table
    cdef readonly size_t limit
    cdef public object on_map

    cdef Py_ssize_t _find(self, uint64_t iova) noexcept nogil
    cdef int span(self, uint64_t iova, uint64_t length, uint32_t prot,
                  uint8_t **where, uint64_t *run) noexcept nogil
    cdef uint8_t *contiguous(self, uint64_t iova, uint64_t length, uint32_t prot) noexcept nogil
    cdef int copy_in(self, void *target, uint64_t iova, uint64_t length) noexcept nogil
    cdef int copy_out(self, uint64_t iova, const void *source, uint64_t length) noexcept nogil
    cdef int _acquire_backing(self, int fd, uint64_t offset, uint64_t size, uint32_t prot) except -2
    cdef void _release_backing(self, int index) noexcept
    cdef void *_mmap(self, int fd, uint64_t first, uint64_t length, int access) except NULL
    cdef int _remap(self, int index, int fd, uint64_t length) except -1
