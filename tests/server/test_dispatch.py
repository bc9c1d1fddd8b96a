import errno
import mmap
import os
import struct
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
import trio

from device.function import ResetKind
from protocol import Command
from protocol.commands import SHAPES, Role
from server.dispatch import HANDLERS
from tests.descriptors import open_fds, settled_fds
from tests.server.raw import (
    BOOL,
    CONFIG,
    DMA_MAP,
    DMA_UNMAP,
    ERR,
    EVENTFD,
    GET_INFO,
    GET_IRQ_INFO,
    GET_REGION_INFO,
    INTX,
    MASK,
    MSI,
    MSIX,
    NONE,
    REGION_READ,
    REGION_WRITE,
    REQ,
    RESET,
    SET_IRQS,
    TRIGGER,
    UNMASK,
    RawClient,
    access,
    dma,
    irqs,
)
from tests.server.world import BAR2_SIZE, PAGE, VECTORS, World

ENTRY = 16  # bytes of an MSI-X table entry


def event(value: int = 0) -> int:
    return os.eventfd(value, os.EFD_NONBLOCK | os.EFD_CLOEXEC)


def fired(fd: int) -> int:
    """How often an eventfd was signalled since last asked."""
    try:
        return os.eventfd_read(fd)
    except BlockingIOError:
        return 0


def test_every_command_that_the_engine_lets_through_has_a_handler() -> None:
    requests = {shape.command for shape in SHAPES.values() if shape.sender is Role.CLIENT}
    assert set(HANDLERS) == requests - {Command.VERSION}


# --- information


async def test_device_info_tells_a_resettable_pci_device(client: RawClient) -> None:
    reply = await client.do(GET_INFO, struct.pack("=IIII", 16, 0, 0, 0))
    assert reply.unpack("IIII") == (16, 0b11, 9, 5)


async def test_regions_are_told_as_the_device_has_them(client: RawClient) -> None:
    sizes = []
    for index in range(9):
        reply = await client.do(GET_REGION_INFO, struct.pack("=IIIIQQ", 32, 0, index, 0, 0, 0))
        argsz, flags, told_index, cap_offset, size, offset = reply.unpack("IIIIQQ")
        assert (argsz, told_index, cap_offset, offset) == (32, index, 0, 0)
        assert bool(flags & 4) == bool(reply.fds) == (index == 2)
        sizes.append((size, flags & 3))
        reply.close()
    assert sizes == [
        *((PAGE, 3), (0, 0), (BAR2_SIZE, 3), (0, 0), (0, 0), (0, 0)),
        *((0, 0), (4096, 3), (0, 0)),
    ]


async def test_a_mappable_region_is_memory_shared_with_the_card(served: World, client: RawClient) -> None:
    reply = await client.do(GET_REGION_INFO, struct.pack("=IIIIQQ", 32, 0, 2, 0, 0, 0))
    with mmap.mmap(reply.fds[0], BAR2_SIZE) as mapped:
        mapped[4:8] = b"ours"
        assert await client.read(2, 4, 4) == b"ours"
        await client.write(2, 4, b"back")
        assert mapped[4:8] == b"back"
    reply.close()


async def test_a_client_that_takes_no_descriptors_is_offered_no_mapping(served: World) -> None:
    client = await served.connect()
    await client.negotiate({"max_msg_fds": 0})
    reply = await client.do(GET_REGION_INFO, struct.pack("=IIIIQQ", 32, 0, 2, 0, 0, 0))
    assert reply.fds == []
    assert reply.unpack("IIIIQQ") == (32, 0b011, 2, 0, BAR2_SIZE, 0)


@pytest.fixture
async def sparse(served: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """BAR 2 may be mapped from its second page on only."""
    regions = list(served.function.regions())
    regions[2] = replace(regions[2], mmap_areas=((PAGE, PAGE),))
    monkeypatch.setattr(served.function, "regions", lambda: regions)


async def test_a_region_mappable_in_part_lists_its_areas(client: RawClient, sparse: None) -> None:
    reply = await client.do(GET_REGION_INFO, struct.pack("=IIIIQQ", 4096, 0, 2, 0, 0, 0))
    assert reply.unpack("IIIIQQ") == (64, 0b1111, 2, 32, BAR2_SIZE, 0)
    assert struct.unpack_from("=HHIIIQQ", reply.payload, 32) == (1, 1, 0, 1, 0, PAGE, PAGE)
    assert len(reply.payload) == 64
    assert len(reply.fds) == 1
    reply.close()


async def test_a_client_with_too_little_room_is_told_how_much_it_takes(
    client: RawClient, sparse: None
) -> None:
    reply = await client.do(GET_REGION_INFO, struct.pack("=IIIIQQ", 63, 0, 2, 0, 0, 0))
    argsz, flags, _, cap_offset, size, _ = reply.unpack("IIIIQQ")
    assert (argsz, cap_offset, size) == (64, 0, BAR2_SIZE)
    assert len(reply.payload) == 32
    assert flags & 4
    reply.close()


async def test_interrupts_are_told_as_the_device_has_them(client: RawClient) -> None:
    told = []
    for index in range(5):
        reply = await client.do(GET_IRQ_INFO, struct.pack("=IIII", 16, 0, index, 0))
        argsz, flags, told_index, count = reply.unpack("IIII")
        assert (argsz, told_index) == (16, index)
        told.append((flags, count))
    assert told == [(0b0111, 1), (0b1011, 1), (0b0011, VECTORS), (0b1001, 1), (0b1001, 1)]


@pytest.mark.parametrize(
    ("command", "payload"),
    [
        (GET_INFO, struct.pack("=IIII", 15, 0, 0, 0)),
        (GET_REGION_INFO, struct.pack("=IIIIQQ", 31, 0, 0, 0, 0, 0)),
        (GET_REGION_INFO, struct.pack("=IIIIQQ", 32, 0, 9, 0, 0, 0)),
        (GET_REGION_INFO, struct.pack("=IIIIQQ", 32, 0, 0xFFFFFFFF, 0, 0, 0)),
        (GET_IRQ_INFO, struct.pack("=IIII", 15, 0, 0, 0)),
        (GET_IRQ_INFO, struct.pack("=IIII", 16, 0, 5, 0)),
    ],
)
async def test_information_that_does_not_exist_or_fit_is_refused(
    client: RawClient, command: int, payload: bytes
) -> None:
    assert await client.refused(command, payload) == errno.EINVAL


# --- regions


async def test_registers_are_read_and_written(served: World, client: RawClient) -> None:
    assert await client.read(0, 8, 4) == struct.pack("<I", 0x12345678 + 8)
    await client.write(0, 4, b"\x01\x02")
    await client.write(0, 8, b"\x03\x00\x00\x00")
    assert served.card.registers.written == [(4, 2, 0x0201), (8, 4, 3)]


@pytest.mark.parametrize("count", [1, 2, 4, 8, 63, 64, 65, 1000, 4096])
async def test_an_access_of_any_length_gives_what_the_device_has(
    served: World, client: RawClient, count: int
) -> None:
    data = os.urandom(count)
    await client.write(2, 16, data)
    assert await client.read(2, 16, count) == data == served.card.memory.load(16, count)


async def test_config_space_is_region_seven(client: RawClient) -> None:
    assert await client.read(CONFIG, 0, 4) == struct.pack("<HH", 0x1AF4, 0x1041)


@pytest.mark.parametrize("command", [REGION_READ, REGION_WRITE])
@pytest.mark.parametrize(
    ("region", "offset", "count"),
    [
        *((9, 0, 4), (0xFFFFFFFF, 0, 4), (1, 0, 4)),
        *((0, PAGE, 4), (0, PAGE - 2, 4), (2, BAR2_SIZE - 64, 65)),
        *((0, (1 << 64) - 4, 4), (0, (1 << 64) - 2, 4), (0, 1 << 63, 8)),
    ],
)
async def test_an_access_outside_of_a_region_is_refused(
    client: RawClient, command: int, region: int, offset: int, count: int
) -> None:
    data = bytes(count) if command == REGION_WRITE else b""
    assert await client.refused(command, access(offset, region, count) + data) == errno.EINVAL


async def test_more_data_than_was_agreed_on_is_refused(client: RawClient) -> None:
    assert await client.refused(REGION_READ, access(0, 2, (1 << 20) + 1)) == errno.EINVAL


async def test_a_write_with_less_data_than_it_says_is_refused(client: RawClient) -> None:
    assert await client.refused(REGION_WRITE, access(0, 2, 8) + bytes(4)) == errno.EINVAL
    assert await client.refused(REGION_WRITE, access(0, 2, 4) + bytes(8)) == errno.EINVAL


# --- DMA


async def test_a_dma_window_reaches_the_memory_behind_its_descriptor(
    served: World, client: RawClient
) -> None:
    fd = os.memfd_create("guest")
    os.truncate(fd, 3 * PAGE)
    reply = await client.do(DMA_MAP, dma(0x10000, PAGE, offset=PAGE), [fd])
    assert reply.payload == b""
    served.function.dma.write(0x10010, b"from the card")
    assert os.pread(fd, 13, PAGE + 0x10) == b"from the card"
    os.close(fd)


async def test_a_window_without_a_descriptor_is_taken(served: World, client: RawClient) -> None:
    await client.do(DMA_MAP, dma(0x10000, PAGE))
    assert len(served.function.dma) == 1


async def test_a_window_over_another_is_refused(served: World, client: RawClient) -> None:
    await client.do(DMA_MAP, dma(0, 2 * PAGE))
    assert await client.refused(DMA_MAP, dma(PAGE, PAGE)) == errno.EEXIST
    assert len(served.function.dma) == 1


async def test_an_unmapped_window_is_gone_and_the_reply_repeats_it(served: World, client: RawClient) -> None:
    await client.do(DMA_MAP, dma(0x10000, PAGE))
    unmap = struct.pack("=IIQQ", 24, 0, 0x10000, PAGE)
    assert (await client.do(DMA_UNMAP, unmap)).payload == unmap
    assert len(served.function.dma) == 0


async def test_an_unmap_of_nothing_succeeds(client: RawClient) -> None:
    # QEMU with a virtual IOMMU unmaps large spans that were never mapped
    await client.do(DMA_UNMAP, struct.pack("=IIQQ", 24, 0, 0, 0x800000000000))


async def test_everything_is_unmapped_at_once(served: World, client: RawClient) -> None:
    for number in range(3):
        await client.do(DMA_MAP, dma(number * PAGE * 2, PAGE))
    await client.do(DMA_UNMAP, struct.pack("=IIQQ", 24, 2, 0, 0))
    assert len(served.function.dma) == 0


@pytest.mark.parametrize(
    ("command", "payload", "expected"),
    [
        (DMA_MAP, dma(0, 0), errno.EINVAL),
        (DMA_MAP, dma((1 << 64) - PAGE, 2 * PAGE), errno.EINVAL),
        (DMA_MAP, dma(1, PAGE), errno.EINVAL),
        (DMA_MAP, dma(0, PAGE, flags=0), errno.EINVAL),
        (DMA_MAP, dma(0, PAGE, flags=0b100 | 3), errno.EINVAL),
        (DMA_MAP, dma(0, PAGE, flags=0b1000 | 3), errno.EINVAL),
        (DMA_UNMAP, struct.pack("=IIQQ", 24, 1, 0, PAGE), errno.EINVAL),
        (DMA_UNMAP, struct.pack("=IIQQ", 24, 2, 0, PAGE), errno.EINVAL),
        (DMA_UNMAP, struct.pack("=IIQQ", 24, 4, 0, PAGE), errno.EOPNOTSUPP),
        (DMA_UNMAP, struct.pack("=IIQQ", 23, 0, 0, PAGE), errno.EINVAL),
    ],
)
async def test_a_window_that_makes_no_sense_is_refused(
    served: World, client: RawClient, command: int, payload: bytes, expected: int
) -> None:
    assert await client.refused(command, payload) == expected
    assert len(served.function.dma) == 0


async def test_a_descriptor_too_small_or_of_no_memory_is_refused(client: RawClient) -> None:
    fd = os.memfd_create("small")
    assert await client.refused(DMA_MAP, dma(0, PAGE), [fd]) == errno.EINVAL
    os.close(fd)
    read_end, write_end = os.pipe()
    assert await client.refused(DMA_MAP, dma(0, PAGE), [read_end]) in (
        errno.ENODEV,
        errno.EACCES,
        errno.EINVAL,
    )
    os.close(read_end)
    os.close(write_end)


async def test_a_client_maps_as_many_windows_as_it_said(served: World) -> None:
    client = await served.connect()
    await client.negotiate({"max_msg_fds": 8, "max_dma_maps": 2})
    await client.do(DMA_MAP, dma(0, PAGE))
    await client.do(DMA_MAP, dma(PAGE, PAGE))
    assert await client.refused(DMA_MAP, dma(2 * PAGE, PAGE)) == errno.ENOSPC
    await client.do(DMA_UNMAP, struct.pack("=IIQQ", 24, 0, 0, PAGE))
    await client.do(DMA_MAP, dma(2 * PAGE, PAGE))


async def test_two_descriptors_for_one_window_are_refused(client: RawClient) -> None:
    fd = os.memfd_create("guest")
    os.truncate(fd, PAGE)
    assert await client.refused(DMA_MAP, dma(0, PAGE), [fd, fd]) == errno.EINVAL
    os.close(fd)


# --- interrupts


@pytest.fixture
async def vectors(served: World) -> AsyncIterator[list[int]]:
    """An eventfd for each vector."""
    fds = [event() for _ in range(VECTORS)]
    yield fds
    for fd in fds:
        os.close(fd)


async def test_vectors_are_wired_and_signalled(served: World, client: RawClient, vectors: list[int]) -> None:
    await client.do(SET_IRQS, irqs(EVENTFD | TRIGGER, MSIX, 0, VECTORS), vectors)
    served.function.interrupts.signal(2)
    assert [fired(fd) for fd in vectors] == [0, 0, 1, 0]


async def test_vectors_are_tested_by_the_client(client: RawClient, vectors: list[int]) -> None:
    await client.do(SET_IRQS, irqs(EVENTFD | TRIGGER, MSIX, 0, VECTORS), vectors)
    await client.do(SET_IRQS, irqs(NONE | TRIGGER, MSIX, 1, 2))
    assert [fired(fd) for fd in vectors] == [0, 1, 1, 0]
    await client.do(SET_IRQS, irqs(BOOL | TRIGGER, MSIX, 0, VECTORS, b"\x01\x00\x00\xff"))
    assert [fired(fd) for fd in vectors] == [1, 0, 0, 1]


async def test_a_masked_vector_waits(served: World, client: RawClient, vectors: list[int]) -> None:
    await client.do(SET_IRQS, irqs(EVENTFD | TRIGGER, MSIX, 0, VECTORS), vectors)
    await client.do(SET_IRQS, irqs(NONE | MASK, MSIX, 0, 2))
    await client.do(SET_IRQS, irqs(BOOL | UNMASK, MSIX, 0, 2, b"\x00\x01"))
    served.function.interrupts.signal(0)
    served.function.interrupts.signal(1)
    assert [fired(fd) for fd in vectors] == [0, 1, 0, 0]
    await client.do(SET_IRQS, irqs(NONE | UNMASK, MSIX, 0, 1))
    assert fired(vectors[0]) == 1


async def test_vectors_without_descriptors_are_taken_away(
    served: World, client: RawClient, vectors: list[int]
) -> None:
    await client.do(SET_IRQS, irqs(EVENTFD | TRIGGER, MSIX, 0, VECTORS), vectors)
    await client.do(SET_IRQS, irqs(EVENTFD | TRIGGER, MSIX, 1, 1))
    for vector in range(VECTORS):
        served.function.interrupts.signal(vector)
    assert [fired(fd) for fd in vectors] == [1, 0, 1, 1]


async def test_an_index_is_disabled(served: World, client: RawClient, vectors: list[int]) -> None:
    await client.do(SET_IRQS, irqs(EVENTFD | TRIGGER, MSIX, 0, VECTORS), vectors)
    await client.do(SET_IRQS, irqs(NONE | TRIGGER, MSIX, 0, 0))
    assert served.function.interrupts.active is None
    await client.do(SET_IRQS, irqs(EVENTFD | TRIGGER, MSI, 0, 1), vectors[:1])
    served.function.interrupts.signal(0)
    assert fired(vectors[0]) == 1


@pytest.mark.parametrize("index", [ERR, REQ])
async def test_error_and_release_have_a_descriptor_of_their_own(
    served: World, client: RawClient, index: int
) -> None:
    fd = event()
    await client.do(SET_IRQS, irqs(EVENTFD | TRIGGER, index, 0, 1), [fd])
    assert (served.function.report_error(), served.function.request_release()) == (index == ERR, index == REQ)
    assert fired(fd) == 1
    os.close(fd)


@pytest.mark.parametrize(
    ("payload", "expected"),
    [
        (irqs(EVENTFD | TRIGGER, 5, 0, 1), errno.EINVAL),
        (irqs(EVENTFD | TRIGGER, MSIX, VECTORS, 1), errno.EINVAL),
        (irqs(EVENTFD | TRIGGER, MSIX, 0xFFFFFFFF, 1), errno.EINVAL),
        (irqs(EVENTFD | TRIGGER, MSIX, 0, 0), errno.EINVAL),
        (irqs(NONE | TRIGGER, MSIX, 1, 0), errno.EINVAL),
        (irqs(NONE | MASK, MSIX, 0, 0), errno.EINVAL),
        (irqs(BOOL | TRIGGER, MSIX, 0, 0), errno.EINVAL),
        (irqs(BOOL | TRIGGER, MSIX, 0, 2, b"\x01"), errno.EINVAL),
        (irqs(NONE | TRIGGER, 5, 0, 0), errno.EINVAL),
        (irqs(NONE, MSIX, 0, 1), errno.EINVAL),
        (irqs(TRIGGER, MSIX, 0, 1), errno.EINVAL),
        (irqs(NONE | BOOL | TRIGGER, MSIX, 0, 1, b"\x01"), errno.EINVAL),
        (irqs(NONE | MASK | TRIGGER, MSIX, 0, 1), errno.EINVAL),
        (irqs(64 | NONE | TRIGGER, MSIX, 0, 1), errno.EINVAL),
        (irqs(EVENTFD | MASK, INTX, 0, 1), errno.ENOTTY),
        (irqs(EVENTFD | UNMASK, INTX, 1, 1), errno.EINVAL),
        (irqs(EVENTFD | UNMASK, INTX, 0, 2), errno.EINVAL),
        (irqs(NONE | UNMASK, INTX, 0, 2), errno.EINVAL),
        (irqs(NONE | MASK, REQ, 0, 1), errno.ENOTTY),
    ],
)
async def test_interrupts_that_make_no_sense_are_refused(
    client: RawClient, payload: bytes, expected: int
) -> None:
    assert await client.refused(SET_IRQS, payload) == expected


async def test_a_wrong_number_of_descriptors_is_refused(client: RawClient, vectors: list[int]) -> None:
    assert await client.refused(SET_IRQS, irqs(EVENTFD | TRIGGER, MSIX, 0, 3), vectors[:2]) == errno.EINVAL
    assert await client.refused(SET_IRQS, irqs(NONE | TRIGGER, MSIX, 0, 1), vectors[:1]) == errno.EINVAL


async def test_what_is_no_eventfd_is_refused(client: RawClient) -> None:
    fd = os.memfd_create("no eventfd")
    assert await client.refused(SET_IRQS, irqs(EVENTFD | TRIGGER, MSIX, 0, 1), [fd]) == errno.EINVAL
    os.close(fd)


async def test_intx_stays_quiet_until_the_client_unmasks_it(served: World, client: RawClient) -> None:
    fd = event()
    await client.do(SET_IRQS, irqs(EVENTFD | TRIGGER, INTX, 0, 1), [fd])
    served.function.interrupts.intx(True)
    served.function.interrupts.intx(True)
    assert fired(fd) == 1
    await client.do(SET_IRQS, irqs(NONE | UNMASK, INTX, 0, 1))
    assert fired(fd) == 1, "still asserted: it comes again"
    served.function.interrupts.intx(False)
    await client.do(SET_IRQS, irqs(NONE | UNMASK, INTX, 0, 1))
    assert fired(fd) == 0
    os.close(fd)


async def test_intx_is_unmasked_by_an_eventfd(served: World, client: RawClient) -> None:
    trigger, resample = event(), event()
    await client.do(SET_IRQS, irqs(EVENTFD | TRIGGER, INTX, 0, 1), [trigger])
    await client.do(SET_IRQS, irqs(EVENTFD | UNMASK, INTX, 0, 1), [resample])
    served.function.interrupts.intx(True)
    assert fired(trigger) == 1
    os.eventfd_write(resample, 1)
    await trio.testing.wait_all_tasks_blocked()
    assert fired(trigger) == 1, "still asserted: it comes again"
    assert fired(resample) == 0, "the device took the event"
    served.function.interrupts.intx(False)
    os.eventfd_write(resample, 1)
    await trio.testing.wait_all_tasks_blocked()
    assert fired(trigger) == 0
    os.close(trigger)
    os.close(resample)


async def test_the_eventfd_that_unmasks_may_be_replaced_and_taken_away(
    served: World, client: RawClient
) -> None:
    trigger, first, second = event(), event(), event()
    await client.do(SET_IRQS, irqs(EVENTFD | TRIGGER, INTX, 0, 1), [trigger])
    before = len(settled_fds())
    await client.do(SET_IRQS, irqs(EVENTFD | UNMASK, INTX, 0, 1), [first])
    await client.do(SET_IRQS, irqs(EVENTFD | UNMASK, INTX, 0, 1), [second])
    served.function.interrupts.intx(True)
    os.eventfd_write(first, 1)
    await trio.testing.wait_all_tasks_blocked()
    assert (fired(trigger), fired(first)) == (1, 1), "nobody listens to the first any more"
    os.eventfd_write(second, 1)
    await trio.testing.wait_all_tasks_blocked()
    assert (fired(trigger), fired(second)) == (1, 0)
    await client.do(SET_IRQS, irqs(EVENTFD | UNMASK, INTX, 0, 1))
    os.eventfd_write(second, 1)
    await trio.testing.wait_all_tasks_blocked()
    assert (fired(trigger), fired(second)) == (0, 1)
    assert len(open_fds()) == before
    for fd in (trigger, first, second):
        os.close(fd)


async def test_disabling_intx_ends_the_watch(served: World, client: RawClient) -> None:
    trigger, resample = event(), event()
    before = len(settled_fds())
    await client.do(SET_IRQS, irqs(EVENTFD | TRIGGER, INTX, 0, 1), [trigger])
    await client.do(SET_IRQS, irqs(EVENTFD | UNMASK, INTX, 0, 1), [resample])
    await client.do(SET_IRQS, irqs(NONE | TRIGGER, INTX, 0, 0))
    await trio.testing.wait_all_tasks_blocked()
    assert len(open_fds()) == before
    os.close(trigger)
    os.close(resample)


# --- the rest


async def test_a_reset_reaches_the_device_and_keeps_the_session(served: World, client: RawClient) -> None:
    await client.do(DMA_MAP, dma(0, PAGE))
    assert (await client.do(RESET)).payload == b""
    assert served.card.resets == [ResetKind.DEVICE]
    assert len(served.function.dma) == 1


@pytest.mark.parametrize("command", [0, 1, 11, 12, 14, 19, 0xFFFF])
async def test_a_command_that_is_none_is_refused(client: RawClient, command: int) -> None:
    assert await client.refused(command, bytes(32)) == errno.EINVAL
