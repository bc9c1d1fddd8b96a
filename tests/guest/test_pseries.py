"""A machine that changes its interrupt controller while our cards are in it: pseries, with XICS and XIVE.

It starts with XICS. A guest that knows XIVE gets it at boot (PAPR calls that "client architecture support",
CAS), and a reset brings XICS back. Without KVM the notifier by which QEMU's VFIO hears of the change is an
empty stub: the machine changes under our INTx, and QEMU sends the cards no word of it.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable

import pytest

from device.function import IrqKind
from server.libvfio_user import Limit
from tests.guest import PPC64, Guest, GuestError, Network, Root
from tests.guest.cards import ServedCard
from tests.guest.conftest import BootGuest, ServeCards, demand_root
from tests.guest.test_traffic import IPERF, UP_BOTH, received

DEADLINE = 150  # seconds; there is no hurry where a machine of another kind is emulated
# A firmware of QEMU's own takes the place of SLOF: it looks at no card, and the kernel starts seconds sooner.
QUICK = ["-machine", "x-vof=on"]
SENT = 4 << 20
# What `info pic` says of one controller and not of the other.
MARKS = {"XICS": "XIRR=", "XIVE": "NSR CPPR"}
# SLOF enables the reporting of parity and system errors, and the kernel leaves that so.
PARITY_AND_SERR = 0x140

PINGS = """
for n in 0 1; do ping -c 3 -i 0.1 -W 5 10.77.$n.1; done
grep virtio /proc/interrupts
if dmesg | grep -e "nobody cared" -e "Disabling IRQ"; then exit 9; fi
"""

# A pseries guest maps its memory in pieces, and unmaps at boot whatever its firmware could have mapped.
many_windows = pytest.mark.needs_no(Limit.DMA_WINDOWS, Limit.UNKNOWN_UNMAPS)


@pytest.fixture
def guest_root() -> Root:
    return demand_root(PPC64)


@pytest.fixture
def networks(make_network: Callable[..., Network]) -> list[Network]:
    return [make_network(tap=f"tap{n}", subnet=f"10.77.{n}") for n in range(2)]


def ports(networks: list[Network]) -> list[str]:
    return [f"tap:name={network.tap},netns={network.path}" for network in networks]


async def irqchip(guest: Guest) -> str:
    """The interrupt controller that the machine uses at this moment."""
    said = await guest.monitor("info pic")
    (name,) = (name for name, mark in MARKS.items() if mark in said)
    return name


def interrupts(output: str, line: str) -> list[int]:
    """How often each card's line was served, when each is described in /proc/interrupts as `line`."""
    return [int(count) for count in re.findall(rf"^ *\d+: +(\d+) +{line} +virtio\d$", output, re.MULTILINE)]


def assert_wired_to_intx(card: ServedCard) -> None:
    wired = card.nic.function.interrupts
    assert wired.active is IrqKind.INTX
    assert wired.line.fd is not None
    assert not wired.lines.intx_disabled
    assert card.nic.function.config.command & PARITY_AND_SERR == PARITY_AND_SERR


@many_windows
async def test_intx_lives_through_the_change_of_irqchip_at_boot_and_back_at_reset(
    boot_guest: BootGuest,
    serve_cards: ServeCards,
    networks: list[Network],
    guest_root: Root,
    caplog: pytest.LogCaptureFixture,
) -> None:
    script = f"""{UP_BOTH}
    tell up; await_host > /dev/null
    echo BOOT
    {PINGS}
    for n in 0 1; do
        iperf3 -c 10.77.$n.1 -n {SENT} -J > /tmp/up; iperf3 -c 10.77.$n.1 -n {SENT} -R -J > /tmp/down
        echo SPLIT; cat /tmp/up; echo SPLIT; cat /tmp/down
    done
    tell done; await_host > /dev/null
    """
    async with (
        networks[0].running(guest_root, "iperf3", "-s", port=IPERF),
        networks[1].running(guest_root, "iperf3", "-s", port=IPERF),
        serve_cards(*ports(networks)) as cards,
    ):
        signals = [0, 0]
        async with boot_guest(
            script,
            [card.socket for card in cards],
            kernel_args="quiet pci=nomsi",
            qemu_args=["-machine", "ic-mode=dual", "-S"],
            deadline=DEADLINE,
        ) as guest:
            for boot in (1, 2):
                assert await irqchip(guest) == "XICS"
                await guest.qmp("cont")
                await guest.expect("up")
                assert await irqchip(guest) == "XIVE"
                for network in networks:
                    answers = await network.run(
                        guest_root, "ping", "-c", "3", "-i", "0.1", network.guest_address
                    )
                    assert " 0% packet loss" in answers
                guest.say()
                await guest.expect("done")
                for number, card in enumerate(cards):
                    assert_wired_to_intx(card)
                    assert card.nic.function.interrupts.lines.signals > signals[number]
                    signals[number] = card.nic.function.interrupts.lines.signals
                if boot == 1:
                    await guest.qmp("stop")
                    await guest.reset()
                    await guest.qmp_event("RESET", guest=False)
            guest.say()
            result = await guest.wait()
        for card in cards:
            assert card.counters["tx_bytes"] > 2 * SENT
            assert card.counters["rx_bytes"] > 2 * SENT
            assert card.counters["tx_dropped"] == card.counters["rx_dropped"] == 0
    for output in result.output.split("BOOT\n")[1:]:
        pings, *reports = output.split("SPLIT\n")
        assert pings.count("3 received, 0% packet loss") == 2
        served = interrupts(pings, r"XIVE-IRQ +\d+ Level")
        assert len(served) == 2
        assert min(served) > 0
        assert [received(report) >= SENT for report in reports] == [True] * 4
    assert result.boots == 2
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


async def ping_in_machine(
    mode: str,
    kernel_args: str,
    boot_guest: BootGuest,
    cards: list[ServedCard],
    expected: tuple[str, IrqKind],
) -> str:
    """Ping through both cards in a machine whose `ic-mode` is `mode`, and give what the guest printed.

    `expected` is which interrupt controller serves them then, and by what they are wired to it.
    """
    async with boot_guest(
        f"{UP_BOTH} {PINGS} tell pinged; await_host",
        [card.socket for card in cards],
        kernel_args=kernel_args,
        qemu_args=["-machine", f"ic-mode={mode}", *QUICK],
        deadline=DEADLINE,
    ) as guest:
        await guest.expect("pinged")
        assert [(await irqchip(guest), card.nic.function.interrupts.active) for card in cards] == [
            expected
        ] * 2
        guest.say()
        result = await guest.wait()
    assert result.output.count("3 received, 0% packet loss") == 2
    return result.output


@many_windows
async def test_msix_works_with_the_irqchip_that_comes_at_boot(
    boot_guest: BootGuest, serve_cards: ServeCards, networks: list[Network]
) -> None:
    async with serve_cards(*ports(networks)) as cards:
        output = await ping_in_machine("dual", "quiet", boot_guest, cards, ("XIVE", IrqKind.MSIX))
    received_by = re.findall(r"MSI\S* +\d+ Edge +virtio([01])-input\.0$", output, re.MULTILINE)
    assert received_by == ["0", "1"], output


@many_windows
async def test_intx_works_with_xics_alone(
    boot_guest: BootGuest, serve_cards: ServeCards, networks: list[Network]
) -> None:
    async with serve_cards(*ports(networks)) as cards:
        output = await ping_in_machine("xics", "quiet pci=nomsi", boot_guest, cards, ("XICS", IrqKind.INTX))
    served = interrupts(output, r"XICS +\d+ Level")
    assert len(served) == 2, output
    assert min(served) > 0


async def test_qemu_itself_aborts_when_one_card_alone_is_below_a_host_bridge(
    boot_guest: BootGuest, serve_cards: ServeCards
) -> None:
    """QEMU 11.1 takes the container of such a card for one of the kernel's VFIO (hw/ppc/spapr_pci_vfio.c,
    vfio_eeh_as_container; two containers it lets alone). When this test fails, QEMU is mended.
    """
    async with serve_cards("loopback") as (card,):
        with pytest.raises(GuestError, match="QEMU ended with status -6") as failed:
            await boot_guest("true", [card.socket], qemu_args=["-S"])
    assert "is not an instance of type vfio-iommu-legacy" in failed.value.result.qemu_stderr
