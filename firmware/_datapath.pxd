from libc.stdint cimport int32_t, int64_t, uint64_t

from firmware._bursts cimport Bursts


cdef enum:
    BELLS = 3                       # receive, transmit, control
    WATCHED_BELLS = 2               # the control queue is not the data path's


cdef class DataPath(Bursts):
    cdef int _wake_fd
    cdef int _bells[BELLS]
    cdef int32_t _sleeping, _stop
    cdef public uint64_t poll_ns

    cdef void _wait(self, int64_t timeout_ns) noexcept nogil
    cdef void _answer(self, int bell) noexcept nogil
    cdef void _loop(self) noexcept nogil
