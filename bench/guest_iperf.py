"""What TCP gets through the card, beside QEMU's own virtio-net in the same guest and run.

``python -m bench.guest_iperf --help`` tells how to run it, ``bench/README.md`` what its numbers mean.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass
from pathlib import Path

import click
import trio
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from bench._reporting import report
from bench._servers import DEFAULT_COMMAND, running
from tests.guest import Card, GuestError, Network, RigError, boot, guest_root
from tests.peers.cache import PeerError

OURS, THEIRS = "trionic", "virtio-net-pci"
IPERF_PORT = 5201
BOOT_SECONDS = 60  # what a guest may take besides its transfers


@dataclass(frozen=True)
class Scenario:
    """A direction of traffic, with or without the work left to the card."""

    name: str
    what: str
    flags: str
    offloads: bool


SCENARIOS = [
    Scenario("send", "guest to host, checksum and segmentation offloaded", "", True),
    Scenario("receive", "host to guest, the same", "-R", True),
    Scenario("send-plain", "guest to host, every packet made by the guest", "", False),
    Scenario("receive-plain", "host to guest, the same", "-R", False),
]

# The least acceptable ratio, ours to theirs.
TARGET = 0.7

# Each card is known by the bus it sits on; each has its own subnet, so routes tell them apart.
SETUP = """
modprobe virtio_net
for n in 0 1; do
    dev=$(nic $n)
    case "$(ethtool -i $dev | grep bus-info)" in *:01:00.0) subnet=0;; *) subnet=1;; esac
    ip addr add 10.77.$subnet.2/24 dev $dev
    ip link set $dev up
done
"""


@dataclass(frozen=True)
class Outcome:
    """What a scenario measured, in Gbit/s."""

    scenario: str
    ours: float
    theirs: float
    ratio: float
    """The median over rounds of (ours / theirs)."""
    spread: tuple[float, float]
    """The least and the greatest of the same."""
    target: float = TARGET

    @property
    def met(self) -> bool:
        """Whether the target is reached."""
        return self.ratio >= self.target


def _script(scenarios: Sequence[Scenario], rounds: int, seconds: float) -> str:
    """Transfers one after the other, the first card changing from round to round."""
    lines = [SETUP]
    for scenario in scenarios:
        switch = "on" if scenario.offloads else "off"
        work = " ".join(f"{kind} {switch}" for kind in ("tx", "tso", "gso", "gro"))
        lines += [f"for n in 0 1; do ethtool -K $(nic $n) {work} || true; done"]
        for number in range(rounds):
            for subnet in (0, 1)[:: 1 if number % 2 else -1]:
                lines += [
                    f"iperf3 -c 10.77.{subnet}.1 -t {seconds:g} {scenario.flags} -J > /tmp/report",
                    f"tell result {scenario.name} {subnet} $(grep -A12 sum_received /tmp/report"
                    " | sed -n 's/.*bits_per_second[^0-9]*\\([0-9.e+]*\\).*/\\1/p' | head -n 1)",
                ]
    return "\n".join(lines)


async def measure(
    scenarios: Sequence[Scenario], rounds: int, seconds: float, command: str, console: Console
) -> list[Outcome]:
    """Boot one guest with both cards and let it transfer; raises GuestError, RigError or PeerError."""
    root = await trio.to_thread.run_sync(guest_root)
    seen: dict[tuple[str, str], list[float]] = {}
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="guest-iperf-")))
        networks = [stack.enter_context(Network(tap=f"tap{n}", subnet=f"10.77.{n}")) for n in range(2)]
        port = f"tap:name=tap0,netns={networks[0].path}"
        server = stack.enter_context(running(f"{command} --port {port}", scratch / "card.sock"))
        script = _script(scenarios, rounds, seconds)
        transfers = 2 * rounds * len(scenarios)
        async with AsyncExitStack() as peers:
            for network in networks:
                await peers.enter_async_context(network.running(root, "iperf3", "-s", port=IPERF_PORT))
            guest = await peers.enter_async_context(
                boot(
                    script,
                    # Behind a root port, ours is on a bus of its own and theirs is not.
                    [Card(server.path, root_port=True)],
                    network=networks[1],
                    taps=["tap1"],
                    deadline=BOOT_SECONDS + transfers * (seconds + 3),
                )
            )
            for number in range(transfers):
                console.print(f"transfer {number + 1} of {transfers}", end="\r")
                name, subnet, speed = (await guest.expect("result")).split()
                seen.setdefault((name, OURS if subnet == "0" else THEIRS), []).append(float(speed) / 1e9)
            await guest.wait()
    return [_outcome(scenario, seen) for scenario in scenarios]


def _outcome(scenario: Scenario, seen: dict[tuple[str, str], list[float]]) -> Outcome:
    ours, theirs = seen[scenario.name, OURS], seen[scenario.name, THEIRS]
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return Outcome(
        scenario.name,
        statistics.median(ours),
        statistics.median(theirs),
        statistics.median(ratios),
        (min(ratios), max(ratios)),
    )


def _table(outcomes: Sequence[Outcome]) -> Table:
    table = Table(title=f"TCP in Gbit/s: {OURS} (A) beside QEMU's {THEIRS} (B)", box=SIMPLE_HEAD)
    table.add_column("scenario", no_wrap=True)
    for heading in ("A", "B", "A / B", "rounds", "target", ""):
        table.add_column(heading, justify="right", no_wrap=True)
    for outcome in outcomes:
        table.add_row(
            outcome.scenario,
            f"{outcome.ours:.2f}",
            f"{outcome.theirs:.2f}",
            f"{outcome.ratio:.2f}",
            "{:.2f}-{:.2f}".format(*outcome.spread),
            f"{outcome.target:.2f}",
            "[green]met[/]" if outcome.met else "[red]missed[/]",
        )
    return table


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "-s",
    "--scenario",
    "chosen",
    multiple=True,
    type=click.Choice([scenario.name for scenario in SCENARIOS]),
    help="Run only this one; repeat for several.  [default: all]",
)
@click.option(
    "--rounds", type=click.IntRange(1), default=5, show_default=True, help="Transfers of each card."
)
@click.option(
    "--seconds", type=click.FloatRange(0.5), default=2, show_default=True, help="The length of a transfer."
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
    chosen: tuple[str, ...], rounds: int, seconds: float, server_command: str, as_json: bool, check: bool
) -> None:
    """Measure a guest's TCP throughput through the card, as a ratio to QEMU's own virtio-net-pci.

    One guest has both cards, each on a TAP device in a network namespace of its own, and transfers through
    them in turn. Needs root; QEMU and the guest are fetched on first use.

    \b
    Examples:
      python -m bench.guest_iperf
      python -m bench.guest_iperf -s send --rounds 10 --seconds 4
      python -m bench.guest_iperf --check --json > guest_iperf.json
    """
    scenarios = [scenario for scenario in SCENARIOS if not chosen or scenario.name in chosen]
    console = Console(stderr=True)
    try:
        outcomes = trio.run(measure, scenarios, rounds, seconds, server_command, console)
    except (GuestError, RigError, PeerError) as error:
        raise click.ClickException(str(error)) from error
    report(outcomes, _table, as_json=as_json, check=check)


if __name__ == "__main__":
    main()
