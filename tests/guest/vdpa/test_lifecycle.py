"""vDPA devices, drivers and machines that come and go under traffic, and what is left of them in the card.

The guest has a virtual IOMMU, so that the card's windows are what its drivers map and nothing else.
"""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest
import trio

from device.virtio.transport import Status
from tests.guest import Guest, Network, Root
from tests.guest._machine import accelerator
from tests.guest.cards import ServedCard, serve_cards
from tests.guest.conftest import networks
from tests.guest.test_vfio_driver import IOMMU, SPLIT_IRQCHIP
from tests.guest.vdpa.parents import ADD, ADDRESSES, DELETE, PARENTS, Parent
from tests.guest.vdpa.story import Story

ROUNDS: Final = 20
REBINDS: Final = 3

FLOWING: Final = 10
"""Frames each way that have to pass in a round before anything is taken away."""

PATIENCE: Final = 240
"""Seconds for some twenty on an idle machine."""

PINGED: Final = "10.77.0.1"


def script(parent: Parent) -> str:
    """The guest pings the host, which pings it, while each vDPA device and each driver is taken from under
    that.
    """
    return f"""
modprobe virtio_vdpa
modprobe virtio_net
traffic() {{
{ADDRESSES}
    ip neigh replace {PINGED} lladdr $HOST dev $dev
    ping -i 0.002 {PINGED} > /tmp/pinged 2>&1 &
    pinging=$!
    wait_for 20 grep -q "bytes from" /tmp/pinged
    tell flow; await_host > /dev/null
}}
over() {{
    kill -INT $pinging
    wait $pinging || true
    grep packets /tmp/pinged
    tell over; await_host > /dev/null
}}
tell host; HOST=$(await_host)
{parent.take()}
if [ $BOOT = 2 ]; then
    step after_the_reboot
    tell over; await_host > /dev/null
    {ADD}
    traffic
    {DELETE}
    over
    step end
    exit 0
fi
step taken
tell over; await_host > /dev/null
step rounds
for round in $(seq {ROUNDS}); do
    {ADD}
    traffic
    {DELETE}
    over
done
step rebinds
for round in $(seq {REBINDS}); do
    {ADD}
    traffic
    echo ${{mgmt#pci/}} > /sys/bus/pci/drivers/{parent.driver}/unbind
    over
    vdpa mgmtdev show
    echo ${{mgmt#pci/}} > /sys/bus/pci/drivers/{parent.driver}/bind
done
step reboot
{ADD}
traffic
reboot
"""


TIMES: Final = [
    *("taken",),
    *[f"round {number}" for number in range(ROUNDS)],
    *[f"rebind {number}" for number in range(REBINDS)],
    *("after the reboot", "after all"),
]
"""When the card is looked at, with no driver in it."""


@dataclass(frozen=True, slots=True)
class Left:
    """What there is in the server while no driver has the card."""

    windows: int
    descriptors: int
    status: Status
    """Beside ACKNOWLEDGE, which Linux sets for whoever comes next (drivers/virtio/virtio.c)."""
    queues_in_use: int
    faults: list[str]


def look(card: ServedCard) -> Left:
    transport = card.nic.card.transport
    return Left(
        len(card.nic.function.dma.windows()),
        len(list(Path("/proc/self/fd").iterdir())),
        transport.status & ~Status.ACKNOWLEDGE,
        sum(queue.enabled or queue.stopping for queue in transport.queues),
        [queue.fault for queue in transport.queues if queue.fault],
    )


async def _frames_flow(card: ServedCard) -> None:
    """Wait until frames have passed in both directions."""
    before = card.counters
    with trio.fail_after(30):
        while min(card.counters[way] - before[way] for way in ("tx_frames", "rx_frames")) < FLOWING:  # noqa: ASYNC110
            await trio.sleep(0.005)


async def _steer(guest: Guest, story: Story, card: ServedCard, host: str) -> None:
    left: dict[str, Left] = story.seen["left"]

    async def cycle(time: str) -> None:
        await guest.expect("flow")
        await _frames_flow(card)
        guest.say()
        await guest.expect("over")
        left[time] = look(card)
        guest.say()

    async def begin(time: str) -> None:
        await guest.expect("host")
        guest.say(host)
        await guest.expect("over")
        left[time] = look(card)
        guest.say()

    first, *rounds, again, last = TIMES
    await begin(first)
    for time in rounds:
        await cycle(time)
    await guest.expect("flow")
    await _frames_flow(card)
    guest.say()
    await begin(again)
    await cycle(last)


@asynccontextmanager
async def pinging(story: Story, network: Network, root: Root) -> AsyncIterator[None]:
    """Ping the guest, many hundred times a second, beside the block."""
    # Started from this very thread, which the death signal is tied to.
    process = subprocess.Popen(  # noqa: ASYNC220
        ["setpriv", "--pdeathsig", "KILL", "--", *network.command(root, "ping", *PING)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield
        process.send_signal(signal.SIGINT)
        story.seen["host's pings"], _ = await trio.to_thread.run_sync(process.communicate)
    finally:
        process.kill()
        process.wait()


PING: Final = ["-q", "-i", "0.002", "10.77.0.2"]


async def _watch(parent: Parent, root: Root, network: Network, folder: Path) -> Story:
    story = Story()
    story.seen["left"] = {}
    port = f"tap:name={network.tap},netns={network.path}"
    accel = await accelerator(root)
    async with serve_cards(folder, [port]) as (card,):
        (tap,) = json.loads(await network.run(root, "ip", "-j", "link", "show", network.tap))
        neighbour = ("ip", "neigh", "replace", network.guest_address, "lladdr", card.mac, "dev", network.tap)
        await network.run(root, *neighbour)
        async with (
            story.told(
                script(parent),
                [card],
                root,
                accel=accel,
                kernel_args="intel_iommu=on",
                qemu_args=[*IOMMU, *(SPLIT_IRQCHIP if accel == "kvm" else [])],
                deadline=PATIENCE,
            ) as guest,
            pinging(story, network, root),
        ):
            await _steer(guest, story, card, tap["address"])
        (counted,) = json.loads(await network.run(root, "ip", "-s", "-j", "link", "show", network.tap))
        story.seen["tap"], story.seen["card"] = counted["stats64"], card.counters
    return story


@pytest.fixture(scope="module", params=PARENTS, ids=str)
def story(
    guest_root: Root, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Story:
    """The script, run to its end."""
    with networks() as make:
        return trio.run(_watch, request.param, guest_root, make(), tmp_path_factory.mktemp("lifecycle"))


def test_devices_drivers_and_the_machine_come_and_go_and_the_kernel_has_nothing_to_say(story: Story) -> None:
    assert story.step("end") == ""
    assert story.complaints == []


@pytest.mark.parametrize(
    ("step", "times"), [("rounds", ROUNDS), ("rebinds", REBINDS), ("after_the_reboot", 1)]
)
def test_nothing_comes_twice_to_the_guest(story: Story, step: str, times: int) -> None:
    summaries = [line for line in story.step(step).splitlines() if "packets transmitted" in line]
    assert len(summaries) == times
    assert [summary for summary in summaries if "duplicates" in summary] == []


def test_nothing_comes_twice_to_the_host(story: Story) -> None:
    summary = story.seen["host's pings"]
    assert "duplicates" not in summary
    assert int(summary.partition(" received")[0].split()[-1]) >= len(TIMES)


@pytest.mark.parametrize("time", TIMES)
def test_nothing_is_left_in_the_card(story: Story, time: str) -> None:
    left = story.seen["left"]
    assert left[time] == Left(0, left["taken"].descriptors, Status(0), 0, [])


def test_a_driver_that_is_gone_is_no_management_device_any_more(story: Story) -> None:
    assert "pci/" not in story.step("rebinds")


def test_all_frames_are_accounted_for(story: Story) -> None:
    card, tap = story.seen["card"], story.seen["tap"]
    assert card["tx_frames"] == tap["rx"]["packets"]
    assert card["rx_frames"] + card["rx_filtered"] + card["rx_dropped"] <= tap["tx"]["packets"]
    assert card["tx_dropped"] == 0
