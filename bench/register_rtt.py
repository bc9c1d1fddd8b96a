"""The price of one register: round trips of a 4-byte BAR read, beside a C server on libvfio-user.

``python -m bench.register_rtt --help`` tells how to run it, ``bench/README.md`` what its numbers mean.
"""

from __future__ import annotations

import array
import shlex
import statistics
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import click
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from bench._reporting import report, require_both_cpus
from bench._servers import DEFAULT_COMMAND, Server, busy, libvfio_user_command, register_client, running
from tests.peers.cache import PeerError

SERVER_CPU = 0
OURS, THEIRS = "trionic", "libvfio-user"
LISTENING_TARGET = 0.2


@dataclass(frozen=True)
class Scenario:
    """One way for server and client to share the CPUs, and how close to the C server it should come."""

    name: str
    what: str
    target: float
    """The largest acceptable ratio, ours to theirs."""
    client_cpu: int
    reads: int
    client_flags: tuple[str, ...] = ()
    poll: bool = False
    together: bool = False
    """Read from the servers in turn, not round by round: fair where each sleeps while the other is read."""
    neighbour: bool = False
    """Something else wants the server's CPU all the time."""
    percentile: Literal["p50", "p90"] = "p50"
    """What is compared."""


_RARE = ("-p", "200", "-u", "30")
SCENARIOS = [
    Scenario("one-core", "both on one CPU, both sleep: software alone", 1.35, 0, 6000),
    Scenario("asleep", "a CPU each, both asleep before each read", 1.05, 1, 1000, _RARE, together=True),
    Scenario("poll", "a CPU each, neither sleeps", 1.25, 1, 20000, ("-s",), poll=True),
    Scenario(
        *("neighbour", "asleep, and the server's CPU busy with something else", 1.5, 1, 500, _RARE),
        neighbour=True,
        percentile="p90",
    ),
]


@dataclass(frozen=True)
class Register:
    """What is read."""

    region: int
    offset: int
    width: int

    def flags(self) -> list[str]:
        """The client's options that choose it."""
        return ["-r", str(self.region), "-o", str(self.offset), "-w", str(self.width)]


@dataclass(frozen=True)
class Latency:
    """Percentiles in microseconds; over all rounds, each is the median of the rounds' own."""

    p50: float
    p90: float
    p99: float


@dataclass(frozen=True)
class Outcome:
    """What a scenario measured."""

    scenario: str
    ours: Latency | None
    theirs: Latency | None
    ratio: float
    """The median over rounds of (ours / theirs); seconds for `listening`."""
    spread: tuple[float, float]
    """The least and the greatest of the same."""
    target: float

    @property
    def met(self) -> bool:
        """Whether the target is reached."""
        return self.ratio <= self.target


def _percentiles(sample: Sequence[int]) -> Latency:
    ordered = sorted(sample)
    at = [ordered[len(ordered) * percent // 100] / 1000 for percent in (50, 90, 99)]
    return Latency(*at)


def _typical(rounds: Sequence[Latency]) -> Latency:
    return Latency(
        statistics.median(one.p50 for one in rounds),
        statistics.median(one.p90 for one in rounds),
        statistics.median(one.p99 for one in rounds),
    )


def _read_registers(scenario: Scenario, register: Register, servers: Sequence[Server]) -> list[Latency]:
    """One round; the servers run only as long as they are measured."""
    command: list[str | Path] = [register_client(), "-b", "-c", str(scenario.client_cpu)]
    command += ["-n", str(scenario.reads), *scenario.client_flags, *register.flags()]
    command += [server.path for server in servers]
    names = ", ".join(server.path.stem for server in servers)
    for server in servers:
        server.thaw()
    try:
        done = subprocess.run(command, capture_output=True, check=False, timeout=120)
    except subprocess.TimeoutExpired:
        raise PeerError(f"no answer from {names}: `{shlex.join(map(str, command))}`") from None
    finally:
        for server in servers:
            server.freeze()
    if done.returncode:
        raise PeerError(f"{names}: {done.stderr.decode(errors='replace').strip()}")
    sample = array.array("I", done.stdout)
    return [_percentiles(sample[at : at + scenario.reads]) for at in range(0, len(sample), scenario.reads)]


def measure(
    scenario: Scenario, commands: dict[str, str], register: Register, rounds: int, scratch: Path
) -> Outcome:
    """Run both servers through a scenario in turns, the first one changing from round to round."""
    seen: dict[str, list[Latency]] = {name: [] for name in commands}
    with ExitStack() as stack:
        servers = {}
        for name, command in commands.items():
            path = scratch / f"{name}.sock"
            servers[name] = stack.enter_context(running(command, path, SERVER_CPU))
            servers[name].freeze()
        if scenario.neighbour:
            stack.enter_context(busy(SERVER_CPU))
        for number in range(rounds):
            order = list(servers)[:: 1 if number % 2 else -1]
            for names in [order] if scenario.together else [[name] for name in order]:
                measured = _read_registers(scenario, register, [servers[name] for name in names])
                for name, latency in zip(names, measured, strict=True):
                    seen[name].append(latency)
    ratios = [
        getattr(ours, scenario.percentile) / getattr(theirs, scenario.percentile)
        for ours, theirs in zip(seen[OURS], seen[THEIRS], strict=True)
    ]
    return Outcome(
        scenario.name,
        _typical(seen[OURS]),
        _typical(seen[THEIRS]),
        statistics.median(ratios),
        (min(ratios), max(ratios)),
        scenario.target,
    )


def measure_listening(command: str, times: int, scratch: Path) -> Outcome:
    """Seconds from exec until a client can connect.

    The first start is not counted: it reads the disk and writes Python's compiled files.
    """
    taken = []
    for _ in range(times + 1):
        server = Server(command, scratch / "listening.sock")
        try:
            taken.append(server.wait_until_listening())
        finally:
            server.stop()
    counted = taken[1:]
    return Outcome(
        "listening", None, None, statistics.median(counted), (min(counted), max(counted)), LISTENING_TARGET
    )


def _cells(outcome: Outcome) -> list[str]:
    def told(latency: Latency | None) -> list[str]:
        return ["", ""] if latency is None else [f"{latency.p50:.1f}", f"{latency.p90:.1f}"]

    unit = " s" if outcome.scenario == "listening" else ""
    low, high = outcome.spread
    return [
        outcome.scenario,
        *told(outcome.ours),
        *told(outcome.theirs),
        f"{outcome.ratio:.2f}{unit}",
        f"{low:.2f}-{high:.2f}",
        f"{outcome.target:.2f}{unit}",
        "[green]met[/]" if outcome.met else "[red]missed[/]",
    ]


def _table(outcomes: Sequence[Outcome]) -> Table:
    table = Table(
        title=f"One register read in us: {OURS} (A) beside {THEIRS} (B)",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("scenario", no_wrap=True)
    for heading in ("A p50", "p90", "B p50", "p90", "A / B", "rounds", "target", ""):
        table.add_column(heading, justify="right", no_wrap=True)
    for outcome in outcomes:
        table.add_row(*_cells(outcome))
    return table


NAMES = [scenario.name for scenario in SCENARIOS]


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "-s",
    "--scenario",
    "chosen",
    multiple=True,
    type=click.Choice([*NAMES, "listening"]),
    help="Run only this one; repeat for several.  [default: all]",
)
@click.option("--rounds", type=click.IntRange(1), default=10, show_default=True, help="Turns of each server.")
@click.option(
    "--server-command",
    metavar="COMMAND",
    default=DEFAULT_COMMAND,
    help="The server to measure; {socket} is replaced by a path.  [default: `trionic serve` of this tree]",
)
@click.option(
    "--poll-arguments",
    metavar="ARGS",
    default="--poll 1000",
    show_default=True,
    help="What makes that server spin; appended in the scenario `poll`.",
)
@click.option("--region", type=click.IntRange(0), default=0, show_default=True, help="Read this region.")
@click.option("--offset", type=click.IntRange(0), default=0, show_default=True, help="Read at this offset.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@click.option("--check", is_flag=True, help="Exit with status 1 when a target is missed.")
def main(
    chosen: tuple[str, ...],
    rounds: int,
    server_command: str,
    poll_arguments: str,
    region: int,
    offset: int,
    as_json: bool,
    check: bool,
) -> None:
    """Measure what a register read costs, as a ratio to the same read from a C server on libvfio-user.

    Both servers run throughout and take turns in every round, so a busy machine slows both; the ratio is
    what remains. The C library is built on first use from Debian's sources, which takes some ten seconds,
    a network and, to install its one dependency, root.

    \b
    Scenarios:
      one-core   server and client on one CPU, both sleep: the cost of software alone
      asleep     a CPU each, asleep before each read: what a driver's rare register access sees
      poll       a CPU each, neither sleeps: the least latency
      neighbour  as asleep, while something else wants the server's CPU; compares the 90th percentile
      listening  from starting the program to the first connection, in seconds

    \b
    Examples:
      python -m bench.register_rtt
      python -m bench.register_rtt -s one-core --rounds 30
      python -m bench.register_rtt --check --json > register_rtt.json
      python -m bench.register_rtt --server-command './my_server {socket}' --poll-arguments --spin
    """
    console = Console(stderr=True)
    names = chosen or (*NAMES, "listening")
    register = Register(region, offset, 4)
    outcomes: list[Outcome] = []
    require_both_cpus()
    try:
        with tempfile.TemporaryDirectory(prefix="register-rtt-") as directory:
            scratch = Path(directory)
            for scenario in SCENARIOS:
                if scenario.name not in names:
                    continue
                with console.status(f"{scenario.name}: {scenario.what}"):
                    ours = f"{server_command} {poll_arguments}" if scenario.poll else server_command
                    commands = {OURS: ours, THEIRS: libvfio_user_command(poll=scenario.poll)}
                    outcomes.append(measure(scenario, commands, register, rounds, scratch))
            if "listening" in names:
                with console.status("listening"):
                    outcomes.append(measure_listening(server_command, rounds, scratch))
    except PeerError as error:
        raise click.ClickException(str(error)) from error
    report(outcomes, _table, as_json=as_json, check=check)


if __name__ == "__main__":
    main()
