# cython: language_level=3
"""Which frames from the network the card hands to its driver (virtio 1.3, 5.1.6.5.1 and 5.1.6.5.2)."""

from libc.stdint cimport uint8_t, uint64_t
from libc.string cimport memcpy

# Entries of each kind that are matched one by one; a longer table means "all of that kind", as in QEMU.
MAC_TABLE_SIZE = MAC_TABLE_ENTRIES


cdef uint64_t _key(const uint8_t *address) noexcept nogil:
    cdef uint64_t key = 0
    memcpy(&key, address, 6)
    return key


cdef uint64_t _key_of(address) except? 0xFFFFFFFFFFFFFFFF:
    cdef bytes octets = bytes(address)
    if len(octets) != 6:
        raise ValueError(f"a MAC address has 6 octets, not {len(octets)}")
    return _key(<const uint8_t *> octets)


cdef class ReceiveFilter:
    """Receive modes and MAC tables; a fresh one is promiscuous, as a driver without control queue needs."""

    def __init__(self, mac):
        self.reset(mac)

    def reset(self, mac):
        """Back to power-on: promiscuous, empty tables, `mac` as the card's own address."""
        self.promiscuous = True
        self.all_multicast = self.all_unicast = False
        self.no_multicast = self.no_unicast = self.no_broadcast = False
        self._mac = _key_of(mac)
        self.set_tables((), ())

    def set_mac(self, mac):
        """Change the card's own address."""
        self._mac = _key_of(mac)

    def set_tables(self, unicast, multicast):
        """Replace both tables; one longer than MAC_TABLE_SIZE accepts everything of its kind."""
        cdef int i
        first = [_key_of(address) for address in unicast]
        second = [_key_of(address) for address in multicast]
        self._unicast_overflow = len(first) > MAC_TABLE_ENTRIES
        self._multicast_overflow = len(second) > MAC_TABLE_ENTRIES
        self._unicast_count = 0 if self._unicast_overflow else len(first)
        self._multicast_count = 0 if self._multicast_overflow else len(second)
        for i in range(self._unicast_count):
            self._unicast[i] = first[i]
        for i in range(self._multicast_count):
            self._multicast[i] = second[i]

    def save(self):
        """Modes, address and tables as bytes, for `stage` of another filter."""
        modes = (self.promiscuous, self.all_multicast, self.all_unicast, self.no_multicast, self.no_unicast,
                 self.no_broadcast, self._unicast_overflow, self._multicast_overflow)
        keys = [self._mac]
        keys += [self._unicast[i] for i in range(self._unicast_count)]
        keys += [self._multicast[i] for i in range(self._multicast_count)]
        return (bytes(modes) + bytes((self._unicast_count, self._multicast_count))
                + b"".join(key.to_bytes(6, "little") for key in keys))

    def stage(self, data):
        """What makes this filter the one that saved `data`; ValueError if none did."""
        modes, counts = bytes(data[:8]), bytes(data[8:10])
        if len(counts) < 2 or not set(modes) <= {0, 1} or max(counts) > MAC_TABLE_ENTRIES:
            raise ValueError("modes or tables that no filter has")
        if len(data) != 10 + 6 * (1 + sum(counts)):
            raise ValueError(f"{len(data)} bytes for {sum(counts)} addresses")
        addresses = [bytes(data[at:at + 6]) for at in range(10, len(data), 6)]

        def apply():
            (self.promiscuous, self.all_multicast, self.all_unicast, self.no_multicast, self.no_unicast,
             self.no_broadcast) = modes[:6]
            self.set_mac(addresses[0])
            self.set_tables(addresses[1:1 + counts[0]], addresses[1 + counts[0]:])
            self._unicast_overflow, self._multicast_overflow = modes[6:]

        return apply

    def accept(self, frame):
        """Whether `frame` would reach the driver."""
        cdef const uint8_t[::1] view = frame
        if view.shape[0] < 6:
            return False
        return self.accepts(&view[0])

    cdef bint accepts(self, const uint8_t *frame) noexcept nogil:
        cdef uint64_t destination = _key(frame)
        cdef int i
        if self.promiscuous:
            return True
        if frame[0] & 1:
            if destination == <uint64_t> 0xFFFFFFFFFFFF:
                return not self.no_broadcast
            if self.no_multicast:
                return False
            if self.all_multicast or self._multicast_overflow:
                return True
            for i in range(self._multicast_count):
                if self._multicast[i] == destination:
                    return True
            return False
        if self.no_unicast:
            return False
        if self.all_unicast or self._unicast_overflow or destination == self._mac:
            return True
        for i in range(self._unicast_count):
            if self._unicast[i] == destination:
                return True
        return False
