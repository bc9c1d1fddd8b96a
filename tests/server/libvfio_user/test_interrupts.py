"""The bridge alone, with a client whose eventfds are a set of numbers."""

import errno
import os
from collections.abc import Iterator

import pytest
import trio
import trio.testing

from device.function import PciFunction
from device.pci import Bar, Identity
from device.pci.capabilities import Msi, Msix
from server.libvfio_user._interrupts import Bridge
from server.libvfio_user._told import Told
from server.libvfio_user.library import LibraryError
from tests.descriptors import open_fds, settled_fds

VECTORS = 4


class Client:
    """What the library knows of a client."""

    def __init__(self) -> None:
        self.wired = set(range(VECTORS))
        self.heard: list[int] = []
        self.fails = 0

    def trigger(self, number: int) -> None:
        if self.fails:
            raise LibraryError("broken", self.fails)
        if number not in self.wired:
            raise LibraryError("nobody", errno.ENOENT)
        self.heard.append(number)


@pytest.fixture
def function() -> Iterator[PciFunction]:
    made = PciFunction(
        "card",
        Identity(0x1AF4, 0x1041, 0, 0),
        bars=[Bar(0, 4096)],
        capabilities=[Msi(VECTORS), Msix(VECTORS, table_bar=0, pba_offset=2048)],
    )
    yield made
    made.close()


@pytest.fixture
def hearing() -> Client:
    return Client()


@pytest.fixture
async def bridge(function: PciFunction, hearing: Client, nursery: trio.Nursery) -> Bridge:
    made = Bridge(function, hearing.trigger, Told("card", 10))
    made.follow()
    nursery.start_soon(made.run)
    return made


def choose(function: PciFunction, *, msi: bool = False, msix: bool = False) -> None:
    function.interrupts.configure_msi(enabled=msi, mask=0)
    function.interrupts.configure_msix(enabled=msix, function_mask=False)


async def test_the_kind_follows_configuration_space(
    function: PciFunction, bridge: Bridge, hearing: Client
) -> None:
    for options, heard in (({}, [0]), ({"msi": True}, [2]), ({"msix": True}, [2]), ({}, [0])):
        choose(function, **options)
        bridge.follow()
        function.interrupts.signal(2)
        await trio.testing.wait_all_tasks_blocked()
        function.interrupts.intx(False)
        assert hearing.heard == heard
        hearing.heard.clear()
        function.irq_unmask(0, 0, [True]) if not options else None


async def test_msi_falls_back_to_the_first_vector(
    function: PciFunction, bridge: Bridge, hearing: Client
) -> None:
    choose(function, msi=True)
    bridge.follow()
    hearing.wired = {0}
    function.interrupts.signal(3)
    await trio.testing.wait_all_tasks_blocked()
    assert hearing.heard == [0]


async def test_what_nobody_hears_is_tried_again_once(
    function: PciFunction, bridge: Bridge, hearing: Client
) -> None:
    choose(function, msix=True)
    bridge.follow()
    hearing.wired = set()
    for number in (3, 1, 3):
        function.interrupts.signal(number)
    await trio.testing.wait_all_tasks_blocked()
    bridge.follow()
    assert hearing.heard == []
    hearing.wired = {1, 3}
    bridge.follow()
    bridge.follow()
    assert hearing.heard == [1, 3]


async def test_what_waits_is_forgotten_with_its_kind(
    function: PciFunction, bridge: Bridge, hearing: Client
) -> None:
    choose(function, msix=True)
    bridge.follow()
    hearing.wired = set()
    function.interrupts.signal(0)
    await trio.testing.wait_all_tasks_blocked()
    choose(function)
    bridge.follow()
    hearing.wired = {0}
    bridge.follow()
    assert hearing.heard == []


async def test_an_eventfd_that_cannot_be_written_ends_nothing(
    function: PciFunction, bridge: Bridge, hearing: Client, caplog: pytest.LogCaptureFixture
) -> None:
    choose(function, msix=True)
    bridge.follow()
    hearing.fails = errno.EBADF
    function.interrupts.signal(0)
    await trio.testing.wait_all_tasks_blocked()
    assert "interrupt 0 does not reach the client: broken" in caplog.text
    hearing.fails = 0
    function.interrupts.signal(1)
    await trio.testing.wait_all_tasks_blocked()
    assert hearing.heard == [1]


def test_closing_leaves_no_descriptor(function: PciFunction, hearing: Client) -> None:
    before = settled_fds()
    bridge = Bridge(function, hearing.trigger, Told("card", 10))
    bridge.follow()
    function.interrupts.unwire_all()
    bridge.close()
    assert open_fds() == before


def test_a_function_without_interrupts_has_nothing_to_bridge(hearing: Client) -> None:
    function = PciFunction("bare", Identity(0x1AF4, 0x1041, 0, 0), interrupt_pin=0)
    bridge = Bridge(function, hearing.trigger, Told("bare", 10))
    bridge.follow()
    assert function.interrupts.active is None
    bridge.close()
    function.close()


def test_the_card_is_wired_by_copies(function: PciFunction, hearing: Client) -> None:
    bridge = Bridge(function, hearing.trigger, Told("card", 10))
    bridge.follow()
    bridge.close()
    fd = function.interrupts.line.fd
    assert fd is not None
    os.eventfd_write(fd, 1)  # still open
