"""What TCP gets through the card by each of its drivers, beside another card in the same guest and run.

``python -m bench.guest_iperf --help`` tells how to run it, ``bench/README.md`` what its numbers mean.
"""

from __future__ import annotations

import os
import re
import statistics
import tempfile
from collections.abc import Sequence
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import click
import trio
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from bench._reporting import report
from bench._servers import DEFAULT_COMMAND, Server, running
from tests.guest import GuestError, Network, RigError, boot, guest_root
from tests.peers.cache import PeerError

IPERF_PORT = 5201
BOOT_SECONDS = 60  # what a guest may take besides its transfers


@dataclass(frozen=True)
class Scenario:
    """A direction of traffic, with or without the work left to the card."""

    name: str
    what: str
    flags: str
    offloads: bool

    @property
    def switch(self) -> str:
        """Whether that work is left to the card, as ethtool says it."""
        return "on" if self.offloads else "off"

    @property
    def work(self) -> str:
        """What a sender does or leaves to its card, for ``ethtool -K``."""
        return " ".join(f"{kind} {self.switch}" for kind in ("tx", "tso", "gso"))


SCENARIOS = [
    Scenario("send", "guest to host, checksum and segmentation offloaded", "", True),
    Scenario("receive", "host to guest, the same", "-R", True),
    Scenario("send-plain", "guest to host, every packet made by the guest", "", False),
    Scenario("receive-plain", "host to guest, every packet made by the host", "-R", False),
]


@dataclass(frozen=True)
class Driver:
    """What drives a card in the guest. `setup` is shell, in which $f is the card's PCI function."""

    name: str
    modules: str
    setup: str = ""


def _vdpa(name: str, driver: str) -> Driver:
    """A driver that is a parent of vDPA devices, with the kernel's own user of one, virtio_vdpa, above it."""
    setup = f"give {driver} $f; vdpa dev add name vdpa${{f##*:}} mgmtdev pci/${{f##*/}}"
    return Driver(name, f"{name} virtio_vdpa", setup)


VIRTIO_PCI = Driver("virtio-pci", "")
DRIVERS = [VIRTIO_PCI, _vdpa("ifcvf", "ifcvf"), _vdpa("vp_vdpa", "vp-vdpa")]


@dataclass(frozen=True)
class Yardstick:
    """What the drivers' figures are divided by."""

    name: str
    what: str


QEMU = Yardstick("qemu", "QEMU's own virtio-net-pci")
OWN = Yardstick("own", "this card with virtio-pci")
YARDSTICKS = [QEMU, OWN]

# The least acceptable ratio, ours to theirs.
TARGET = 0.7

# The interface of a PCI function may sit below a vDPA device.
FIND_INTERFACE = """
find_interface() {
    for one in "$(readlink -f "$1")"/virtio*/net/* "$(readlink -f "$1")"/vdpa*/virtio*/net/*; do
        if [ -e "$one" ]; then echo "${one##*/}"; return 0; fi
    done
    return 1
}
"""


@dataclass(frozen=True)
class Transfer:
    """What one transfer was like."""

    speed: float
    """Gbit/s."""
    cost: float
    """Seconds of processor time that QEMU and the card's server took for a GB."""


@dataclass(frozen=True)
class Ratio:
    """Ours to theirs: the median over rounds, the least and the greatest."""

    median: float
    least: float
    greatest: float

    @classmethod
    def of(cls, ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
        """From the rounds' figures."""
        ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
        return cls(statistics.median(ratios), min(ratios), max(ratios))

    @property
    def cells(self) -> tuple[str, str]:
        """As columns of a table."""
        return f"{self.median:.2f}", f"{self.least:.2f}-{self.greatest:.2f}"


@dataclass(frozen=True)
class Outcome:
    """What a scenario measured of a driver, in Gbit/s."""

    scenario: str
    driver: str
    against: str
    ours: float
    theirs: float
    ratio: Ratio
    cost: Ratio
    """Of the processor time for a byte."""
    target: float = TARGET

    @property
    def met(self) -> bool:
        """Whether the target is reached."""
        return self.ratio.median >= self.target


@dataclass(frozen=True)
class Plan:
    """What is to be measured. Cards are numbered: 0 is the yardstick, then one for each driver."""

    scenarios: Sequence[Scenario]
    drivers: Sequence[Driver]
    against: Yardstick
    rounds: int
    seconds: int
    cpus: int

    @property
    def cards(self) -> list[Driver]:
        """What drives each card."""
        return [VIRTIO_PCI, *self.drivers]

    @property
    def transfers_each(self) -> int:
        """How many a scenario has."""
        return len(self.cards) * self.rounds

    def script(self) -> str:
        """Transfers one after the other, each round beginning with another card."""
        lines = [line for number, driver in enumerate(self.cards) for line in _setup(number, driver)]
        numbers = range(len(self.cards))
        for scenario in self.scenarios:
            lines += [f"tell scenario {scenario.name}", "await_host > /dev/null"]
            lines += [
                f"ethtool -K $dev{number} {scenario.work} gro {scenario.switch} || true" for number in numbers
            ]
            for turn in range(self.rounds):
                first = turn % len(numbers)
                for number in [*numbers[first:], *numbers[:first]]:
                    length = f"-t {self.seconds}"
                    lines += [
                        f"tell begin {number}; await_host > /dev/null",
                        f"iperf3 -c {_subnet(number)}.1 {length} {scenario.flags} -J > /tmp/report",
                        "tell result $(grep -A12 sum_received /tmp/report)",
                    ]
        return "\n".join(lines)


def _subnet(number: int) -> str:
    """Each card has its own, so that routes tell them apart."""
    return f"10.77.{number}"


def _setup(number: int, driver: Driver) -> list[str]:
    """Shell that gives the card its driver and its interface an address, and calls the interface $devN."""
    interface = f"dev{number}"
    return [
        f"for module in virtio_net {driver.modules}; do modprobe $module; done",
        f"f=$(card {number})",
        driver.setup,
        f'wait_for 10 find_interface "$f"; {interface}=$(find_interface "$f")',
        f"ip addr add {_subnet(number)}.2/24 dev ${interface}; ip link set ${interface} up",
    ]


async def measure(plan: Plan, command: str, console: Console) -> list[Outcome]:
    """Boot one guest with all cards and let it transfer; raises GuestError, RigError or PeerError."""
    root = await trio.to_thread.run_sync(guest_root)
    seen: dict[tuple[str, int], list[Transfer]] = {}
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="guest-iperf-")))
        networks = [
            stack.enter_context(Network(tap=f"tap{number}", subnet=_subnet(number)))
            for number in range(len(plan.cards))
        ]
        # QEMU's own card comes first on its command line, and so on the bus.
        taken = [networks[0].tap] if plan.against is QEMU else []
        servers: dict[int, Server] = {}
        for number, network in list(enumerate(networks))[len(taken) :]:
            port = f"tap:name={network.tap},netns={network.path}"
            path = scratch / f"{network.tap}.sock"
            servers[number] = stack.enter_context(running(f"{command} --port {port}", path))
        async with AsyncExitStack() as peers:
            for network in networks:
                await peers.enter_async_context(network.running(root, "iperf3", "-s", port=IPERF_PORT))
            guest = await peers.enter_async_context(
                boot(
                    FIND_INTERFACE + plan.script(),
                    [server.path for server in servers.values()],
                    network=networks[0],
                    taps=taken,
                    smp=plan.cpus,
                    deadline=BOOT_SECONDS + len(plan.scenarios) * plan.transfers_each * (plan.seconds + 3),
                )
            )
            for scenario in plan.scenarios:
                await guest.expect("scenario")
                for network in networks:
                    await network.run(root, "ethtool", "-K", network.tap, *scenario.work.split())
                guest.say()
                for number in range(plan.transfers_each):
                    console.print(f"{scenario.name} {number + 1} of {plan.transfers_each}   ", end="\r")
                    card = int(await guest.expect("begin"))
                    taking_part = [guest.pid, *(servers[card].pid for _ in range(card in servers))]
                    before = _processor_seconds(taking_part)
                    guest.say()
                    report = await guest.expect("result")
                    spent = _processor_seconds(taking_part) - before
                    seen.setdefault((scenario.name, card), []).append(_transfer(report, spent))
            await guest.wait()
    return [
        _outcome(scenario, driver, plan.against, seen[scenario.name, number], seen[scenario.name, 0])
        for number, driver in enumerate(plan.drivers, start=1)
        for scenario in plan.scenarios
    ]


def _processor_seconds(pids: Sequence[int]) -> float:
    """What these processes took so far, in the kernel as well; to a hundredth of a second."""
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])  # utime and stime, proc_pid_stat(5)
    return ticks / os.sysconf("SC_CLK_TCK")


def _transfer(report: str, spent: float) -> Transfer:
    """From what iperf3 said of the receiver in its JSON, and the processor time."""
    told = dict(re.findall(r'"(bytes|bits_per_second)":\s*([0-9.e+]+)', report))
    return Transfer(float(told["bits_per_second"]) / 1e9, spent / float(told["bytes"]) * 1e9)


def _outcome(
    scenario: Scenario,
    driver: Driver,
    against: Yardstick,
    ours: Sequence[Transfer],
    theirs: Sequence[Transfer],
) -> Outcome:
    our_speed, their_speed = ([one.speed for one in side] for side in (ours, theirs))
    our_cost, their_cost = ([one.cost for one in side] for side in (ours, theirs))
    return Outcome(
        scenario.name,
        driver.name,
        against.name,
        statistics.median(our_speed),
        statistics.median(their_speed),
        Ratio.of(our_speed, their_speed),
        Ratio.of(our_cost, their_cost),
    )


def _table(outcomes: Sequence[Outcome]) -> Table:
    [yardstick] = {one.what for one in YARDSTICKS if one.name == outcomes[0].against}
    table = Table(title=f"TCP in Gbit/s: this card (A) beside {yardstick} (B)", box=SIMPLE_HEAD)
    for heading in ("driver", "scenario"):
        table.add_column(heading, no_wrap=True)
    for heading in ("A", "B", "A / B", "rounds", "target", "", "CPU A / B", "rounds"):
        table.add_column(heading, justify="right", no_wrap=True)
    for outcome in outcomes:
        table.add_row(
            outcome.driver,
            outcome.scenario,
            f"{outcome.ours:.2f}",
            f"{outcome.theirs:.2f}",
            *outcome.ratio.cells,
            f"{outcome.target:.2f}",
            "[green]met[/]" if outcome.met else "[red]missed[/]",
            *outcome.cost.cells,
        )
    return table


Named = TypeVar("Named", Scenario, Driver, Yardstick)


def _chosen(everything: Sequence[Named], names: Sequence[str]) -> list[Named]:
    """Those of these names, in the order in which they stand; without names all of them."""
    return [one for one in everything if not names or one.name in names]


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "-s",
    "--scenario",
    "scenarios",
    multiple=True,
    type=click.Choice([scenario.name for scenario in SCENARIOS]),
    help="Run only this one; repeat for several.  [default: all]",
)
@click.option(
    "-d",
    "--driver",
    "drivers",
    multiple=True,
    type=click.Choice([driver.name for driver in DRIVERS]),
    help="What drives our card; repeat for several, each with a card of its own.  [default: virtio-pci]",
)
@click.option(
    "--against",
    type=click.Choice([yardstick.name for yardstick in YARDSTICKS]),
    default=QEMU.name,
    show_default=True,
    help="What it is compared with: QEMU's own virtio-net-pci, or another card of ours with virtio-pci.",
)
@click.option(
    "--rounds", type=click.IntRange(1), default=5, show_default=True, help="Transfers of each card."
)
@click.option(
    "--seconds", type=click.IntRange(1), default=2, show_default=True, help="The length of a transfer."
)
@click.option(
    "--cpus",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="The guest's processors. ifcvf takes no more vectors than there are, and with one reads the ISR.",
)
@click.option(
    "--server-command",
    metavar="COMMAND",
    default=DEFAULT_COMMAND,
    help="The server to measure, without its --port.  [default: `trionic serve` of this tree]",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@click.option("--check", is_flag=True, help="Exit with status 1 when a target is missed.")
def main(
    scenarios: tuple[str, ...],
    drivers: tuple[str, ...],
    against: str,
    rounds: int,
    seconds: int,
    cpus: int,
    server_command: str,
    as_json: bool,
    check: bool,
) -> None:
    """Measure a guest's TCP throughput through the card, as a ratio to another card in the same guest.

    One guest has all cards, each on a TAP device in a network namespace of its own, and transfers through
    them in turn. Needs root; QEMU and the guest are fetched on first use.

    \b
    Examples:
      python -m bench.guest_iperf
      python -m bench.guest_iperf -s send --rounds 10 --seconds 4
      python -m bench.guest_iperf -d ifcvf -d vp_vdpa --against own
      python -m bench.guest_iperf --check --json > guest_iperf.json
    """
    [yardstick] = _chosen(YARDSTICKS, [against])
    plan = Plan(
        _chosen(SCENARIOS, scenarios),
        _chosen(DRIVERS, drivers or [VIRTIO_PCI.name]),
        yardstick,
        rounds,
        seconds,
        cpus,
    )
    try:
        outcomes = trio.run(measure, plan, server_command, Console(stderr=True))
    except (GuestError, RigError, PeerError) as error:
        raise click.ClickException("\n".join([str(error), *getattr(error, "__notes__", [])])) from error
    report(outcomes, _table, as_json=as_json, check=check)


if __name__ == "__main__":
    main()
