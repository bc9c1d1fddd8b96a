from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from posix.uio cimport iovec

from device.dma._windows cimport DmaWindows


cdef enum:
    MAX_SEGMENTS = 1024


cdef struct Segment:
    uint64_t address
    uint32_t length


cdef struct Chain:
    uint16_t head
    uint16_t readable           # segments the device reads come first ...
    uint16_t segments           # ... those it writes fill the rest
    uint64_t readable_bytes
    uint64_t writable_bytes
    Segment segment[MAX_SEGMENTS]


cdef class VirtQueue:
    cdef readonly DmaWindows dma
    cdef readonly int index
    cdef readonly uint16_t max_size
    cdef readonly uint16_t size
    cdef readonly bint enabled
    cdef public uint16_t vector
    cdef readonly uint64_t descriptor_address, driver_address, device_address
    cdef readonly bint event_index, indirect
    cdef readonly uint16_t last_avail, used_index
    cdef int _fault
    cdef uint64_t _generation
    cdef uint8_t *_descriptors
    cdef uint16_t *_avail
    cdef uint16_t *_used
    cdef uint16_t _signalled
    cdef bint _signalled_valid
    cdef Chain _chain

    cdef bint resolve(self) noexcept nogil
    cdef bint ready(self) noexcept nogil
    cdef uint16_t available(self) noexcept nogil
    cdef int pop_chain(self, Chain *chain) noexcept nogil
    cdef void unpop_chains(self, uint16_t count) noexcept nogil
    cdef void push_used(self, uint16_t head, uint32_t written) noexcept nogil
    cdef void publish(self) noexcept nogil
    cdef bint wants_interrupt(self) noexcept nogil
    cdef bint wants_kicks(self, uint16_t seen) noexcept nogil
    cdef void refuses_kicks(self) noexcept nogil
    cdef int _walk(self, Chain *chain, uint16_t head) noexcept nogil
    cdef int vectors_of(self, Chain *chain, int first, int last, uint32_t prot,
                        iovec *out, int room) noexcept nogil
