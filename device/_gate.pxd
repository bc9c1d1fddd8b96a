from libc.stdint cimport int32_t
from posix.types cimport pid_t


cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_mutex_t:
        pass


cdef class Gate:
    cdef pthread_mutex_t _mutex
    cdef int32_t _waiting
    cdef unsigned long _owner
    cdef int _depth

    cdef void acquire(self) noexcept nogil
    cdef void release(self) noexcept nogil
