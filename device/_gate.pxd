from libc.stdint cimport int32_t, uint64_t


cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_mutex_t:
        pass


cdef class Gate:
    cdef pthread_mutex_t _mutex
    cdef int32_t _waiting
    cdef uint64_t _owner        # the thread inside, or 0
    cdef int _depth

    cdef void acquire(self) noexcept nogil
    cdef void release(self) noexcept nogil
    cdef int suspend(self) noexcept nogil
    cdef void resume(self, int depth) noexcept nogil
