# cython: language_level=3
"""The device's side of a split virtqueue (virtio 1.3, 2.7), with indirect descriptors and event index.

Everything in the rings was written by a driver that may lie. Each descriptor is read once into the device's
own memory and checked there; what does not hold breaks this queue, `fault` says how, and nothing else.
Indices are single aligned loads and stores: acquire on avail.idx, release on used.idx, a full fence where
event index needs one.

Rings that are not in this process in one piece, because the client has to be asked for them or because they
lie in several mappings, are worked on in copies: what is available and its descriptors are fetched for a
burst at once, completions are collected and written at its end. Asking lets the gate go, and the queue may
have been reset before the answer came. Then nothing has happened (DISTURBED): what was popped of a queue
that still is the same is given back or completed later, and of any other it is forgotten.

Callers hold the card's gate, and are one at a time for each queue.
"""

from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memmove
from posix.uio cimport iovec

from device._atomic cimport (
    fence,
    load16_acquire,
    load16_relaxed,
    load_int,
    load_int_after,
    store16_relaxed,
    store16_release,
)
from device.dma._windows cimport (
    DMA_READ,
    DMA_WRITE,
    FAULT_DISTURBED,
    FAULT_GONE,
    FAULT_MESSAGE_ONLY,
    FAULT_NONE,
    FAULT_REFUSED,
    DmaWindows,
)


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


cdef class Rings:
    """What a burst does with a queue. See device.virtio._split for its life."""

    def __dealloc__(self):
        free(self._copies)

    # --- rings

    cdef bint resolve(self) noexcept nogil:
        """Find the rings in the DMA windows, again after each change of those, or when some were truncated;
        False while any is missing.
        """
        cdef uint64_t size = self.size
        cdef int32_t losses = load_int(self.dma.losses)
        if self._generation == self.dma.generation and self._generation != 0 and self._losses == losses:
            return self._descriptors != NULL
        self._generation, self._losses = self.dma.generation, losses
        self._copied = False
        self._descriptors = self.dma.contiguous(self.descriptor_address, 16 * size, DMA_READ)
        self._avail = <uint16_t *> self.dma.contiguous(self.driver_address, 6 + 2 * size, DMA_READ)
        self._used = <uint16_t *> self.dma.contiguous(self.device_address, 6 + 8 * size, DMA_WRITE)
        if self._descriptors == NULL or self._avail == NULL or self._used == NULL:
            self._copied = self.reachable() and self._use_copies()
            if not self._copied:
                self._descriptors = NULL
        return self._descriptors != NULL

    cdef bint reachable(self) noexcept nogil:
        """Whether the rings are in the DMA windows. Changes nothing: a burst may be waiting for the client."""
        cdef uint64_t size = self.size
        return (self.dma.reach(self.descriptor_address, 16 * size, DMA_READ) == FAULT_NONE
                and self.dma.reach(self.driver_address, 6 + 2 * size, DMA_READ) == FAULT_NONE
                and self.dma.reach(self.device_address, 6 + 8 * size, DMA_WRITE) == FAULT_NONE)

    cdef bint _use_copies(self) noexcept nogil:
        if self._copies == NULL:
            self._copies = <uint8_t *> malloc(16 * <size_t> self.max_size + 4 + 2 * <size_t> self.max_size)
        self._descriptors = self._copies
        self._avail = <uint16_t *> (self._copies + 16 * <size_t> self.max_size)
        self._fetched = self.next_avail
        return self._copies != NULL

    cdef bint ready(self) noexcept nogil:
        return (self.enabled and self._fault == 0 and not (self.stopping and self.settled())
                and self.resolve())

    cdef bint settled(self) noexcept nogil:
        """Whether no chain is in flight, and the driver can see that of all that were."""
        return self._popped == 0 and self.owed_count == 0 and not self.unpublished

    cdef int _ring_failed(self, int fault) noexcept nogil:
        """A ring could not be reached: BROKEN, or DISTURBED and it is looked for again."""
        if fault <= FAULT_REFUSED:
            return self.failed(fault, 10)
        self._generation = 0
        return DISTURBED

    cdef int failed(self, int fault, int number) noexcept nogil:
        """What a FAULT of a copy means: BROKEN, with this fault of the queue, or DISTURBED."""
        if fault == FAULT_DISTURBED or fault == FAULT_GONE:
            return DISTURBED
        if self._fault == 0:
            self._fault = number
        return BROKEN

    cdef int _load16(self, uint64_t address, uint16_t *value) noexcept nogil:
        """One of a ring's words, never half of it; a FAULT."""
        cdef uint8_t *where
        cdef uint64_t run
        cdef int32_t losses = load_int(self.dma.losses)
        if self.dma.span(address, 2, DMA_READ, &where, &run) != FAULT_NONE:
            return self.dma.copy_in(value, address, 2)
        value[0] = load16_acquire(<uint16_t *> where)
        return self.dma.unless_lost(losses, address, 2, DMA_READ)

    cdef int _store16(self, uint64_t address, uint16_t value) noexcept nogil:
        """Set one of a ring's words after all that was written before; a FAULT."""
        cdef uint8_t *where
        cdef uint64_t run
        if self.dma.span(address, 2, DMA_WRITE, &where, &run) != FAULT_NONE:
            return self.dma.copy_out(address, &value, 2)
        store16_release(<uint16_t *> where, value)
        if self.dma.marking:
            self.dma.mark(address, 2)
        return FAULT_NONE

    # --- chains

    cdef int _fetch(self) noexcept nogil:
        """Copy avail.idx, what became available since the last time, and the descriptors."""
        cdef uint16_t index = 0, ready, at, part
        cdef int fault = self._load16(self.driver_address + 2, &index)
        ready = index - self.next_avail
        if fault == FAULT_NONE and index != self._fetched and ready <= self.size:
            at = self.next_avail & (self.size - 1)
            part = min(ready, <uint16_t> (self.size - at))
            fault = self.dma.copy_in(&self._avail[2 + at], self.driver_address + 4 + 2 * at, 2 * part)
            if fault == FAULT_NONE and part < ready:
                fault = self.dma.copy_in(&self._avail[2], self.driver_address + 4, 2 * (ready - part))
            if fault == FAULT_NONE:
                fault = self.dma.copy_in(
                    self._descriptors, self.descriptor_address, 16 * <uint64_t> self.size)
        if fault != FAULT_NONE:
            return self._ring_failed(fault)
        self._fetched = self._avail[1] = index
        return 0

    cdef int available(self, uint16_t *index) noexcept nogil:
        """avail.idx, which differs from `next_avail` when chains wait: 0, BROKEN, DISTURBED.

        The queue must be ready. In a copy it may be older than the last look.
        """
        cdef int got = 0
        if self._copied and self._fetched == self.next_avail:
            got = self._fetch()
        if got == 0:
            index[0] = load16_acquire(&self._avail[1])
        return got

    cdef int pop_chain(self, Chain *chain) noexcept nogil:
        """Take the next chain: 1 and `chain` filled, 0 when there is none, BROKEN, DISTURBED.

        DISTURBED also when some memory was truncated meanwhile: nothing is made of what was read then.
        """
        cdef uint16_t avail
        cdef int got, fault = 0
        if not self.ready():
            return BROKEN if self._fault else 0
        if self.stopping:
            return 0
        got = self.available(&avail)
        if got < 0:
            return got
        if <uint16_t> (avail - self.next_avail) > self.size:
            fault = 1
        elif avail != self.next_avail:
            fault = self._walk(chain, load16_relaxed(&self._avail[2 + (self.next_avail & (self.size - 1))]))
        if load_int_after(self.dma.losses) != self._losses:
            return DISTURBED
        if fault:
            return self.failed(fault, fault)
        if avail == self.next_avail:
            return 0
        self.next_avail += 1
        self._popped += 1
        return 1

    cdef void give_back(self) noexcept nogil:
        """Give back what was popped and not pushed; it will be popped again."""
        self.next_avail -= self._popped
        self._popped = 0
        self._fetched = self.next_avail

    cdef int _walk(self, Chain *chain, uint16_t head) noexcept nogil:
        """Read a chain: 0, the number of a fault, or what kept an indirect table from being copied."""
        cdef Descriptor d
        cdef int fault
        cdef bint indirect = False
        cdef const uint8_t *table = self._descriptors
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
            memcpy(&d, table + 16 * index, 16)
            if d.flags & DESC_F_INDIRECT:
                if indirect or not self.indirect or d.flags & DESC_F_NEXT:
                    return 5
                if d.length == 0 or d.length & 15 or d.length // 16 > MAX_SEGMENTS:
                    return 6
                indirect = True
                limit, index, steps = d.length // 16, 0, 0
                table = self.dma.contiguous(d.address, d.length, DMA_READ)
                if table == NULL:
                    table = self._table
                    fault = self.dma.copy_in(self._table, d.address, d.length)
                    if fault != FAULT_NONE:
                        return fault if fault == FAULT_DISTURBED or fault == FAULT_GONE else 7
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

        Returns the number of pieces, or BROKEN, or NOT_HERE.
        """
        cdef int i, fault, used = 0
        cdef uint64_t done, run
        cdef uint8_t *where
        for i in range(first, last):
            done = 0
            while done < chain.segment[i].length:
                if used == room or chain.segment[i].address + done < done:
                    self._fault = 8
                    return BROKEN
                fault = self.dma.span(chain.segment[i].address + done, chain.segment[i].length - done,
                                      prot, &where, &run)
                if fault == FAULT_MESSAGE_ONLY:
                    return NOT_HERE
                if fault != FAULT_NONE:
                    self._fault = 8
                    return BROKEN
                out[used].iov_base = where
                out[used].iov_len = run
                used += 1
                done += run
        return used

    # --- completions

    cdef void push_used(self, uint16_t head, uint32_t written) noexcept nogil:
        """Hand a chain back; the driver sees it at the next complete().

        Always succeeds, whatever became of the rings. At most OWED_ROOM between two completes.
        """
        cdef uint32_t *entry
        if self._popped:
            self._popped -= 1
        self.unpublished = True
        if self._copied or self.owed_count or self._generation != self.dma.generation:
            self.owe(head, written)
            return
        entry = <uint32_t *> &self._used[2] + 2 * (self.used_index & (self.size - 1))
        entry[0] = head
        entry[1] = written
        if self.dma.marking:
            self.dma.mark(self.device_address + 4 + 8 * (self.used_index & (self.size - 1)), 8)
        self.used_index += 1

    cdef void owe(self, uint16_t head, uint32_t written) noexcept nogil:
        """Keep a completion until it can be written."""
        if self.owed_count < OWED_ROOM:
            self.owed[self.owed_count] = Used(head, written)
            self.owed_count += 1
        self.unpublished = True

    cdef int complete(self) noexcept nogil:
        """Let the driver see what was pushed: 1 when it wants an interrupt, 0, BROKEN, DISTURBED.

        What could not be shown is `unpublished` still, and shown by the next call.
        """
        cdef uint16_t word
        if not self.unpublished or not self.enabled or not self.resolve():
            return 0
        if self._copied or self.owed_count:
            return self._complete_by_copies()
        self.unpublished = False
        store16_release(&self._used[1], self.used_index)
        if self.dma.marking:
            self.dma.mark(self.device_address + 2, 2)
        fence()
        word = load16_relaxed(&self._avail[2 + self.size if self.event_index else 0])
        return self._interrupt_due(word)

    cdef int _complete_by_copies(self) noexcept nogil:
        cdef uint16_t at, part, word = 0
        cdef int fault = FAULT_NONE
        while self.owed_count and fault == FAULT_NONE:
            at = self.used_index & (self.size - 1)
            part = min(self.owed_count, <uint32_t> (self.size - at))
            fault = self.dma.copy_out(self.device_address + 4 + 8 * at, self.owed, 8 * part)
            if fault == FAULT_NONE:
                self.used_index += part
                self.owed_count -= part
                memmove(self.owed, self.owed + part, self.owed_count * sizeof(Used))
        if fault == FAULT_NONE:
            fault = self._store16(self.device_address + 2, self.used_index)
        fence()
        if fault == FAULT_NONE:
            fault = self._load16(self.driver_address + (4 + 2 * self.size if self.event_index else 0), &word)
        if fault != FAULT_NONE:
            return self._ring_failed(fault)
        self.unpublished = False
        return self._interrupt_due(word)

    cdef bint _interrupt_due(self, uint16_t word) noexcept nogil:
        """Whether the driver wants to be told of what was published since this was last asked (2.7.7).

        `word` is its used_event, or its flags.
        """
        cdef uint16_t previous = self._signalled
        cdef bint known = self._signalled_valid
        if not self.event_index:
            return not word & AVAIL_F_NO_INTERRUPT
        self._signalled = self.used_index
        self._signalled_valid = True
        return not known or <uint16_t> (self.used_index - word - 1) < <uint16_t> (self.used_index - previous)

    # --- kicks

    cdef int wants_kicks(self, uint16_t seen) noexcept nogil:
        """Ask for a notification once avail.idx moves on from `seen`.

        1 when it has already, 0, BROKEN, DISTURBED.
        """
        cdef uint16_t index = 0
        cdef int fault
        if self._copied:
            fault = self._store16(self.device_address + (4 + 8 * self.size if self.event_index else 0),
                                  seen if self.event_index else 0)
            fence()
            if fault == FAULT_NONE:
                fault = self._load16(self.driver_address + 2, &index)
            return index != seen if fault == FAULT_NONE else self._ring_failed(fault)
        self._set_kicks(seen if self.event_index else 0)
        fence()
        return load16_acquire(&self._avail[1]) != seen

    cdef void refuses_kicks(self) noexcept nogil:
        """Ask for silence; a driver with event index keeps it by itself while avail_event stays behind.

        Not worth a message to the client.
        """
        if not self.event_index and not self._copied:
            self._set_kicks(USED_F_NO_NOTIFY)

    cdef void _set_kicks(self, uint16_t value) noexcept nogil:
        """Set avail_event, or the flags where it was not negotiated."""
        cdef uint32_t at = 2 + 4 * self.size if self.event_index else 0
        store16_relaxed(&self._used[at], value)
        if self.dma.marking:
            self.dma.mark(self.device_address + 2 * at, 2)
