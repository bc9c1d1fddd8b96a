from __future__ import annotations

import random
from errno import EACCES, EFAULT

import pytest
from hypothesis import given
from hypothesis import strategies as st

import client
from client.windows import Window, WindowError, Windows
from protocol.limits import MAX_DMA_MAPS
from protocol.vfio import DmaMapFlags

BOTH = DmaMapFlags.READ | DmaMapFlags.WRITE


def window(iova: int, size: int, flags: DmaMapFlags = BOTH, memory: bytearray | None = None) -> Window:
    return Window(iova, size, flags, memoryview(bytearray(size) if memory is None else memory))


def with_windows(*windows: Window) -> Windows:
    made = Windows()
    for one in windows:
        made.add(one)
    return made


def refusal(windows: Windows, address: int, data: int | bytes) -> int:
    """The errno of a read of so many bytes, or of a write."""
    try:
        if isinstance(data, int):
            windows.read(address, data)
        else:
            windows.write(address, data)
    except WindowError as error:
        return error.errno
    raise AssertionError("it was not refused")


def test_a_device_reads_and_writes_what_lies_behind_the_address() -> None:
    memory = bytearray(b"0123456789abcdef")
    windows = with_windows(window(0x1000, 16, memory=memory))
    assert windows.read(0x1004, 3) == b"456"
    windows.write(0x100D, b"XYZ")
    assert memory == b"0123456789abcXYZ"


def test_an_access_crosses_from_one_window_into_the_next() -> None:
    first, second = bytearray(16), bytearray(16)
    windows = with_windows(window(0x1010, 16, memory=second), window(0x1000, 16, memory=first))
    windows.write(0x100C, b"12345678")
    assert bytes(first[12:] + second[:4]) == b"12345678"
    assert windows.read(0x100C, 8) == b"12345678"


@pytest.mark.parametrize(
    ("address", "count"), [(0xFFF, 1), (0xFFF, 2), (0x100F, 2), (0x1010, 1), (0, 1), (0x100E, 0x20)]
)
def test_what_is_not_mapped_is_a_fault(address: int, count: int) -> None:
    windows = with_windows(window(0x1000, 16), window(0x1020, 16))
    assert refusal(windows, address, count) == EFAULT
    assert refusal(windows, address, bytes(count)) == EFAULT


def test_a_window_is_for_the_directions_it_was_given_for() -> None:
    windows = with_windows(window(0x1000, 16, DmaMapFlags.READ), window(0x2000, 16, DmaMapFlags.WRITE))
    assert windows.read(0x1000, 16) == bytes(16)
    windows.write(0x2000, bytes(16))
    assert refusal(windows, 0x1000, b"x") == EACCES
    assert refusal(windows, 0x2000, 1) == EACCES


def test_a_window_without_bytes_here_is_a_fault() -> None:
    windows = with_windows(Window(0x1000, 16, BOTH))
    assert refusal(windows, 0x1000, 1) == EFAULT
    assert refusal(windows, 0x1000, b"x") == EFAULT


def test_memory_that_its_owner_gave_up_is_a_fault() -> None:
    view = memoryview(bytearray(16))
    windows = with_windows(Window(0x1000, 16, BOTH, view))
    view.release()
    assert refusal(windows, 0x1000, 1) == EFAULT
    assert refusal(windows, 0x1000, b"x") == EFAULT


def test_a_refused_write_has_stored_nothing() -> None:
    memory = bytearray(16)
    windows = with_windows(window(0x1000, 16, memory=memory), window(0x1010, 16, DmaMapFlags.READ))
    assert refusal(windows, 0x1008, b"x" * 16) == EACCES
    assert not any(memory)


def test_nothing_is_moved_where_nothing_is_asked_for() -> None:
    windows = with_windows(window(0x1000, 16))
    assert windows.read(0x1000, 0) == b""
    windows.write(0x1010, b"")


@pytest.mark.parametrize(
    ("iova", "size"), [(0xFF1, 16), (0x1000, 16), (0x1008, 1), (0x100F, 16), (0, 0x4000)]
)
def test_windows_do_not_overlap(iova: int, size: int) -> None:
    windows = with_windows(window(0x1000, 16))
    with pytest.raises(client.ClientError, match="overlaps"):
        windows.add(window(iova, size))
    windows.add(window(0xFF0, 16))
    windows.add(window(0x1010, 16))
    assert [one.iova for one in windows] == [0xFF0, 0x1000, 0x1010]


@pytest.mark.parametrize(
    "bad",
    [
        Window(0, 0, BOTH),
        Window(0, 16, BOTH, memoryview(bytearray(15))),
        Window(0, 16, BOTH, memoryview(bytearray(16)).cast("I")),
        Window(0, 8, BOTH, memoryview(bytearray(16))[::2]),
        Window(0, 16, BOTH, memoryview(bytes(16))),
    ],
    ids=["empty", "short", "numbers", "every other byte", "read-only"],
)
def test_a_window_is_what_it_says(bad: Window) -> None:
    with pytest.raises(client.ClientError):
        Windows().add(bad)


def test_only_the_very_window_is_removed() -> None:
    windows = with_windows(window(0x1000, 16))
    windows.remove(0x1000, 8)
    windows.remove(0x1008, 16)
    assert (0x1000, 16) in windows
    windows.remove(0x1000, 16)
    assert len(windows) == 0
    assert (0x1000, 16) not in windows


def test_262144_windows_come_and_go_in_any_order() -> None:
    windows = Windows()
    addresses = [0x1000_0000 + number * 4096 for number in range(MAX_DMA_MAPS)]
    shuffled = random.Random(5).sample(addresses, len(addresses))
    for iova in shuffled:
        windows.add(Window(iova, 4096, BOTH))
    assert [one.iova for one in windows] == addresses
    for iova in shuffled[:-1]:
        windows.remove(iova, 4096)
    assert [one.iova for one in windows] == shuffled[-1:]


def test_written_pages_are_told_once() -> None:
    windows = with_windows(window(0x10000, 0x10000))
    windows.write(0x10000, b"before the log")
    windows.log_writes(0x1000)
    windows.write(0x10FFF, b"12")
    windows.write(0x15000, b"1")
    windows.read(0x17000, 1)
    assert list(windows.take_written(0x10000, 0x12000)) == [0x10000, 0x11000]
    assert list(windows.take_written(0x10000, 0x20000)) == [0x15000]
    assert list(windows.take_written(0x10000, 0x20000)) == []
    windows.write(0x16000, b"1")
    windows.stop_log()
    assert list(windows.take_written(0x10000, 0x20000)) == []


@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(1, 8), st.sampled_from([*DmaMapFlags, BOTH]))),
    st.lists(st.tuples(st.integers(0, 50), st.binary(max_size=12))),
)
def test_the_registry_equals_a_table_of_bytes(
    spans: list[tuple[int, int, DmaMapFlags]], writes: list[tuple[int, bytes]]
) -> None:
    windows = Windows()
    flags: dict[int, DmaMapFlags] = {}
    for iova, size, kind in spans:
        covered = range(iova, iova + size)
        try:
            windows.add(window(iova, size, kind))
            assert not flags.keys() & set(covered)
            flags.update(dict.fromkeys(covered, kind))
        except client.ClientError:
            assert flags.keys() & set(covered)
    content = dict.fromkeys(flags, 0)
    for address, data in writes:
        covered = range(address, address + len(data))
        try:
            windows.write(address, data)
        except WindowError:
            assert any(DmaMapFlags.WRITE not in flags.get(at, DmaMapFlags(0)) for at in covered)
        else:
            assert all(DmaMapFlags.WRITE in flags[at] for at in covered)
            content.update(zip(covered, data, strict=True))
    for at in range(60):
        if DmaMapFlags.READ in flags.get(at, DmaMapFlags(0)):
            assert windows.read(at, 1)[0] == content[at]
        else:
            refusal(windows, at, 1)
