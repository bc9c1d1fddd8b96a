"""Cards that take their memory back themselves while it is not decoded, with QEMU as the client that maps it.

A BAR of such a card faults in whatever maps it, so also in QEMU, as soon as the guest has switched memory
decoding off. The sentences of test_vfio_driver.py hold with these cards too.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator

import pytest

from device.revocation import Revocation
from tests.guest import GuestError, Network
from tests.guest.cards import ServedCard
from tests.guest.conftest import BootGuest, ServeCards
from tests.guest.programs import program, read_steps
from tests.guest.test_traffic import UP

ROUNDS = 10
SWITCHES = 500
UNTIL_IT_ENDS = 1_000_000

# `off` and `on` switch memory decoding while no driver is there: one that is waits for ever for the answer to
# a command whose doorbell was lost, and Linux gives some when a link has gone up or down already.
TOOLS = f"""{UP}
function=$(basename $(card))
memory=$(sed -n 3p $(card)/resource | cut -d' ' -f1)
check() {{ test $(( $(devmem $memory 32) )) -eq $(( $1 )); }}
driver=/sys/bus/pci/drivers/virtio-pci
off() {{ echo $function > $driver/unbind; setpci -s $function COMMAND=0:2; }}
on() {{
    setpci -s $function COMMAND=2:2; echo $function > $driver/bind
    dev=$(nic); ip addr add 10.77.0.2/24 dev $dev; bring_up $dev
}}
pings() {{ ping -c 1 -W 5 10.77.0.1; }}
"""


@pytest.fixture
async def card(serve_cards: ServeCards, network: Network) -> AsyncIterator[ServedCard]:
    """A card on the TAP device of `network` that takes its memory back."""
    port = f"tap:name={network.tap},netns={network.path}"
    async with serve_cards(port, revocation=Revocation.ENFORCED) as (served,):
        yield served


def reachable(card: ServedCard) -> int:
    """How many bytes of the card's memory mappings reach now."""
    return os.fstat(card.nic.card.memory.fd).st_size


async def test_a_guest_that_switches_memory_decoding_has_its_bytes_and_its_network_back(
    boot_guest: BootGuest, card: ServedCard
) -> None:
    script = f"""{TOOLS}
    devmem $memory 32 0x5a17c0de
    pings; check 0x5a17c0de
    off; if check 0x5a17c0de; then exit 9; fi
    tell off; await_host
    on; tell on; await_host
    for round in $(seq {ROUNDS}); do
        off; on
        check 0x5a17c0de
        pings
    done
    """
    async with boot_guest(script, [card.socket]) as guest:
        await guest.expect("off")
        assert reachable(card) == 0
        guest.say()
        await guest.expect("on")
        assert reachable(card) == card.nic.card.memory.size
        guest.say()
        result = await guest.wait()
    assert result.output.count("1 received, 0% packet loss") == ROUNDS + 1


async def test_a_guest_resets_the_card_reboots_and_starts_anew(
    boot_guest: BootGuest, card: ServedCard
) -> None:
    script = f"""{TOOLS}
    check 0; devmem $memory 32 0x5a17c0de; check 0x5a17c0de; pings
    echo $function > $driver/unbind
    echo 1 > /sys/bus/pci/devices/$function/reset
    on; check 0; devmem $memory 32 0x5a17c0de; pings
    if [ $BOOT -lt 2 ]; then reboot; fi
    """
    result = await boot_guest(script, [card.socket])
    assert result.boots == 2
    assert result.output.count("1 received, 0% packet loss") == 4


READ_WHILE_SWITCHING = """
install -m 755 /run/files/read_bar /bin/read_bar
read_bar $(basename $(card)) %d
"""


async def test_a_guest_may_read_memory_that_another_processor_switches_off(
    boot_guest: BootGuest, serve_cards: ServeCards
) -> None:
    async with serve_cards("loopback", revocation=Revocation.COOPERATIVE) as (card,):
        script = READ_WHILE_SWITCHING % SWITCHES
        result = await boot_guest(script, [card.socket], smp=2, files={"read_bar": program("read_bar")})
    assert [step.good for step in read_steps(result.output)] == [True]


async def test_qemu_itself_ends_when_a_guest_reads_memory_that_was_taken_back(
    boot_guest: BootGuest, serve_cards: ServeCards
) -> None:
    """QEMU 11.1 lets the card know first and takes the BAR out of the guest's address space afterwards
    (hw/vfio/pci.c, vfio_pci_write_config). When this test fails, QEMU is mended.
    """
    async with serve_cards("loopback", revocation=Revocation.ENFORCED) as (card,):
        script = READ_WHILE_SWITCHING % UNTIL_IT_ENDS
        with pytest.raises(GuestError, match="QEMU ended with status -7"):  # SIGBUS
            await boot_guest(script, [card.socket], smp=2, files={"read_bar": program("read_bar")})
