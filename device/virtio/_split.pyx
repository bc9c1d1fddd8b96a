# cython: language_level=3
"""The device's side of a split virtqueue (virtio 1.3, 2.7), with indirect descriptors and event index.

Everything in the rings was written by a driver that may lie. Each descriptor is read once into the device's
own memory and checked there; what does not hold breaks this queue, `fault` says how, and nothing else.
Indices are single aligned loads and stores: acquire on avail.idx, release on used.idx, a full fence where
event index needs one.

Callers hold the card's gate.
"""

import errno

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy
from posix.uio cimport iovec

from device._atomic cimport fence, load16_acquire, load16_relaxed, store16_relaxed, store16_release
from device.dma._windows cimport DMA_READ, DMA_WRITE, FAULT_NONE, DmaWindows

from device.errors import DeviceError


cdef enum:
    DESC_F_NEXT = 1
    DESC_F_WRITE = 2
    DESC_F_INDIRECT = 4
    AVAIL_F_NO_INTERRUPT = 1
    USED_F_NO_NOTIFY = 1


cdef packed struct Descriptor:
    uint64_t address
    uint32_t length
    uint16_t flags
    uint16_t next


MAX_QUEUE_SIZE = 32768      # virtio 1.3, 2.7
MAX_CHAIN = MAX_SEGMENTS    # descriptors in a chain: UIO_MAXIOV, what readv and writev take

# Why a queue is broken, by the number the walker returns.
FAULTS = {
    1: "avail.idx is more than the queue size ahead",
    2: "a descriptor index is beyond the table",
    3: "a chain is longer than its table: it loops",
    4: "a device-readable descriptor follows a device-writable one",
    5: "an indirect descriptor was not negotiated, has a successor, or is nested",
    6: "an indirect table is empty, too long, or not a multiple of 16 bytes",
    7: "an indirect table is not in a readable DMA window",
    8: "a buffer is not in a DMA window that allows the access",
    9: "a chain of buffers is empty or holds more than 4 GiB",
}


cdef class VirtQueue:
    """Queue `index` of a device, at most `max_size` (a power of two) descriptors deep."""

    def __init__(self, DmaWindows dma not None, int index, uint16_t max_size):
        if max_size == 0 or max_size & (max_size - 1) or max_size > MAX_QUEUE_SIZE:
            raise ValueError(f"queue size {max_size}: a power of two from 1 to {MAX_QUEUE_SIZE}")
        self.dma = dma
        self.index = index
        self.max_size = max_size
        self.reset()

    def reset(self):
        """Forget the driver's rings and every index."""
        self.size = self.max_size
        self.enabled = False
        self._fault = 0
        self.vector = 0xFFFF
        self.descriptor_address = self.driver_address = self.device_address = 0
        self.event_index = self.indirect = False
        self.last_avail = self.used_index = 0
        self._generation = 0
        self._descriptors = NULL
        self._signalled_valid = False

    def enable(self, uint16_t size, uint64_t descriptors, uint64_t driver, uint64_t device, *,
               bint event_index=False, bint indirect=False):
        """Start on the rings at these addresses.

        Raises DeviceError(EINVAL) for a size or an alignment that the spec excludes.
        """
        if size == 0 or size > self.max_size or size & (size - 1):
            raise DeviceError(
                errno.EINVAL, f"queue {self.index}: size {size} is not a power of two up to {self.max_size}")
        if descriptors & 15 or driver & 1 or device & 3:
            raise DeviceError(
                errno.EINVAL,
                f"queue {self.index}: rings at {descriptors:#x}, {driver:#x}, {device:#x} are not aligned")
        self.size = size
        self.descriptor_address, self.driver_address, self.device_address = descriptors, driver, device
        self.event_index, self.indirect = event_index, indirect
        self._fault = 0
        self._generation = 0
        self._signalled_valid = False
        self.enabled = True

    def disable(self):
        """Stop looking at the rings; the indices stay for whoever saves them."""
        self.enabled = False

    def restore(self, uint16_t last_avail, uint16_t used_index):
        """Continue where another device left off."""
        self.last_avail, self.used_index = last_avail, used_index
        self._signalled_valid = False

    @property
    def fault(self):
        """Why the queue is broken, or None."""
        return FAULTS.get(self._fault)

    # --- rings

    cdef bint resolve(self) noexcept nogil:
        """Find the rings in the DMA windows, again after each change of those; False while any is missing."""
        cdef uint64_t size = self.size
        if self._generation == self.dma.generation and self._generation != 0:
            return self._descriptors != NULL
        self._generation = self.dma.generation
        self._descriptors = self.dma.contiguous(self.descriptor_address, 16 * size, DMA_READ)
        self._avail = <uint16_t *> self.dma.contiguous(self.driver_address, 6 + 2 * size, DMA_READ)
        self._used = <uint16_t *> self.dma.contiguous(self.device_address, 6 + 8 * size, DMA_WRITE)
        if self._avail == NULL or self._used == NULL:
            self._descriptors = NULL
        return self._descriptors != NULL

    cdef bint ready(self) noexcept nogil:
        return self.enabled and self._fault == 0 and self.resolve()

    cdef uint16_t available(self) noexcept nogil:
        """avail.idx as it is now; it differs from `last_avail` when chains wait. The queue must be ready."""
        return load16_acquire(&self._avail[1])

    cdef int pop_chain(self, Chain *chain) noexcept nogil:
        """Take the next chain: 1 and `chain` filled, 0 when there is none, -1 when the queue is broken."""
        cdef uint16_t avail, head
        if not self.ready():
            return -1 if self._fault else 0
        avail = load16_acquire(&self._avail[1])
        if avail == self.last_avail:
            return 0
        if <uint16_t> (avail - self.last_avail) > self.size:
            self._fault = 1
            return -1
        head = load16_relaxed(&self._avail[2 + (self.last_avail & (self.size - 1))])
        self._fault = self._walk(chain, head)
        if self._fault:
            return -1
        self.last_avail += 1
        return 1

    cdef void unpop_chains(self, uint16_t count) noexcept nogil:
        """Give back the `count` chains popped last; they will be popped again."""
        self.last_avail -= count

    cdef int _walk(self, Chain *chain, uint16_t head) noexcept nogil:
        cdef Descriptor d
        cdef bint indirect = False
        cdef uint64_t table = 0             # address of the indirect table, once in it; any may be, zero too
        cdef uint32_t limit = self.size     # entries in the table walked
        cdef uint32_t index = head
        cdef uint32_t steps = 0
        chain.head = head
        chain.readable = chain.segments = 0
        chain.readable_bytes = chain.writable_bytes = 0
        while True:
            if index >= limit:
                return 2
            if steps >= limit:
                return 3
            steps += 1
            if indirect:
                if self.dma.copy_in(&d, table + 16 * index, 16) != FAULT_NONE:
                    return 7
            else:
                memcpy(&d, self._descriptors + 16 * index, 16)
            if d.flags & DESC_F_INDIRECT:
                if indirect or not self.indirect or d.flags & DESC_F_NEXT:
                    return 5
                if d.length == 0 or d.length & 15 or d.length // 16 > MAX_SEGMENTS:
                    return 6
                indirect = True
                table, limit, index, steps = d.address, d.length // 16, 0, 0
                continue
            if d.length:
                if chain.segments >= MAX_SEGMENTS:
                    return 3
                if d.flags & DESC_F_WRITE:
                    chain.writable_bytes += d.length
                elif chain.writable_bytes:
                    return 4
                else:
                    chain.readable_bytes += d.length
                    chain.readable += 1
                chain.segment[chain.segments] = Segment(d.address, d.length)
                chain.segments += 1
            if not d.flags & DESC_F_NEXT:
                break
            index = d.next
        if chain.segments == 0 or chain.readable_bytes + chain.writable_bytes > <uint64_t> 0xFFFFFFFF:
            return 9
        return 0

    cdef int vectors_of(self, Chain *chain, int first, int last, uint32_t prot,
                        iovec *out, int room) noexcept nogil:
        """Turn segments first..last-1 into at most `room` pieces of memory.

        Returns the number of pieces, or -1 and the queue is broken.
        """
        cdef int i, used = 0
        cdef uint64_t done, run
        cdef uint8_t *where
        for i in range(first, last):
            done = 0
            while done < chain.segment[i].length:
                if (used == room or chain.segment[i].address + done < done
                        or self.dma.span(chain.segment[i].address + done, chain.segment[i].length - done,
                                         prot, &where, &run) != FAULT_NONE):
                    self._fault = 8
                    return -1
                out[used].iov_base = where
                out[used].iov_len = run
                used += 1
                done += run
        return used

    cdef void push_used(self, uint16_t head, uint32_t written) noexcept nogil:
        """Hand a chain back; the driver sees it at the next publish()."""
        cdef uint32_t *entry = <uint32_t *> &self._used[2] + 2 * (self.used_index & (self.size - 1))
        entry[0] = head
        entry[1] = written
        self.used_index += 1

    cdef void publish(self) noexcept nogil:
        store16_release(&self._used[1], self.used_index)

    cdef bint wants_interrupt(self) noexcept nogil:
        """Whether the driver wants to be told of what was published since this was last asked (2.7.7)."""
        cdef uint16_t event, previous = self._signalled
        cdef bint known = self._signalled_valid
        fence()
        if not self.event_index:
            return not load16_relaxed(&self._avail[0]) & AVAIL_F_NO_INTERRUPT
        self._signalled = self.used_index
        self._signalled_valid = True
        event = load16_relaxed(&self._avail[2 + self.size])
        return not known or <uint16_t> (self.used_index - event - 1) < <uint16_t> (self.used_index - previous)

    cdef bint wants_kicks(self, uint16_t seen) noexcept nogil:
        """Ask for a notification once avail.idx moves on from `seen`; True when it has already."""
        if self.event_index:
            store16_relaxed(&self._used[2 + 4 * self.size], seen)
        else:
            store16_relaxed(&self._used[0], 0)
        fence()
        return self.available() != seen

    cdef void refuses_kicks(self) noexcept nogil:
        """Ask for silence; a driver with event index keeps it by itself while avail_event stays behind."""
        if not self.event_index:
            store16_relaxed(&self._used[0], USED_F_NO_NOTIFY)

    # --- the same for Python: control queues, prototypes and tests

    def pop(self):
        """The next available chain as a DescriptorChain, or None; DeviceError(EIO): the queue is broken."""
        cdef int got = self.pop_chain(&self._chain)
        if got < 0:
            raise DeviceError(errno.EIO, f"queue {self.index} is broken: {self.fault}")
        if got == 0:
            return None
        cdef Chain *c = &self._chain
        segments = [(c.segment[i].address, c.segment[i].length) for i in range(c.segments)]
        return DescriptorChain(self, c.head, segments[:c.readable], segments[c.readable:])

    def push(self, chain, uint32_t written=0):
        """Hand `chain` back with `written` bytes in it; returns whether the driver wants an interrupt."""
        if not self.ready():
            return False
        self.push_used(chain.head, written)
        self.publish()
        return self.wants_interrupt()

    def enable_kicks(self):
        """Ask for notifications; returns whether a chain is available already."""
        return self.wants_kicks(self.last_avail) if self.ready() else False

    def disable_kicks(self):
        """Ask for no notifications."""
        if self.ready():
            self.refuses_kicks()


class DescriptorChain:
    """A popped chain: `readable` and `writable` are its segments as (address, length).

    Every access goes through the DMA windows of that moment, so a chain may be held while windows change.
    """

    __slots__ = ("_dma", "head", "readable", "writable")

    def __init__(self, VirtQueue queue, int head, list readable, list writable):
        self._dma = queue.dma
        self.head = head
        self.readable = readable
        self.writable = writable

    def read(self):
        """All device-readable bytes; raises DeviceError(EFAULT) when they are not in DMA windows."""
        return b"".join(self._dma.read(address, length) for address, length in self.readable)

    def write(self, data):
        """Fill the device-writable segments with `data`; returns the number of bytes that fitted."""
        view = memoryview(data)
        done = 0
        for address, length in self.writable:
            part = view[done:done + length]
            if not len(part):
                break
            self._dma.write(address, part)
            done += len(part)
        return done
