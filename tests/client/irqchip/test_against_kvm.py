"""The irqchips modelled here beside KVM's: the same accesses and levels, the same registers after each."""

from __future__ import annotations

import fcntl
import os
import re
import struct
from collections.abc import Callable
from dataclasses import replace
from typing import Final

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from client.irqchip.registers import RedirectionEntry
from client.irqchip.userspace import Ioapic, Pic
from client.irqchip.userspace.local_apic import Offsets
from client.kvm import PortDriver, Vm, _abi, open_port_driver
from client.kvm import _assembler as asm
from client.kvm._ioctl import ioctl
from client.kvm.ports import _ANSWER_PORT as ANSWERED
from tests.client.irqchip.userspace.test_chip import Device, devices

pytestmark = pytest.mark.vcpu

Demand = Callable[[bool, str], None]

SEQUENCES: Final = 60
STEPS: Final = 40
FIRST_FREE_VECTOR: Final = 0x20  # those below are exceptions of the processor


# --- the pair of 8259A

MASTER, SLAVE, ELCR = 0x20, 0xA0, 0x4D0
PIC_PORTS = (0x20, 0x21, 0xA0, 0xA1, 0x4D0, 0x4D1)
_command = st.one_of(
    st.builds(lambda command, irq: command << 5 | irq, st.integers(0, 7), st.integers(0, 7)),  # OCW2
    st.builds(lambda bits: 0x08 | bits, st.sampled_from([0, 2, 3, 4, 6, 0x40, 0x60, 0x67])),  # OCW3
    st.just(0x20),
    st.sampled_from([0x10, 0x11]),  # ICW1
)
_data = st.sampled_from([MASTER + 1, SLAVE + 1, ELCR, ELCR + 1])
_halves = st.sampled_from([MASTER, SLAVE])
_pic_steps = st.one_of(
    st.tuples(st.just("write"), _halves, _command),
    st.tuples(
        st.just("write"), st.sampled_from([MASTER + 1, SLAVE + 1, ELCR, ELCR + 1]), st.integers(0, 255)
    ),
    st.tuples(
        st.just("initialize"), st.sampled_from([MASTER, SLAVE]), st.sampled_from([0, 1, 2, 3, 0x11, 0x13])
    ),
    st.tuples(st.just("read"), st.sampled_from(PIC_PORTS), st.just(0)),
    st.tuples(st.just("level"), st.sampled_from([gsi for gsi in range(16) if gsi != 2]), st.integers(0, 1)),
    st.tuples(st.just("take"), st.just(0), st.just(0)),
)


class BothPics:
    """One of ours, and one of KVM's with a processor that does what it is told."""

    def __init__(self, vm: Vm, ports: PortDriver) -> None:
        self.vm = vm
        self.ports = ports
        self.ours = Pic()
        self.ours.activate()

    async def write(self, port: int, value: int) -> None:
        await self.ports.write(port, value)
        self.ours.write(port, value)

    async def initialize(self, port: int, icw4: int) -> None:
        await self.write(port, 0x11)
        for word in (0x40 if port == MASTER else 0x48, 4, icw4):
            await self.write(port + 1, word)

    async def read(self, port: int, _: int) -> None:
        state = self.ours.state()
        polled = {MASTER: state.master.poll, SLAVE: state.slave.poll}.get(port & ~1, 0)
        known = 0x07 if polled else 0xFF  # Linux before 6.5 leaves bit 7 of a poll out
        assert self.ours.read(port) & known == await self.ports.read(port) & known

    async def level(self, gsi: int, level: int) -> None:
        self.vm.irq_line(gsi, bool(level))
        self.ours.set_level(gsi, bool(level))

    async def take(self, *_: int) -> None:
        state = self.ours.state()
        if min(state.master.irq_base, state.slave.irq_base) >= FIRST_FREE_VECTOR:
            expected = self.ours.intack() if self.ours.asks else None
            assert await self.ports.take() == expected

    @property
    def irr(self) -> int:
        return self.vm.pic_state().irr

    def check(self) -> None:
        assert self.ours.state() == self.vm.pic_state()


@given(st.lists(_pic_steps, min_size=5, max_size=STEPS))
@settings(max_examples=SEQUENCES, derandomize=True)
def test_the_pair_of_8259a_does_what_kvms_does(script: list[tuple[str, int, int]]) -> None:
    async def play() -> None:
        with Vm() as vm, open_port_driver(vm) as ports:
            both = BothPics(vm, ports)
            for port in (MASTER, SLAVE):
                await both.initialize(port, 1)
            for step, first, second in script:
                await getattr(both, step)(first, second)
                both.check()

    trio.run(play)


# --- the I/O APIC, and the local one

IOAPIC_BASE, LOCAL_BASE = 0xFEC0_0000, 0xFEE0_0000
REGSEL, WIN = 0x00, 0x10
KVM_GET_LAPIC: Final = 2 << 30 | 0x400 << 16 | 0xAE << 8 | 0x8E

# Whether a vector's end reaches an edge that has the vector of a level depends on what KVM has found out
# about the other entries. No operating system mixes them.
VECTORS: Final = {True: [0x08, 0x21, 0x2F, 0x31, 0x31, 0x45, 0xFE], False: [0x09, 0x22, 0x32, 0x46]}
_entries = st.sampled_from([True, True, False]).flatmap(
    lambda level: st.builds(
        RedirectionEntry,
        vector=st.sampled_from(VECTORS[level]),
        delivery_mode=st.sampled_from([0, 0, 0, 1]),
        active_low=st.booleans(),
        remote_irr=st.booleans(),
        level=st.just(level),
        masked=st.sampled_from([False, False, True]),
    )
)
_inputs = st.sampled_from([0, 1, 8, 10, 11, 23])
_ioapic_steps = st.one_of(
    st.tuples(st.just("low"), _inputs, _entries.map(lambda entry: entry.pack() & 0xFFFF_FFFF)),
    st.tuples(st.just("high"), _inputs, st.sampled_from([0, 0, 0xFF00_0000])),
    st.tuples(st.just("read"), st.integers(0, 0x42), st.just(0)),
    st.tuples(st.just("write"), st.sampled_from([0, 1, 2, 3, 0x40, 0xFF]), st.integers(0, 0xFFFF_FFFF)),
    st.tuples(st.just("level"), _inputs, st.integers(0, 1)),
    st.tuples(st.sampled_from(["take", "end"]), st.just(0), st.just(0)),
)


class ApicDriver(PortDriver):
    """Reaches the APICs as well, through segments that no program in real mode could load."""

    FS: Final = b"\x64"
    GS: Final = b"\x65"
    ANSWER: Final = 0x700

    def open_segments(self) -> None:
        sregs = _abi.Sregs()
        ioctl(self._vcpu.fd, _abi.GET_SREGS, sregs)
        sregs.fs.base, sregs.gs.base = IOAPIC_BASE, LOCAL_BASE
        ioctl(self._vcpu.fd, _abi.SET_SREGS, sregs)

    async def store(self, segment: bytes, offset: int, value: int) -> None:
        """mov dword segment:[offset], value"""
        await self._do(segment + b"\x66\xc7\x06" + struct.pack("<HI", offset, value) + asm.out(ANSWERED, 0))

    async def load(self, segment: bytes, offset: int) -> int:
        """mov eax, segment:[offset]"""
        await self._do(segment + asm.load_eax(offset) + asm.store_eax(self.ANSWER) + asm.out(ANSWERED, 0))
        return int.from_bytes(self._memory[self.ANSWER : self.ANSWER + 4], "little")

    def local_apic(self) -> bytes:
        data = bytearray(0x400)
        fcntl.ioctl(self._vcpu.fd, KVM_GET_LAPIC, data)
        return bytes(data)


class BothIoapics:
    """One of ours, and one of KVM's with a processor that does what it is told."""

    def __init__(self, vm: Vm, driver: ApicDriver) -> None:
        self.vm = vm
        self.driver = driver
        self.ours = Ioapic()
        self.ours.activate()
        self.ends_itself = False
        """A KVM that emulates real mode may end the local APIC's interrupts when the processor takes them."""

    async def start(self) -> None:
        """Local APICs on, with a logical destination; nothing from KVM's 8259A."""
        self.driver.open_segments()
        for port in (MASTER + 1, SLAVE + 1):
            await self.driver.write(port, 0xFF)
        for offset, value in ((Offsets.SVR, 0x1FF), (Offsets.LDR, 1 << 24)):
            await self.driver.store(ApicDriver.GS, offset, value)
            self.ours.local.write(offset, value)
        await self.low(0, RedirectionEntry(vector=0x41, masked=False).pack())
        await self.level(0, 1)
        await self.take()
        self.ends_itself = not any(self.local_bank(Offsets.ISR))
        await self.end()
        await self.level(0, 0)

    async def write(self, number: int, value: int) -> None:
        for offset, data in ((REGSEL, number), (WIN, value)):
            await self.driver.store(ApicDriver.FS, offset, data)
            self.ours.write(offset, data)

    async def low(self, gsi: int, value: int) -> None:
        await self.write(0x10 + 2 * gsi, value)

    async def high(self, gsi: int, value: int) -> None:
        await self.write(0x11 + 2 * gsi, value)

    async def read(self, number: int, _: int) -> None:
        await self.driver.store(ApicDriver.FS, REGSEL, number)
        self.ours.write(REGSEL, number)
        assert self.ours.read(WIN) == await self.driver.load(ApicDriver.FS, WIN)

    async def level(self, gsi: int, level: int) -> None:
        self.vm.irq_line(gsi, bool(level))
        self.ours.set_level(gsi, bool(level))

    async def take(self, *_: int) -> None:
        delivery = self.ours.acknowledge()
        assert await self.driver.take() == (delivery.vector if delivery else None)
        if self.ends_itself:
            await self.end()

    async def end(self, *_: int) -> None:
        await self.driver.store(ApicDriver.GS, Offsets.EOI, 0)
        self.ours.local.write(Offsets.EOI, 0)

    @property
    def irr(self) -> int:
        return self.vm.ioapic_state().irr

    def check(self) -> None:
        ours, kvms = self.ours.state(), self.vm.ioapic_state()
        assert (ours.id, ours.ioregsel, ours.irr) == (kvms.id, kvms.ioregsel, kvms.irr)
        assert ours.entries == kvms.entries
        for bank in (Offsets.ISR, Offsets.TMR, Offsets.IRR):
            ours_bank = [self.ours.local.read(offset) for offset in range(bank, bank + 0x80, 0x10)]
            assert ours_bank == self.local_bank(bank)

    def local_bank(self, bank: Offsets) -> list[int]:
        data = self.driver.local_apic()
        return [int.from_bytes(data[at : at + 4], "little") for at in range(bank, bank + 0x80, 0x10)]


@given(st.lists(_ioapic_steps, min_size=5, max_size=STEPS))
@settings(max_examples=SEQUENCES, derandomize=True)
def test_the_io_apic_does_what_kvms_does(script: list[tuple[str, int, int]]) -> None:
    async def play() -> None:
        with Vm() as vm, open_port_driver(vm) as ports:
            both = BothIoapics(vm, ApicDriver(ports._vcpu, ports._memory))
            await both.start()
            both.check()
            for step, first, second in script:
                await getattr(both, step)(first, second)
                both.check()

    trio.run(play)


# --- eventfds


class Twin:
    """A device with eventfds of its own at each of the two irqchips, which is signalled at both."""

    def __init__(self, both: BothPics | BothIoapics, gsi: int, ours: Device, kvms: Device) -> None:
        self.both = both
        self.gsi = gsi
        self.ours = ours
        self.kvms = kvms
        ours.attach(both.ours, gsi)
        both.vm.irqfd(gsi, kvms.trigger_fd, kvms.resample_fd)

    async def fire(self) -> None:
        """Until both have heard it: KVM takes it in a thread of its own, which tells nobody."""
        await self.ours.fire()
        os.eventfd_write(self.kvms.trigger_fd, 1)
        with trio.fail_after(5):
            while self.both.ours.state().irr != self.both.irr:
                await trio.lowlevel.checkpoint()

    @property
    def resampled(self) -> int:
        """How often it was told to look at its line again; both irqchips agree."""
        ours = self.ours.resampled
        assert self.kvms.resampled == ours
        return ours


async def test_all_eventfds_of_an_input_are_told_at_its_end_as_kvm_does() -> None:
    with Vm() as vm, open_port_driver(vm) as ports, devices(4) as made:
        both = BothPics(vm, ports)
        for port in (MASTER, SLAVE):
            await both.initialize(port, 1)
        await both.write(ELCR + 1, 1 << 2)
        async with both.ours.watched():
            one, other = Twin(both, 10, made[0], made[1]), Twin(both, 10, made[2], made[3])
            for _ in range(2):
                await one.fire()
                await both.take()
                both.check()
                assert one.resampled == 0
                await both.write(SLAVE, 0x60 | 2)
                assert (one.resampled, other.resampled) == (1, 1)
                await both.write(MASTER, 0x60 | 2)
                await both.take()
                both.check()


async def test_an_end_of_what_is_not_in_service_lets_go_as_kvms_does() -> None:
    with Vm() as vm, open_port_driver(vm) as ports, devices(2) as made:
        both = BothPics(vm, ports)
        for port in (MASTER, SLAVE):
            await both.initialize(port, 1)
        await both.write(ELCR, 1 << 5)
        async with both.ours.watched():
            device = Twin(both, 5, made[0], made[1])
            await device.fire()
            await both.write(MASTER, 0x60 | 5)
            assert device.resampled == 1
            both.check()
            await both.take()
            assert both.ours.counters[5].resampled == 1


async def test_an_input_that_is_unmasked_is_looked_at_again_as_kvm_does(demand: Demand) -> None:
    linux = tuple(map(int, re.findall(r"\d+", os.uname().release)[:2]))
    demand(linux >= (6, 4), "KVM looks at an input again since Linux 6.4")
    with Vm() as vm, open_port_driver(vm) as ports, devices(2) as made:
        both = BothIoapics(vm, ApicDriver(ports._vcpu, ports._memory))
        await both.start()
        entry = RedirectionEntry(vector=0x45, level=True)
        await both.low(10, entry.pack())
        async with both.ours.watched():
            device = Twin(both, 10, made[0], made[1])
            await device.fire()
            await both.low(10, replace(entry, masked=False).pack())
            assert device.resampled == 1
            both.check()
            await device.fire()
            await both.take()
            await both.end()
            assert device.resampled == 1
            both.check()
