from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t
from posix.uio cimport iovec

from device.dma._windows cimport DmaWindows


cdef enum:
    MAX_SEGMENTS = 1024
    OWED_ROOM = 512             # completions that may wait to be written to a ring: see push_used

# What calls that look into rings return besides 0 and 1.
cdef enum:
    BROKEN = -1                 # the queue, by the driver's fault or the client's
    DISTURBED = -2              # the card changed while the client was asked: nothing happened, look again

# What vectors_of returns besides a number of pieces and BROKEN.
cdef enum:
    NOT_HERE = -2               # some of the memory is not in this process: copy it


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


cdef struct Used:
    uint32_t head
    uint32_t written


cdef class Rings:
    cdef readonly DmaWindows dma
    cdef readonly int index
    cdef readonly uint16_t max_size
    cdef readonly uint16_t size
    cdef readonly bint enabled
    cdef readonly bint stopping             # enabled until what is in flight is done
    cdef readonly uint64_t epoch            # grows when the driver's queue becomes another one
    cdef public uint16_t vector
    cdef readonly uint64_t descriptor_address, driver_address, device_address
    cdef readonly bint event_index, indirect
    cdef readonly uint16_t used_index       # up to where completions are written into the used ring
    cdef uint16_t next_avail
    cdef int _fault
    cdef uint64_t _generation
    cdef int32_t _losses                    # DmaWindows.losses when the rings were found
    cdef uint8_t *_descriptors
    cdef uint16_t *_avail
    cdef uint16_t *_used
    cdef uint16_t _signalled
    cdef bint _signalled_valid
    cdef uint16_t _popped                   # chains that were popped and not pushed yet
    cdef bint unpublished                   # the driver may not have seen the used index
    # rings that are not in this process in one piece
    cdef bint _copied                       # _descriptors and _avail are copies, there is no _used
    cdef uint8_t *_copies
    cdef uint16_t _fetched                  # up to where the copies are good
    cdef Used owed[OWED_ROOM]
    cdef uint32_t owed_count
    cdef uint8_t _table[16 * MAX_SEGMENTS]  # an indirect table's copy

    cdef bint resolve(self) noexcept nogil
    cdef bint reachable(self) noexcept nogil
    cdef bint ready(self) noexcept nogil
    cdef bint settled(self) noexcept nogil
    cdef int available(self, uint16_t *index) noexcept nogil
    cdef int pop_chain(self, Chain *chain) noexcept nogil
    cdef void give_back(self) noexcept nogil
    cdef int failed(self, int fault, int number) noexcept nogil
    cdef void push_used(self, uint16_t head, uint32_t written) noexcept nogil
    cdef void owe(self, uint16_t head, uint32_t written) noexcept nogil
    cdef int complete(self) noexcept nogil
    cdef int wants_kicks(self, uint16_t seen) noexcept nogil
    cdef void refuses_kicks(self) noexcept nogil
    cdef int vectors_of(self, Chain *chain, int first, int last, uint32_t prot,
                        iovec *out, int room) noexcept nogil
    cdef void _set_kicks(self, uint16_t value) noexcept nogil
    cdef bint _use_copies(self) noexcept nogil
    cdef int _fetch(self) noexcept nogil
    cdef int _walk(self, Chain *chain, uint16_t head) noexcept nogil
    cdef int _complete_by_copies(self) noexcept nogil
    cdef bint _interrupt_due(self, uint16_t word) noexcept nogil
    cdef int _ring_failed(self, int fault) noexcept nogil
    cdef int _load16(self, uint64_t address, uint16_t *value) noexcept nogil
    cdef int _store16(self, uint64_t address, uint16_t value) noexcept nogil
