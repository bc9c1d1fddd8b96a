from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from posix.uio cimport iovec

from device._gate cimport Gate
from device.dma._windows cimport DmaWindows
from device.interrupts._lines cimport Lines
from device.virtio._split cimport Chain, VirtQueue
from firmware._cable cimport Cable
from firmware._filter cimport ReceiveFilter


cdef enum:
    MAX_MERGE = 256                 # receive buffers one frame may be spread over
    PIECES = 1024                   # memory pieces of one transmit: writev's limit


cdef struct Counters:
    uint64_t tx_frames, tx_bytes, tx_dropped
    uint64_t rx_frames, rx_bytes, rx_dropped, rx_filtered
    uint64_t interrupts, kicks, sleeps


cdef class DataPath:
    cdef readonly Gate gate
    cdef readonly DmaWindows dma
    cdef readonly Lines lines
    cdef readonly VirtQueue rx, tx
    cdef readonly ReceiveFilter filter
    cdef Counters _n
    cdef Cable _cable
    # what the driver negotiated
    cdef public bint mergeable, checksum_to_driver, running, link_up
    cdef public bint bus_master         # software lets the card do DMA
    cdef readonly bint tso4_to_driver, tso6_to_driver, ecn_to_driver
    # wake-ups
    cdef int _wake_fd, _event_fd
    cdef int32_t _sleeping, _stop
    cdef public uint64_t poll_ns
    # a received frame, its header first, that waits for buffers
    cdef uint8_t *_frame
    cdef uint32_t _frame_length
    cdef bint _tx_blocked, _rx_starved
    cdef bint _tx_absent, _rx_absent    # the queue is disabled, broken, or its rings are in no window
    cdef int _reported                  # troubles the event was raised for
    cdef uint16_t _rx_seen              # avail.idx when the driver's buffers did not suffice
    cdef Chain _chain
    cdef iovec _pieces[PIECES]
    cdef uint16_t _heads[MAX_MERGE]
    cdef uint32_t _lengths[MAX_MERGE]

    cdef short _awaited(self) noexcept nogil
    cdef bint _service(self) noexcept nogil
    cdef bint _arm(self) noexcept nogil
    cdef void _report(self) noexcept nogil
    cdef bint _transmit(self) noexcept nogil
    cdef int _send(self) noexcept nogil
    cdef int _send_copy(self) noexcept nogil
    cdef int _sent(self, int result, uint64_t length) noexcept nogil
    cdef bint _receive(self) noexcept nogil
    cdef bint _takes_segments(self, uint8_t gso_type) noexcept nogil
    cdef int _deliver(self) noexcept nogil
    cdef void _complete(self, VirtQueue queue) noexcept nogil
    cdef void _wait(self, int64_t timeout_ns) noexcept nogil
    cdef void _loop(self) noexcept nogil
