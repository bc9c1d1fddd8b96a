"""The live-migration block of an IFC VF, at the start of its BAR 4: ring state, and the log of written pages.

     00  CONTROL, 32 bits: 0 logs nothing, 1 (turned on for the VF) and 3 (for the PF) log
     08  STATUS, 64 bits: bit 0 logging, bit 1 bits left out, bit 2 log too small
     10  BASE, 64 bits: where the log begins; in use from when it is written, also while pages are logged
     18  END, 64 bits: the first byte behind it; likewise
     20  ring state, and at 28 PAIRS, 32 bits: see below

Ring state is a dword a queue, the index of the next chain to take in its low half (last_avail) and that of
the next used entry in its high half. Drivers look for it in two places:

    2019's, DPDK's of network cards, and Linux before 6.5   0x20 + (queue / 2) * 0x40 + (queue % 2) * 4
    Linux since 6.5                                         0x20 + queue * 4, by 16 bits, last_avail only

Both agree on queues 0 and 1. Queue 2 of the second is at 0x28, where DPDK writes the number of queue pairs in
use, a dword. So by 16 bits that is queue 2, by any other width PAIRS, unless one of the layouts was chosen.

Facts: Linux drivers/vdpa/ifcvf/ifcvf_base.h and .c, DPDK drivers/vdpa/ifc/base/ifcvf.h and .c. They leave
open what STATUS says and how the log is laid out: STATUS is this card's own, the log is vhost's, for DPDK
hands the card vhost's log as it is. DPDK says where the log is before it turns logging on, but by stores that
are not volatile: in Debian's build of 24.11 they come behind CONTROL.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Sequence
from enum import IntFlag
from typing import Final

from device.declared import DeclaredRegisters, Register
from device.dma import DmaWindows
from device.dma._guest_log import GuestLog
from device.profiles import QUEUES, RingLayout
from device.virtio._split import VirtQueue

OFF: Final = 0
ON: Final = (1, 3)

RING_STATE: Final = 0x20
PAIR_STRIDE: Final = 0x40


class LogStatus(IntFlag):
    """STATUS. What went wrong stays until logging is turned on again, or has another place."""

    LOGGING = 1  # or bits for what was written before are still on their way
    UNREACHABLE = 2  # a bit could not be set: see GuestLog.unreachable
    TOO_SMALL = 4  # a page was written whose bit would be at END or behind it


# An int, for a flag that is inverted has no bits but those with names.
_WRONG: Final = int(LogStatus.UNREACHABLE | LogStatus.TOO_SMALL)


def _ring_state(place: Callable[[int], int], queues: Iterable[int]) -> tuple[Register, ...]:
    return tuple(
        Register(name, place(queue) + offset, 2, index=queue)
        for queue in queues
        for offset, name in ((0, "last_avail"), (2, "used_index"))
    )


def _in_pairs(queue: int) -> int:
    return RING_STATE + queue // 2 * PAIR_STRIDE + queue % 2 * 4


def _in_words(queue: int) -> int:
    return RING_STATE + queue * 4


_LOG: Final = (
    Register("control", 0x00, 4),
    Register("status", 0x08, 8, writable=False),
    Register("base", 0x10, 8),
    Register("end", 0x18, 8),
)
_ALL: Final = range(QUEUES)
_PAIRS: Final = (*_LOG, *_ring_state(_in_pairs, _ALL), Register("pairs", 0x28, 4))
_WORDS: Final = (*_LOG, *_ring_state(_in_words, _ALL))
# Linux before 6.5 reads the older places by 16 bits: they count where nothing else is.
_BOTH: Final = (*_WORDS, *_ring_state(_in_pairs, range(2, QUEUES)))

# What is seen by 16 bits, and by any other width.
_LAYOUTS: Final = {
    RingLayout.AUTO: (_BOTH, _PAIRS),
    RingLayout.PAIRS: (_PAIRS, _PAIRS),
    RingLayout.WORDS: (_WORDS, _WORDS),
}

# control, pairs, base and end as written, base and end as in use, what went wrong
_SAVED: Final = struct.Struct("<IIQQQQB")


class LiveMigration:
    """The block of a card with `queues` and `dma`: a handler of its BAR, and a part that moves.

    Ring state is that of the queues themselves: of one that runs, how far it has got, without chains in
    flight; of one that was stopped, where another card has to go on. Reading it by 16 bits ends its queue's
    stop. It is written before a queue runs, which is when it is enabled and the driver has said DRIVER_OK,
    and not taken after. Who writes last_avail alone says that nothing is in flight: the used index is set to
    the same.
    """

    def __init__(
        self,
        queues: Sequence[VirtQueue],
        dma: DmaWindows,
        layout: RingLayout,
        driver_ok: Callable[[], bool],
    ) -> None:
        self._queues = tuple(queues)
        self._driver_ok = driver_ok
        self.log = GuestLog(dma)
        by_words, by_others = _LAYOUTS[layout]
        self._by_words = DeclaredRegisters(by_words, self)
        self._by_others = DeclaredRegisters(by_others, self)
        self._queue_at = {each.offset: each.index for each in by_words if each.index is not None}
        self.reset()

    def reset(self) -> None:
        """Nothing is logged any more, all registers are zero; the queues are reset by their owner."""
        self._control, self._pairs, self._base, self._end = OFF, 0, 0, 0
        self.log.reset()

    def read(self, offset: int, count: int) -> int:
        """See Handler."""
        if count != 2:
            return self._by_others.read(offset, count)
        index = self._queue_at.get(offset)
        if index is not None:
            self._come_to_rest(self._queues[index])
        return self._by_words.read(offset, count)

    def write(self, offset: int, count: int, value: int) -> None:
        """See Handler."""
        (self._by_words if count == 2 else self._by_others).write(offset, count, value)

    # --- the log

    def _get_control(self) -> int:
        return self._control

    def _set_control(self, value: int) -> None:
        """Other values than the three mean nothing, and are not taken."""
        if value in ON:
            self._control = value
            self.log.start(self._base, self._end)
        elif value == OFF:
            self._control = value
            self.log.stop()

    def _get_status(self) -> LogStatus:
        status = LogStatus.LOGGING if self.log.active or self.log.owing else LogStatus(0)
        if self.log.unreachable:
            status |= LogStatus.UNREACHABLE
        if self.log.too_small:
            status |= LogStatus.TOO_SMALL
        return status

    def _get_base(self) -> int:
        return self._base

    def _set_base(self, value: int) -> None:
        self._base = value
        self._begin_anew()

    def _get_end(self) -> int:
        return self._end

    def _set_end(self, value: int) -> None:
        self._end = value
        self._begin_anew()

    def _begin_anew(self) -> None:
        """Pages that are logged have another place from now on, unless it is the same."""
        if self.log.active and (self.log.base, self.log.end) != (self._base, self._end):
            self.log.start(self._base, self._end)

    # --- the queues

    def _get_pairs(self) -> int:
        return self._pairs

    def _set_pairs(self, value: int) -> None:
        """Kept for who reads it: a card with one pair has nothing to choose from."""
        self._pairs = value

    def _come_to_rest(self, queue: VirtQueue) -> None:
        """Have a queue that is stopping be at rest. Linux's driver, which reads by 16 bits, does not wait for
        that (ifcvf_vdpa_set_vq_ready), and goes on from what it reads: the ring must not change any more.

        Only where the client is asked for memory is anything in flight still. Chains are given back then, and
        what the driver cannot see of is done by the queue if it is enabled as it was, and lost with a reset.
        """
        if queue.stopping:
            queue.disable()

    def _queue(self, index: int) -> VirtQueue:
        """One of them, at rest if it was stopped and nothing of it is in flight any more."""
        queue = self._queues[index]
        queue.finish_stop()
        return queue

    def _get_last_avail(self, queue: int) -> int:
        return self._queue(queue).last_avail

    def _set_last_avail(self, queue: int, value: int) -> None:
        if not (self._queue(queue).enabled and self._driver_ok()):
            self._queues[queue].place(value, value)

    def _get_used_index(self, queue: int) -> int:
        return self._queue(queue).used_index

    def _set_used_index(self, queue: int, value: int) -> None:
        if not (self._queue(queue).enabled and self._driver_ok()):
            self._queues[queue].place(self._queues[queue].last_avail, value)

    # --- moving to another card

    def save(self) -> bytes:
        """The registers, but for ring state, which the queues have. Bits on their way into the log do not go
        along: that they are left out does.
        """
        log = self.log
        wrong = self._get_status() & ~LogStatus.LOGGING
        if log.owing:
            wrong |= LogStatus.UNREACHABLE
        return _SAVED.pack(
            *(self._control, self._pairs, self._base, self._end),
            *(log.base, log.end, wrong),
        )

    def stage(self, data: bytes) -> Callable[[], None]:
        """What makes this the block that saved `data`; ValueError if none did."""
        if len(data) != _SAVED.size:
            raise ValueError(f"{len(data)} bytes of {_SAVED.size}")
        control, pairs, base, end, used_base, used_end, wrong = _SAVED.unpack(data)
        if control not in (OFF, *ON) or wrong & ~_WRONG:
            raise ValueError(f"control {control} and status {wrong:#x}")

        def apply() -> None:
            self._control, self._pairs, self._base, self._end = control, pairs, base, end
            self.log.start(used_base, used_end)
            if control == OFF:
                self.log.stop()
            self.log.unreachable = bool(wrong & LogStatus.UNREACHABLE)
            self.log.too_small = bool(wrong & LogStatus.TOO_SMALL)

        return apply
