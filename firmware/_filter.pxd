from libc.stdint cimport uint8_t, uint16_t, uint64_t


cdef enum:
    MAC_TABLE_ENTRIES = 64


cdef class ReceiveFilter:
    cdef public bint promiscuous, all_multicast, all_unicast, no_multicast, no_unicast, no_broadcast
    cdef uint64_t _mac
    cdef uint64_t _unicast[MAC_TABLE_ENTRIES]
    cdef uint64_t _multicast[MAC_TABLE_ENTRIES]
    cdef int _unicast_count, _multicast_count
    cdef bint _unicast_overflow, _multicast_overflow

    cdef bint accepts(self, const uint8_t *frame) noexcept nogil
