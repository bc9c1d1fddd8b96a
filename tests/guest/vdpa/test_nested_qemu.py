"""QEMU itself as the user of vhost-vdpa: in a guest with a virtual IOMMU runs another QEMU, whose machine
boots from the network by the card and fetches a file for ever (iPXE, the ROM of its virtio card). Meanwhile
it is stopped, and moved to another process.

Cards are served by our own engine alone, see Limit.UNKNOWN_UNMAPS.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pytest
import trio

from device.profiles import N3000
from device.virtio.features import Feature
from device.virtio.transport import Status
from tests.conftest import cannot
from tests.guest import Network, RigError, Root
from tests.guest._qemu import qemu_tree
from tests.guest.cards import ServedCard, serve_cards
from tests.guest.vdpa._boot_server import BootServer, boot_server
from tests.guest.vdpa._nested import SCRIPT, Nested
from tests.guest.vdpa.parents import ADD, IFCVF, VDPA
from tests.guest.vdpa.story import Story

PATIENCE: Final = 400  # seconds for some forty on an idle machine

BOOT, FILE = "boot", "file"
FILES: Final = {
    BOOT: f"#!ipxe\n:again\nimgfetch --name it tftp://10.77.0.1/{FILE}\nimgfree it\ngoto again\n".encode(),
    FILE: bytes(range(256)) * 400,
}
BLOCKS: Final = len(FILES[FILE]) // 1432 // 4
"""A quarter of the file's, by iPXE's blocks of 1432 bytes: who waits for so many is in the middle of it."""

OWN_RINGS, SHADOW_RINGS = "x-svq=off", "x-svq=on"
MOVED: Final = "file:/tmp/moved"
RX, TX = 0, 1

DONE: Final[dict[str, Any]] = {"return": {}}

UNSHADOWED: Final = Feature.ORDER_PLATFORM | Feature.NET_GUEST_ANNOUNCE
"""What QEMU's shadow rings do not know: a device that offers it must be made without."""

NOT_SHADOWED: Final = "svq does not work with features"
"""QEMU's words for `UNSHADOWED`."""

SLOW: Final = "vectors, however only"
"""Of ifcvf, in a guest with fewer processors than it wants vectors."""

NO_RING_STATE: Final = "ring restore failed: -1: Operation not permitted"
"""QEMU's words for a parent that cannot suspend: it takes the used indices for where to go on."""


@dataclass(frozen=True, slots=True)
class Look:
    """How the card was."""

    status: int
    features: Feature
    queues: list[tuple[bool, int, int]]
    """Of RX and TX: whether enabled, last_avail, used index."""
    windows: int
    fetches: dict[str, int]
    """How often each file had been asked for; who is not answered in time asks again."""
    answers: list[dict[str, Any]] = field(default_factory=list)
    """Of the monitor, before this."""


class Nest(Story):
    """What was seen."""

    def __init__(self) -> None:
        super().__init__()
        self.looks: dict[str, Look] = {}
        self.said: dict[str, str] = {}
        """What the QEMUs in the guest printed."""


@dataclass(frozen=True, slots=True)
class Watch:
    """The machine in the machine, with what is at both ends of its network."""

    nest: Nest
    card: ServedCard
    server: BootServer
    qemu: Nested

    def look(self, name: str, *answers: dict[str, Any]) -> None:
        """Keep how things are now."""
        transport = self.card.nic.card.transport
        self.nest.looks[name] = Look(
            transport.status,
            Feature(transport.driver_features),
            [(queue.enabled, queue.last_avail, queue.used_index) for queue in transport.queues[:2]],
            len(self.card.nic.function.dma),
            dict(self.server.requests),
            list(answers),
        )

    async def start_shadowed(self) -> None:
        """It starts with shadow rings, on a device with nothing of `UNSHADOWED`."""
        features = self.card.nic.offered_features() & ~UNSHADOWED
        await self.qemu.shell(f"vdpa dev del {VDPA}; {ADD} device_features {features:#x}")
        await self.qemu.start(SHADOW_RINGS)

    async def boots(self) -> None:
        """It boots and fetches, and is in the middle of a file."""
        await self.server.fetched(BOOT)
        await self.server.fetched(FILE)
        await self.server.blocks(BLOCKS)

    async def pause(self) -> None:
        """It is stopped, and goes on where it was."""
        self.look("runs")
        stopped = await self.qemu.ask("stop")
        self.look("stopped", stopped)
        resumed = await self.qemu.ask("cont")
        await self.server.fetched(FILE)
        self.look("resumed", resumed)

    async def move(self) -> None:
        """It goes on in another process."""
        await self.server.blocks(BLOCKS)
        events = {"capabilities": [{"capability": "events", "state": True}]}
        answers = [
            await self.qemu.ask("migrate-set-capabilities", **events),
            await self.qemu.ask("migrate", uri=MOVED),
        ]
        await self.qemu.until("completed")
        self.look("left", *answers)
        self.nest.said["source"] = await self.qemu.end()
        await self.qemu.start(SHADOW_RINGS, "-incoming", MOVED)
        await self.server.fetched(FILE)
        self.look("arrived")
        self.nest.said["target"] = await self.qemu.end()
        self.look("ended")


async def _happens(watch: Watch) -> None:
    await watch.qemu.start(OWN_RINGS)
    await watch.boots()
    await watch.pause()
    watch.look("not moved", await watch.qemu.ask("migrate", uri=MOVED))
    watch.nest.said["own rings"] = await watch.qemu.end()
    watch.nest.said["refused"] = await watch.qemu.refused(SHADOW_RINGS)
    await watch.start_shadowed()
    await watch.boots()
    await watch.move()


async def _watch(root: Root, folder: Path) -> Nest:
    nest = Nest()
    script = f"{SCRIPT}modprobe vhost_vdpa\n{IFCVF.take()}\n{ADD}\nserve_host\nvdpa dev del {VDPA}\n"
    with Network() as network:
        async with (
            boot_server(network, FILES) as server,
            serve_cards(folder, [f"tap:name={network.tap},netns={network.path}"], profile=N3000) as (card,),
            nest.told(
                script,
                [card],
                root,
                memory="1G",
                iommu=True,
                trees=[qemu_tree(root)],
                deadline=PATIENCE,
                expected_complaints=[SLOW],
            ) as guest,
        ):
            qemu = Nested(guest)
            await _happens(Watch(nest, card, server, qemu))
            qemu.over()
    return nest


@pytest.fixture(scope="module")
def nest(guest_root: Root, tmp_path_factory: pytest.TempPathFactory) -> Nest:
    """All of it, once."""
    try:
        return trio.run(_watch, guest_root, tmp_path_factory.mktemp("nested"))
    except RigError as missing:
        cannot(str(missing))


def moved_on(earlier: Look, later: Look) -> bool:
    """Whether the card went on behind where it was, in both queues; indices wrap."""
    return all(
        0 < now[1] - before[1] & 0xFFFF < 0x8000
        for before, now in zip(earlier.queues, later.queues, strict=True)
    )


def test_a_machine_boots_from_the_network_by_vhost_vdpa(nest: Nest) -> None:
    runs = nest.looks["runs"]
    assert runs.status & Status.DRIVER_OK
    assert runs.features == Feature.VERSION_1 | Feature.ACCESS_PLATFORM
    assert [enabled for enabled, _, _ in runs.queues] == [True, True]
    assert runs.fetches[FILE] > 1


def test_a_machine_that_is_stopped_leaves_the_card_alone_and_goes_on_where_it_was(nest: Nest) -> None:
    """QEMU resets the card meanwhile. What the card goes on from is written after its queues are enabled."""
    stopped, resumed = nest.looks["stopped"], nest.looks["resumed"]
    assert stopped.answers == resumed.answers == [DONE]
    assert stopped.queues == [(False, 0, 0)] * 2
    assert moved_on(nest.looks["runs"], resumed)
    assert resumed.fetches[BOOT] == stopped.fetches[BOOT]
    assert resumed.fetches[FILE] > stopped.fetches[FILE]


def test_a_device_that_offers_what_shadow_rings_do_not_know_has_none_and_does_not_move(nest: Nest) -> None:
    """QEMU's, not the card's: a device is made without these features, and then has both."""
    assert NOT_SHADOWED in nest.said["refused"]
    assert NOT_SHADOWED in str(nest.looks["not moved"].answers)


def test_a_machine_with_shadow_rings_goes_on_in_another_process(nest: Nest) -> None:
    """In the middle of a file, without having booted."""
    left, arrived = nest.looks["left"], nest.looks["arrived"]
    assert left.answers == [DONE, DONE]
    assert left.fetches[BOOT] == arrived.fetches[BOOT]
    assert arrived.fetches[FILE] > left.fetches[FILE]
    assert [enabled for enabled, _, _ in arrived.queues] == [True, True]


def test_when_all_have_gone_nothing_is_left_in_the_card(nest: Nest) -> None:
    ended = nest.looks["ended"]
    assert ended.windows == 0
    assert [enabled for enabled, _, _ in ended.queues] == [False, False]


def test_neither_kernel_nor_qemu_complains(nest: Nest) -> None:
    """QEMU says of each stop that ifcvf cannot suspend: it asks the rings in its place."""
    assert nest.complaints == []
    assert nest.said["source"] == nest.said["target"] == ""
    said = nest.said["own rings"]
    assert NO_RING_STATE in said
    assert said.count("qemu-system") == said.count(NO_RING_STATE)
