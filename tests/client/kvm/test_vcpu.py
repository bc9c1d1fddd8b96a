import errno
import mmap
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import trio

from client.kvm import Exits, KvmError, Vcpu, Vm, _abi
from client.kvm import _assembler as asm
from client.kvm import vcpu as module
from client.kvm._ioctl import ioctl
from client.kvm.cpuid import MAX_ENTRIES, CpuidEntry, Registers
from client.kvm.errors import GuestError
from client.kvm.routing import MsiRoute
from client.kvm.vm import IrqchipKind
from tests.descriptors import no_fd_leaks

pytestmark = pytest.mark.vcpu

PATIENCE = 20
RAM = 0x1_0000
READ_ONLY = 0x2_0000
NOWHERE = 0xD_0000


class Noted(Exits):
    """Notes what the guest does, and answers by `answer`."""

    def __init__(self) -> None:
        self.done: list[tuple[str, int, object]] = []
        self.answer = b"\x5a"

    async def mmio_read(self, address: int, count: int) -> bytes:
        self.done.append(("mmio read", address, count))
        await trio.lowlevel.checkpoint()
        return self.answer * count

    async def mmio_write(self, address: int, data: bytes) -> None:
        self.done.append(("mmio write", address, data))

    async def port_read(self, port: int, count: int) -> bytes:
        self.done.append(("port read", port, count))
        return self.answer * count

    async def port_write(self, port: int, data: bytes) -> None:
        self.done.append(("port write", port, data))


@contextmanager
def guest(
    code: bytes, irqchip: IrqchipKind | None = None, kind: type[Vcpu] = Vcpu
) -> Iterator[tuple[Vcpu, mmap.mmap]]:
    """A processor about to run `code`, with memory that it may and may not write."""
    with no_fd_leaks(), mmap.mmap(-1, RAM) as memory, mmap.mmap(-1, mmap.PAGESIZE) as read_only:
        memory[0x1000 : 0x1000 + len(code)] = code
        read_only[:4] = b"read"
        with Vm(irqchip) as vm:
            vm.add_memory(0, memory)
            vm.add_memory(READ_ONLY, read_only, read_only=True)
            with kind(vm) as vcpu:
                vcpu.start_at(0x1000, RAM - 16)
                yield vcpu, memory


async def test_a_guest_runs_until_it_halts() -> None:
    code = asm.mov_eax(0x1234_5678) + asm.store_eax(0x600) + asm.HLT
    with guest(code) as (vcpu, memory):
        await vcpu.run(Exits())
        assert memory[0x600:0x604] == bytes.fromhex("78563412")


async def test_what_is_no_memory_is_answered_by_tasks() -> None:
    exits = Noted()
    code = asm.mov_es(NOWHERE >> 4) + asm.load_al_es(0x10) + asm.store_al_es(0x20) + asm.store_eax(0x600)
    with guest(code + asm.HLT) as (vcpu, memory):
        await vcpu.run(exits)
        assert exits.done == [("mmio read", NOWHERE + 0x10, 1), ("mmio write", NOWHERE + 0x20, b"\x5a")]
        assert memory[0x600] == 0x5A


async def test_memory_that_is_read_only_is_read_without_an_exit() -> None:
    exits = Noted()
    code = asm.mov_es(READ_ONLY >> 4) + asm.load_al_es(0) + asm.store_al_es(1) + asm.HLT
    with guest(code) as (vcpu, _):
        await vcpu.run(exits)
        assert exits.done == [("mmio write", READ_ONLY + 1, b"r")]


async def test_ports_are_answered_by_tasks() -> None:
    exits = Noted()
    code = asm.in_al(0x3F8) + asm.store_eax(0x600) + asm.out(0x3F9, 7) + asm.HLT
    with guest(code) as (vcpu, memory):
        await vcpu.run(exits)
        assert exits.done == [("port read", 0x3F8, 1), ("port write", 0x3F9, b"\7")]
        assert memory[0x600] == 0x5A


async def test_a_string_of_port_accesses_is_one_access_after_the_other() -> None:
    exits = Noted()
    setup = b"\xba\xf8\x03" + b"\xbe\x00\x06" + b"\xb9\x03\x00"  # dx = 0x3f8, si = 0x600, cx = 3
    with guest(setup + b"\xf3\x6e" + asm.HLT) as (vcpu, memory):  # rep outsb
        memory[0x600:0x603] = b"abc"
        await vcpu.run(exits)
        assert exits.done == [("port write", 0x3F8, letter) for letter in (b"a", b"b", b"c")]


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (asm.mov_es(NOWHERE >> 4) + asm.load_al_es(1), "reads 1 bytes at 0xd0001"),
        (asm.mov_es(NOWHERE >> 4) + asm.store_al_es(1), "writes 1 bytes at 0xd0001"),
        (asm.in_al(0x70), "reads port 0x70"),
        (asm.out(0x70, 0), "writes port 0x70"),
        (b"\xea\x00\x00\x00\xd0", "internal error 1"),  # a far jump to where there is nothing
    ],
)
async def test_a_guest_that_cannot_go_on_ends_the_run(code: bytes, said: str) -> None:
    with guest(code + asm.HLT) as (vcpu, _), pytest.raises(GuestError, match=said):
        await vcpu.run(Exits())


async def test_an_answer_of_another_size_is_refused() -> None:
    exits = Noted()
    exits.answer = b"ab"
    with guest(asm.in_al(0x70)) as (vcpu, _), pytest.raises(GuestError, match="1 bytes, and 2 were answered"):
        await vcpu.run(exits)


@pytest.mark.parametrize(
    ("reason", "union", "said"),
    [
        (_abi.ExitReason.INTERNAL_ERROR, (3).to_bytes(4, "little"), "internal error 3"),
        (_abi.ExitReason.FAIL_ENTRY, _abi.RUN_FAIL_ENTRY.pack(0x8000_0021, 1), "0x80000021 on CPU 1"),
        (_abi.ExitReason.SHUTDOWN, b"", "triple fault"),
        (_abi.ExitReason.UNKNOWN, b"", "reason 0, which is unknown"),
    ],
)
async def test_what_kvm_says_about_the_end_is_told(
    reason: int, union: bytes, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with guest(asm.HLT) as (vcpu, _):

        def answers(fd: int, request: int) -> int:
            _abi.RUN_REASON.pack_into(vcpu._run, _abi.RUN_EXIT_REASON, reason)
            vcpu._run[_abi.RUN_UNION : _abi.RUN_UNION + len(union)] = union
            return 0

        monkeypatch.setattr(module, "ioctl", answers)
        with pytest.raises(GuestError, match=said):
            await vcpu.run(Exits())


async def test_kvms_refusal_to_run_has_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(fd: int, request: int) -> int:
        raise OSError(errno.EFAULT, os.strerror(errno.EFAULT))

    with guest(asm.HLT) as (vcpu, _):
        monkeypatch.setattr(module, "ioctl", refuses)
        with pytest.raises(KvmError, match="KVM_RUN") as caught:
            await vcpu.run(Exits())
        assert caught.value.errno == errno.EFAULT


async def test_a_mistake_in_an_answer_comes_as_it_is() -> None:
    class Mistaken(Exits):
        async def port_read(self, port: int, count: int) -> bytes:
            raise ZeroDivisionError

    with guest(asm.in_al(0x70)) as (vcpu, _), pytest.raises(ZeroDivisionError):
        await vcpu.run(Mistaken())


async def test_a_processor_runs_again_from_where_it_was_set() -> None:
    exits = Noted()
    with guest(asm.out(0x70, 1) + asm.HLT) as (vcpu, _):
        for _ in range(3):
            await vcpu.run(exits)
            vcpu.start_at(0x1000)
        assert exits.done == [("port write", 0x70, b"\1")] * 3


@pytest.mark.parametrize("times", [0, 1, 2])
async def test_an_access_that_was_given_up_is_over(times: int) -> None:
    """An instruction that left the guest does not move the next one that is set, however often it is left."""

    class Stuck(Exits):
        async def mmio_read(self, address: int, count: int) -> bytes:
            scope.cancel()
            await trio.sleep_forever()
            raise AssertionError

    code = asm.mov_es(NOWHERE >> 4) + asm.load_al_es(0) + asm.SPIN
    with guest(code) as (vcpu, memory):
        for _ in range(times):
            vcpu.start_at(0x1000)
            with trio.fail_after(PATIENCE), trio.CancelScope() as scope:
                await vcpu.run(Stuck())
        memory[0x2000:0x2010] = (asm.mov_eax(7) + asm.store_eax(0x600) + asm.HLT).ljust(16, b"\xf4")
        vcpu.start_at(0x2000)
        await vcpu.run(Exits())
        assert memory[0x600] == 7


# --- how it is stopped


@pytest.mark.parametrize(
    ("code", "irqchip"),
    [
        pytest.param(asm.CLI + asm.SPIN, None, id="spins"),
        pytest.param(asm.CLI + asm.forever(asm.HLT), "kernel", id="halted for good"),
        pytest.param(asm.STI + asm.forever(asm.HLT), "kernel", id="waits for interrupts"),
        pytest.param(asm.forever(asm.out(0x70, 0)), None, id="exits all the time"),
    ],
)
async def test_a_guest_is_stopped_whatever_it_does(code: bytes, irqchip: IrqchipKind | None) -> None:
    marked = asm.increment(0x600) + code
    with guest(marked, irqchip) as (vcpu, memory), trio.fail_after(PATIENCE):
        for times in range(1, 4):
            vcpu.start_at(0x1000)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(vcpu.run, Noted())
                while memory[0x600] < times:
                    await trio.lowlevel.checkpoint()
                nursery.cancel_scope.cancel()


async def test_a_run_that_is_cancelled_before_it_begins_runs_nothing() -> None:
    with guest(asm.increment(0x600) + asm.SPIN) as (vcpu, memory):
        with trio.CancelScope() as scope:
            scope.cancel()
            await vcpu.run(Exits())
        assert memory[0x600] == 0


async def test_a_stop_that_comes_before_the_guest_is_entered_is_not_missed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The thread is about to enter the guest when it is kicked."""
    about_to, kicked = threading.Event(), threading.Event()

    def late(fd: int, request: int) -> int:
        about_to.set()
        kicked.wait()
        return ioctl(fd, request)

    with guest(asm.CLI + asm.SPIN) as (vcpu, _), trio.fail_after(PATIENCE):
        monkeypatch.setattr(module, "ioctl", late)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(vcpu.run, Exits())
            await trio.to_thread.run_sync(about_to.wait)
            vcpu._kick()
            kicked.set()


async def test_a_stray_kick_does_not_end_a_run() -> None:
    done = trio.Event()

    class Kicking(Exits):
        async def port_read(self, port: int, count: int) -> bytes:
            assert vcpu._thread is not None
            signal.pthread_kill(vcpu._thread, module.KICK)
            return b"\0"

        async def port_write(self, port: int, data: bytes) -> None:
            done.set()

    code = asm.in_al(0x70) + asm.out(0x71, 0) + asm.CLI + asm.SPIN
    with guest(code) as (vcpu, _), trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(vcpu.run, Kicking())
            await done.wait()
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize("code", [asm.SPIN, asm.in_al(0x70)], ids=["in the guest", "outside of it"])
async def test_the_thread_has_its_signals_back_and_the_kick_reaches_nobody(code: bytes) -> None:
    blocked: list[bool] = []
    received: list[int] = []
    entered = threading.Event()

    class Around(Vcpu):
        def _loop(self, exits: Exits) -> None:
            blocked.append(module.KICK in signal.pthread_sigmask(signal.SIG_BLOCK, ()))
            entered.set()
            super()._loop(exits)
            blocked.append(module.KICK in signal.pthread_sigmask(signal.SIG_BLOCK, ()))

    class Kicking(Exits):
        async def port_read(self, port: int, count: int) -> bytes:
            vcpu._kick()
            return bytes(count)

    handler = signal.signal(module.KICK, lambda number, _: received.append(number))
    try:
        with guest(code, kind=Around) as (vcpu, _):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(vcpu.run, Kicking())
                while len(blocked) < 2 and (code != asm.SPIN or not entered.is_set() or vcpu._thread is None):
                    await trio.lowlevel.checkpoint()
                nursery.cancel_scope.cancel()
        await trio.lowlevel.checkpoint()
    finally:
        signal.signal(module.KICK, handler)
    assert blocked == [False, False]
    assert not received


# --- interrupts and CPUID


async def test_the_end_of_a_level_that_came_as_a_message_is_told() -> None:
    told: list[int] = []
    enable = asm.write_msr(0x1B, 0xFEE0_0D00) + asm.write_msr(0x80F, 0x1FF)
    main = enable + asm.out(0x70, 0) + asm.STI + asm.forever(asm.HLT)
    handler = asm.write_msr(0x80B, 0) + asm.out(0x71, 0) + asm.IRET
    done = trio.Event()

    class Machine(Exits):
        async def port_write(self, port: int, data: bytes) -> None:
            if port == 0x70:
                route = MsiRoute(10, 0x4A, level=True)
                vm.set_routes([route])
                assert vm.signal_msi(route.address, route.data)

    def listen(vector: int) -> None:
        told.append(vector)
        done.set()

    with no_fd_leaks(), mmap.mmap(-1, RAM) as memory, Vm("split") as vm:
        memory[0x1000 : 0x1000 + len(main)] = main
        memory[0x2000 : 0x2000 + len(handler)] = handler
        memory[4 * 0x4A : 4 * 0x4A + 4] = bytes.fromhex("00200000")
        vm.add_memory(0, memory)
        vm.eoi_listeners.append(listen)
        with Vcpu(vm) as vcpu, trio.fail_after(PATIENCE):
            vcpu.start_at(0x1000, RAM - 16)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(vcpu.run, Machine())
                await done.wait()
                nursery.cancel_scope.cancel()
        assert told == [0x4A]


def test_more_of_cpuid_than_kvm_takes_is_refused() -> None:
    def entries(count: int) -> list[CpuidEntry]:
        return [CpuidEntry(0x4000_0000 + number, 0, 0, Registers()) for number in range(count)]

    with no_fd_leaks(), Vm(None) as vm:
        Vcpu(vm, 0, cpuid=entries(MAX_ENTRIES)).close()
        with pytest.raises(KvmError) as caught:
            Vcpu(vm, 1, cpuid=entries(MAX_ENTRIES + 1))
        assert caught.value.errno == errno.E2BIG


def test_a_processor_that_is_there_already_is_refused() -> None:
    with no_fd_leaks(), Vm(None) as vm, Vcpu(vm), pytest.raises(KvmError) as caught:
        Vcpu(vm)
    assert caught.value.errno == errno.EEXIST
