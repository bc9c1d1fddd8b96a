# cython: language_level=3
"""The card's data path: frames between one pair of virtqueues and a port, without the GIL or Python objects.

Transmit: pop chains from the transmit queue, write them to the port, straight from guest memory when the port
takes the virtio-net header or needs none, hand the buffers back, decide about the interrupt once per burst.
Receive: take frames from the port while the driver has buffers, filter, copy into one or more buffers,
publish. See _bursts.

`service()` does one bounded burst and may be called from anywhere. `run()` is the worker: it repeats bursts,
looks again for a while after bulk traffic, then arms the notifications and sleeps until the driver kicks, by
a register or an eventfd, the port has something, or someone calls `wake()`.
"""

import os
import struct

from libc.stdint cimport int64_t, uint64_t
from posix.types cimport off_t
from posix.uio cimport iovec
from posix.unistd cimport read, write

from device._atomic cimport fence, load_int, relax, store_int
from device.virtio._rings cimport OWED_ROOM
from firmware._bursts cimport Bursts


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
    int ppoll(pollfd *, unsigned long, const timespec *, const void *)


cdef extern from "<sys/uio.h>" nogil:
    int RWF_NOWAIT
    ssize_t preadv2(int, const iovec *, int, off_t, int)


cdef enum:
    # A doorbell by message costs the guest a round trip, so after bulk traffic the worker looks into rings
    # a few more times by the clock before it asks for doorbells. What is smaller, requests and their answers,
    # is never made to wait for the clock.
    BULK_BYTES = 4096
    NAPS = 4
    NAP_NS = 100000
    TIMER_SLACK_NS = 1000           # the default slack would make a nap half as long again


cdef uint64_t _now() noexcept nogil:
    cdef timespec t
    clock_gettime(CLOCK_MONOTONIC, &t)
    return <uint64_t> t.tv_sec * 1000000000 + <uint64_t> t.tv_nsec


_COUNTS = struct.Struct("<HH")      # completions owed to the receive and to the transmit ring
_COMPLETION = struct.Struct("<II")  # as in a used ring


cdef int _eventfd() except -1:
    return os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)


cdef class DataPath(Bursts):
    """The bursts, what starts and stops them, and their thread."""

    def __cinit__(self, *args, **kwargs):
        cdef int i
        self._wake_fd = -1
        for i in range(BELLS):
            self._bells[i] = -1
        self._wake_fd = _eventfd()
        self.event_file = _eventfd()
        for i in range(BELLS):
            self._bells[i] = _eventfd()

    def __dealloc__(self):
        cdef int fd
        for fd in [self._wake_fd, self.event_file, self._bells[0], self._bells[1], self._bells[2]]:
            if fd >= 0:
                os.close(fd)

    # --- control side

    def attach(self, int fd, int framing, int vnet_header_size):
        """Use a port: its non-blocking `fd` (borrowed; -1 for none), its framing and its header size.

        Framings are 0 packets, 1 stream, 2 loopback.
        """
        with self.gate:
            self.dma.disturb()
            self.cable.attach(fd, framing, vnet_header_size)
            self.frame_length = 0
            self.port_attached()
        self.wake()

    def detach(self):
        """Let go of the port's fd; frames to it are dropped until another is attached."""
        with self.gate:
            self.dma.disturb()
            self.cable.detach()
            self.frame_length = 0
        self.wake()

    def start(self, *, bint mergeable, bint checksum_to_driver,
              bint tso4_to_driver=False, bint tso6_to_driver=False, bint ecn_to_driver=False):
        """Begin to serve the queues with what the driver negotiated."""
        with self.gate:
            self.mergeable, self.checksum_to_driver = mergeable, checksum_to_driver
            self.tso4_to_driver, self.tso6_to_driver = tso4_to_driver, tso6_to_driver
            self.ecn_to_driver = ecn_to_driver
            self.reported = 0
            self.running = True
        self.wake()

    def halt(self):
        """Leave the queues alone from now on; a frame that waited for buffers is dropped."""
        with self.gate:
            self.dma.disturb()
            self.running = False
            self.frame_length = 0
            self.cable.forget()
        if self.dma.guest_log_owed:
            self.wake()                 # the reset is complete when that is settled

    @property
    def bus_master(self):
        """Whether the card may do DMA; while it may not it leaves rings and buffers alone.

        Set it in the gate.
        """
        return bool(self.may_master)

    @bus_master.setter
    def bus_master(self, bint allowed):
        self.dma.disturb()
        self.may_master = allowed

    def save(self):
        """What is on its way to the driver, for `stage` of another data path; save the queues with it.

        Frames that the driver has not got yet, and completions that its rings have not (VirtQueue.owed_list).
        What the port has not got yet stays here and goes out here.
        """
        with self.gate:
            completions = [self.rx.owed_list(), self.tx.owed_list()]
            counts = _COUNTS.pack(*(len(owed) for owed in completions))
            rings = b"".join(_COMPLETION.pack(*each) for owed in completions for each in owed)
            return counts + rings + self.cable.save(self.frame[:self.frame_length])

    def stage(self, data):
        """What delivers what another data path saved before all else; ValueError if none did.

        To be called in the gate, after VirtQueue.restore and `start`.
        """
        if len(data) < _COUNTS.size:
            raise ValueError(f"{len(data)} bytes where the numbers of completions should be")
        received, sent = _COUNTS.unpack_from(data)
        frames_at = _COUNTS.size + (received + sent) * _COMPLETION.size
        if max(received, sent) > OWED_ROOM or frames_at > len(data):
            raise ValueError(f"{received} and {sent} completions in {len(data)} bytes")
        rings = list(_COMPLETION.iter_unpack(data[_COUNTS.size:frames_at]))
        deliver = self.cable.stage(data[frames_at:])

        def apply():
            deliver()
            self.rx.owe_again(rings[:received])
            self.tx.owe_again(rings[received:])

        return apply

    @property
    def port_lost(self):
        """The port's peer has gone, or spoke nonsense."""
        return bool(self.cable.lost)

    @property
    def event_fd(self):
        """Readable when the worker has news: a queue broke (see VirtQueue.fault) or the port was lost."""
        return self.event_file

    @property
    def doorbell_fds(self):
        """Eventfds for the driver's side, as good as `kick`: of the receive, transmit and control queue.

        Made and closed with the data path. The last is for whoever serves the control queue to watch.
        """
        return self._bells[0], self._bells[1], self._bells[2]

    def counters(self):
        """Everything counted since the card was made, by name."""
        return dict(self.n)

    def kick(self):
        """The driver's doorbell."""
        fence()
        self.n.kicks += 1
        if load_int(&self._sleeping):
            self.wake()

    def wake(self):
        """Make the worker look again, whatever it waits for."""
        cdef uint64_t one = 1
        write(self._wake_fd, &one, sizeof(one))

    def windows_changed(self):
        """A DMA window is new: if rings were not to be found, look whether they lie in it."""
        if self.running and (self.tx_absent or self.rx_absent):
            self.wake()

    @property
    def awaited(self):
        """The events (POLLIN, POLLOUT of poll(2)) that the worker would wait for at the port."""
        return self.events()

    def stop(self):
        """Make run() return."""
        store_int(&self._stop, 1)
        self.wake()

    def service(self):
        """One burst in each direction; returns whether there may be more to do."""
        with self.gate:
            more = self.burst()
            if not more:
                more = self.arm()
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
            before = self.n.tx_bytes + self.n.rx_bytes
            self.gate.acquire()
            more = self.burst()
            self.gate.release()
            if more:
                continue
            if self.poll_ns:
                deadline = _now() + self.poll_ns
                while not more and not load_int(&self._stop) and _now() < deadline:
                    relax()
                    self.gate.acquire()
                    more = self.burst()
                    self.gate.release()
                if more:
                    continue
            if self.n.tx_bytes + self.n.rx_bytes - before >= BULK_BYTES:
                naps = 0
            if naps < NAPS:
                naps += 1
                self._wait(NAP_NS)
                continue
            store_int(&self._sleeping, 1)
            self.gate.acquire()
            more = self.arm()
            self.gate.release()
            if not more:
                self._wait(-1)
            store_int(&self._sleeping, 0)
        prctl(PR_SET_TIMERSLACK, 0)

    cdef void _wait(self, int64_t timeout_ns) noexcept nogil:
        """Sleep until a wake-up, the port, or `timeout_ns`; -1: for ever, and then for doorbells too."""
        cdef pollfd fds[2 + WATCHED_BELLS]
        cdef timespec timeout
        cdef uint64_t drained
        cdef int i
        self.n.sleeps += 1
        fds[0].fd = self._wake_fd
        fds[0].events = POLLIN
        fds[0].revents = 0
        fds[1].events = self.events()
        fds[1].fd = self.cable.fd if fds[1].events else -1        # POLLHUP alone would make this a busy loop
        fds[1].revents = 0
        for i in range(WATCHED_BELLS):
            fds[2 + i].fd = self._bells[i] if timeout_ns < 0 else -1
            fds[2 + i].events = POLLIN
            fds[2 + i].revents = 0
        timeout.tv_sec = 0
        timeout.tv_nsec = timeout_ns
        ppoll(fds, 2 + WATCHED_BELLS, NULL if timeout_ns < 0 else &timeout, NULL)
        if fds[0].revents:
            read(self._wake_fd, &drained, sizeof(drained))
        for i in range(WATCHED_BELLS):
            if fds[2 + i].revents:
                self._answer(self._bells[i])

    cdef void _answer(self, int bell) noexcept nogil:
        """Quieten a doorbell. Its file is the client's too, which may have read it, and have it block."""
        cdef uint64_t rung = 0
        cdef iovec room
        room.iov_base = &rung
        room.iov_len = sizeof(rung)
        if preadv2(bell, &room, 1, -1, RWF_NOWAIT) == sizeof(rung):
            self.n.kicks += 1           # however often it was rung, or the client says so
