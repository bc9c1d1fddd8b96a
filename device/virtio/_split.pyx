# cython: language_level=3
"""A split virtqueue in the device (virtio 1.3, 2.7): its life, and what devices written in Python do with it.

A chain that `pop` gives is in flight until it is pushed or given back, and its memory is pinned so long: the
client's DMA_UNMAP waits for it. The data path (firmware) takes no pins. It pops, moves the bytes and pushes
within one stay in the gate, through which nothing is unmapped, and where it lets the gate go, to ask the
client, it keeps no pointer over that: it looks everything up again, or is disturbed (`DmaWindows.epoch`).

Callers hold the card's gate, and are one at a time for each queue.
"""

import errno

from libc.stdint cimport uint16_t, uint32_t, uint64_t

from device.dma._pins cimport Pin
from device.dma._windows cimport DMA_READ, DMA_WRITE, DmaWindows
from device.virtio._rings cimport BROKEN, DISTURBED, MAX_SEGMENTS, OWED_ROOM, Chain, Rings

from device.errors import DeviceError
from device.virtio.chain import DescriptorChain
from device.virtio.faults import FAULTS


MAX_QUEUE_SIZE = 32768      # virtio 1.3, 2.7
MAX_CHAIN = MAX_SEGMENTS    # descriptors in a chain: UIO_MAXIOV, what readv and writev take


cdef class VirtQueue(Rings):
    """Queue `index` of a device, at most `max_size` (a power of two) descriptors deep."""

    def __cinit__(self, *args, **kwargs):
        self._pins = set()

    def __init__(self, DmaWindows dma not None, int index, uint16_t max_size):
        if max_size == 0 or max_size & (max_size - 1) or max_size > MAX_QUEUE_SIZE:
            raise ValueError(f"queue size {max_size}: a power of two from 1 to {MAX_QUEUE_SIZE}")
        self.dma = dma
        self.index = index
        self.max_size = max_size
        self.reset()

    def reset(self):
        """Forget the driver's rings and every index."""
        self._changed()
        self.size = self.max_size
        self.enabled = self.stopping = False
        self._fault = 0
        self.vector = 0xFFFF
        self.descriptor_address = self.driver_address = self.device_address = 0
        self.event_index = self.indirect = False
        self.next_avail = self.used_index = 0
        self.owed_count = 0
        self.unpublished = False

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
        self._changed()
        self.size = size
        self.descriptor_address, self.driver_address, self.device_address = descriptors, driver, device
        self.event_index, self.indirect = event_index, indirect
        self._fault = 0
        self.enabled, self.stopping = True, False

    def disable(self):
        """Stop looking at the rings; the indices stay for whoever saves them."""
        self._changed()
        self.enabled = self.stopping = False

    def stop(self):
        """Take no more chains. The queue stays enabled until `finish_stop` finds that all is done."""
        self.stopping = self.enabled

    def go_on(self):
        """Take chains again, if the queue has not come to rest since `stop`."""
        self.stopping = False

    def finish_stop(self):
        """Disable the queue if it is stopping, no chain is in flight, the driver can see that of all that
        were, and the guest's log has heard of it; or if that can never be: the queue is broken, or its rings
        are in no window. Then what the driver cannot see of is not a part of `last_avail`.
        """
        if (self.stopping and not self.dma.owes_log()
                and (self._fault or self.settled() or self._popped == 0 and not self.reachable())):
            self.disable()

    def place(self, uint16_t last_avail, uint16_t used_index):
        """Where a queue that does not run goes on when it does. What was in flight is forgotten."""
        self._changed()
        self.next_avail, self.used_index = last_avail, used_index
        self.owed_count = 0

    def restore(self, uint16_t last_avail, uint16_t used_index, int fault=0):
        """Continue where another device left off, broken if it was; the driver is interrupted once for it.

        ValueError for a fault that is none.
        """
        if fault and fault not in FAULTS:
            raise ValueError(f"queue {self.index}: fault {fault}")
        self._changed()
        self.next_avail, self.used_index = last_avail, used_index
        self.owed_count = 0
        self._fault = fault
        self.unpublished = True

    cdef void _changed(self) noexcept:
        """Whoever waits for the client on this queue's behalf is to leave it alone."""
        self._let_go()
        self.give_back()
        self.epoch += 1
        self.dma.disturb()
        self._generation = 0
        self._descriptors = NULL
        self._signalled_valid = False

    @property
    def last_avail(self):
        """The index of the first chain that is not completed: where another device has to go on."""
        return <uint16_t> (self.next_avail - self._popped - self.owed_count)

    @property
    def fault_number(self):
        """The key of `fault` in FAULTS, or 0."""
        return self._fault

    @property
    def fault(self):
        """Why the queue is broken, or None."""
        return FAULTS.get(self._fault)

    def owed_list(self):
        """Completions that wait to be written to the ring, as (head, written); not a part of `last_avail`."""
        return [(self.owed[i].head, self.owed[i].written) for i in range(self.owed_count)]

    def owe_again(self, owed):
        """After `restore`: have these completions written; at most OWED_ROOM."""
        for head, written in owed:
            self.owe(head, written)
        self.next_avail += self.owed_count

    # --- chains for control queues, prototypes and tests

    def pop(self):
        """The next available chain as a DescriptorChain, or None.

        Its memory is pinned, if all of it, and the rings, are in this process: whoever has to ask the client
        for a part cannot make him wait. DeviceError: EIO when the queue is broken; ECANCELED when the card
        changed while the client was asked for the rings. Of a chain whose memory is about to go, or is more
        than can be pinned, those of DmaWindows.pin (EAGAIN, ENOSPC, ENOMEM): it stays available.
        """
        cdef int got = self._checked(self.pop_chain(&self._chain))
        if got == 0:
            return None
        cdef Chain *c = &self._chain
        segments = [(c.segment[i].address, c.segment[i].length) for i in range(c.segments)]
        readable, writable = segments[:c.readable], segments[c.readable:]
        pin = self._hold([(address, length, DMA_READ) for address, length in readable]
                         + [(address, length, DMA_WRITE) for address, length in writable])
        return DescriptorChain(self.dma, self.epoch, c.head, readable, writable, pin)

    cdef object _hold(self, list spans):
        """The pin of the chain that was popped last, or None."""
        if self._copied:
            return None
        try:
            pin = self.dma.pins.take(spans, f"queue {self.index}")
        except DeviceError as error:
            if error.errno in (errno.EFAULT, errno.EOPNOTSUPP):
                return None                 # no memory of this process: whoever uses the chain finds that out
            self.next_avail -= 1
            self._popped -= 1
            raise
        self._pins.add(pin)
        return pin

    cdef void _let_go(self) noexcept:
        for pin in self._pins:
            (<Pin> pin).release()
        self._pins.clear()

    def push(self, chain, uint32_t written=0):
        """Hand `chain` back with `written` bytes in it; returns whether the driver wants an interrupt.

        A chain of rings that the driver has taken away since is forgotten. DeviceError as for `pop`; with
        ECANCELED the chain is handed back by the next push or settle. ENOBUFS when too many wait for that.
        """
        cdef bint known = chain.epoch == self.epoch and self.enabled and not self._fault
        if known and self.owed_count == OWED_ROOM:
            raise DeviceError(errno.ENOBUFS, f"queue {self.index}: {OWED_ROOM} chains wait for the rings")
        if chain.pin is not None:
            chain.pin.release()
            self._pins.discard(chain.pin)
        if not known:
            return False
        self.push_used(chain.head, written)
        return self.settle()

    def settle(self):
        """Let the driver see what could not be shown when it was pushed; returns and raises as `push`."""
        return bool(self._told(self._checked(self.complete())))

    def give_chains_back(self):
        """Forget every chain that was popped and not pushed: they will be popped again."""
        self._let_go()
        self.give_back()

    def _checked(self, int got):
        if got == BROKEN:
            raise DeviceError(errno.EIO, f"queue {self.index} is broken: {self.fault}")
        if got == DISTURBED:
            raise DeviceError(errno.ECANCELED, f"queue {self.index}: the card changed meanwhile")
        return got

    def enable_kicks(self):
        """Ask for notifications; returns whether a chain is available already. DeviceError as for `pop`."""
        return bool(self._told(self._checked(self.wants_kicks(self.next_avail)))) if self.ready() else False

    def disable_kicks(self):
        """Ask for no notifications."""
        if self.ready():
            self.refuses_kicks()
            self._told(0)

    def _told(self, int got):
        """The same, when the guest's log has heard of what was written."""
        self.dma.settle_log()
        return got
