# cython: language_level=3
"""What the data path does of frames: bounded bursts between a pair of virtqueues and a port, without the GIL.

A burst may have to ask the client for memory, and the gate is let go meanwhile. It then goes on only if the
card is as it was: `dma.epoch` tells, whatever is found by a pointer is looked up again, and a burst that was
DISTURBED ends at once: chains that are not done with go back to their queue if it still is the same, a frame
that was not delivered waits, one that was sent is completed by the next burst.
"""

from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset
from posix.unistd cimport write

from device._atomic cimport load_int, load_int_after
from device._gate cimport Gate
from device.dma._windows cimport DMA_READ, FAULT_DISTURBED, FAULT_NONE, DmaWindows
from device.interrupts._lines cimport Lines
from device.virtio._rings cimport DISTURBED, NOT_HERE, OWED_ROOM, Chain
from device.virtio._split cimport VirtQueue
from firmware._checksum cimport complete_checksum
from firmware._cable cimport ETHERNET, FRAME_LIMIT, FRAMING_LOOPBACK, FRAMING_PACKETS, HEADER, Cable
from firmware._filter cimport ReceiveFilter


cdef extern from "<poll.h>" nogil:
    short POLLIN
    short POLLOUT


cdef enum:
    NEEDS_CSUM = 1                  # header flags
    TROUBLE_TX = 1
    TROUBLE_RX = 2
    TROUBLE_PORT = 4
    GSO_TCPV4 = 1                   # header gso_type
    GSO_TCPV6 = 4
    GSO_ECN = 0x80


BURST = BURST_FRAMES                # frames per direction and burst: bounds how long a register access waits


cdef uint16_t _little16(const uint8_t *p) noexcept nogil:
    return <uint16_t> (p[0] | p[1] << 8)


cdef class Bursts:
    """One queue pair's bursts; `rx` and `tx` are named from the driver's side."""

    def __cinit__(self, *args, **kwargs):
        self.event_file = -1
        self.cable = Cable()
        self.frame = <uint8_t *> calloc(1, HEADER + FRAME_LIMIT)
        if self.frame == NULL:
            raise MemoryError

    def __init__(self, Gate gate not None, DmaWindows dma not None, Lines lines not None,
                 VirtQueue rx not None, VirtQueue tx not None, ReceiveFilter filter not None):
        self.gate, self.dma, self.lines, self.rx, self.tx, self.filter = gate, dma, lines, rx, tx, filter
        self.link_up = self.may_master = True
        dma.gate = gate

    def __dealloc__(self):
        free(self.frame)

    cdef short events(self) noexcept nogil:
        """The events at the port that would give a burst something to do; any other would make it spin."""
        cdef short events = 0
        if self.cable.lost:
            return 0
        if self.cable.backlog():
            events |= POLLOUT
        if not self.running or not self.may_master:
            return events
        if not self.rx_starved:
            events |= POLLIN
        if self.tx_blocked:
            events |= POLLOUT
        return events

    cdef void port_attached(self) noexcept nogil:
        """Another port: what was wrong with the last is told no more."""
        self.reported &= ~TROUBLE_PORT

    cdef bint burst(self) noexcept nogil:
        """One burst each way; True when work is left that needs no waiting."""
        cdef bint more
        if self._busy:
            return False
        self._busy = True
        if self.running and self.may_master:
            more = self._both_ways()
        else:
            more = False
            self.cable.flush()          # the driver was told that this is sent
        more |= self._settle_log()
        self._busy = False
        return more

    cdef bint _settle_log(self) noexcept nogil:
        """Tell the guest's log what was written, once for all of a burst; True when it is to be done again."""
        if self.may_master:
            return self.dma.settle_log() == FAULT_DISTURBED
        if not self.running:
            self.dma.drop_log()         # its driver is gone, and the next one may not allow DMA for long
        return False

    cdef bint _both_ways(self) noexcept nogil:
        cdef int sent = 0, received = 0
        self.tx_absent = not self.tx.ready()
        if not self.tx_absent:
            sent = self._transmit()
        else:
            self.tx_blocked = False
            self.cable.flush()          # what was sent before goes out still
        if sent != DISTURBED:
            self.rx_absent = not self.rx.ready()
            if not self.rx_absent:
                received = self._receive()
            if self.rx_absent or self.rx._fault:
                self.rx_starved = True  # there is nowhere to put what the port has
        self._report()
        return sent or received

    cdef bint arm(self) noexcept nogil:
        """Ask the driver for kicks where they can help; True when there is work already."""
        cdef bint more
        if self._busy or not self.running or not self.may_master:
            return False
        self._busy = True
        more = self._ask_for_kicks()
        more |= self._settle_log()
        self._busy = False
        return more

    cdef bint _ask_for_kicks(self) noexcept nogil:
        cdef int sends = 0, receives = 0
        if self.tx.ready():
            if self.tx_absent:
                sends = True            # its rings have come since the burst
            elif not self.tx_blocked:
                sends = self.tx.wants_kicks(self.tx.next_avail)
        if sends >= 0 and self.rx.ready():
            if self.rx_absent:
                receives = True
            elif self.rx_starved:
                receives = self.rx.wants_kicks(self._rx_seen)
        return sends or receives

    cdef void _report(self) noexcept nogil:
        """Raise the event for each trouble once."""
        cdef uint64_t one = 1
        cdef int news = ((TROUBLE_TX if self.tx._fault else 0) | (TROUBLE_RX if self.rx._fault else 0)
                         | (TROUBLE_PORT if self.cable.lost else 0))
        if news & ~self.reported:
            self.reported |= news
            write(self.event_file, &one, sizeof(one))

    cdef int _complete(self, VirtQueue queue) noexcept nogil:
        """Publish a burst and interrupt if the driver wants it."""
        cdef int wanted = queue.complete()
        if wanted > 0:
            self.n.interrupts += 1
            self.lines.notify(1, queue.vector)
        return wanted

    # --- transmit

    cdef int _transmit(self) noexcept nogil:
        """1 when there may be more to do, 0, DISTURBED."""
        cdef int sent, got, done = 0
        if self.tx.unpublished and self._complete(self.tx) < 0:
            return DISTURBED            # or broken, which the next burst sees
        self.tx.refuses_kicks()
        self.cable.flush()
        self.tx_blocked = self.cable.full()
        while done < BURST_FRAMES and not self.tx_blocked:
            got = self.tx.pop_chain(&self._chain)
            if got == DISTURBED:
                return DISTURBED
            if got <= 0:
                break
            sent = self._send()
            if sent == DISTURBED:
                self.tx.give_back()
                return DISTURBED
            if self.tx._fault:
                break
            if sent == 0:
                self.tx.give_back()
                self.tx_blocked = True
                break
            if sent < 0:
                self.n.tx_dropped += 1
            self.tx.push_used(self._chain.head, 0)
            done += 1
        self.cable.flush()
        if self._complete(self.tx) == DISTURBED:
            return DISTURBED
        return done == BURST_FRAMES

    cdef int _send(self) noexcept nogil:
        """Send the popped chain: 1 sent, 0 the port is full, -1 dropped or the queue broke, DISTURBED."""
        cdef Chain *c = &self._chain
        cdef uint8_t header[HEADER]
        cdef uint64_t length, skipped
        cdef int i, count
        cdef int32_t losses = load_int(self.dma.losses)
        cdef ssize_t wrote
        if (c.readable_bytes < HEADER + ETHERNET or c.readable_bytes > HEADER + FRAME_LIMIT
                or not self.link_up or self.cable.lost):
            return -1
        length = c.readable_bytes - HEADER
        if self.cable.framing != FRAMING_PACKETS:
            return self._send_copy()
        count = self.tx.vectors_of(c, 0, c.readable, DMA_READ, self._pieces, PIECES)
        if count == NOT_HERE:
            return self._send_copy()
        if count < 0:
            return -1
        i = 0
        if self.cable.header_size == 0:
            skipped = 0
            while skipped < HEADER:
                wrote = min(<uint64_t> (HEADER - skipped), self._pieces[i].iov_len)
                memcpy(header + skipped, self._pieces[i].iov_base, wrote)
                self._pieces[i].iov_base = <uint8_t *> self._pieces[i].iov_base + wrote
                self._pieces[i].iov_len -= wrote
                skipped += wrote
                if self._pieces[i].iov_len == 0:
                    i += 1
            if load_int_after(self.dma.losses) != losses:
                return self._send_copy()        # which refuses what was truncated
            if header[1] != 0:
                return -1               # segmentation was not offered to this driver
            if header[0] & NEEDS_CSUM:
                return self._send_copy()
        return self._sent(self.cable.send_pieces(&self._pieces[i], count - i), length)

    cdef int _sent(self, int result, uint64_t length) noexcept nogil:
        """Count a frame that has left."""
        if result > 0:
            self.n.tx_frames += 1
            self.n.tx_bytes += length
        return result

    cdef int _send_copy(self) noexcept nogil:
        """Send through memory of our own: streams, the loopback, checksums that the port cannot leave.

        And frames that lie in memory of the client that is not in this process.
        """
        cdef Chain *c = &self._chain
        cdef uint32_t total = <uint32_t> c.readable_bytes, length = total - HEADER, done = 0
        cdef uint8_t header[HEADER]
        cdef uint8_t copy[HEADER + FRAME_LIMIT]
        cdef int i, fault
        for i in range(c.readable):
            fault = self.dma.copy_in(copy + done, c.segment[i].address, c.segment[i].length)
            if fault != FAULT_NONE:
                return self.tx.failed(fault, 8)
            done += c.segment[i].length
        memcpy(header, copy, HEADER)
        if self.cable.header_size == 0:
            if header[1] != 0:
                return -1
            if header[0] & NEEDS_CSUM and not (
                    self.cable.framing == FRAMING_LOOPBACK and self.checksum_to_driver):
                if not complete_checksum(copy + HEADER, length, _little16(header + 6), _little16(header + 8)):
                    return -1
                header[0] &= ~NEEDS_CSUM
        return self._sent(self.cable.send_frame(header, copy + HEADER, length), length)

    # --- receive

    cdef int _receive(self) noexcept nogil:
        """1 when there may be more to do, 0, DISTURBED."""
        cdef int got, done = 0
        if self.rx.unpublished and self._complete(self.rx) < 0:
            return DISTURBED
        self.rx_starved = False
        while done < BURST_FRAMES and self.rx.ready():
            if OWED_ROOM - self.rx.owed_count < MAX_MERGE and self._complete(self.rx) < 0:
                return DISTURBED
            got = self.rx.available(&self._rx_seen)
            if got == DISTURBED:
                return DISTURBED
            if got < 0:
                break
            if self.frame_length == 0:
                if self._rx_seen == self.rx.next_avail:
                    self.rx_starved = True
                    break
                if self.cable.fetch(self.frame, &self.frame_length) <= 0:
                    break
            done += 1
            if self.frame_length == 0:
                self.n.rx_dropped += 1
                continue
            if not self.link_up:
                self.n.rx_dropped += 1
                self.frame_length = 0
                continue
            if not self.filter.accepts(self.frame + HEADER):
                self.n.rx_filtered += 1
                self.frame_length = 0
                continue
            got = self._deliver()
            if got == DISTURBED:
                return DISTURBED
            if got == 0:
                self.rx_starved = True
                break
            if got < 0:
                if self.rx._fault:
                    break
                self.n.rx_dropped += 1
            else:
                self.n.rx_frames += 1
                self.n.rx_bytes += self.frame_length - HEADER
            self.frame_length = 0
        if self._complete(self.rx) == DISTURBED:
            return DISTURBED
        return done == BURST_FRAMES

    cdef bint _takes_segments(self, uint8_t gso_type) noexcept nogil:
        """Whether the driver accepted such frames; a port may still hold some that the one before it did."""
        if gso_type & GSO_ECN and not self.ecn_to_driver:
            return False
        gso_type &= ~GSO_ECN
        return ((gso_type == GSO_TCPV4 and self.tso4_to_driver)
                or (gso_type == GSO_TCPV6 and self.tso6_to_driver))

    cdef int _deliver(self) noexcept nogil:
        """Put `frame` into receive buffers: 1 delivered, -1 dropped or the queue broke.

        0 there are too few buffers, DISTURBED: then none is taken.
        """
        cdef Chain *c = &self._chain
        cdef uint32_t total = self.frame_length, done = 0, room, part
        cdef uint64_t count_at[2]       # guest addresses of the two bytes of num_buffers
        cdef uint32_t offset
        cdef uint8_t byte
        cdef int got, fault, i, used = 0
        if self.frame[1] and not self._takes_segments(self.frame[1]):
            return -1
        if not self.checksum_to_driver:
            if self.frame[0] & NEEDS_CSUM and not complete_checksum(
                    self.frame + HEADER, total - HEADER,
                    _little16(self.frame + 6), _little16(self.frame + 8)):
                return -1
            memset(self.frame, 0, 1)
        self.frame[10], self.frame[11] = 1, 0
        while done < total:
            got = self.rx.pop_chain(c) if used < MAX_MERGE else -1
            if got <= 0:
                self.rx.give_back()
                return got
            if used == 0 and c.writable_bytes < HEADER:
                self.rx.give_back()
                self.rx._fault = 8
                return -1
            room = <uint32_t> min(c.writable_bytes, <uint64_t> (total - done))
            if room < total - done and not self.mergeable:
                self.rx.give_back()
                return -1
            offset = 0
            for i in range(c.readable, c.segments):
                part = min(c.segment[i].length, room - offset)
                if part == 0:
                    break
                fault = self.dma.copy_out(c.segment[i].address, self.frame + done + offset, part)
                if fault != FAULT_NONE:
                    self.rx.give_back()
                    return self.rx.failed(fault, 8)
                if used == 0:
                    if offset <= 10 < offset + part:
                        count_at[0] = c.segment[i].address + 10 - offset
                    if offset <= 11 < offset + part:
                        count_at[1] = c.segment[i].address + 11 - offset
                offset += part
            self._heads[used] = c.head
            self._lengths[used] = room
            used += 1
            done += room
        if used > 1:
            for i in range(2):
                byte = <uint8_t> (used >> (8 * i))
                fault = self.dma.copy_out(count_at[i], &byte, 1)
                if fault != FAULT_NONE:
                    self.rx.give_back()
                    return self.rx.failed(fault, 8)
        for i in range(used):
            self.rx.push_used(self._heads[i], self._lengths[i])
        return 1
