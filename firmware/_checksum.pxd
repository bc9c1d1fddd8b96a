"""The Internet checksum (RFC 1071) for Cython modules."""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy


cdef inline uint16_t ones_complement_sum(const uint8_t *data, uint32_t length) noexcept nogil:
    """The folded sum of `length` bytes, in the byte order of memory."""
    cdef uint64_t total = 0
    cdef uint32_t word = 0
    cdef uint32_t i = 0
    while i + 4 <= length:
        memcpy(&word, data + i, 4)
        total += word
        i += 4
    if i < length:
        word = 0
        memcpy(&word, data + i, length - i)
        total += word
    total = <uint64_t> <uint32_t> total + (total >> 32)
    total = <uint64_t> <uint32_t> total + (total >> 32)
    total = <uint64_t> <uint16_t> total + (total >> 16)
    total = <uint64_t> <uint16_t> total + (total >> 16)
    return <uint16_t> total


cdef inline bint complete_checksum(
        uint8_t *frame, uint32_t length, uint32_t start, uint32_t offset) noexcept nogil:
    """Do what HDR_F_NEEDS_CSUM asks for (virtio 1.3, 5.1.6.2); False if that is outside the frame."""
    cdef uint16_t value
    if start >= length or offset + 2 > length - start:
        return False
    value = ~ones_complement_sum(frame + start, length - start)
    if value == 0:
        value = 0xFFFF      # zero would say "no checksum" in UDP; both mean the same in ones' complement
    memcpy(frame + start + offset, &value, 2)
    return True
