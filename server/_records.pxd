# The records that the drain reads and writes by hand. It checks when it is imported that the protocol has the same.

from libc.stdint cimport uint16_t, uint32_t, uint64_t


cdef struct header_t:
    uint16_t message_id
    uint16_t command
    uint32_t message_size
    uint32_t flags
    uint32_t error


cdef struct access_t:
    uint64_t offset
    uint32_t region
    uint32_t count


cdef struct map_t:
    uint32_t argsz
    uint32_t flags
    uint64_t offset
    uint64_t address
    uint64_t length


cdef struct unmap_t:
    uint32_t argsz
    uint32_t flags
    uint64_t address
    uint64_t length


cdef enum:
    DMA_MAP = 2
    DMA_UNMAP = 3
    REGION_READ = 9
    REGION_WRITE = 10
    REPLY = 0x1
    NO_REPLY = 0x10
    ERROR = 0x20
