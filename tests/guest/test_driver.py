"""What a guest's tools see of the card, and what they may do to it."""

from __future__ import annotations

import re

import trio

from tests.guest import Network, Root
from tests.guest.cards import ServedCard
from tests.guest.conftest import BootGuest, ServeCards
from tests.guest.test_traffic import UP


async def test_ethtool_tells_driver_features_and_statistics(boot_guest: BootGuest, card: ServedCard) -> None:
    result = await boot_guest(
        UP + "ping -c 2 -i 0.2 10.77.0.1; ethtool -i $dev; ethtool -k $dev; ethtool -S $dev; ethtool $dev",
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
    script = f"""{UP}
    cat /sys/class/net/$dev/mtu
    ping -c 1 -M do -s 8972 10.77.0.1
    ip link set $dev mtu 1280
    if ping -c 1 -W 1 -M do -s 1300 10.77.0.1; then exit 9; fi
    ping -c 1 -M do -s 1252 10.77.0.1
    ip link set $dev mtu 9000
    if ip link set $dev mtu 9001; then exit 9; fi
    """
    async with serve_cards(spec) as (card,):
        result = await boot_guest(script, [card.socket])
    assert "9000\n" in result.output
    assert result.output.count("1 received, 0% packet loss") == 2


async def test_the_guest_sees_the_link_go_down_and_up_with_the_host_device(
    boot_guest: BootGuest, card: ServedCard, network: Network, guest_root: Root
) -> None:
    script = f"""{UP}
    wait_for 5 grep -q 1 /sys/class/net/$dev/carrier
    tell up; await_host
    wait_for 5 grep -q 0 /sys/class/net/$dev/carrier
    ip link show $dev; tell down; await_host
    wait_for 5 grep -q 1 /sys/class/net/$dev/carrier
    ping -c 2 -i 0.2 10.77.0.1
    """
    async with boot_guest(script, [card.socket]) as guest:
        await guest.expect("up")
        await network.run(guest_root, "ip", "link", "set", network.tap, "down")
        guest.say()
        await guest.expect("down")
        assert not card.link_is_up
        await network.run(guest_root, "ip", "link", "set", network.tap, "up")
        guest.say()
        result = await guest.wait()
    assert "NO-CARRIER" in result.output
    assert "2 received, 0% packet loss" in result.output


async def test_promiscuous_and_multicast_modes_reach_the_card(
    boot_guest: BootGuest, card: ServedCard, network: Network, guest_root: Root
) -> None:
    script = f"""{UP}
    tell plain; await_host
    ip link set $dev promisc on; tell promisc; await_host
    ip link set $dev promisc off allmulticast on; tell allmulti; await_host
    ip link set $dev allmulticast off
    ip maddr add 01:00:5e:01:02:03 dev $dev; tell group; await_host
    ip maddr del 01:00:5e:01:02:03 dev $dev; tell none; await_host
    ip link set $dev address 52:54:00:aa:bb:cc; tell address; await_host
    """
    own, other = bytes.fromhex(card.mac.replace(":", "")), bytes.fromhex("525400ffffff")
    changed, group = bytes.fromhex("525400aabbcc"), bytes.fromhex("01005e010203")
    seen: dict[str, list[bool]] = {}
    async with boot_guest(script, [card.socket]) as guest:
        for phase in ("plain", "promisc", "allmulti", "group", "none", "address"):
            await guest.expect(phase)
            accepted = card.nic.filter.accept
            # Linux changes receive modes from a work queue, after the command has returned.
            expected = EXPECTED[phase]
            with trio.move_on_after(5):
                while [accepted(mac) for mac in (own, other, group, changed)] != expected:  # noqa: ASYNC110
                    await trio.sleep(0.01)
            seen[phase] = [accepted(mac) for mac in (own, other, group, changed)]
            guest.say()
    assert seen == EXPECTED


# Whether a frame passes that is for: the first own address, somebody else, the group, the second own address.
EXPECTED = {
    "plain": [True, False, False, False],
    "promisc": [True, True, True, True],
    "allmulti": [True, False, True, False],
    "group": [True, False, True, False],
    "none": [True, False, False, False],
    "address": [False, False, False, True],
}


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
