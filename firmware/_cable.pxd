from libc.stdint cimport uint8_t, uint32_t
from posix.uio cimport iovec


cdef enum:
    HEADER = 12                     # struct virtio_net_hdr_v1
    ETHERNET = 14
    FRAME_LIMIT = 65535 + 18
    STREAM_PREFIX = 4               # a frame's length in a stream, and in the loopback's queue
    STREAM_ROOM = 1 << 18
    LOOPBACK_ROOM = 1 << 22
    CARRIED_ROOM = (1 << 22) + STREAM_PREFIX + HEADER + FRAME_LIMIT     # a full loopback and the frame before it
    FRAMING_PACKETS = 0
    FRAMING_STREAM = 1
    FRAMING_LOOPBACK = 2


cdef class Cable:
    cdef int fd, framing, header_size
    cdef bint lost                      # the end of `fd`, an error, or a stream that lies about a length
    cdef uint8_t *_in
    cdef uint32_t _in_head, _in_tail, _in_room
    cdef uint8_t *_out
    cdef uint32_t _out_head, _out_tail
    cdef bytes _luggage                 # keeps `_carried` alive
    cdef const uint8_t *_carried        # frames that came along with the card from another one, before all others
    cdef uint32_t _carried_head, _carried_tail

    cdef void forget(self) noexcept nogil
    cdef bint backlog(self) noexcept nogil
    cdef bint full(self) noexcept nogil
    cdef int send_pieces(self, const iovec *pieces, int count) noexcept nogil
    cdef int send_frame(self, const uint8_t *header, const uint8_t *frame, uint32_t length) noexcept nogil
    cdef int _send_stream(self, const uint8_t *frame, uint32_t length) noexcept nogil
    cdef int _send_loopback(self, const uint8_t *header, const uint8_t *frame, uint32_t length) noexcept nogil
    cdef void flush(self) noexcept nogil
    cdef int fetch(self, uint8_t *frame, uint32_t *frame_length) noexcept nogil
    cdef int _fetch_stream(self, uint8_t *frame, uint32_t *frame_length) noexcept nogil
