"""INTx as a guest lives with it: both of its interrupt controllers, shared lines, resets, changes to MSI-X.

Without KVM, QEMU passes each interrupt on by itself and takes the guest's next access to a BAR for the end of
it. So it maps no BAR from the first INTx on, until MSI-X takes over.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
import trio

from device.function import IrqKind, MemoryBar
from tests.guest import Card, Network, Root
from tests.guest.cards import ServedCard
from tests.guest.conftest import BootGuest, ServeCards
from tests.guest.test_traffic import IPERF, UP_BOTH, received

NO_MSI = "quiet pci=nomsi"
SIZES = [0, 1, 500, 1472, 1473, 9000, 30000]
SWITCHES = 10
WORDS = 20
PATTERN = 40_503_001  # so that each word differs from its neighbours in every byte

# What the scripts share. `check_line` fails if the kernel turned the line off, or if more than one in four of
# its interrupts was nobody's. A few are: QEMU lets the line go at any access to a BAR, so also at one that
# comes before the interrupt is taken.
TOOLS = """
function=$(basename $(card))
line() { grep 'virtio[0-9]' /proc/interrupts; }
count() { line | awk '{ print $2 }'; }
check_line() {
    if dmesg | grep -e "nobody cared" -e "Disabling IRQ"; then return 1; fi
    set -- $(cat /proc/irq/$(line | cut -d : -f 1 | tr -d ' ')/spurious)
    test $4 -le $(( $(count) / 4 ))
}
unbind() { echo $function > /sys/bus/pci/drivers/virtio-pci/unbind; }
bind() { echo $function > /sys/bus/pci/drivers/virtio-pci/bind; }
up() { modprobe virtio_net; dev=$(nic); ip addr add 10.77.0.2/24 dev $dev; bring_up $dev; }
"""


class Pings:
    """The answers to a ping that goes on beside a test."""

    def __init__(self) -> None:
        self.answered: list[int] = []
        self._news = trio.Event()

    async def listen(self, stream: trio.abc.ReceiveStream) -> None:
        """Read what ping prints, which it does without end."""
        text = ""
        async for chunk in stream:
            *lines, text = (text + chunk.decode()).split("\n")
            for line in lines:
                if answer := re.search(r" bytes from .* icmp_seq=(\d+)", line):
                    self.answered.append(int(answer[1]))
            self._news.set()
            self._news = trio.Event()
        raise AssertionError("ping ended")

    async def flow(self, count: int = 10) -> None:
        """Wait until answers come, and then for `count` more; AssertionError if one is missing in between."""
        start = len(self.answered)
        while len(self.answered) <= start + count:
            await self._news.wait()
        numbers = self.answered[start:]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))


@asynccontextmanager
async def pinging(network: Network, root: Root, card: ServedCard) -> AsyncIterator[Pings]:
    """Let the host ping the guest every 10 ms while the block runs."""
    # Nobody asks for an address, so that answers depend on nothing but the card.
    neighbour = ("neigh", "replace", network.guest_address, "lladdr", card.mac, "dev", network.tap)
    await network.run(root, "ip", *neighbour, "nud", "permanent")
    printed, prints = os.pipe()
    # Started from this very thread: the death signal is tied to the thread that starts it.
    command = network.command(root, "ping", "-n", "-i", "0.01", network.guest_address)
    process = subprocess.Popen(  # noqa: ASYNC220
        ["setpriv", "--pdeathsig", "KILL", "--", *command],
        stdin=subprocess.DEVNULL,
        stdout=prints,
    )
    os.close(prints)
    pings = Pings()
    try:
        async with trio.lowlevel.FdStream(printed) as stream, trio.open_nursery() as nursery:
            nursery.start_soon(pings.listen, stream)
            yield pings
            nursery.cancel_scope.cancel()
    finally:
        process.kill()
        process.wait()


async def until(condition: Callable[[], bool]) -> None:
    """Wait until the card is in a state that no event tells of; a guest's deadline ends it."""
    while not condition():  # noqa: ASYNC110
        await trio.sleep(0.005)


def count_accesses(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list that each access by message to the memory of a card made later adds to."""
    seen: list[str] = []
    read, write = MemoryBar.read, MemoryBar.write

    def read_and_tell(bar: MemoryBar, offset: int, count: int) -> bytes:
        seen.append("read")
        return read(bar, offset, count)

    def write_and_tell(bar: MemoryBar, offset: int, data: bytes) -> None:
        seen.append("write")
        write(bar, offset, data)

    monkeypatch.setattr(MemoryBar, "read", read_and_tell)
    monkeypatch.setattr(MemoryBar, "write", write_and_tell)
    return seen


@pytest.mark.parametrize(
    ("arguments", "chip"), [("", r"IO-APIC +\d+-fasteoi"), ("noapic", r"XT-PIC")], ids=["ioapic", "pic"]
)
async def test_frames_of_every_size_pass_both_ways_through_either_interrupt_controller(
    boot_guest: BootGuest, card: ServedCard, network: Network, guest_root: Root, arguments: str, chip: str
) -> None:
    pings = "\n".join(f"ping -c 1 -W 2 -s {size} -p a5 10.77.0.1" for size in SIZES)
    script = f"""{TOOLS} up; {pings}
    iperf3 -c 10.77.0.1 -n 8M -J > /tmp/up; iperf3 -c 10.77.0.1 -n 8M -R -J > /tmp/down
    tell loaded; await_host
    cat /tmp/up; echo SPLIT; cat /tmp/down; echo SPLIT; line; check_line
    """
    async with (
        network.running(guest_root, "iperf3", "-s", port=IPERF),
        boot_guest(script, [card.socket], kernel_args=f"{NO_MSI} {arguments}") as guest,
    ):
        await guest.expect("loaded")
        for size in SIZES:
            options = ("-c", "1", "-W", "2", "-s", str(size), "-p", "a5")
            report = await network.run(guest_root, "ping", *options, network.guest_address)
            assert " 0% packet loss" in report
            assert "wrong data" not in report
        assert card.nic.function.interrupts.active is IrqKind.INTX
        guest.say()
        result = await guest.wait()
    assert result.output.count(" 0% packet loss") == len(SIZES)
    assert "wrong data" not in result.output
    up, down, line = result.output[result.output.index("{") :].split("SPLIT")
    assert received(up) >= 8 << 20
    assert received(down) >= 8 << 20
    served = re.search(rf"\d+: +(\d+) +{chip} +virtio0", line)
    assert served, line
    assert 100 < int(served[1]) <= card.nic.function.interrupts.lines.signals
    assert card.counters["tx_dropped"] == card.counters["rx_dropped"] == 0


async def test_the_driver_changes_between_msix_and_intx_while_the_host_pings(
    boot_guest: BootGuest, card: ServedCard, network: Network, guest_root: Root
) -> None:
    script = f"""{TOOLS} up
    tell bound $(line); await_host
    for switch in $(seq {SWITCHES}); do
        unbind
        tell unbound; await_host
        echo $(( (switch + 1) % 2 )) > /sys/bus/pci/devices/$function/msi_bus
        bind; up
        tell bound $(line); await_host
        if [ $(( switch % 2 )) -eq 1 ]; then check_line; fi
    done
    """
    interrupts = card.nic.function.interrupts
    async with boot_guest(script, [card.socket]) as guest, pinging(network, guest_root, card) as pings:
        for switch in range(SWITCHES + 1):
            lines = await guest.expect("bound")
            await pings.flow()
            if switch % 2:
                assert "IO-APIC" in lines
                assert "MSI" not in lines
                assert interrupts.active is IrqKind.INTX
            else:
                assert "MSIX" in lines
                assert "IO-APIC" not in lines
                assert interrupts.active is IrqKind.MSIX
                assert interrupts.line.fd is None  # whatever happens, INTx cannot be signalled
                assert not interrupts.lines.intx_asserted
            guest.say()
            if switch < SWITCHES:
                await guest.expect("unbound")
                assert interrupts.active is IrqKind.INTX
                guest.say()
        await guest.wait()


async def test_two_cards_share_one_line(
    boot_guest: BootGuest, serve_cards: ServeCards, make_network: Callable[..., Network], guest_root: Root
) -> None:
    networks = [make_network(tap=f"tap{n}", subnet=f"10.77.{n}") for n in range(2)]
    script = f"""{UP_BOTH} {TOOLS}
    for n in 0 1; do ping -c 100 -i 0.005 -s 1400 10.77.$n.1 > /tmp/$n & done; wait
    cat /tmp/0 /tmp/1
    tell sent $(line); await_host
    unbind
    tell alone $(line); await_host
    check_line
    """
    ports = [f"tap:name={network.tap},netns={network.path}" for network in networks]
    async with serve_cards(*ports) as cards:
        # Four slots apart, so that both have the same line of the root bus.
        slots = [Card(card.socket, options={"addr": f"{4 * n + 4:x}"}) for n, card in enumerate(cards)]
        async with (
            boot_guest(script, slots, kernel_args=NO_MSI) as guest,
            pinging(networks[0], guest_root, cards[0]) as first,
            pinging(networks[1], guest_root, cards[1]) as second,
        ):
            assert re.search(r"IO-APIC +\d+-fasteoi +virtio0, virtio1", await guest.expect("sent"))
            await first.flow()
            await second.flow()
            guest.say()
            assert re.search(r"IO-APIC +\d+-fasteoi +virtio1", await guest.expect("alone"))
            await second.flow()
            guest.say()
            result = await guest.wait()
        assert all(card.counters["tx_frames"] >= 100 for card in cards)
    assert result.output.count("100 received, 0% packet loss") == 2


async def test_resets_and_reboots_under_traffic_leave_the_line_in_order(
    boot_guest: BootGuest, card: ServedCard, network: Network, guest_root: Root
) -> None:
    script = f"""{TOOLS} up
    ping -i 0.002 10.77.0.1 > /dev/null &
    tell busy $(line); await_host
    check_line
    if [ $BOOT -eq 2 ]; then reboot; fi
    """
    lines = card.nic.function.interrupts.lines
    async with (
        boot_guest(script, [card.socket], kernel_args=NO_MSI) as guest,
        pinging(network, guest_root, card) as pings,
    ):
        for boot in (1, 2, 3):
            assert "IO-APIC" in await guest.expect("busy")
            assert guest.boots == boot
            await pings.flow()
            if boot == 1:
                # While the processor stands still, an interrupt is under way for sure.
                await guest.qmp("stop")
                await until(lambda: lines.intx_asserted and lines.intx_masked)
                await guest.reset()
                await guest.qmp("cont")
            else:
                guest.say()
        await guest.wait()


async def test_a_line_that_the_guest_disables_is_silent_and_loses_nothing(
    boot_guest: BootGuest, card: ServedCard, network: Network, guest_root: Root
) -> None:
    script = f"""{TOOLS} up
    tell flowing; await_host
    for again in 1 2; do
        setpci -s $function COMMAND=400:400
        before=$(count)
        tell disabled; await_host
        test $(count) -eq $before
        setpci -s $function COMMAND=0:400
        tell flowing; await_host
    done
    setpci -s $function COMMAND=400:400
    tell high; await_host
    unbind; bind; up
    tell flowing
    await_host
    check_line
    """
    lines = card.nic.function.interrupts.lines
    async with (
        boot_guest(script, [card.socket], kernel_args=NO_MSI) as guest,
        pinging(network, guest_root, card) as pings,
    ):
        await guest.expect("flowing")
        await pings.flow()
        first = pings.answered[-1]
        for _ in range(2):
            guest.say()
            await guest.expect("disabled")
            assert lines.intx_disabled
            signals = lines.signals
            await until(lambda: lines.intx_asserted)
            frames, answers = card.counters["rx_frames"], len(pings.answered)
            await until(lambda: card.counters["rx_frames"] >= frames + 20)  # noqa: B023
            assert lines.intx_asserted
            assert lines.signals == signals
            assert len(pings.answered) < answers + 10  # those under way
            guest.say()
            await guest.expect("flowing")
            await pings.flow(30)
        answered = pings.answered[pings.answered.index(first) :]
        assert answered == list(range(first, first + len(answered)))
        guest.say()
        await guest.expect("high")
        await until(lambda: lines.intx_asserted)
        guest.say()
        await guest.expect("flowing")
        await pings.flow()
        assert not lines.intx_disabled
        guest.say()
        await guest.wait()


async def test_memory_that_intx_keeps_from_being_mapped_is_right_throughout(
    boot_guest: BootGuest,
    serve_cards: ServeCards,
    network: Network,
    guest_root: Root,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Accesses by message are those of the time from the first INTx to the change to MSI-X, all of them."""
    script = f"""{TOOLS}
    memory=$(sed -n 3p $(card)/resource | cut -d' ' -f1)
    write() {{
        for n in $(seq {WORDS}); do devmem $(( memory + 4 * n )) 32 $(( {PATTERN} * (n + $1) )); done
    }}
    check() {{
        for n in $(seq {WORDS}); do
            test $(( $(devmem $(( memory + 4 * n ))) )) -eq $(( {PATTERN} * (n + $1) ))
        done
    }}
    write 1; tell idle; await_host
    echo 0 > /sys/bus/pci/devices/$function/msi_bus
    up; tell intx; await_host
    check 1; write 2; check 2; tell busy; await_host
    unbind
    echo 1 > /sys/bus/pci/devices/$function/msi_bus
    bind; up; tell msix; await_host
    check 2; write 3; tell done; await_host
    """
    by_message = count_accesses(monkeypatch)
    spec = f"tap:name={network.tap},netns={network.path}"
    async with serve_cards(spec) as (card,):
        memory = card.nic.card.memory

        def written(number: int) -> bool:
            words = [PATTERN * (n + number) for n in range(1, WORDS + 1)]
            return memory.load(4, 4 * WORDS) == b"".join(word.to_bytes(4, "little") for word in words)

        async with boot_guest(script, [card.socket]) as guest, pinging(network, guest_root, card) as pings:
            await guest.expect("idle")
            assert written(1)
            assert by_message == []
            guest.say()
            await guest.expect("intx")
            await pings.flow()
            guest.say()
            await guest.expect("busy")
            await pings.flow()
            assert written(2)
            assert by_message == ["read"] * WORDS + ["write"] * WORDS + ["read"] * WORDS
            guest.say()
            await guest.expect("msix")
            await pings.flow()
            guest.say()
            await guest.expect("done")
            assert written(3)
            assert len(by_message) == 3 * WORDS
            guest.say()
            await guest.wait()
