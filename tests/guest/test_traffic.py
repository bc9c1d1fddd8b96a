"""Frames between a guest's driver and the host's network, through the card and a real TAP device."""

from __future__ import annotations

import json

import pytest

from tests.guest import Network, Root
from tests.guest.cards import ServedCard
from tests.guest.conftest import BootGuest, ServeCards

UP = """
modprobe virtio_net
dev=$(nic)
ip addr add 10.77.0.2/24 dev $dev
ip -6 addr add fd77::2/64 dev $dev nodad
bring_up $dev
"""

# Of two cards, each with a network of its own.
UP_BOTH = """
modprobe virtio_net
for n in 0 1; do
    dev=$(nic $n)
    ip addr add 10.77.$(( $(cut -d: -f6 /sys/class/net/$dev/address) )).2/24 dev $dev
    bring_up $dev
done
"""

IPERF = 5201


def received(report: str) -> int:
    """The bytes that arrived, of an iperf3 report in JSON."""
    return int(json.loads(report)["end"]["sum_received"]["bytes"])


async def test_an_unmodified_driver_binds_and_pings(boot_guest: BootGuest, card: ServedCard) -> None:
    result = await boot_guest(
        f"""{UP}
        ethtool -i $dev
        cat /sys/class/net/$dev/address
        ping -c 1 -W 5 10.77.0.1
        ping -c 1 -W 5 fd77::1
        """,
        [card.socket],
    )
    assert "driver: virtio_net" in result.output
    assert card.mac in result.output
    assert result.output.count("1 received, 0% packet loss") == 2


async def test_the_host_pings_the_guest(
    boot_guest: BootGuest, card: ServedCard, network: Network, guest_root: Root
) -> None:
    async with boot_guest(UP + "tell up; await_host", [card.socket]) as guest:
        await guest.expect("up")
        report = await network.run(guest_root, "ping", "-c", "5", "-i", "0.2", "-s", "1400", "10.77.0.2")
        assert "5 received, 0% packet loss" in report
        guest.say()


@pytest.mark.parametrize("offloads", ["on", "off"])
async def test_tcp_flows_both_ways(
    boot_guest: BootGuest, card: ServedCard, network: Network, guest_root: Root, offloads: str
) -> None:
    script = f"""{UP}
    ethtool -K $dev tx {offloads} tso {offloads} gso {offloads} gro {offloads}
    iperf3 -c 10.77.0.1 -t 2 -J > /tmp/up; iperf3 -c 10.77.0.1 -t 2 -R -J > /tmp/down
    cat /tmp/up; echo SPLIT; cat /tmp/down
    """
    async with network.running(guest_root, "iperf3", "-s", port=IPERF):
        result = await boot_guest(script, [card.socket])
    up, down = result.output[result.output.index("{") :].split("SPLIT")
    assert received(up) > 10_000_000
    assert received(down) > 10_000_000
    counters = card.counters
    assert counters["tx_dropped"] == counters["rx_dropped"] == 0
    mean = counters["tx_bytes"] / counters["tx_frames"]
    assert (mean > 1514) == (offloads == "on")


async def test_a_card_without_offloads_offers_none(
    boot_guest: BootGuest, serve_cards: ServeCards, network: Network, guest_root: Root
) -> None:
    script = f"{UP} ethtool -k $dev; iperf3 -c 10.77.0.1 -t 1; iperf3 -c 10.77.0.1 -t 1 -R"
    spec = f"tap:name={network.tap},netns={network.path}"
    async with serve_cards(spec, offloads=False) as (card,):
        async with network.running(guest_root, "iperf3", "-s", port=IPERF):
            result = await boot_guest(script, [card.socket])
        assert "tx-checksumming: off" in result.output
        assert "tx-tcp-segmentation: off [fixed]" in result.output
        assert card.counters["tx_bytes"] / card.counters["tx_frames"] <= 1514


async def test_udp_of_every_size_arrives_whole(
    boot_guest: BootGuest, card: ServedCard, network: Network, guest_root: Root
) -> None:
    sizes = [0, 1, 17, 18, 19, 500, 1471, 1472, 1473, 4000, 9000, 30000, 65507]
    pings = "\n".join(f"ping -c 1 -W 2 -s {size} -p a5 10.77.0.1" for size in sizes)
    result = await boot_guest(UP + pings, [card.socket])
    assert result.output.count(" 0% packet loss") == len(sizes)
    assert "wrong data" not in result.output


async def test_the_loopback_gives_back_what_the_guest_sends(
    boot_guest: BootGuest, serve_cards: ServeCards
) -> None:
    script = """
    modprobe virtio_net
    dev=$(nic)
    ip link set $dev arp off promisc on; bring_up $dev
    ip addr add 10.77.0.2/24 dev $dev
    timeout 10 tcpdump -Z root -i $dev -c 1 -Q in -n icmp > /tmp/dump &
    sleep 1
    ping -c 1 -W 1 10.77.0.9 || true
    wait
    cat /tmp/dump
    """
    async with serve_cards("loopback") as (card,):
        result = await boot_guest(script, [card.socket])
    assert "10.77.0.2 > 10.77.0.9: ICMP echo request" in result.output
