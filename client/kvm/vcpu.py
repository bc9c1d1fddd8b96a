"""A processor of a VM, run in a thread of its own; what the guest asks of its machine is answered by trio
tasks.

    with Vcpu(vm) as cpu:
        cpu.start_at(0x1000)
        await cpu.run(exits)

Cancelling `run` stops the guest at once, also one that spins with its interrupts off.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, Final, Self

import trio

from client._nursery import background
from client.kvm import _abi
from client.kvm._abi import ExitReason
from client.kvm._ioctl import flexible, ioctl
from client.kvm.cpuid import CpuidEntry, SevCaps, filter_cpuid
from client.kvm.errors import GuestError, KvmError
from client.kvm.vm import Vm

KICK: Final = signal.SIGURG
"""Gets a thread out of KVM_RUN. It is blocked everywhere but there, so it is never delivered and nobody's
handler matters; and by default it is ignored, so that even a stray one would do no harm."""

_EVERY_SIGNAL: Final = (1 << 64) - 1
_FLAGS_RESET: Final = 1 << 1  # RFLAGS: the bit that is always one; interrupts are off


class Exits:
    """What a machine has at its addresses and ports; here nothing. Raised exceptions end `Vcpu.run`."""

    async def mmio_read(self, address: int, count: int) -> bytes:
        """`count` bytes (1, 2, 4 or 8) that the guest reads where there is no memory."""
        raise GuestError(f"the guest reads {count} bytes at {address:#x}, where there is nothing")

    async def mmio_write(self, address: int, data: bytes) -> None:
        """The guest writes where there is no memory."""
        raise GuestError(f"the guest writes {len(data)} bytes at {address:#x}, where there is nothing")

    async def port_read(self, port: int, count: int) -> bytes:
        """`count` bytes (1, 2 or 4) of an `in`."""
        raise GuestError(f"the guest reads port {port:#x}, where there is nothing")

    async def port_write(self, port: int, data: bytes) -> None:
        """The bytes of an `out`."""
        raise GuestError(f"the guest writes port {port:#x}, where there is nothing")


class Vcpu:
    """Processor `number`. A context manager; close it before its VM.

    Its CPUID is `cpuid`, by default all that KVM proposes without a word of encrypted memory, which no guest
    of ours has. Raises KvmError: EEXIST for a number that was used before, for a VM keeps its processors.
    """

    def __init__(self, vm: Vm, number: int = 0, *, cpuid: Sequence[CpuidEntry] | None = None) -> None:
        self._vm = vm
        self._kicking = threading.Lock()
        self._thread: int | None = None
        with ExitStack() as stack:
            self.fd, size = vm.create_vcpu(number)
            stack.callback(os.close, self.fd)
            shared = stack.enter_context(mmap.mmap(self.fd, size))
            self._run = stack.enter_context(memoryview(shared))
            self._limiter = trio.CapacityLimiter(1)
            self._set_signal_mask()
            self._set_cpuid(filter_cpuid(vm.supported_cpuid(), SevCaps(0), "v7") if cpuid is None else cpuid)
            self._closing = stack.pop_all()

    def _set_signal_mask(self) -> None:
        mask = _EVERY_SIGNAL & ~(1 << KICK - 1)
        data = mask.to_bytes(8, "little")
        argument = flexible(_abi.SignalMaskHeader(len=len(data)), data)
        self._make("KVM_SET_SIGNAL_MASK", _abi.SET_SIGNAL_MASK, argument)

    def _set_cpuid(self, entries: Sequence[CpuidEntry]) -> None:
        raw: list[ctypes.Structure] = [
            _abi.CpuidEntry(entry.function, entry.index, entry.flags, *entry.registers) for entry in entries
        ]
        argument = flexible(_abi.CpuidHeader(nent=len(raw)), raw)
        self._make("KVM_SET_CPUID2", _abi.SET_CPUID2, argument)

    def start_at(self, address: int, stack: int = 0) -> None:
        """Go on at `address` below 64 KiB, in real mode with interrupts off, segments 0 and an empty stack
        that ends at `stack`; also if the guest had halted.
        """
        sregs = _abi.Sregs()
        self._make("KVM_GET_SREGS", _abi.GET_SREGS, sregs)
        for segment in (sregs.cs, sregs.ds, sregs.es, sregs.ss):
            segment.base = segment.selector = 0
        self._make("KVM_SET_SREGS", _abi.SET_SREGS, sregs)
        self._make("KVM_SET_REGS", _abi.SET_REGS, _abi.Regs(rip=address, rsp=stack, rflags=_FLAGS_RESET))
        self._make("KVM_SET_MP_STATE", _abi.SET_MP_STATE, _abi.MpState(_abi.MP_STATE_RUNNABLE))

    async def run(self, exits: Exits) -> None:
        """Run the guest until it halts for good, which it can only without an irqchip, or until cancelled.

        `exits` answers in this task, and may take its time. An access it did not answer, because it raised or
        was cancelled, reads as what was there before. Raises GuestError if the guest cannot go on, KvmError,
        and what `exits` raises.
        """
        self._run[_abi.RUN_IMMEDIATE_EXIT] = 0
        async with background() as nursery:
            nursery.start_soon(self._kick_when_cancelled)
            await trio.to_thread.run_sync(self._loop, exits, limiter=self._limiter)

    async def _kick_when_cancelled(self) -> None:
        try:
            await trio.sleep_forever()
        finally:
            self._kick()

    def _kick(self) -> None:
        """Get the guest out, or never let it in: KVM_RUN returns at once while immediate_exit is set."""
        with self._kicking:
            self._run[_abi.RUN_IMMEDIATE_EXIT] = 1
            if self._thread is not None:
                signal.pthread_kill(self._thread, KICK)

    @contextmanager
    def _kickable(self) -> Iterator[None]:
        """This thread may be sent KICK within the block, and has none left after it."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, (KICK,))
        try:
            with self._kicking:
                self._thread = threading.get_ident()
            try:
                yield
            finally:
                with self._kicking:
                    self._thread = None
                _take_kick()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _loop(self, exits: Exits) -> None:
        with self._kickable():
            try:
                while self._enter():
                    (reason,) = _abi.RUN_REASON.unpack_from(self._run, _abi.RUN_EXIT_REASON)
                    if reason == ExitReason.HLT:
                        return
                    self._handle(reason, exits)
            finally:
                self._complete()

    def _enter(self) -> bool:
        """KVM_RUN; whether the guest wants something."""
        while not self._run[_abi.RUN_IMMEDIATE_EXIT]:
            try:
                ioctl(self.fd, _abi.RUN)
            except OSError as error:
                if error.errno != errno.EINTR:
                    raise KvmError("KVM_RUN", error.errno or 0) from None
                _take_kick()
            else:
                return True
        return False

    def _complete(self) -> None:
        """Let KVM finish the instruction whose access made the guest leave, and no other."""
        self._run[_abi.RUN_IMMEDIATE_EXIT] = 1
        with suppress(OSError):  # EINTR
            ioctl(self.fd, _abi.RUN)

    def _handle(self, reason: int, exits: Exits) -> None:
        if reason == ExitReason.MMIO:
            self._mmio(exits)
        elif reason == ExitReason.IO:
            self._port(exits)
        elif reason == ExitReason.IOAPIC_EOI:
            (vector,) = _abi.RUN_EOI.unpack_from(self._run, _abi.RUN_UNION)
            trio.from_thread.run_sync(self._end_of_interrupt, vector)
        elif reason != ExitReason.INTR:
            raise GuestError(self._why(reason))

    def _mmio(self, exits: Exits) -> None:
        address, data, count, write = _abi.RUN_MMIO.unpack_from(self._run, _abi.RUN_UNION)
        if write:
            trio.from_thread.run(exits.mmio_write, address, data[:count])
        else:
            answer = trio.from_thread.run(exits.mmio_read, address, count)
            self._put(_abi.RUN_MMIO_DATA, answer, count)

    def _port(self, exits: Exits) -> None:
        direction, size, port, count, at = _abi.RUN_IO.unpack_from(self._run, _abi.RUN_UNION)
        for offset in range(at, at + size * count, size):
            if direction == _abi.RUN_IO_OUT:
                trio.from_thread.run(exits.port_write, port, bytes(self._run[offset : offset + size]))
            else:
                self._put(offset, trio.from_thread.run(exits.port_read, port, size), size)

    def _put(self, offset: int, answer: bytes, count: int) -> None:
        if len(answer) != count:
            raise GuestError(f"the guest reads {count} bytes, and {len(answer)} were answered")
        self._run[offset : offset + count] = answer

    def _end_of_interrupt(self, vector: int) -> None:
        for listener in tuple(self._vm.eoi_listeners):
            listener(vector)

    def _why(self, reason: int) -> str:
        """What to tell about an exit that there is no way back from."""
        if reason == ExitReason.INTERNAL_ERROR:
            (suberror,) = _abi.RUN_INTERNAL.unpack_from(self._run, _abi.RUN_UNION)
            return f"KVM cannot go on with the guest: internal error {suberror}"
        if reason == ExitReason.FAIL_ENTRY:
            hardware, cpu = _abi.RUN_FAIL_ENTRY.unpack_from(self._run, _abi.RUN_UNION)
            return f"the processor refuses to enter the guest: reason {hardware:#x} on CPU {cpu}"
        if reason == ExitReason.SHUTDOWN:
            return "the guest shut down (a triple fault)"
        return f"the guest left for reason {reason}, which is unknown here"

    def _make(self, doing: str, request: int, argument: Any) -> None:
        try:
            ioctl(self.fd, request, argument)
        except OSError as error:
            raise KvmError(doing, error.errno or 0) from None

    def close(self) -> None:
        """End the processor; it must not be running."""
        self._closing.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _take_kick() -> None:
    """While a kick waits for this thread KVM_RUN does nothing."""
    signal.sigtimedwait((KICK,), 0)
