"""Drivers that come and go, machines that restart, cards that are pulled out and plugged in again."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.guest import Card, Network
from tests.guest._qmp import QmpError
from tests.guest.cards import ServedCard
from tests.guest.conftest import BootGuest, ServeCards
from tests.guest.test_traffic import UP, UP_BOTH

ROUNDS = 20


async def test_the_driver_unbinds_and_binds_twenty_times(boot_guest: BootGuest, card: ServedCard) -> None:
    script = f"""{UP}
    virtio=$(basename $(readlink /sys/class/net/$dev/device))
    for round in $(seq {ROUNDS}); do
        ping -c 1 -W 2 10.77.0.1 > /dev/null
        echo $virtio > /sys/bus/virtio/drivers/virtio_net/unbind
        echo $virtio > /sys/bus/virtio/drivers/virtio_net/bind
        dev=$(nic)
        ip addr add 10.77.0.2/24 dev $dev
        bring_up $dev
    done
    ping -c 1 -W 2 10.77.0.1
    """
    result = await boot_guest(script, [card.socket])
    assert "1 received, 0% packet loss" in result.output


async def test_the_pci_driver_unbinds_and_binds_twenty_times(boot_guest: BootGuest, card: ServedCard) -> None:
    script = f"""{UP}
    function=$(basename $(card))
    for round in $(seq {ROUNDS}); do
        echo $function > /sys/bus/pci/drivers/virtio-pci/unbind
        echo $function > /sys/bus/pci/drivers/virtio-pci/bind
    done
    dev=$(nic)
    ip addr add 10.77.0.2/24 dev $dev
    bring_up $dev
    ping -c 1 -W 2 10.77.0.1
    """
    result = await boot_guest(script, [card.socket])
    assert "1 received, 0% packet loss" in result.output


async def test_the_guest_reboots_with_the_server_running(boot_guest: BootGuest, card: ServedCard) -> None:
    script = f"{UP} ping -c 1 -W 5 10.77.0.1; if [ $BOOT -lt 3 ]; then reboot; fi"
    result = await boot_guest(script, [card.socket])
    assert result.boots == 3
    assert result.output.count("1 received, 0% packet loss") == 3


async def test_a_guest_killed_in_the_middle_leaves_the_card_ready_for_the_next(
    boot_guest: BootGuest, card: ServedCard
) -> None:
    async with boot_guest(
        f"{UP} ping -i 0.01 10.77.0.1 > /dev/null & tell busy; await_host", [card.socket]
    ) as guest:
        await guest.expect("busy")
        guest.kill()
    result = await boot_guest(f"{UP} ping -c 1 -W 5 10.77.0.1", [card.socket])
    assert "1 received, 0% packet loss" in result.output


async def test_the_card_is_unplugged_and_plugged_in_twenty_times(
    boot_guest: BootGuest, serve_cards: ServeCards, network: Network
) -> None:
    script = f"""
    modprobe virtio_net
    for round in $(seq {ROUNDS}); do
        dev=$(nic)
        ip addr add 10.77.0.2/24 dev $dev
        bring_up $dev
        ping -c 1 -W 2 10.77.0.1 > /dev/null
        tell unplug; await_host
        wait_for 10 test ! -e /sys/class/net/$dev
        tell plug; await_host
    done
    """
    # Without MSI-X, for the reason that the next test shows.
    port = f"tap:name={network.tap},netns={network.path}"
    async with serve_cards(port, msix=False) as (card,):  # noqa: SIM117
        async with boot_guest(script, [Card(card.socket, root_port=True)], deadline=240) as guest:
            for _ in range(ROUNDS):
                await guest.expect("unplug")
                await guest.qmp("device_del", id="card0")
                await guest.qmp_event("DEVICE_DELETED", device="card0")
                guest.say()
                await guest.expect("plug")
                await guest.qmp(
                    "device_add",
                    driver="vfio-user-pci",
                    id="card0",
                    bus="card0-port",
                    socket={"type": "unix", "path": str(card.socket)},
                )
                guest.say()


async def test_qemu_itself_aborts_when_a_card_with_msix_is_unplugged(
    boot_guest: BootGuest, card: ServedCard
) -> None:
    """QEMU 11.1 takes the PBA's memory region out of a BAR that has let go of it already (hw/vfio-user/pci.c,
    vfio_user_instance_finalize). When this test fails, QEMU is mended and the test above can use MSI-X.
    """
    async with boot_guest("tell up; await_host", [Card(card.socket, root_port=True)]) as guest:
        await guest.expect("up")
        await guest.qmp("device_del", id="card0")
        with pytest.raises(QmpError, match="QEMU has gone"):
            await guest.qmp_event("DEVICE_DELETED", device="card0")
        guest.kill()
    assert "memory_region_del_subregion: Assertion" in guest.qemu_stderr


async def test_two_cards_in_one_guest_work_side_by_side(
    boot_guest: BootGuest, serve_cards: ServeCards, make_network: Callable[..., Network]
) -> None:
    networks = [make_network(tap=f"tap{n}", subnet=f"10.77.{n}") for n in range(2)]
    script = f"{UP_BOTH} ping -c 1 -W 5 10.77.0.1; ping -c 1 -W 5 10.77.1.1"
    ports = [f"tap:name={network.tap},netns={network.path}" for network in networks]
    async with serve_cards(*ports) as cards:
        result = await boot_guest(script, [card.socket for card in cards])
        assert result.output.count("1 received, 0% packet loss") == 2
        assert all(card.counters["tx_frames"] >= 2 for card in cards)


async def test_one_processor_and_four_get_their_vectors(boot_guest: BootGuest, card: ServedCard) -> None:
    for processors in (1, 4):
        result = await boot_guest(
            f"{UP} ping -c 1 -W 5 10.77.0.1; grep virtio /proc/interrupts", [card.socket], smp=processors
        )
        assert "virtio0-config" in result.output
        assert "virtio0-input.0" in result.output
