"""vDPA devices, drivers and machines that come and go under traffic, and what is left of them in the card.

The guest has a virtual IOMMU, so that the card's windows are what its drivers map and nothing else.
"""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
import trio

from device.profiles import parse_profile
from device.virtio.transport import Status
from tests.guest import Guest, Network, Root
from tests.guest.cards import ServedCard, serve_cards
from tests.guest.conftest import networks
from tests.guest.vdpa.parents import PARENTS
from tests.guest.vdpa.story import Story

ROUNDS: Final = 20

FLOWING: Final = 10
"""Frames each way that have to pass each card in a round before anything is taken away."""

PATIENCE: Final = 240
"""Seconds for some twenty on an idle machine."""

PING: Final = ("-q", "-i", "0.005")

SHORT_RINGS: Final = parse_profile("n3000:queue-size=64")
"""Linux maps each buffer for itself, and fills the receive ring each time anew."""

CARDS: Final = range(len(PARENTS))
"""Each parent has the card of its number in `PARENTS`."""

# The guest pings the host by each card, and is pinged, while vDPA devices and drivers go from under that.
SCRIPT: Final = f"""
modprobe virtio_vdpa
modprobe virtio_net
cards="{" ".join(map(str, CARDS))}"
drivers="{" ".join(parent.driver for parent in PARENTS)}"
functions="$(for n in $cards; do card $n; done)"
add() {{
    n=0
    for function in $functions; do
        vdpa dev add name vdpa$n mgmtdev pci/${{function##*/}}
        dev=$(echo $function/virtio*/net/*)
        dev=${{dev##*/}}
        ip addr add 10.77.$n.2/24 dev $dev
        bring_up $dev
        set -- $hosts; shift $n
        ip neigh replace 10.77.$n.1 lladdr $1 dev $dev
        ping -i 0.005 10.77.$n.1 > /tmp/pinged$n 2>&1 &
        n=$((n + 1))
    done
    for n in $cards; do wait_for 20 grep -q "bytes from" /tmp/pinged$n; done
    tell flow; await_host > /dev/null
}}
delete() {{ for n in $cards; do vdpa dev del vdpa$n; done; }}
drive() {{
    set -- $1 $functions
    for driver in $drivers; do
        echo ${{2##*/}} > /sys/bus/pci/drivers/$driver/$1
        set -- $1 $3
    done
}}
over() {{
    killall -INT ping
    wait
    for n in $cards; do echo "card $n: $(grep packets /tmp/pinged$n)"; done
    tell over; await_host > /dev/null
}}
tell hosts; hosts=$(await_host)
{"".join(parent.take(card) for card, parent in enumerate(PARENTS))}
step taken
tell over; await_host > /dev/null
if [ $BOOT = 1 ]; then
    step rounds
    for round in $(seq {ROUNDS}); do
        add
        delete
        over
    done
    step rebind
    add
    drive unbind
    over
    vdpa mgmtdev show
    drive bind
    step reboot
    add
    reboot
fi
step after_the_reboot
add
delete
over
step end
"""


TIMES: Final = [
    *("taken",),
    *[f"round {number}" for number in range(ROUNDS)],
    *("rebind", "after the reboot", "after all"),
]
"""When the cards are looked at, with no vDPA device on them."""


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


async def _frames_flow(cards: list[ServedCard]) -> None:
    """Wait until frames have passed each card in both directions."""
    before = [card.counters for card in cards]

    def passed() -> int:
        return min(
            card.counters[way] - counted[way]
            for card, counted in zip(cards, before, strict=True)
            for way in ("tx_frames", "rx_frames")
        )

    with trio.fail_after(30):
        while passed() < FLOWING:  # noqa: ASYNC110
            await trio.sleep(0.005)


async def _steer(guest: Guest, story: Story, cards: list[ServedCard], hosts: str) -> None:
    left: dict[str, list[Left]] = story.seen["left"]

    async def flow() -> None:
        await guest.expect("flow")
        await _frames_flow(cards)
        guest.say()

    async def over(time: str) -> None:
        await guest.expect("over")
        left[time] = [look(card) for card in cards]
        guest.say()

    async def begin(time: str) -> None:
        await guest.expect("hosts")
        guest.say(hosts)
        await over(time)

    first, *times, again, last = TIMES
    await begin(first)
    for time in times:
        await flow()
        await over(time)
    await flow()
    await begin(again)
    await flow()
    await over(last)


@asynccontextmanager
async def pinging(story: Story, network: Network, root: Root) -> AsyncIterator[None]:
    """Ping the guest, two hundred times a second, beside the block."""
    # Started from this very thread, which the death signal is tied to.
    process = subprocess.Popen(  # noqa: ASYNC220
        [
            "setpriv",
            "--pdeathsig",
            "KILL",
            "--",
            *network.command(root, "ping", *PING, network.guest_address),
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield
        process.send_signal(signal.SIGINT)
        said, _ = await trio.to_thread.run_sync(process.communicate)
        story.seen["host's pings"].append(said)
    finally:
        process.kill()
        process.wait()


async def _device(network: Network, root: Root, *options: str) -> dict[str, Any]:
    """What the host tells of its TAP device."""
    printed = await network.run(root, "ip", *options, "-j", "link", "show", network.tap)
    (device,) = json.loads(printed)
    found: dict[str, Any] = device
    return found


async def _watch(root: Root, links: list[Network], folder: Path) -> Story:
    story = Story()
    story.seen |= {"left": {}, "host's pings": []}
    ports = [f"tap:name={link.tap},netns={link.path}" for link in links]
    async with serve_cards(folder, ports, profile=SHORT_RINGS) as cards:
        for card, link in zip(cards, links, strict=True):
            neighbour = ("ip", "neigh", "replace", link.guest_address, "lladdr", card.mac, "dev", link.tap)
            await link.run(root, *neighbour)
        hosts = [(await _device(link, root))["address"] for link in links]
        async with (
            story.told(SCRIPT, cards, root, iommu=True, deadline=PATIENCE) as guest,
            AsyncExitStack() as pings,
        ):
            for link in links:
                await pings.enter_async_context(pinging(story, link, root))
            await _steer(guest, story, cards, " ".join(hosts))
        story.seen["taps"] = [(await _device(link, root, "-s"))["stats64"] for link in links]
        story.seen["cards"] = [card.counters for card in cards]
    return story


@pytest.fixture(scope="module")
def story(guest_root: Root, tmp_path_factory: pytest.TempPathFactory) -> Story:
    """The script, run to its end."""
    with networks() as make:
        links = [make(tap=f"tap{card}", subnet=f"10.77.{card}") for card in CARDS]
        return trio.run(_watch, guest_root, links, tmp_path_factory.mktemp("lifecycle"))


@pytest.fixture(params=CARDS, ids=[str(parent) for parent in PARENTS])
def card(request: pytest.FixtureRequest) -> int:
    """Each parent's card in turn."""
    number: int = request.param
    return number


def test_devices_drivers_and_the_machine_come_and_go_and_the_kernel_has_nothing_to_say(story: Story) -> None:
    assert story.step("end") == ""
    assert story.complaints == []


@pytest.mark.parametrize(("step", "times"), [("rounds", ROUNDS), ("rebind", 1), ("after_the_reboot", 1)])
def test_nothing_comes_twice_to_the_guest(story: Story, card: int, step: str, times: int) -> None:
    summaries = [line for line in story.step(step).splitlines() if line.startswith(f"card {card}: ")]
    assert ["packets transmitted" in summary for summary in summaries] == [True] * times
    assert [summary for summary in summaries if "duplicates" in summary] == []


def test_nothing_comes_twice_to_the_host(story: Story) -> None:
    for summary in story.seen["host's pings"]:
        assert "duplicates" not in summary, summary
        assert int(summary.partition(" received")[0].split()[-1]) >= len(TIMES), summary


@pytest.mark.parametrize("time", TIMES)
def test_nothing_is_left_in_the_card(story: Story, card: int, time: str) -> None:
    left = story.seen["left"]
    assert left[time][card] == Left(0, left["taken"][card].descriptors, Status(0), 0, [])


def test_a_driver_that_is_gone_is_no_management_device_any_more(story: Story) -> None:
    assert "pci/" not in story.step("rebind")


def test_all_frames_are_accounted_for(story: Story, card: int) -> None:
    counted, tap = story.seen["cards"][card], story.seen["taps"][card]
    assert counted["tx_frames"] == tap["rx"]["packets"]
    assert counted["rx_frames"] + counted["rx_filtered"] + counted["rx_dropped"] <= tap["tx"]["packets"]
    assert counted["tx_dropped"] == 0
