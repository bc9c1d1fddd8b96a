"""Frames between virtio_vdpa's interface and the host's network, and commands to the card by its driver.

Cards are served by our own engine: the other has no part in this, and is in test_vectors.
"""

from __future__ import annotations

import json
from itertools import product
from typing import Any, Final

import pytest
import trio

from tests.guest import Guest, Network, Root
from tests.guest.cards import ServedCard, serve_cards
from tests.guest.conftest import networks
from tests.guest.driver_steps import (
    LINK,
    MTU,
    PASSES,
    RECEIVE_MODES,
    follow_receive_modes,
    mtu_was_taken,
    switch_link,
)
from tests.guest.test_traffic import IPERF, received
from tests.guest.vdpa.parents import Parent
from tests.guest.vdpa.story import Story

BYTES: Final = 8 << 20
"""That iperf3 moves in each run."""

SCRIPT: Final = f"""
step ping
for host in 10.77.0.1 fd77::1; do
    for size in 20 700 1400; do ping -c 1 -W 5 -s $size $host; done
done
step mtu
{MTU}
ip link set $dev mtu 1500
for offloads in on off; do
    step offloads_$offloads
    ethtool -K $dev tx $offloads tso $offloads gso $offloads gro $offloads
    for way in up down; do
        tell ${{offloads}}_$way; await_host > /dev/null
        step ${{offloads}}_$way
        reverse=; if [ $way = down ]; then reverse=-R; fi
        iperf3 -c 10.77.0.1 -n {BYTES} $reverse -J
    done
done
tell flowed; await_host > /dev/null
step link
{LINK}
step receive_modes
{RECEIVE_MODES}
step counters
tell rest; await_host
wait_for 5 grep -q 0 /sys/class/net/$dev/carrier
grep . /sys/class/net/$dev/statistics/?x_packets /sys/class/net/$dev/statistics/?x_bytes
tell counted; await_host
step end
"""

RUNS: Final = [f"{offloads}_{way}" for offloads, way in product(("on", "off"), ("up", "down"))]


async def _tap(network: Network, root: Root) -> dict[str, Any]:
    (device,) = json.loads(await network.run(root, "ip", "-s", "-j", "link", "show", network.tap))
    counted: dict[str, Any] = device["stats64"]
    return counted


async def _steer(guest: Guest, story: Story, card: ServedCard, network: Network, root: Root) -> None:
    async with network.running(root, "iperf3", "-s", port=IPERF):
        for moment in (*RUNS, "flowed"):
            await guest.expect(moment)
            story.seen[moment] = card.counters
            guest.say()
    await switch_link(guest, card, network, root)
    story.seen["passes"] = await follow_receive_modes(guest, card)
    await guest.expect("rest")
    await network.run(root, "ip", "link", "set", network.tap, "down")
    guest.say()
    await guest.expect("counted")
    story.seen["card"], story.seen["tap"] = card.counters, await _tap(network, root)
    guest.say()


@pytest.fixture(scope="module")
def story(guest_root: Root, tmp_path_factory: pytest.TempPathFactory, parent: Parent) -> Story:
    """The script, run to its end in a guest whose card is on a TAP device."""

    async def tell(network: Network) -> Story:
        story = Story()
        port = f"tap:name={network.tap},netns={network.path}"
        async with (
            serve_cards(tmp_path_factory.mktemp("traffic"), [port]) as (card,),
            story.told(parent.up() + SCRIPT, [card], guest_root) as guest,
        ):
            await _steer(guest, story, card, network, guest_root)
        return story

    with networks() as make:
        return trio.run(tell, make(mtu=9000))


def grown(story: Story, counter: str, first: str, last: str) -> int:
    """By how much one of the card's counters grew from one moment to another."""
    counted: int = story.seen[last][counter] - story.seen[first][counter]
    return counted


def of_run(story: Story, run: str) -> tuple[str, int, int]:
    """The card's direction in this run of iperf3, and the frames and bytes that went in it meanwhile."""
    way = "tx" if run.endswith("up") else "rx"
    after = [*RUNS, "flowed"][RUNS.index(run) + 1]
    return way, grown(story, f"{way}_frames", run, after), grown(story, f"{way}_bytes", run, after)


def test_the_script_comes_to_its_end_and_the_kernel_has_nothing_to_say(story: Story) -> None:
    assert story.step("end") == ""
    assert story.complaints == []


def test_pings_of_either_protocol_are_answered(story: Story) -> None:
    assert story.step("ping").count(" 0% packet loss") == 6


def test_the_mtu_can_change_up_to_the_cards(story: Story) -> None:
    assert mtu_was_taken(story.step("mtu"))


@pytest.mark.parametrize("run", RUNS)
def test_the_bytes_of_a_stream_are_what_the_card_counts(story: Story, run: str) -> None:
    arrived = received(story.step(run))
    _, frames, carried = of_run(story, run)
    assert arrived >= BYTES
    # Up to 66 bytes of headers a frame, and the other connection of iperf3.
    assert arrived <= carried <= arrived + 80 * frames + 100_000


@pytest.mark.parametrize("run", RUNS)
def test_segments_are_left_to_the_card_with_offloads_alone(story: Story, run: str) -> None:
    way, frames, carried = of_run(story, run)
    mean = carried / frames
    if run.startswith("off") and way == "tx":
        assert mean <= 1514
    elif run.startswith("on"):
        assert mean > 1514


def test_the_link_goes_down_and_up_with_the_hosts_device(story: Story) -> None:
    said = story.step("link")
    assert "NO-CARRIER" in said
    assert "1 received, 0% packet loss" in said


def test_commands_for_modes_and_addresses_reach_the_card(story: Story) -> None:
    assert story.seen["passes"] == PASSES


def test_the_guest_the_card_and_the_host_count_the_same(story: Story) -> None:
    counted = dict(line.split(":") for line in story.step("counters").split() if "statistics/" in line)
    guest = {path.rpartition("/")[2]: int(value) for path, value in counted.items()}
    card, tap = story.seen["card"], story.seen["tap"]
    assert card["tx_frames"] == guest["tx_packets"] == tap["rx"]["packets"]
    assert card["tx_bytes"] == guest["tx_bytes"] == tap["rx"]["bytes"]
    assert card["rx_frames"] == guest["rx_packets"]
    assert card["rx_bytes"] == guest["rx_bytes"]
    assert card["rx_frames"] + card["rx_filtered"] == tap["tx"]["packets"]
    assert card["tx_dropped"] == card["rx_dropped"] == 0
