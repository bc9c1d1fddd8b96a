from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from posix.uio cimport iovec

from device._gate cimport Gate
from device.dma._windows cimport DmaWindows
from device.interrupts._lines cimport Lines
from device.virtio._rings cimport Chain
from device.virtio._split cimport VirtQueue
from firmware._cable cimport Cable
from firmware._filter cimport ReceiveFilter


cdef enum:
    MAX_MERGE = 256                 # receive buffers one frame may be spread over
    PIECES = 1024                   # memory pieces of one transmit: writev's limit
    BURST_FRAMES = 64


cdef struct Counters:
    uint64_t tx_frames, tx_bytes, tx_dropped
    uint64_t rx_frames, rx_bytes, rx_dropped, rx_filtered
    uint64_t interrupts, kicks, sleeps


cdef class Bursts:
    cdef readonly Gate gate
    cdef readonly DmaWindows dma
    cdef readonly Lines lines
    cdef readonly VirtQueue rx, tx
    cdef readonly ReceiveFilter filter
    cdef Counters n
    cdef Cable cable
    # what the driver negotiated
    cdef public bint mergeable, checksum_to_driver, running, link_up
    cdef bint may_master                # software lets the card do DMA
    cdef readonly bint tso4_to_driver, tso6_to_driver, ecn_to_driver
    cdef int event_file
    # a received frame, its header first, that waits for buffers
    cdef uint8_t *frame
    cdef uint32_t frame_length
    cdef bint tx_blocked, rx_starved
    cdef bint tx_absent, rx_absent      # the queue is disabled, broken, or its rings are in no window
    cdef int reported                   # troubles the event was raised for
    cdef bint _busy                     # a thread is at it, if not in the gate then asking the client
    cdef uint16_t _rx_seen              # avail.idx when the driver's buffers did not suffice
    cdef Chain _chain
    cdef iovec _pieces[PIECES]
    cdef uint16_t _heads[MAX_MERGE]
    cdef uint32_t _lengths[MAX_MERGE]

    cdef short events(self) noexcept nogil
    cdef void port_attached(self) noexcept nogil
    cdef bint burst(self) noexcept nogil
    cdef bint arm(self) noexcept nogil
    cdef bint _both_ways(self) noexcept nogil
    cdef bint _settle_log(self) noexcept nogil
    cdef bint _ask_for_kicks(self) noexcept nogil
    cdef void _report(self) noexcept nogil
    cdef int _complete(self, VirtQueue queue) noexcept nogil
    cdef int _transmit(self) noexcept nogil
    cdef int _send(self) noexcept nogil
    cdef int _send_copy(self) noexcept nogil
    cdef int _sent(self, int result, uint64_t length) noexcept nogil
    cdef int _receive(self) noexcept nogil
    cdef bint _takes_segments(self, uint8_t gso_type) noexcept nogil
    cdef int _deliver(self) noexcept nogil
