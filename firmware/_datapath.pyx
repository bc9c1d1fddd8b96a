# cython: language_level=3
"""The card's data path: frames between one pair of virtqueues and a port, without the GIL or Python objects.

Transmit: pop chains from the transmit queue, write them to the port, straight from guest memory when the port
takes the virtio-net header or needs none, hand the buffers back, decide about the interrupt once per burst.
Receive: take frames from the port while the driver has buffers, filter, copy into one or more buffers,
publish.

`service()` does one bounded burst and may be called from anywhere. `run()` is the worker: it repeats bursts,
looks again for a while after bulk traffic, then arms the notifications and sleeps until the driver kicks, the
port has something, or someone calls `wake()`.
"""

import os

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset
from posix.uio cimport iovec
from posix.unistd cimport read, write

from device._atomic cimport fence, load_int, relax, store_int
from device._gate cimport Gate
from device.dma._windows cimport DMA_READ, FAULT_NONE, DmaWindows
from device.interrupts._lines cimport Lines
from device.virtio._split cimport Chain, VirtQueue
from firmware._checksum cimport complete_checksum
from firmware._cable cimport ETHERNET, FRAME_LIMIT, FRAMING_LOOPBACK, FRAMING_PACKETS, HEADER, Cable
from firmware._filter cimport ReceiveFilter


cdef extern from "<sys/prctl.h>" nogil:
    int prctl(int, unsigned long)
    int PR_SET_TIMERSLACK

cdef extern from "<time.h>" nogil:
    struct timespec:
        long tv_sec
        long tv_nsec
    int clock_gettime(int, timespec *)
    int CLOCK_MONOTONIC

cdef extern from "<poll.h>" nogil:
    struct pollfd:
        int fd
        short events
        short revents
    short POLLIN
    short POLLOUT
    int ppoll(pollfd *, unsigned long, const timespec *, const void *)


cdef enum:
    NEEDS_CSUM = 1                  # header flags
    # A doorbell by message costs the guest a round trip, so after bulk traffic the worker looks into rings
    # a few more times by the clock before it asks for doorbells. What is smaller, requests and their answers,
    # is never made to wait for the clock.
    BULK_BYTES = 4096
    NAPS = 4
    NAP_NS = 100000
    TIMER_SLACK_NS = 1000           # the default slack would make a nap half as long again
    BURST_FRAMES = 64
    TROUBLE_TX = 1
    TROUBLE_RX = 2
    TROUBLE_PORT = 4
    GSO_TCPV4 = 1                   # header gso_type
    GSO_TCPV6 = 4
    GSO_ECN = 0x80


BURST = BURST_FRAMES                # frames per direction and burst: bounds how long a register access waits


cdef uint64_t _now() noexcept nogil:
    cdef timespec t
    clock_gettime(CLOCK_MONOTONIC, &t)
    return <uint64_t> t.tv_sec * 1000000000 + <uint64_t> t.tv_nsec


cdef uint16_t _little16(const uint8_t *p) noexcept nogil:
    return <uint16_t> (p[0] | p[1] << 8)


cdef class DataPath:
    """One queue pair's data path; `rx` and `tx` are named from the driver's side."""

    def __cinit__(self, *args, **kwargs):
        self._wake_fd = self._event_fd = -1
        self._cable = Cable()
        self._frame = <uint8_t *> calloc(1, HEADER + FRAME_LIMIT)
        if self._frame == NULL:
            raise MemoryError
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._event_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def __init__(self, Gate gate not None, DmaWindows dma not None, Lines lines not None,
                 VirtQueue rx not None, VirtQueue tx not None, ReceiveFilter filter not None):
        self.gate, self.dma, self.lines, self.rx, self.tx, self.filter = gate, dma, lines, rx, tx, filter
        self.link_up = self.bus_master = True

    def __dealloc__(self):
        if self._wake_fd >= 0:
            os.close(self._wake_fd)
        if self._event_fd >= 0:
            os.close(self._event_fd)
        free(self._frame)

    # --- control side

    def attach(self, int fd, int framing, int vnet_header_size):
        """Use a port: its non-blocking `fd` (borrowed; -1 for none), its framing and its header size.

        Framings are 0 packets, 1 stream, 2 loopback.
        """
        with self.gate:
            self._cable.attach(fd, framing, vnet_header_size)
            self._frame_length = 0
            self._reported &= ~TROUBLE_PORT
        self.wake()

    def detach(self):
        """Let go of the port's fd; frames to it are dropped until another is attached."""
        with self.gate:
            self._cable.detach()
            self._frame_length = 0
        self.wake()

    def start(self, *, bint mergeable, bint checksum_to_driver,
              bint tso4_to_driver=False, bint tso6_to_driver=False, bint ecn_to_driver=False):
        """Begin to serve the queues with what the driver negotiated."""
        with self.gate:
            self.mergeable, self.checksum_to_driver = mergeable, checksum_to_driver
            self.tso4_to_driver, self.tso6_to_driver = tso4_to_driver, tso6_to_driver
            self.ecn_to_driver = ecn_to_driver
            self._reported = 0
            self.running = True
        self.wake()

    def halt(self):
        """Leave the queues alone from now on; a frame that waited for buffers is dropped."""
        with self.gate:
            self.running = False
            self._frame_length = 0
            self._cable.forget()

    @property
    def port_lost(self):
        """The port's peer has gone, or spoke nonsense."""
        return bool(self._cable.lost)

    @property
    def event_fd(self):
        """Readable when the worker has news: a queue broke (see VirtQueue.fault) or the port was lost."""
        return self._event_fd

    def counters(self):
        """Everything counted since the card was made, by name."""
        return dict(self._n)

    def kick(self):
        """The driver's doorbell."""
        fence()
        self._n.kicks += 1
        if load_int(&self._sleeping):
            self.wake()

    def wake(self):
        """Make the worker look again, whatever it waits for."""
        cdef uint64_t one = 1
        write(self._wake_fd, &one, sizeof(one))

    def windows_changed(self):
        """A DMA window is new: if rings were not to be found, look whether they lie in it."""
        if self.running and (self._tx_absent or self._rx_absent):
            self.wake()

    @property
    def awaited(self):
        """The events (POLLIN, POLLOUT of poll(2)) that the worker would wait for at the port."""
        return self._awaited()

    def stop(self):
        """Make run() return."""
        store_int(&self._stop, 1)
        self.wake()

    def service(self):
        """One burst in each direction; returns whether there may be more to do."""
        with self.gate:
            more = self._service()
            if not more:
                more = self._arm()
        return more

    def run(self):
        """Serve until stop() is called; releases the GIL for all of it."""
        with nogil:
            self._loop()
        store_int(&self._stop, 0)

    # --- the worker

    cdef void _loop(self) noexcept nogil:
        cdef bint more
        cdef int naps = NAPS            # taken since the last bulk; none at the start
        cdef uint64_t deadline, before
        prctl(PR_SET_TIMERSLACK, TIMER_SLACK_NS)
        while not load_int(&self._stop):
            before = self._n.tx_bytes + self._n.rx_bytes
            self.gate.acquire()
            more = self._service()
            self.gate.release()
            if more:
                continue
            if self.poll_ns:
                deadline = _now() + self.poll_ns
                while not more and not load_int(&self._stop) and _now() < deadline:
                    relax()
                    self.gate.acquire()
                    more = self._service()
                    self.gate.release()
                if more:
                    continue
            if self._n.tx_bytes + self._n.rx_bytes - before >= BULK_BYTES:
                naps = 0
            if naps < NAPS:
                naps += 1
                self._wait(NAP_NS)
                continue
            store_int(&self._sleeping, 1)
            self.gate.acquire()
            more = self._arm()
            self.gate.release()
            if not more:
                self._wait(-1)
            store_int(&self._sleeping, 0)
        prctl(PR_SET_TIMERSLACK, 0)

    cdef void _wait(self, int64_t timeout_ns) noexcept nogil:
        """Sleep until a wake-up, the port, or `timeout_ns` (-1: for ever)."""
        cdef pollfd fds[2]
        cdef timespec timeout
        cdef uint64_t drained
        self._n.sleeps += 1
        fds[0].fd = self._wake_fd
        fds[0].events = POLLIN
        fds[0].revents = 0
        fds[1].events = self._awaited()
        fds[1].fd = self._cable.fd if fds[1].events else -1       # POLLHUP alone would make this a busy loop
        fds[1].revents = 0
        timeout.tv_sec = 0
        timeout.tv_nsec = timeout_ns
        ppoll(fds, 2, NULL if timeout_ns < 0 else &timeout, NULL)
        if fds[0].revents:
            read(self._wake_fd, &drained, sizeof(drained))

    cdef short _awaited(self) noexcept nogil:
        """The events at the port that would give a burst something to do; any other would make it spin."""
        cdef short events = 0
        if not self.running or not self.bus_master or self._cable.lost:
            return 0
        if not self._rx_starved:
            events |= POLLIN
        if self._tx_blocked or self._cable.backlog():
            events |= POLLOUT
        return events

    cdef bint _service(self) noexcept nogil:
        """One burst each way; True when work is left that needs no waiting."""
        cdef bint more = False
        if not self.running or not self.bus_master:
            return False
        self._tx_absent = not self.tx.ready()
        if not self._tx_absent:
            more = self._transmit()
        else:
            self._tx_blocked = False
            self._cable.flush()         # what was sent before goes out still
        self._rx_absent = not self.rx.ready()
        if not self._rx_absent:
            more = self._receive() or more
        if self._rx_absent or self.rx._fault:
            self._rx_starved = True     # there is nowhere to put what the port has
        self._report()
        return more

    cdef bint _arm(self) noexcept nogil:
        """Ask the driver for kicks where they can help; True when there is work already."""
        cdef bint more = False
        if not self.running or not self.bus_master:
            return False
        if self.tx.ready():
            if self._tx_absent:
                more = True             # its rings have come since the burst
            elif not self._tx_blocked:
                more = self.tx.wants_kicks(self.tx.last_avail)
        if self.rx.ready():
            if self._rx_absent:
                more = True
            elif self._rx_starved:
                more = self.rx.wants_kicks(self._rx_seen) or more
        return more

    cdef void _report(self) noexcept nogil:
        """Raise the event for each trouble once."""
        cdef uint64_t one = 1
        cdef int news = ((TROUBLE_TX if self.tx._fault else 0) | (TROUBLE_RX if self.rx._fault else 0)
                         | (TROUBLE_PORT if self._cable.lost else 0))
        if news & ~self._reported:
            self._reported |= news
            write(self._event_fd, &one, sizeof(one))

    cdef void _complete(self, VirtQueue queue) noexcept nogil:
        """Publish a burst and interrupt if the driver wants it."""
        queue.publish()
        if queue.wants_interrupt():
            self._n.interrupts += 1
            self.lines.notify(1, queue.vector)

    # --- transmit

    cdef bint _transmit(self) noexcept nogil:
        cdef int sent, done = 0
        cdef int got = 1
        self.tx.refuses_kicks()
        self._cable.flush()
        self._tx_blocked = self._cable.full()
        while done < BURST_FRAMES and not self._tx_blocked:
            got = self.tx.pop_chain(&self._chain)
            if got <= 0:
                break
            sent = self._send()
            if self.tx._fault:
                break
            if sent == 0:
                self.tx.unpop_chains(1)
                self._tx_blocked = True
                break
            if sent < 0:
                self._n.tx_dropped += 1
            self.tx.push_used(self._chain.head, 0)
            done += 1
        self._cable.flush()
        if done:
            self._complete(self.tx)
        return done == BURST_FRAMES

    cdef int _send(self) noexcept nogil:
        """Send the popped chain: 1 sent, 0 the port is full, -1 dropped."""
        cdef Chain *c = &self._chain
        cdef uint8_t header[HEADER]
        cdef uint64_t length, skipped
        cdef int i, count
        cdef ssize_t wrote
        if (c.readable_bytes < HEADER + ETHERNET or c.readable_bytes > HEADER + FRAME_LIMIT
                or not self.link_up or self._cable.lost):
            return -1
        length = c.readable_bytes - HEADER
        if self._cable.framing != FRAMING_PACKETS:
            return self._send_copy()
        count = self.tx.vectors_of(c, 0, c.readable, DMA_READ, self._pieces, PIECES)
        if count < 0:
            return -1
        i = 0
        if self._cable.header_size == 0:
            skipped = 0
            while skipped < HEADER:
                wrote = min(<uint64_t> (HEADER - skipped), self._pieces[i].iov_len)
                memcpy(header + skipped, self._pieces[i].iov_base, wrote)
                self._pieces[i].iov_base = <uint8_t *> self._pieces[i].iov_base + wrote
                self._pieces[i].iov_len -= wrote
                skipped += wrote
                if self._pieces[i].iov_len == 0:
                    i += 1
            if header[1] != 0:
                return -1               # segmentation was not offered to this driver
            if header[0] & NEEDS_CSUM:
                return self._send_copy()
        return self._sent(self._cable.send_pieces(&self._pieces[i], count - i), length)

    cdef int _sent(self, int result, uint64_t length) noexcept nogil:
        """Count a frame that has left."""
        if result > 0:
            self._n.tx_frames += 1
            self._n.tx_bytes += length
        return result

    cdef int _send_copy(self) noexcept nogil:
        """Send through memory of our own: streams, the loopback, checksums that the port cannot leave."""
        cdef Chain *c = &self._chain
        cdef uint32_t total = <uint32_t> c.readable_bytes, length = total - HEADER, done = 0
        cdef uint8_t header[HEADER]
        cdef uint8_t copy[HEADER + FRAME_LIMIT]
        cdef int i
        for i in range(c.readable):
            if self.dma.copy_in(copy + done, c.segment[i].address, c.segment[i].length) != FAULT_NONE:
                self.tx._fault = 8
                return -1
            done += c.segment[i].length
        memcpy(header, copy, HEADER)
        if header[1] != 0:
            return -1
        if header[0] & NEEDS_CSUM and not (self._cable.framing == FRAMING_LOOPBACK and self.checksum_to_driver):
            if not complete_checksum(copy + HEADER, length, _little16(header + 6), _little16(header + 8)):
                return -1
            header[0] &= ~NEEDS_CSUM
        return self._sent(self._cable.send_frame(header, copy + HEADER, length), length)

    # --- receive

    cdef bint _receive(self) noexcept nogil:
        cdef int done = 0, published = 0, got
        self._rx_starved = False
        while done < BURST_FRAMES:
            self._rx_seen = self.rx.available()
            if self._frame_length == 0:
                if self._rx_seen == self.rx.last_avail:
                    self._rx_starved = True
                    break
                got = self._cable.fetch(self._frame, &self._frame_length)
                if got <= 0:
                    break
            done += 1
            if self._frame_length == 0:
                self._n.rx_dropped += 1
                continue
            if not self.link_up:
                self._n.rx_dropped += 1
                self._frame_length = 0
                continue
            if not self.filter.accepts(self._frame + HEADER):
                self._n.rx_filtered += 1
                self._frame_length = 0
                continue
            got = self._deliver()
            if got == 0:
                self._rx_starved = True
                break
            if got < 0:
                if self.rx._fault:
                    break
                self._n.rx_dropped += 1
            else:
                self._n.rx_frames += 1
                self._n.rx_bytes += self._frame_length - HEADER
                published += 1
            self._frame_length = 0
        if published:
            self._complete(self.rx)
        return done == BURST_FRAMES

    cdef bint _takes_segments(self, uint8_t gso_type) noexcept nogil:
        """Whether the driver accepted such frames; a port may still hold some that the one before it did."""
        if gso_type & GSO_ECN and not self.ecn_to_driver:
            return False
        gso_type &= ~GSO_ECN
        return ((gso_type == GSO_TCPV4 and self.tso4_to_driver)
                or (gso_type == GSO_TCPV6 and self.tso6_to_driver))

    cdef int _deliver(self) noexcept nogil:
        """Put `_frame` into receive buffers: 1 delivered, 0 too few buffers (none taken), -1 dropped."""
        cdef Chain *c = &self._chain
        cdef uint32_t total = self._frame_length, done = 0, room, part
        cdef uint64_t count_at[2]       # guest addresses of the two bytes of num_buffers
        cdef uint32_t offset
        cdef uint8_t byte
        cdef int got, i, used = 0
        if self._frame[1] and not self._takes_segments(self._frame[1]):
            return -1
        if not self.checksum_to_driver:
            if self._frame[0] & NEEDS_CSUM and not complete_checksum(
                    self._frame + HEADER, total - HEADER,
                    _little16(self._frame + 6), _little16(self._frame + 8)):
                return -1
            memset(self._frame, 0, 1)
        self._frame[10] = self._frame[11] = 0
        while done < total:
            got = self.rx.pop_chain(c) if used < MAX_MERGE else -1
            if got <= 0:
                if got == 0 or self.rx._fault == 0:
                    self.rx.unpop_chains(used)
                return got
            if used == 0 and c.writable_bytes < HEADER:
                self.rx.unpop_chains(1)
                self.rx._fault = 8
                return -1
            room = <uint32_t> min(c.writable_bytes, <uint64_t> (total - done))
            if room < total - done and not self.mergeable:
                self.rx.unpop_chains(1)
                return -1
            offset = 0
            for i in range(c.readable, c.segments):
                part = min(c.segment[i].length, room - offset)
                if part == 0:
                    break
                if self.dma.copy_out(c.segment[i].address, self._frame + done + offset, part) != FAULT_NONE:
                    self.rx._fault = 8
                    return -1
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
        for i in range(2):
            byte = <uint8_t> (used >> (8 * i))
            self.dma.copy_out(count_at[i], &byte, 1)
        for i in range(used):
            self.rx.push_used(self._heads[i], self._lengths[i])
        return 1
