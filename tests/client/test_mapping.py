from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable
from contextlib import ExitStack

import pytest

import client
from client.mapping import MAX_ALIGN, BarMapping, MappingError, MappingState, OnZapped
from client.phys_vec import PhysVec
from client.regions import RegionDetails
from protocol.vfio import RegionFlags
from tests.client import pci_device as pci
from tests.client.bar_files import RWM, memory, region_of
from tests.client.pci_device import Switch

ONES = 0xFFFF_FFFF


def state_of(bar: BarMapping) -> MappingState:
    return bar.state


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
