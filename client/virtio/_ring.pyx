# cython: language_level=3, boundscheck=False, wraparound=False
"""The driver's side of a split virtqueue (virtio 1.3, 2.7), with event index; `_ring.pyi` tells the promises.

The device is not trusted: chains and buffers are remembered on this side, of what the device writes only the
used ring and received bytes are read, and what is read twice is bounded both times. Indices are single aligned loads and stores: release on avail.idx,
acquire on used.idx, and a full fence between publishing an index and reading the other side's event index or
flags (2.7.7.1, 2.7.10.1).

A slot is a fixed buffer that belongs to the descriptor of the same number.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

from client.errors import ClientError, DeviceError


cdef extern from *:
    """
    #define ring_load_acquire(p)      __atomic_load_n((p), __ATOMIC_ACQUIRE)
    #define ring_load_relaxed(p)      __atomic_load_n((p), __ATOMIC_RELAXED)
    #define ring_store_release(p, v)  __atomic_store_n((p), (v), __ATOMIC_RELEASE)
    #define ring_store_relaxed(p, v)  __atomic_store_n((p), (v), __ATOMIC_RELAXED)
    #define ring_fence()              __atomic_thread_fence(__ATOMIC_SEQ_CST)
    """
    uint16_t load_acquire "ring_load_acquire"(const uint16_t *p) noexcept nogil
    uint16_t load16 "ring_load_relaxed"(const uint16_t *p) noexcept nogil
    uint32_t load32 "ring_load_relaxed"(const uint32_t *p) noexcept nogil
    void store_release "ring_store_release"(uint16_t *p, uint16_t v) noexcept nogil
    void store16 "ring_store_relaxed"(uint16_t *p, uint16_t v) noexcept nogil
    void fence "ring_fence"() noexcept nogil


cdef enum:
    F_NEXT = 1
    F_WRITE = 2
    NO_INTERRUPT = 1
    NO_NOTIFY = 1
    NET_HEADER = 12
    NUM_BUFFERS = 10

cdef packed struct Descriptor:
    uint64_t address
    uint32_t length
    uint16_t flags
    uint16_t next

MAX_SIZE = 32768


def ring_layout(int size):
    if size < 1 or size > MAX_SIZE or size & (size - 1):
        raise ClientError(f"a ring of {size} descriptors: not a power of two up to {MAX_SIZE}")
    cdef int driver = 16 * size
    cdef int device = (driver + 6 + 2 * size + 63) & ~63
    return device + 6 + 8 * size, driver, device


cdef class Ring:
    cdef Py_buffer _memory
    cdef bint _held
    cdef Descriptor *_descriptors
    cdef uint16_t *_avail
    cdef uint16_t *_used
    cdef uint32_t *_used_entries
    cdef uint16_t *_free
    cdef uint16_t *_next
    cdef uint16_t *_length
    cdef uint16_t _mask, _free_count, _avail_index, _kicked, _last_used
    cdef bint _event_index
    cdef list _tokens
    cdef readonly uint16_t size
    cdef readonly object descriptor_iova, driver_iova, device_iova

    def __cinit__(self, memory, iova, int size, *args, bint event_index=False, **kwargs):
        total, driver, device = ring_layout(size)
        PyObject_GetBuffer(memory, &self._memory, PyBUF_SIMPLE | PyBUF_WRITABLE)
        self._held = True
        if self._memory.len < total or <size_t>self._memory.buf & 15:
            raise ClientError(f"a ring of {size} descriptors needs {total} bytes, aligned to 16")
        cdef uint8_t *base = <uint8_t *>self._memory.buf
        memset(base, 0, total)
        self._descriptors = <Descriptor *>base
        self._avail = <uint16_t *>(base + <int>driver)
        self._used = <uint16_t *>(base + <int>device)
        self._used_entries = <uint32_t *>(base + <int>device + 4)
        self._free = <uint16_t *>calloc(size, 2)
        self._next = <uint16_t *>calloc(size, 2)
        self._length = <uint16_t *>calloc(size, 2)
        if self._free == NULL or self._next == NULL or self._length == NULL:
            raise MemoryError
        self.size = size
        self._mask = size - 1
        self._event_index = event_index
        self._tokens = [None] * size
        self._free_count = size
        cdef int i
        for i in range(size):
            self._free[i] = size - 1 - i
        self.descriptor_iova = iova
        self.driver_iova = iova + driver
        self.device_iova = iova + device

    def __dealloc__(self):
        free(self._free)
        free(self._next)
        free(self._length)
        if self._held:
            PyBuffer_Release(&self._memory)

    def release(self):
        self._descriptors = NULL
        if self._held:
            self._held = False
            PyBuffer_Release(&self._memory)

    cdef int _check(self) except -1:
        if self._descriptors == NULL:
            raise ClientError("the ring is released")
        return 0

    @property
    def free(self):
        return self._free_count

    # giving buffers to the device

    cdef inline void _offer(self, uint16_t head) noexcept:
        """Put a chain's head into the avail ring; `publish` lets the device see it."""
        store16(&self._avail[2 + (self._avail_index & self._mask)], head)
        self._avail_index += 1

    cdef inline uint16_t _take(self) noexcept:
        self._free_count -= 1
        return self._free[self._free_count]

    cdef inline void _give(self, uint16_t descriptor) noexcept:
        self._free[self._free_count] = descriptor
        self._free_count += 1

    def add(self, readable, writable, token):
        self._check()
        cdef Py_ssize_t count = len(readable) + len(writable)
        if count == 0 or token is None:
            raise ClientError("a chain needs a buffer and a token")
        if count > self._free_count:
            return False
        cdef uint16_t head = 0, previous = 0, at
        cdef Py_ssize_t i = 0
        for buffers, flags in ((readable, 0), (writable, F_WRITE)):
            for address, length in buffers:
                at = self._take()
                self._descriptors[at].address = address
                self._descriptors[at].length = length
                self._descriptors[at].flags = flags
                self._descriptors[at].next = 0
                if i == 0:
                    head = at
                else:
                    self._descriptors[previous].flags |= F_NEXT
                    self._descriptors[previous].next = at
                    self._next[previous] = at
                previous = at
                i += 1
        self._length[head] = count
        self._tokens[head] = token
        self._offer(head)
        return True

    def publish(self):
        self._check()
        return self._publish()

    cdef bint _publish(self) noexcept:
        """Let the device see what was offered; whether it wants a notification for it."""
        cdef uint16_t new = self._avail_index, old = self._kicked, event
        if new == old:
            return False
        store_release(&self._avail[1], new)
        fence()
        self._kicked = new
        if self._event_index:
            event = load16(<uint16_t *>&self._used_entries[2 * self.size])
            return <uint16_t>(new - event - 1) < <uint16_t>(new - old)
        return not load16(&self._used[0]) & NO_NOTIFY

    # taking them back

    cdef int _pending(self) except -1:
        """How many used entries wait; raises DeviceError if the device claims more than it was given."""
        cdef uint16_t count = <uint16_t>(load_acquire(&self._used[1]) - self._last_used)
        if count > self.size:
            raise DeviceError(f"used.idx is {count} ahead in a ring of {self.size}")
        return count

    cdef int _entry(self, uint16_t ahead, uint16_t *head, uint32_t *written) except -1:
        """Read a used entry; raises DeviceError if it names no chain that the device has."""
        cdef uint32_t *entry = &self._used_entries[2 * (<uint16_t>(self._last_used + ahead) & self._mask)]
        cdef uint32_t number = load32(entry)
        if number >= self.size or self._length[number] == 0:
            raise DeviceError(f"used entry {number} is no chain that the device has")
        head[0] = <uint16_t>number
        written[0] = load32(entry + 1)
        return 0

    cdef void _free_chain(self, uint16_t head) noexcept:
        cdef uint16_t count = self._length[head], at = head, following
        self._length[head] = 0
        while count:
            following = self._next[at]
            self._give(at)
            at = following
            count -= 1

    def collect(self):
        self._check()
        cdef uint16_t head
        cdef uint32_t written
        cdef int count = self._pending()
        found = []
        while count:
            self._entry(0, &head, &written)
            self._last_used += 1
            count -= 1
            found.append((self._tokens[head], written))
            self._tokens[head] = None
            self._free_chain(head)
        return found

    @property
    def outstanding(self):
        return <uint16_t>(self._avail_index - self._last_used)

    @property
    def pending(self):
        self._check()
        return self._pending() > 0

    # interrupts

    def enable_interrupts(self, int after=1):
        self._check()
        if after < 1:
            after = 1
        if self._event_index:
            store16(&self._avail[2 + self.size], <uint16_t>(self._last_used + after - 1))
        else:
            store16(&self._avail[0], 0)
        fence()
        return self._pending() >= after

    def disable_interrupts(self):
        self._check()
        if self._event_index:
            store16(&self._avail[2 + self.size], <uint16_t>(self._last_used + 0x8000))
        else:
            store16(&self._avail[0], NO_INTERRUPT)


cdef class _Slots(Ring):
    """A ring whose descriptor number i has the buffer number i."""

    cdef Py_buffer _slots
    cdef bint _slots_held
    cdef uint8_t *_base
    cdef uint64_t _iova
    cdef uint32_t _slot_size

    def __init__(self, memory, iova, int size, *, slots, slots_iova, int slot_size, bint event_index=False):
        if slot_size <= NET_HEADER:
            raise ClientError(f"slots of {slot_size} bytes have no room for a frame")
        PyObject_GetBuffer(slots, &self._slots, PyBUF_SIMPLE | PyBUF_WRITABLE)
        self._slots_held = True
        if self._slots.len < <Py_ssize_t>size * slot_size:
            raise ClientError(f"{size} slots of {slot_size} bytes do not fit into {self._slots.len}")
        self._base = <uint8_t *>self._slots.buf
        self._iova = slots_iova
        self._slot_size = slot_size

    def __dealloc__(self):
        if self._slots_held:
            PyBuffer_Release(&self._slots)

    def release(self):
        Ring.release(self)
        if self._slots_held:
            self._slots_held = False
            PyBuffer_Release(&self._slots)

    cdef inline uint8_t *_slot(self, uint16_t number) noexcept:
        return self._base + <size_t>number * self._slot_size


cdef class TransmitRing(_Slots):
    cdef bint _send(self, const uint8_t *header, const uint8_t *frame, size_t length) noexcept:
        """Copy a frame into slots and offer them; False if there are not enough."""
        cdef size_t whole = NET_HEADER + length, part, done
        cdef size_t count = (whole + self._slot_size - 1) // self._slot_size
        cdef uint16_t head, at, following
        if count > self._free_count:
            return False
        head = at = self._take()
        self._length[head] = <uint16_t>count
        if header == NULL:
            memset(self._slot(at), 0, NET_HEADER)
        else:
            memcpy(self._slot(at), header, NET_HEADER)
        part = self._slot_size - NET_HEADER
        if part > length:
            part = length
        memcpy(self._slot(at) + NET_HEADER, frame, part)
        self._descriptors[at].address = self._iova + <uint64_t>at * self._slot_size
        self._descriptors[at].length = <uint32_t>(NET_HEADER + part)
        done = part
        while done < length:
            following = self._take()
            part = self._slot_size
            if part > length - done:
                part = length - done
            memcpy(self._slot(following), frame + done, part)
            self._descriptors[at].flags = F_NEXT
            self._descriptors[at].next = following
            self._next[at] = following
            at = following
            self._descriptors[at].address = self._iova + <uint64_t>at * self._slot_size
            self._descriptors[at].length = <uint32_t>part
            done += part
        self._descriptors[at].flags = 0
        self._offer(head)
        return True

    def slots_for(self, Py_ssize_t length):
        return (NET_HEADER + length + self._slot_size - 1) // self._slot_size

    def push(self, frames, Py_ssize_t start=0, header=None):
        self._check()
        if start < 0:
            raise ClientError(f"frames are counted from 0, not from {start}")
        self._reap()
        cdef Py_buffer view
        cdef const uint8_t *prefix = self._header(header)
        cdef Py_ssize_t i, count = len(frames)
        cdef bint sent
        for i in range(start, count):
            frame = frames[i]
            PyObject_GetBuffer(frame, &view, PyBUF_SIMPLE)
            try:
                self._fits(view.len)
                sent = self._send(prefix, <const uint8_t *>view.buf, view.len)
            finally:
                PyBuffer_Release(&view)
            if not sent:
                return i - start
        return max(count - start, 0)

    def repeat(self, frame, Py_ssize_t count, header=None):
        self._check()
        self._reap()
        cdef const uint8_t *prefix = self._header(header)
        cdef const uint8_t[::1] view = frame
        cdef Py_ssize_t sent = 0
        self._fits(view.shape[0])
        while sent < count and self._send(prefix, &view[0] if view.shape[0] else NULL, view.shape[0]):
            sent += 1
        return sent

    cdef const uint8_t *_header(self, header) except? NULL:
        if header is None:
            return NULL
        if not isinstance(header, bytes) or len(header) != NET_HEADER:
            raise ClientError(f"a net header is {NET_HEADER} bytes")
        return <const uint8_t *>PyBytes_AS_STRING(header)

    cdef int _fits(self, Py_ssize_t length) except -1:
        if self.slots_for(length) > self.size:
            raise ClientError(f"a frame of {length} bytes does not fit into the ring")
        return 0

    cdef int _reap(self) except -1:
        cdef uint16_t head
        cdef uint32_t written
        cdef int count = self._pending(), i
        for i in range(count):
            self._entry(0, &head, &written)
            self._last_used += 1
            self._free_chain(head)
        return count

    def reap(self):
        self._check()
        return self._reap()


cdef class ReceiveRing(_Slots):
    cdef bint _mergeable

    def __init__(self, memory, iova, int size, *, slots, slots_iova, int slot_size, bint event_index=False,
                 bint mergeable=False):
        _Slots.__init__(self, memory, iova, size, slots=slots, slots_iova=slots_iova, slot_size=slot_size,
                        event_index=event_index)
        self._mergeable = mergeable
        cdef uint16_t at
        while self._free_count:
            at = self._take()
            self._descriptors[at].address = self._iova + <uint64_t>at * self._slot_size
            self._descriptors[at].length = self._slot_size
            self._descriptors[at].flags = F_WRITE
            self._length[at] = 1
            self._offer(at)

    cdef int _frame(self, int available, size_t *total, uint16_t *buffers) except -1:
        """The next frame's length without its header and its buffers; 0 if not all of them are there yet."""
        cdef uint16_t head, count = 1, i
        cdef uint32_t written
        cdef uint8_t *slot
        self._entry(0, &head, &written)
        if written < NET_HEADER or written > self._slot_size:
            raise DeviceError(f"the device wrote {written} bytes into a buffer of {self._slot_size}")
        slot = self._slot(head)
        if self._mergeable:
            count = slot[NUM_BUFFERS] | <uint16_t>slot[NUM_BUFFERS + 1] << 8
            if count == 0 or count > self.size:
                raise DeviceError(f"a frame of {count} buffers")
            if count > available:
                return 0
        total[0] = written - NET_HEADER
        for i in range(1, count):
            self._entry(i, &head, &written)
            if written > self._slot_size:
                raise DeviceError(f"the device wrote {written} bytes into a buffer of {self._slot_size}")
            total[0] += written
        buffers[0] = count
        return 1

    cdef int _consume(self, uint8_t *into, size_t room, uint16_t buffers) except -1:
        """Copy a frame out, if `into` is given, and offer its buffers anew. `room` bounds the copy."""
        cdef uint16_t head, i
        cdef uint32_t written
        cdef size_t skip = NET_HEADER, part
        for i in range(buffers):
            self._entry(0, &head, &written)
            if into != NULL:
                part = written - skip if written > skip else 0
                if part > self._slot_size - skip:
                    part = self._slot_size - skip
                if part > room:
                    part = room
                memcpy(into, self._slot(head) + skip, part)
                into += part
                room -= part
            skip = 0
            self._last_used += 1
            self._offer(head)
        if into != NULL and room:
            raise DeviceError("the device changed a used entry that it had given back")
        return 0

    def pop(self, int limit=64):
        return self._pop(limit, False)

    def pop_with_headers(self, int limit=64):
        return self._pop(limit, True)

    cdef list _pop(self, int limit, bint headers):
        self._check()
        cdef int available = self._pending()
        cdef size_t total
        cdef uint16_t buffers, head
        cdef uint32_t written
        cdef list found = []
        while limit > 0 and available > 0:
            if not self._frame(available, &total, &buffers):
                break
            frame = PyBytes_FromStringAndSize(NULL, total)
            if headers:
                self._entry(0, &head, &written)
                found.append((PyBytes_FromStringAndSize(<char *>self._slot(head), NET_HEADER), frame))
            else:
                found.append(frame)
            self._consume(<uint8_t *>PyBytes_AS_STRING(frame), total, buffers)
            available -= buffers
            limit -= 1
        return found

    def drain(self):
        self._check()
        cdef int available = self._pending()
        cdef size_t total, octets = 0
        cdef uint16_t buffers
        cdef int frames = 0
        while available > 0 and self._frame(available, &total, &buffers):
            self._consume(NULL, 0, buffers)
            available -= buffers
            frames += 1
            octets += total
        return frames, octets
