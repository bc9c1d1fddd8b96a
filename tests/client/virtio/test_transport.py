from __future__ import annotations

import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio

from client.errors import DeviceError
from client.pci import ConfigSpace
from client.virtio.features import Feature
from client.virtio.transport import NO_VECTOR, Status, VirtioPci, plan_vectors
from tests.client.virtio.fake_nic import FakeNic, config_space, session_with_nic


@asynccontextmanager
async def transport_of(nic: FakeNic) -> AsyncIterator[VirtioPci]:
    with trio.fail_after(10):
        async with session_with_nic(nic) as session:
            with VirtioPci(session, ConfigSpace(bytes(nic.config))) as transport:
                yield transport


@pytest.mark.parametrize(
    ("available", "queues", "plan"),
    [
        (4, 3, (0, [1, 2, 3])),
        (9, 3, (0, [1, 2, 3])),
        (3, 3, (0, [1, 1, 1])),
        (2, 2, (0, [1, 1])),
        (1, 3, (0, [0, 0, 0])),
    ],
)
def test_vectors_are_shared_only_if_there_are_too_few(
    available: int, queues: int, plan: tuple[int, list[int]]
) -> None:
    assert plan_vectors(available, queues) == plan


def broken(at: int, layout: str, *values: int) -> FakeNic:
    nic = FakeNic()
    struct.pack_into(layout, nic.config, at, *values)
    return nic


@pytest.mark.parametrize(
    ("nic", "reason"),
    [
        (broken(0x43, "<B", 9), "no virtio structure COMMON"),
        (broken(0x73, "<B", 9), "no virtio structure NOTIFY"),
        (broken(0x44, "<B", 3), "of BAR 3, 0x0 long"),
        (broken(0x44, "<B", 7), "of BAR 7"),
        (broken(0x4C, "<I", 0x37), "COMMON is at"),
        (broken(0x48, "<I", 0x3FC9), "COMMON is at"),
        (broken(0x48, "<I", 0xFFFF_FFFF), "COMMON is at"),
        (broken(0x7C, "<I", 0xFFFF_FFFF), "NOTIFY is at"),
        (broken(0x42, "<B", 15), "cut short"),
    ],
)
async def test_structures_that_are_missing_or_misplaced_are_refused(nic: FakeNic, reason: str) -> None:
    with pytest.raises(DeviceError, match=reason):
        async with transport_of(nic):
            pass


async def test_the_first_structure_of_a_kind_wins() -> None:
    nic = FakeNic()
    raw = config_space()
    raw[0x83] = 0x90  # a second COMMON after the notify structure
    raw[0x85] = 0
    struct.pack_into("<BBBBBBHII", raw, 0x90, 9, 0, 16, 1, 0, 0, 0, 0x1000, 0x38)
    raw[0x71] = 0x90
    nic.config = raw
    async with transport_of(nic) as transport:
        assert transport.structures[1].offset == 0


async def test_features_beyond_32_bits_are_seen_and_accepted() -> None:
    nic = FakeNic()
    async with transport_of(nic) as transport:
        await transport.reset()
        offered = await transport.offered_features()
        assert Feature.VERSION_1 in offered
        assert int(offered) == nic.offered_features
        await transport.add_status(Status.ACKNOWLEDGE)
        await transport.add_status(Status.DRIVER)
        await transport.accept_features(Feature.VERSION_1 | Feature.MAC)
        assert nic.features == 1 << 32 | 1 << 5


async def test_features_that_the_device_does_not_accept_are_an_error() -> None:
    async with transport_of(FakeNic()) as transport:
        with pytest.raises(DeviceError, match="does not accept"):
            await transport.accept_features(Feature.MAC)


async def test_a_reset_waits_until_the_device_is_reset() -> None:
    nic = FakeNic()
    slow = iter([15, 15, 0])
    plain = nic.read

    def read(region: int, offset: int, count: int) -> bytes:
        return bytes([next(slow)]) if (region, offset) == (0, 0x14) else plain(region, offset, count)

    nic.read = read  # type: ignore[method-assign]
    async with transport_of(nic) as transport:
        await transport.reset()
    assert next(slow, None) is None


async def test_a_doorbell_outside_its_structure_is_refused() -> None:
    nic = FakeNic()
    struct.pack_into("<I", nic.config, 0x80, 0x1000)
    async with transport_of(nic) as transport:
        await transport.doorbell(0)
        with pytest.raises(DeviceError, match="doorbell of queue 1"):
            await transport.doorbell(1)


async def test_a_configuration_that_never_stands_still_is_an_error() -> None:
    nic = FakeNic()
    nic.generation_changes = 1000
    async with transport_of(nic) as transport:
        with pytest.raises(DeviceError, match="never stops"):
            await transport.device_config(12)


async def test_no_vector_is_accepted_as_such() -> None:
    nic = FakeNic()
    async with transport_of(nic) as transport:
        await transport.set_config_vector(NO_VECTOR)
        await transport.set_config_vector(2)
        nic.refuse_vectors = True
        with pytest.raises(DeviceError, match="refuses vector 1"):
            await transport.set_config_vector(1)
