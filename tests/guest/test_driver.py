"""What a guest's tools see of the card, and what they may do to it."""

from __future__ import annotations

import re

from tests.guest import Network, Root
from tests.guest.cards import ServedCard
from tests.guest.conftest import BootGuest, ServeCards
from tests.guest.driver_steps import (
    LINK,
    MTU,
    PASSES,
    RECEIVE_MODES,
    follow_receive_modes,
    mtu_was_taken,
    switch_link,
)
from tests.guest.test_traffic import UP


async def test_ethtool_tells_driver_features_and_statistics(boot_guest: BootGuest, card: ServedCard) -> None:
    result = await boot_guest(
        UP + "ping -c 1 -W 5 10.77.0.1; ethtool -i $dev; ethtool -k $dev; ethtool -S $dev; ethtool $dev",
        [card.socket],
    )
    for line in (
        "driver: virtio_net",
        "bus-info: 0000:",
        "rx-checksumming: on",
        "tx-checksum-ip-generic: on",
        "tx-tcp-segmentation: on",
        "tx-tcp6-segmentation: on",
        "tx-tcp-ecn-segmentation: on",
        "Link detected: yes",
    ):
        assert line in result.output
    statistics = dict(re.findall(r"(\w+): (\d+)", result.output))
    assert int(statistics["tx0_kicks"]) >= 1
    assert int(statistics["rx0_drops"]) == int(statistics["tx0_tx_timeouts"]) == 0


async def test_the_mtu_can_change_up_to_the_cards(
    boot_guest: BootGuest, serve_cards: ServeCards, network: Network, guest_root: Root
) -> None:
    spec = f"tap:name={network.tap},netns={network.path},mtu=9000"
    async with serve_cards(spec) as (card,):
        result = await boot_guest(UP + MTU, [card.socket])
    assert mtu_was_taken(result.output)


async def test_the_guest_sees_the_link_go_down_and_up_with_the_host_device(
    boot_guest: BootGuest, card: ServedCard, network: Network, guest_root: Root
) -> None:
    async with boot_guest(UP + LINK, [card.socket]) as guest:
        await switch_link(guest, card, network, guest_root)
        result = await guest.wait()
    assert "NO-CARRIER" in result.output
    assert "1 received, 0% packet loss" in result.output


async def test_promiscuous_and_multicast_modes_reach_the_card(
    boot_guest: BootGuest, card: ServedCard
) -> None:
    async with boot_guest(UP + RECEIVE_MODES, [card.socket]) as guest:
        assert await follow_receive_modes(guest, card) == PASSES


async def test_frames_for_others_stay_away_unless_the_guest_is_promiscuous(
    boot_guest: BootGuest, card: ServedCard, network: Network, guest_root: Root
) -> None:
    script = f"""{UP}
    tell ready; await_host
    rx=$(cat /sys/class/net/$dev/statistics/rx_packets)
    tell counted; await_host
    echo grew $(( $(cat /sys/class/net/$dev/statistics/rx_packets) - rx ))
    ip link set $dev promisc on
    tell promisc; await_host
    echo saw $(( $(cat /sys/class/net/$dev/statistics/rx_packets) - rx ))
    """
    async with boot_guest(script, [card.socket]) as guest:
        await guest.expect("ready")
        ip = ("ip", "neigh", "replace", "10.77.0.99", "lladdr", "52:54:00:ff:ff:ff", "dev", network.tap)
        await network.run(guest_root, *ip)
        guest.say()
        await guest.expect("counted")
        filtered = card.counters["rx_filtered"]
        await network.run(guest_root, "ping", "-c", "5", "-i", "0.1", "-W", "1", "10.77.0.99", check=False)
        assert card.counters["rx_filtered"] >= filtered + 5
        guest.say()
        await guest.expect("promisc")
        await network.run(guest_root, "ping", "-c", "5", "-i", "0.1", "-W", "1", "10.77.0.99", check=False)
        guest.say()
        result = await guest.wait()
    words = dict(line.split() for line in result.output.splitlines() if line.startswith(("grew ", "saw ")))
    assert int(words["grew"]) < 5
    assert int(words["saw"]) >= 5
