"""DPDK's virtio driver (drivers/net/virtio) in a guest's user space: testpmd, with each personality of the
card, and a program that sleeps until it is interrupted, on vfio-pci behind a virtual IOMMU. They run once for
all sentences here.

The cards are served by our own engine alone: libvfio-user refuses the unmaps of such a QEMU
(Limit.UNKNOWN_UNMAPS).
"""

from __future__ import annotations

import struct
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import pytest
import trio

from device.profiles import PROFILES
from tests.guest import Guest, Root, boot
from tests.guest._dpdk import loading
from tests.guest.cards import MAC, ServedCard, serve_cards
from tests.guest.dpdk.testpmd import PREPARED, STEERED, Testpmd, shown
from tests.guest.dpdk.wire import Wire
from tests.guest.seen import kept_warnings
from tests.guest.vdpa.kernel_log import KERNEL_ARGS, complaints

NAMES: Final = list(PROFILES)
JUMBO: Final = 9000  # the second card's MTU, in bytes
OWN: Final = bytes.fromhex((MAC % 0).replace(":", ""))  # each card's, to begin with
OURS: Final = bytes.fromhex("020000000001")
STRANGER: Final = bytes.fromhex("525400000042")
ADDED: Final = bytes.fromhex("525400000077")
CHANGED: Final = bytes.fromhex("525400000099")
GROUP: Final = bytes.fromhex("01005e000005")
EXPERIMENTAL: Final = b"\x88\xb5"
BURST: Final = 1000  # frames: more than the rings of two of the cards have descriptors
SIZES: Final = [60, 61, 127, 128, 1000, 1513, 1514]
JUMBO_SIZES: Final = [2047, 2048, 2049, 4096, 9014]  # about the sizes of one and two buffers
PATIENCE: Final = 180  # seconds for some fifteen on an idle machine

DRIVERS: Final = loading("bus_pci", "mempool_ring", "net_virtio")
COMMAND: Final = (
    f"dpdk-testpmd --in-memory -m 64 -l 0-1 {DRIVERS}"
    " $(for card in $cards; do echo -a ${card##*/}; done)"
    " -- -i --port-topology=loop --total-num-mbufs=8192 --enable-scatter --tx-offloads=0x8000"
)

SCRIPT: Final = f"""
{PREPARED.format(pages=48)}
cards="$(card 0) $(card 1) $(card 2)"
give vfio-pci $cards
{STEERED.format(command=COMMAND)}
dpdk_sleeper --in-memory -m 32 -l 0 {DRIVERS} -a $(basename $(card 0))
tell quiet; await_host
"""

# The kernel refuses to disable what is not enabled (vfio_pci_set_msi_trigger in drivers/vfio/pci).
OWN_FAULT: Final = "EAL: Error disabling MSI-X interrupts"


@dataclass
class Story:
    """What was seen."""

    infos: list[str] = field(default_factory=list)
    """What testpmd shows of each card."""
    returned: list[list[bytes]] = field(default_factory=list)
    """Frames that each card sent, for those of `SIZES`, and `JUMBO_SIZES` where they fit."""
    bursts: list[int] = field(default_factory=list)
    """How many frames of a burst each card sent back in their order."""
    counters: list[dict[str, int]] = field(default_factory=list)
    """Each card's, after those."""
    accepted: dict[str, set[bytes]] = field(default_factory=dict)
    """Which receivers' frames came back, by what the receive filter was told."""
    links: list[str] = field(default_factory=list)
    """What testpmd shows of the first card's link: at first, without a cable, with one."""
    refusal: str = ""
    """What it says to an MTU that is too large."""
    restarted: list[bytes] = field(default_factory=list)
    """A frame back from each card, after its port was stopped and started."""
    checksum: bytes = b""
    """A datagram whose checksum was left to the card."""
    woken: list[bytes] = field(default_factory=list)
    """Frames back from a program that the card had to wake for each."""
    windows: list[list[tuple[int, int, int, bool]]] = field(default_factory=list)
    """Each card's, when testpmd has gone."""
    warnings: list[str] = field(default_factory=list)
    """What the cards had logged."""
    complaints: list[str] = field(default_factory=list)
    """Of the guest's kernel."""
    output: str = ""


def frame(receiver: bytes, size: int = 60, mark: int = 0) -> bytes:
    """A frame of that many bytes, without checksum."""
    head = receiver + OURS + EXPERIMENTAL + struct.pack("!I", mark)
    return head + bytes(n & 0xFF for n in range(size - len(head)))


def swapped(sent: bytes) -> bytes:
    """The same, sent by its receiver."""
    return sent[6:12] + sent[:6] + sent[12:]


def sum16(data: bytes) -> int:
    """The ones' complement sum of 16-bit words (RFC 1071)."""
    total: int = sum(word for (word,) in struct.iter_unpack("!H", data + bytes(len(data) % 2)))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


PAYLOAD: Final = b"checked"
PSEUDO: Final = bytes([10, 77, 0, 1, 10, 77, 0, 2, 0, 17]) + struct.pack("!H", 8 + len(PAYLOAD))


def datagram(receiver: bytes) -> bytes:
    """UDP in IPv4, with a wrong checksum."""
    header = struct.pack("!BxH4xBB2x", 0x45, 28 + len(PAYLOAD), 64, 17) + PSEUDO[:8]
    header = header[:10] + struct.pack("!H", 0xFFFF - sum16(header)) + header[12:]
    udp = struct.pack("!HHHH", 1000, 2000, 8 + len(PAYLOAD), 0x1234) + PAYLOAD
    return (receiver + OURS + b"\x08\x00" + header + udp).ljust(60, b"\0")


async def _tell_traffic(story: Story, pmd: Testpmd, wires: list[Wire], cards: list[ServedCard]) -> None:
    for number, (wire, card) in enumerate(zip(wires, cards, strict=True)):
        story.infos.append(await pmd.run(f"show port info {number}"))
        back = []
        for size in SIZES + JUMBO_SIZES * (number == 1):
            await wire.send(frame(OWN, size))
            back.append(await wire.receive())
        story.returned.append(back)
        await wire.send(*(frame(OWN, mark=mark) for mark in range(BURST)))
        story.bursts.append(sum([await wire.receive() == swapped(frame(OWN, mark=m)) for m in range(BURST)]))
        story.counters.append(card.counters)


async def _tell_filter(story: Story, pmd: Testpmd, wire: Wire) -> None:
    async def accepted(last: bytes) -> set[bytes]:
        """What comes back of a frame for each receiver; the one for `last` does."""
        receivers = [STRANGER, ADDED, CHANGED, GROUP, OWN]
        await wire.send(*(frame(receiver) for receiver in receivers if receiver != last), frame(last))
        seen = set()
        while last not in seen:
            seen.add((await wire.receive())[6:12])
        return seen

    for step, order, last in (
        ("promiscuous", "set promisc 0 on", OWN),
        ("strict", "set promisc 0 off", OWN),
        ("all groups", "set allmulti 0 on", OWN),
        ("no groups", "set allmulti 0 off", OWN),
        ("another address", f"mac_addr add 0 {ADDED.hex(':')}", OWN),
        ("no other address", f"mac_addr remove 0 {ADDED.hex(':')}", OWN),
        ("a new address", f"mac_addr set 0 {CHANGED.hex(':')}", CHANGED),
    ):
        await pmd.run(order)
        story.accepted[step] = await accepted(last)


async def _tell_link(story: Story, pmd: Testpmd, wire: Wire) -> None:
    async def link() -> str:
        return shown(await pmd.run("show port info 0"), "Link status")

    story.links.append(await link())
    await wire.pull_out()
    await pmd.heard("Port 0: link state change event")
    story.links.append(await link())
    await wire.plug_in()
    await pmd.heard("Port 0: link state change event")
    story.links.append(await link())


async def _tell_restart(story: Story, pmd: Testpmd, wires: list[Wire], cards: list[ServedCard]) -> None:
    await pmd.run("stop")
    story.refusal = await pmd.run("port config mtu 0 1501")
    await pmd.run("port stop all")
    await pmd.run("port config mtu 0 1400")
    await pmd.run("port start all")
    await pmd.run("start")
    receivers = [CHANGED, OWN, OWN]
    for wire, receiver in zip(wires, receivers, strict=True):
        await wire.send(frame(receiver))
        story.restarted.append(await wire.receive())
    await pmd.run("stop")
    await pmd.run("port stop 0")
    await pmd.run("csum set udp hw 0")
    await pmd.run("port start 0")  # it negotiates anew, and so the card has its first address again
    await pmd.run("set fwd csum")
    await pmd.run("start")
    await wires[0].send(datagram(OWN))
    story.checksum = await wires[0].receive()
    await pmd.run("stop")


async def _tell_interrupts(story: Story, guest: Guest, wire: Wire) -> None:
    for mark in (0, 0, 1 << 24):  # the program takes the last for the end
        await guest.printed("sleeps\n")
        await wire.send(frame(OWN, mark=mark))
        story.woken.append(await wire.receive())
        await guest.printed("woken\n")
    await guest.printed("done\n")


async def _watch(root: Root, dpdk: Path, folder: Path) -> Story:
    story = Story()
    async with AsyncExitStack() as stack:
        wires: list[Wire] = []
        cards: list[ServedCard] = []
        for name, profile in PROFILES.items():
            place = folder / name
            place.mkdir()
            wire = Wire(place / "wire")
            mtu = JUMBO if len(cards) == 1 else None
            served = serve_cards(place, [wire.port], profile=profile, mtu=mtu)
            cards += await stack.enter_async_context(served)
            wires.append(await stack.enter_async_context(wire))
        guest = await stack.enter_async_context(
            boot(
                SCRIPT,
                [card.socket for card in cards],
                root=root,
                smp=2,
                memory="1G",
                kernel_args=KERNEL_ARGS,
                iommu=True,
                trees=[dpdk],
                deadline=PATIENCE,
            )
        )
        with kept_warnings(story.warnings):
            pmd = Testpmd(guest)
            await pmd.started()
            await pmd.run(f"port config mtu 1 {JUMBO}")
            await pmd.run("set fwd macswap retry")
            await pmd.run("set burst tx delay 10 retry 1000000")  # it would drop what finds the ring full
            await pmd.run("start")
            await _tell_traffic(story, pmd, wires, cards)
            await _tell_filter(story, pmd, wires[0])
            await _tell_link(story, pmd, wires[0])
            await _tell_restart(story, pmd, wires, cards)
            await pmd.quit()
            await _tell_interrupts(story, guest, wires[0])
            await guest.expect("quiet")
            story.windows = [sorted(card.nic.function.dma.windows()) for card in cards]
            guest.say()
            result = await guest.wait()
        story.output = result.output
        story.complaints = complaints(result.console)
    return story


@pytest.fixture(scope="module")
def story(guest_root: Root, dpdk: Path, tmp_path_factory: pytest.TempPathFactory) -> Story:
    """testpmd, run to its end in a guest with a card of each profile."""
    return trio.run(_watch, guest_root, dpdk, tmp_path_factory.mktemp("virtio_pmd"))


def test_the_driver_takes_each_profile_in_modern_mode(story: Story) -> None:
    for info in story.infos:
        assert shown(info, "Driver name") == "net_virtio"
        assert shown(info, "vtnet_hdr_size") == "12"  # 10 in legacy mode without mergeable buffers
        assert shown(info, "Link status") == "up"
    assert [shown(info, "max_mtu") for info in story.infos] == ["1500", "9000", "1500"]


@pytest.mark.parametrize("card", range(len(NAMES)), ids=NAMES)
def test_frames_of_all_sizes_come_and_go(story: Story, card: int) -> None:
    sizes = SIZES + JUMBO_SIZES * (card == 1)
    assert story.returned[card] == [swapped(frame(OWN, size)) for size in sizes]


@pytest.mark.parametrize("card", range(len(NAMES)), ids=NAMES)
def test_a_burst_longer_than_the_rings_comes_back_whole_and_in_order(story: Story, card: int) -> None:
    sizes = SIZES + JUMBO_SIZES * (card == 1)
    counters = story.counters[card]
    assert story.bursts[card] == BURST
    assert counters["rx_frames"] == counters["tx_frames"] == BURST + len(sizes)
    assert counters["rx_bytes"] == counters["tx_bytes"] == 60 * BURST + sum(sizes)
    assert counters["rx_dropped"] == counters["tx_dropped"] == counters["rx_filtered"] == 0


def test_the_receive_filter_does_what_the_driver_tells_it(story: Story) -> None:
    assert story.accepted == {
        "promiscuous": {OWN, STRANGER, ADDED, CHANGED, GROUP},
        "strict": {OWN},
        "all groups": {OWN, GROUP},
        "no groups": {OWN},
        "another address": {OWN, ADDED},
        "no other address": {OWN},
        # It gave the card its first address in the table of others too, and leaves it there
        # (virtio_mac_addr_add in drivers/net/virtio).
        "a new address": {CHANGED, OWN},
    }


def test_the_driver_is_interrupted_when_the_link_changes(story: Story) -> None:
    assert story.links == ["up", "down", "up"]


def test_an_mtu_above_the_cards_is_refused(story: Story) -> None:
    assert "MTU (1501) > device max MTU (1500)" in story.refusal


def test_ports_are_stopped_and_started_and_go_on(story: Story) -> None:
    assert story.restarted == [swapped(frame(receiver)) for receiver in (CHANGED, OWN, OWN)]


def test_checksums_that_are_left_to_the_card_are_right(story: Story) -> None:
    length = 8 + len(PAYLOAD)
    udp = story.checksum[34 : 34 + length]
    assert udp[8:] == PAYLOAD
    assert sum16(PSEUDO + udp) == 0xFFFF


def test_a_program_sleeps_until_the_receive_queue_interrupts_it(story: Story) -> None:
    assert story.woken == [swapped(frame(OWN, mark=mark)) for mark in (0, 0, 1 << 24)]


def test_nothing_is_left_behind_and_nobody_complains(story: Story) -> None:
    assert story.windows == [[], [], []]
    assert [message for message in story.warnings if "lost its peer" not in message] == []
    assert story.complaints == []
    said = [line for line in story.output.splitlines() if line.startswith("EAL: Error")]
    assert [line for line in said if not line.startswith(OWN_FAULT)] == []
