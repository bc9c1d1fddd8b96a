"""Drivers that lie in their rings, and change them while the card looks: the queue may break, no more."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from device.function import ResetKind
from firmware import Nic
from firmware.ports import open_port
from fuzz._choices import Choices
from fuzz._driver import doorbell, furnish, life, scribble
from fuzz._rings import Rings
from fuzz._zoo import MEMORY_PAGES, Zoo
from tests.firmware.driver import driver_of

PAGE = 4096


@pytest.fixture(scope="module")
def rings() -> Iterator[Rings]:
    made = Rings()
    yield made
    made.close()


@settings(max_examples=300)
@given(st.binary(max_size=600))
def test_after_any_driver_the_next_ones_frame_passes(rings: Rings, data: bytes) -> None:
    rings.run(data)


async def served(nic: Nic) -> None:
    """The worker has looked into the rings, and sleeps or is about to."""
    before = nic.datapath.counters()["sleeps"]
    nic.datapath.wake()
    with trio.fail_after(30):
        while nic.datapath.counters()["sleeps"] == before:
            await trio.lowlevel.checkpoint()


@pytest.mark.parametrize("seed", range(4))
async def test_rings_that_change_under_a_running_worker_do_no_more_than_break_their_queue(seed: int) -> None:
    choices = Choices(random.Random(seed).randbytes(1 << 16))
    zoo = Zoo()
    nic = Nic(open_port("loopback"), mac=b"\x02\0\0\0\0\1", bar2_size=PAGE)

    def write(offset: int, width: int, value: int) -> None:
        nic.function.region_write(0, offset, value.to_bytes(width, "little"))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(nic.run)
        while choices.left:
            nic.function.reset(ResetKind.LOST_CLIENT)
            with nic.function.gate:
                nic.function.dma.map(0, MEMORY_PAGES * PAGE, 3, zoo.kinds["memory"], 0)
            furnish(zoo.guest)
            nic.function.region_write(7, 4, b"\x06\0")
            for one in life(Choices(b""), int(nic.offered_features())):
                write(*one)
            for number in range(12):
                write(*doorbell(scribble(choices, zoo.guest)))
                if number % 4 == 0:
                    await served(nic)
        nursery.cancel_scope.cancel()
    counted = nic.datapath.counters()
    assert counted["tx_frames"]
    assert counted["rx_frames"]
    assert counted["sleeps"]  # it was the worker that served them
    nic.function.reset(ResetKind.LOST_CLIENT)
    with driver_of(nic) as driver:  # which closes the card
        driver.start()
        driver.send(b"\xff" * 6 + bytes(54))
        driver.settle()
        assert driver.received() == [b"\xff" * 6 + bytes(54)]
    zoo.close()
