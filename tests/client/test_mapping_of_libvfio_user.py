"""What switches memory decoding, at the real libvfio-user: its BAR 2 may be mapped, and it has FLR."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import NamedTuple

import pytest

import client
from client.decoding import COMMAND
from client.mapping import BarMapping, MappingState
from client.pci import CapabilityId, read_config
from protocol.vfio import RegionIndex
from tests.client.lvu_device import PCIE, PM, RESETS, lvu_device, session_with

MEMORY_ON, MEMORY_OFF = b"\2\0", b"\0\0"


@pytest.fixture(scope="module")
def command() -> str:
    """How to start the device; building it needs Debian's archive once."""
    return lvu_device()


def config(offset: int, data: bytes) -> Callable[[client.Session], Awaitable[object]]:
    """A write to configuration space."""
    return lambda session: session.region_write(RegionIndex.CONFIG, offset, data)


class Switch(NamedTuple):
    """What takes the BARs away, what brings them back, and how many resets that is."""

    off: Callable[[client.Session], Awaitable[object]]
    on: Callable[[client.Session], Awaitable[object]]
    resets: int


SWITCHES = {
    "COMMAND": Switch(config(COMMAND, MEMORY_OFF), config(COMMAND, MEMORY_ON), 0),
    "D3hot": Switch(config(PM + 4, b"\x0b\0"), config(PM + 4, b"\x08\0"), 0),
    "FLR": Switch(config(PCIE + 8, b"\0\x80"), config(COMMAND, MEMORY_ON), 1),
    "DEVICE_RESET": Switch(client.Session.reset, config(COMMAND, MEMORY_ON), 1),
}


@pytest.mark.parametrize("switch", SWITCHES.values(), ids=SWITCHES.keys())
async def test_a_mapping_is_zapped_and_comes_back_as_the_same_pages(
    command: str, tmp_path: Path, switch: Switch
) -> None:
    async with session_with(command, tmp_path / "lvu.sock") as session:
        read = await read_config(session)
        assert [entry.id for entry in read.capabilities] == [CapabilityId.PM, CapabilityId.PCIE]
        with (
            BarMapping(session.regions[RegionIndex.BAR2], session.decoding) as mapping,
            mapping.view(0, 8) as view,
            client.Bar(session, RegionIndex.BAR2) as bar,
        ):
            view[:] = content = os.urandom(8)
            resets = await session.region_read(RegionIndex.BAR0, RESETS, 4)
            await switch.off(session)
            assert bytes(view) == b"\xff" * 8
            assert mapping.state is MappingState.ZAPPED
            assert await bar.read(0, 8) == int.from_bytes(content, "little"), "by message"
            await switch.on(session)
            mapping.fault()
            assert bytes(view) == content
            after = await session.region_read(RegionIndex.BAR0, RESETS, 4)
            assert int.from_bytes(after, "little") - int.from_bytes(resets, "little") == switch.resets


async def test_what_libvfio_user_refuses_changes_nothing(command: str, tmp_path: Path) -> None:
    async with session_with(command, tmp_path / "lvu.sock") as session:
        with BarMapping(session.regions[RegionIndex.BAR2], session.decoding) as mapping:
            mapping.fault()
            with pytest.raises(client.ServerError, match="EINVAL"):
                await session.region_write(RegionIndex.CONFIG, PM + 4, b"\3")
            assert mapping.state is MappingState.FAULTABLE
            assert mapping.generation == 1, "it was away for as long as the question took"
