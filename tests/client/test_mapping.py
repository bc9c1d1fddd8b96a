from __future__ import annotations

import errno
import os
import struct
from collections.abc import Awaitable, Callable
from contextlib import ExitStack

import pytest
import trio
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import client
from client.decoding import COMMAND, MemoryDecoding
from client.mapping import MAX_ALIGN, BarMapping, MappingError, MappingState, OnZapped
from client.pci import ConfigSpace
from client.phys_vec import PhysVec
from client.regions import RegionDetails
from protocol.vfio import RegionFlags
from tests.client import pci_device as pci
from tests.client.test_bars import RWM, memory

ONES = 0xFFFF_FFFF


def region_of(fd: int, size: int, *areas: tuple[int, int], offset: int = 0) -> RegionDetails:
    return RegionDetails(2, size, RWM, offset, areas or ((0, size),), (), fd)


def state_of(bar: BarMapping) -> MappingState:
    return bar.state


class Switch:
    """The decoding of a device that does what it is told."""

    def __init__(self) -> None:
        self.decoding = MemoryDecoding(object())  # type: ignore[arg-type]
        self.decoding.learn(ConfigSpace(bytes(pci.config_space())))

    def do(self, call: Callable[[Callable[[], Awaitable[None]]], Awaitable[None]]) -> None:
        async def nothing() -> None:
            await trio.lowlevel.checkpoint()

        trio.run(call, nothing)

    def write(self, offset: int, data: bytes) -> None:
        self.do(lambda nothing: self.decoding.around_write(offset, data, nothing))

    def memory(self, *, on: bool) -> None:
        self.write(COMMAND, pci.MEMORY_ON if on else pci.MEMORY_OFF)

    def reset(self) -> None:
        self.do(lambda nothing: self.decoding.around_reset(nothing))


# what is mapped


def test_loads_and_stores_are_those_of_the_memory() -> None:
    with memory(0x3000) as fd:
        region = RegionDetails(2, 0x2000, RWM, 0x1000, ((0, 0x2000),), (), fd)
        with BarMapping(region) as bar:
            bar.write(0x1008, 8, 0x1122334455667788)
            assert os.pread(fd, 8, 0x2008) == struct.pack("=Q", 0x1122334455667788)
            os.pwrite(fd, b"\xaa\xbb\xcc\xdd", 0x1000)
            assert bar.read(0, 1) == 0xAA
            assert bar.read(2, 2) == struct.unpack("=H", b"\xcc\xdd")[0]
            assert bar.read(0, 4) == struct.unpack("=I", b"\xaa\xbb\xcc\xdd")[0]
            bar.view(0x10, 3)[:] = b"xyz"
            assert os.pread(fd, 3, 0x1010) == b"xyz"


def test_only_sparse_areas_are_mapped() -> None:
    with memory(0x8000) as fd:
        region = RegionDetails(0, 0x8000, RWM, 0, ((0x1000, 0x1000), (0x4000, 0x2000)), (), fd)
        with BarMapping(region) as bar:
            assert not bar.covers(0, 4)
            assert bar.covers(0x1000, 0x1000)
            assert not bar.covers(0x1FFC, 8)
            assert not bar.covers(0x2000, 1)
            assert bar.covers(0x5FF8, 8)
            with pytest.raises(client.ClientError, match="not mapped"):
                bar.read(0x3000, 4)
            with pytest.raises(client.ClientError, match="not mapped"):
                bar.view(0x1800, 0x1000)


def test_an_access_must_be_aligned() -> None:
    with memory(0x1000) as fd, BarMapping(RegionDetails(0, 0x1000, RWM, 0, ((0, 0x1000),), (), fd)) as bar:
        with pytest.raises(client.ClientError, match="not aligned"):
            bar.read(1, 2)
        with pytest.raises(client.ClientError, match="not aligned"):
            bar.read(2, 4)
        with pytest.raises(client.ClientError, match="not aligned"):
            bar.write(4, 8, 0)


def test_the_last_bytes_of_an_odd_length_are_reached() -> None:
    region = RegionDetails(0, 0x1000, RWM, 0, ((0, 0x7FF),), (), -1)
    with memory(0x1000) as fd:
        region.fd = fd
        os.pwrite(fd, b"\1\2\3\4\5\6\7", 0x7F8)
        with BarMapping(region) as bar:
            assert bar.read(0x7FE, 1) == 7
            assert bar.read(0x7FC, 2) == struct.unpack("=H", b"\5\6")[0]
            assert bar.read(0x7F8, 4) == struct.unpack("=I", b"\1\2\3\4")[0]
            with pytest.raises(client.ClientError, match="not mapped"):
                bar.read(0x7F8, 8)


def test_a_file_that_shrinks_before_it_is_faulted_in_is_refused() -> None:
    with memory(0x1000) as fd, BarMapping(RegionDetails(0, 0x1000, RWM, 0, ((0, 0x1000),), (), fd)) as bar:
        os.truncate(fd, 0)
        with pytest.raises(client.MappingError, match="ends at 0x0"):
            bar.read(0, 4)


def test_a_read_only_region_stays_so() -> None:
    flags = RegionFlags.READ | RegionFlags.MMAP
    with memory(0x1000) as fd, BarMapping(RegionDetails(0, 0x1000, flags, 0, ((0, 0x1000),), (), fd)) as bar:
        assert bar.read(0, 4) == 0
        with pytest.raises(client.ClientError, match="read-only"):
            bar.write(0, 4, 1)


@pytest.mark.parametrize(
    ("size", "offset", "areas"),
    [
        (0x1000, 0, ((0, 0x2000),)),
        (0x2000, 0x1000, ((0, 0x2000),)),
        (0x4000, 0, ((0x800, 0x800),)),
        (0x4000, 1, ((0xFFF, 0x1000),)),
    ],
)
def test_a_mapping_that_would_fault_later_is_refused(
    size: int, offset: int, areas: tuple[tuple[int, int], ...]
) -> None:
    with memory(size) as fd, pytest.raises(client.ClientError):
        BarMapping(RegionDetails(0, 0x4000, RWM, offset, areas, (), fd))


def test_a_region_without_descriptor_is_not_mapped() -> None:
    with pytest.raises(client.ClientError, match="cannot be mapped"):
        BarMapping(RegionDetails(0, 0x4000, RWM, 0, (), ()))


def test_unmapping_waits_for_views() -> None:
    with memory(0x1000) as fd:
        bar = BarMapping(RegionDetails(0, 0x1000, RWM, 0, ((0, 0x1000),), (), fd))
        view = bar.view(0, 8)
        with pytest.raises(BufferError):
            bar.close()
        with pytest.raises(client.ClientError, match="not mapped"):
            bar.read(0, 4)
        view.release()
        bar.close()


def test_areas_that_touch_are_one() -> None:
    with memory(0x4000) as fd:
        region = region_of(fd, 0x4000, (0x1000, 0x1000), (0x2000, 0x1000), (0x1000, 0x2000))
        with BarMapping(region) as bar:
            assert bar.covers(0x1000, 0x2000)
            assert not bar.covers(0, 0x2000)
            assert not bar.covers(0x2000, 0x2000)
            bar.write(0x1FF8, 8, 1)
            assert bytes(bar.view(0x1FF8, 16)) == (1).to_bytes(8, "little") + bytes(8)


def test_part_of_a_bar_may_be_mapped() -> None:
    with memory(0x5000) as fd:
        os.pwrite(fd, b"part", 0x3000)
        region = region_of(fd, 0x4000, (0, 0x3000), offset=0x1000)
        with BarMapping(region, offset=0x2000, length=0x1000) as bar:
            assert (bar.offset, bar.length) == (0x2000, 0x1000)
            assert bytes(bar.view(0x2000, 4)) == b"part"
            assert bar.translate(0x2000, 0x1000) == (PhysVec(0x3000, 0x1000),)
            assert not bar.covers(0x1000, 1)
            assert not bar.covers(0x3000, 1)
        with BarMapping(region, offset=0x2000) as bar:
            assert bar.length == 0x2000
            assert not bar.covers(0x3000, 1)
        with pytest.raises(MappingError, match="is mappable") as refusal:
            BarMapping(region, offset=0x3000)
        assert refusal.value.errno == errno.EINVAL


@pytest.mark.parametrize(
    ("offset", "length"),
    [(0x800, None), (0x4000, None), (-0x1000, None), (0, 0), (0, 0x4001), (0x3000, 0x2000)],
)
def test_what_is_no_part_of_it_is_refused(offset: int, length: int | None) -> None:
    with memory(0x4000) as fd, pytest.raises(MappingError, match="cannot be mapped") as refusal:
        BarMapping(region_of(fd, 0x4000), offset=offset, length=length)
    assert refusal.value.errno == errno.EINVAL


def test_a_bar_of_0x100_bytes_is_mapped_as_the_page_that_it_is_in() -> None:
    with memory(0x100) as fd:
        os.pwrite(fd, b"tail", 0xFC)
        region = region_of(fd, 0x100)
        with BarMapping(region) as bar:
            assert bytes(bar.view(0xFC, 4)) == b"tail"
            assert not bar.covers(0xFC, 8), "the BAR ends there"
        with BarMapping(region, length=0x1000) as bar:
            assert bytes(bar.view(0xFC, 8)) == b"tail" + bytes(4)
            assert bar.covers(0, 0x1000)
        with pytest.raises(MappingError, match="cannot be mapped"):
            BarMapping(region, length=0x1001)


def test_an_address_is_aligned_as_the_bar_is_or_misses_that_on_demand() -> None:
    size = 4 << 20
    with memory(size) as fd:
        region = region_of(fd, size)
        for offset, skew in ((0, 0), (0x5000, 0), (0, 0x1000), (0x5000, 0x1000)):
            with BarMapping(region, offset=offset, skew=skew) as bar:
                assert bar._pages.address % size == offset + skew
        with BarMapping(region, align=1 << 30) as bar:
            assert bar._pages.address % (1 << 30) == 0
        with pytest.raises(MappingError, match="modulo"):
            BarMapping(region, align=3)


def test_a_bar_of_many_gib_is_aligned_to_one() -> None:
    size = 1 << 36
    with memory(size) as fd, BarMapping(region_of(fd, size)) as bar:
        assert bar._pages.address % MAX_ALIGN == 0
        bar.write(size - 8, 8, 7)
        assert os.pread(fd, 1, size - 8) == b"\7"


def test_a_bar_that_says_it_is_larger_than_any_process_is_refused() -> None:
    with memory(0x1000) as fd, pytest.raises(MappingError, match="cannot be mapped") as refusal:
        BarMapping(region_of(fd, 1 << 62), Switch().decoding)
    assert refusal.value.errno == errno.ENOMEM


# faulting


def test_it_begins_unfaulted_and_is_faulted_in_by_the_first_touch() -> None:
    with memory(0x4000) as fd, BarMapping(region_of(fd, 0x4000)) as bar:
        assert state_of(bar) is MappingState.FAULTABLE
        with pytest.raises(MappingError, match="not faulted in") as refusal:
            bar.translate(0, 0x1000)
        assert refusal.value.errno == errno.EFAULT
        bar.read(0x10, 4)
        assert state_of(bar) is MappingState.MAPPED
        assert bar.translate(0x10, 0x3FF0) == (PhysVec(0x10, 0x3FF0),)


def test_it_is_faulted_in_by_hand_area_by_area_or_whole() -> None:
    with memory(0x8000) as fd:
        region = region_of(fd, 0x8000, (0x1000, 0x1000), (0x4000, 0x2000))
        with BarMapping(region) as bar:
            bar.fault(0x4FFF, 2)
            assert bar.translate(0x4000, 0x2000) == (PhysVec(0x4000, 0x2000),)
            with pytest.raises(MappingError, match="not faulted in"):
                bar.translate(0x1000, 1)
            bar.fault()
            assert bar.translate(0x1000, 0x1000) == (PhysVec(0x1000, 0x1000),)
            for offset, length in ((0, 0x1000), (0x1000, 0x4000), (0x8000, 1)):
                with pytest.raises(MappingError, match="not mapped at") as refusal:
                    bar.fault(offset, length)
                assert refusal.value.errno == errno.EFAULT
                with pytest.raises(MappingError, match="not mapped at"):
                    bar.translate(offset, length)


def test_without_a_decoding_a_file_that_is_too_short_is_found_out_at_once() -> None:
    with memory(0x2000) as fd:
        with pytest.raises(MappingError, match="ends at 0x2000") as refusal:
            BarMapping(region_of(fd, 0x4000))
        assert refusal.value.errno == errno.EFAULT
        with BarMapping(region_of(fd, 0x4000), Switch().decoding) as bar:
            with pytest.raises(MappingError, match="ends at 0x2000") as refusal:
                bar.fault()
            assert refusal.value.errno == errno.EFAULT
            assert state_of(bar) is MappingState.FAULTABLE
            assert bar.read(0, 4) == 0, "what there is"
            with pytest.raises(MappingError, match="ends at 0x2000"):
                bar.translate(0, 0x4000)
            os.truncate(fd, 0x4000)
            bar.fault()


def test_when_the_session_has_closed_its_descriptor_nothing_is_faulted_in_any_more() -> None:
    with memory(0x1000) as fd:
        region = region_of(fd, 0x1000)
        with BarMapping(region) as bar, BarMapping(region) as late:
            assert bar.fd == fd
            bar.write(0, 4, 7)
            region.fd = -1
            assert bar.read(0, 4) == 7
            with pytest.raises(MappingError, match="Bad file descriptor") as refusal:
                late.read(0, 4)
            assert refusal.value.errno == errno.EFAULT


def test_a_closed_mapping_is_unmapped_for_good() -> None:
    with memory(0x1000) as fd:
        switch = Switch()
        bar = BarMapping(region_of(fd, 0x1000), switch.decoding)
        bar.fault()
        bar.close()
        bar.close()
        assert state_of(bar) is MappingState.UNMAPPED
        switch.memory(on=False)
        assert bar.generation == 0, "it follows nobody"
        switch.memory(on=True)
        for touch in (bar.fault, lambda: bar.read(0, 4), lambda: bar.view(0, 1), lambda: bar.translate(0, 1)):
            with pytest.raises(MappingError, match="not mapped at"):
                touch()


# taking away


def test_while_memory_is_off_it_reads_as_ones_and_writes_are_dropped() -> None:
    with memory(0x1000) as fd:
        switch = Switch()
        with BarMapping(region_of(fd, 0x1000), switch.decoding) as bar:
            bar.write(0, 4, 7)
            switch.memory(on=False)
            assert state_of(bar) is MappingState.ZAPPED
            assert [bar.read(0, width) for width in (1, 2, 4, 8)] == [0xFF, 0xFFFF, ONES, (1 << 64) - 1]
            bar.write(0, 4, 8)
            assert os.pread(fd, 1, 0) == b"\7"
            with pytest.raises(MappingError, match="does not answer") as refusal:
                bar.fault()
            assert refusal.value.errno == errno.EFAULT
            with pytest.raises(MappingError, match="not faulted in"):
                bar.translate(0, 4)
            with pytest.raises(client.ClientError, match="not aligned"):
                bar.read(1, 2)


def test_re_enabled_it_is_the_same_pages_in_the_same_place() -> None:
    with memory(0x2000) as fd:
        switch = Switch()
        with BarMapping(region_of(fd, 0x2000), switch.decoding) as bar, bar.view(0x1000, 8) as view:
            view[:] = b"deviceok"
            where, generation = bar._pages.address, bar.generation
            switch.memory(on=False)
            assert bytes(view) == b"\xff" * 8
            view[:] = b"nowhere!"
            switch.memory(on=True)
            assert state_of(bar) is MappingState.FAULTABLE
            bar.fault()
            assert bytes(view) == b"deviceok"
            assert (bar._pages.address, bar.generation) == (where, generation + 1)


def test_a_view_may_be_taken_while_nobody_answers() -> None:
    with memory(0x2000) as fd:
        os.pwrite(fd, b"here", 0)
        switch = Switch()
        switch.memory(on=False)
        with BarMapping(region_of(fd, 0x2000), switch.decoding) as bar, bar.view(0, 4) as view:
            assert bytes(view) == b"\xff" * 4
            switch.memory(on=True)
            bar.fault()
            assert bytes(view) == b"here"


def test_who_wants_to_be_told_is_told() -> None:
    with memory(0x1000) as fd:
        switch = Switch()
        with BarMapping(region_of(fd, 0x1000), switch.decoding, on_zapped=OnZapped.RAISE) as bar:
            bar.write(0, 4, 7)
            switch.memory(on=False)
            for touch in (lambda: bar.read(0, 4), lambda: bar.write(0, 4, 1), lambda: bar.view(0, 1)):
                with pytest.raises(MappingError, match="does not answer at 0x0 of region 2") as refusal:
                    touch()
                assert refusal.value.errno == errno.EIO
            switch.memory(on=True)
            assert bar.read(0, 4) == 7
            os.truncate(fd, 0)
            with pytest.raises(MappingError, match="does not answer") as refusal:
                bar.read(0, 4)
            assert refusal.value.errno == errno.EIO


def test_flr_d3_and_reset_each_take_it_away_and_memory_brings_it_back() -> None:
    with memory(0x1000) as fd:
        switch = Switch()
        switches: list[tuple[Callable[[], None], Callable[[], None]]] = [
            (lambda: switch.write(pci.PCIE + 8, pci.FLR), lambda: switch.memory(on=True)),
            (lambda: switch.write(pci.AF + 4, pci.AF_FLR), lambda: switch.memory(on=True)),
            (switch.reset, lambda: switch.memory(on=True)),
            (lambda: switch.write(pci.PM + 4, pci.D3_HOT), lambda: switch.write(pci.PM + 4, pci.D0)),
        ]
        with BarMapping(region_of(fd, 0x1000), switch.decoding) as bar, bar.view(0, 4) as view:
            for off, on in switches:
                bar.fault()
                assert bytes(view) == bytes(4)
                off()
                assert bytes(view) == b"\xff" * 4
                assert state_of(bar) is MappingState.ZAPPED
                on()
                assert state_of(bar) is MappingState.FAULTABLE


def test_a_virtual_function_keeps_its_memory_whatever_command_says() -> None:
    with memory(0x1000) as fd:
        switch = Switch()
        switch.decoding.command_memory = False
        with BarMapping(region_of(fd, 0x1000), switch.decoding) as bar:
            bar.fault()
            switch.memory(on=False)
            assert (state_of(bar), bar.generation) == (MappingState.MAPPED, 0)
            switch.reset()
            assert (state_of(bar), bar.generation) == (MappingState.FAULTABLE, 1)
            bar.fault()
            switch.write(pci.PM + 4, pci.D3_HOT)
            assert state_of(bar) is MappingState.ZAPPED


def test_all_mappings_of_a_device_are_taken_away() -> None:
    with memory(0x2000) as fd, ExitStack() as stack:
        switch = Switch()
        bars = [
            stack.enter_context(BarMapping(region_of(fd, 0x2000), switch.decoding, offset=at))
            for at in (0, 0x1000)
        ]
        for bar in bars:
            bar.fault()
        switch.memory(on=False)
        assert {state_of(bar) for bar in bars} == {MappingState.ZAPPED}


def test_a_session_that_ends_takes_it_away_for_good() -> None:
    with memory(0x1000) as fd:
        switch = Switch()
        with BarMapping(region_of(fd, 0x1000), switch.decoding) as bar, bar.view(0, 1) as view:
            switch.decoding.end()
            assert view[0] == 0xFF
            switch.memory(on=True)
            assert state_of(bar) is MappingState.ZAPPED


def test_a_view_that_outlives_close_is_still_taken_away() -> None:
    with memory(0x1000) as fd:
        switch = Switch()
        bar = BarMapping(region_of(fd, 0x1000), switch.decoding)
        view = bar.view(0, 1)
        with pytest.raises(BufferError):
            bar.close()
        switch.memory(on=False)
        assert view[0] == 0xFF
        view.release()
        bar.close()


def test_a_zap_that_races_with_a_fault_is_told_by_the_generation() -> None:
    with memory(0x1000) as fd, BarMapping(region_of(fd, 0x1000)) as bar:
        bar.fault()
        generation, ranges = bar.generation, bar.translate(0, 0x1000)
        bar.zap()
        assert bar.generation != generation
        bar.fault()
        assert bar.translate(0, 0x1000) == ranges, "the same bytes, and yet to be looked at again"
        assert bar.generation != generation


# what the server takes away by itself


def test_what_the_server_takes_away_reads_as_ones_until_it_is_faulted_in_again() -> None:
    with memory(0x4000) as fd, BarMapping(region_of(fd, 0x4000)) as bar, bar.view(0, 0x4000) as view:
        bar.write(0, 4, 7)
        bar.write(0x2000, 4, 8)
        os.truncate(fd, 0x1000)
        assert bar.read(0x2000, 4) == ONES
        bar.write(0x2000, 4, 9)
        assert bar.lost(0x2000, 4)
        assert not bar.lost(0, 0x1000)
        assert bar.read(0, 4) == 7, "what is left"
        with pytest.raises(MappingError, match="not faulted in"):
            bar.translate(0, 0x4000)
        assert bar.translate(0, 0x1000) == (PhysVec(0, 0x1000),)
        with pytest.raises(MappingError, match="ends at 0x1000") as refusal:
            bar.fault()
        assert refusal.value.errno == errno.EFAULT
        assert bar.read(0, 4) == 7, "a fault that fails changes nothing"
        os.truncate(fd, 0x4000)
        assert bar.read(0x2000, 4) == ONES
        bar.fault(0x2000, 4)
        assert bar.read(0x2000, 4) == 0, "what the server has there now"
        assert view[0x3000] == 0
        assert not bar.lost(0, 0x4000)


def test_what_nobody_has_touched_since_is_not_known_to_be_lost_but_is_not_translated() -> None:
    with memory(0x4000) as fd, BarMapping(region_of(fd, 0x4000)) as bar:
        bar.fault()
        os.truncate(fd, 0x1000)
        assert not bar.lost(0, 0x4000)
        with pytest.raises(MappingError, match="ends at 0x1000"):
            bar.translate(0, 0x4000)


def test_a_read_only_view_cannot_be_written_to_whatever_became_of_it() -> None:
    with memory(0x1000) as fd:
        region = RegionDetails(0, 0x1000, RegionFlags.READ | RegionFlags.MMAP, 0, ((0, 0x1000),), (), fd)
        with BarMapping(region) as bar, bar.view(0, 4) as view:
            changes: list[Callable[[], object]] = [bytes, bar.zap, bar.fault]
            for change in changes:
                change()
                with pytest.raises(TypeError, match="read-only"):
                    view[0] = 1
                with pytest.raises(client.ClientError, match="read-only"):
                    bar.write(0, 4, 1)
            assert not bar.writable


# any order of events


class Life(RuleBasedStateMachine):
    """A mapping of two areas, its device's decoding and its server's whims, against a model."""

    AREAS = ((0, 0x2000), (0x3000, 0x1000))
    SIZE = 0x4000

    @initialize(vf=st.booleans(), raises=st.booleans())
    def begin(self, vf: bool, raises: bool) -> None:
        self.fd = os.memfd_create("life")
        os.truncate(self.fd, self.SIZE)
        self.content = bytearray(self.SIZE)
        self.switch = Switch()
        self.switch.decoding.command_memory = not vf
        self.on_zapped = OnZapped.RAISE if raises else OnZapped.ONES
        region = region_of(self.fd, self.SIZE, *self.AREAS)
        self.bar = BarMapping(region, self.switch.decoding, on_zapped=self.on_zapped)
        self.vf = vf
        self.on = self.powered = True
        self.there = True  # the server's file
        self.present: dict[int, bool] = {0: False, 1: False}
        self.lost: set[int] = set()
        self.views: list[tuple[int, memoryview]] = []

    @property
    def answers(self) -> bool:
        return self.powered and (self.on or self.vf)

    def taken_away(self, *, reset: bool = False) -> None:
        if reset or not self.answers:
            for area in self.present:
                self.present[area] = False
            self.lost.clear()

    @rule(on=st.booleans())
    def command(self, on: bool) -> None:
        self.on = on
        self.switch.memory(on=on)
        self.taken_away()

    @rule(powered=st.booleans())
    def power(self, powered: bool) -> None:
        self.powered = powered
        self.switch.write(pci.PM + 4, pci.D0 if powered else pci.D3_HOT)
        self.taken_away()

    @rule(how=st.sampled_from(["message", "pcie", "af"]))
    def reset(self, how: str) -> None:
        self.on, self.powered = False, True
        if how == "message":
            self.switch.reset()
        elif how == "pcie":
            self.switch.write(pci.PCIE + 8, pci.FLR)
        else:
            self.switch.write(pci.AF + 4, pci.AF_FLR)
        self.taken_away(reset=True)

    @rule(there=st.booleans())
    def server_truncates(self, there: bool) -> None:
        if not there:
            self.content = bytearray(self.SIZE)
            self.lost |= {area for area, present in self.present.items() if present}
        os.truncate(self.fd, self.SIZE if there else 0)
        if there and not self.there:  # what was not touched meanwhile is there again
            self.lost &= {area for area, present in self.present.items() if present and self.known_lost(area)}
        self.there = there

    def known_lost(self, area: int) -> bool:
        return self.bar.lost(self.AREAS[area][0] + 8, 4)

    @rule(area=st.sampled_from([0, 1]))
    def fault(self, area: int) -> None:
        start, length = self.AREAS[area]
        if not self.answers or not self.there:
            with pytest.raises(MappingError) as refusal:
                self.bar.fault(start, length)
            assert refusal.value.errno == errno.EFAULT
            return
        self.bar.fault(start, length)
        self.faulted(area)
        assert self.bar.translate(start, length) == (PhysVec(start, length),)

    def faulted(self, area: int) -> None:
        self.present[area] = True
        self.lost.discard(area)

    @rule(area=st.sampled_from([0, 1]), value=st.integers(0, ONES))
    def write(self, area: int, value: int) -> None:
        at = self.AREAS[area][0] + 8
        if (error := self.refusal(area)) is not None:
            with pytest.raises(MappingError) as refusal:
                self.bar.write(at, 4, value)
            assert refusal.value.errno == error
            return
        self.bar.write(at, 4, value)
        if self.touched(area):
            self.content[at : at + 4] = value.to_bytes(4, "little")

    @rule(area=st.sampled_from([0, 1]))
    def read(self, area: int) -> None:
        at = self.AREAS[area][0] + 8
        if (error := self.refusal(area)) is not None:
            with pytest.raises(MappingError) as refusal:
                self.bar.read(at, 4)
            assert refusal.value.errno == error
            return
        value = self.bar.read(at, 4)
        expected = int.from_bytes(self.content[at : at + 4], "little") if self.touched(area) else ONES
        assert value == expected

    def refusal(self, area: int) -> int | None:
        """What an access is refused with."""
        if self.answers and not self.present[area] and not self.there:
            return errno.EFAULT
        gone = not self.answers or area in self.lost
        return errno.EIO if gone and self.on_zapped is OnZapped.RAISE else None

    def touched(self, area: int) -> bool:
        """Whether an access found the device."""
        if not self.answers or area in self.lost:
            return False
        self.faulted(area)
        return True

    @precondition(lambda self: len(self.views) < 4)
    @rule(area=st.sampled_from([0, 1]))
    def view(self, area: int) -> None:
        start, length = self.AREAS[area]
        if self.answers and not self.there:
            with pytest.raises(MappingError):
                self.bar.view(start, length)
            return
        if not self.answers and self.on_zapped is OnZapped.RAISE:
            with pytest.raises(MappingError):
                self.bar.view(start, length)
            return
        self.views.append((area, self.bar.view(start, length)))
        if self.answers:
            self.faulted(area)

    @precondition(lambda self: self.views)
    @rule()
    def let_go(self) -> None:
        self.views.pop()[1].release()

    @invariant()
    def views_show_the_devices_bytes_or_ones(self) -> None:
        for area, view in getattr(self, "views", ()):
            start = self.AREAS[area][0]
            here = self.present[area] and area not in self.lost
            assert view[8:12] == (self.content[start + 8 : start + 12] if here else b"\xff" * 4)

    @invariant()
    def the_state_is_that_of_the_model(self) -> None:
        if not hasattr(self, "bar"):
            return
        if not self.answers:
            expected = MappingState.ZAPPED
        elif any(self.present.values()):
            expected = MappingState.MAPPED
        else:
            expected = MappingState.FAULTABLE
        assert state_of(self.bar) is expected

    def teardown(self) -> None:
        if not hasattr(self, "bar"):
            return
        if self.views:
            with pytest.raises(BufferError):
                self.bar.close()
        for _, view in self.views:
            view.release()
        self.bar.close()
        assert state_of(self.bar) is MappingState.UNMAPPED
        os.close(self.fd)


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=60, stateful_step_count=30)
