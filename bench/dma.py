"""What DMA windows cost: mapped and taken back beside libvfio-user, found and copied between beside plain C.

``python -m bench.dma --help`` tells how to run it, ``bench/README.md`` what its numbers mean.
"""

from __future__ import annotations

import array
import os
import random
import shlex
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import click
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from bench import _in_process
from bench._reporting import report, require_both_cpus
from bench._servers import DEFAULT_COMMAND, Server, dma_client, libvfio_user_dma_command, running
from device.dma import PAGE_SIZE, PROT_DMA_READ, PROT_DMA_WRITE, DmaWindows
from device.pci import MemoryBar
from tests.peers.cache import PeerError

SERVER_CPU: Final = 0
PATIENCE: Final = 120.0
BOTH: Final = PROT_DMA_READ | PROT_DMA_WRITE

LOOKUPS: Final = 100_000
SEED: Final = 5
"""Of the order in which windows are looked up: at random, so that no lookup finds what the last one did."""

COPIED_PER_ROUND: Final = 256 << 20


@dataclass(frozen=True)
class Pairs:
    """A way of mapping windows over the socket and taking them back."""

    name: str
    what: str
    client_cpu: int
    flags: tuple[str, ...]
    rounds: int
    target: float = 1.0
    """The largest acceptable ratio, ours to theirs."""


@dataclass(frozen=True)
class Lookups:
    """Finding addresses at random in a table of so many windows."""

    name: str
    windows: int
    target: float

    @property
    def what(self) -> str:
        """For people."""
        return f"an address at random in {self.windows:,} windows"


@dataclass(frozen=True)
class Copies:
    """Copying from one window into another."""

    name: str
    size: int
    target: float = 1.1
    bars: bool = False
    """Whether the windows are the BARs of two other cards."""

    @property
    def what(self) -> str:
        """For people."""
        between = "one card's BAR to another's, by a third" if self.bars else "window to window"
        return f"{self.size >> 10:,} KiB from {between}"


# libvfio-user of 2022 takes sixteen windows, one of which stays mapped.
SCENARIOS: Final[list[Pairs | Lookups | Copies]] = [
    Pairs("pair", "a window of a file that is mapped already, one core", 0, ("-k",), 1000),
    Pairs("pair-two-cores", "the same, server and client on a core each", 1, ("-k",), 1000),
    Pairs("pair-fifteen", "fifteen windows, then all are taken back, one core", 0, ("-k", "-w", "15"), 100),
    Pairs("pair-first", "the only window of its file, one core", 0, (), 1000),
    Pairs("pair-by-message", "a window without a descriptor, one core", 0, ("-m",), 1000),
    Lookups("find-10", 10, 1.25),
    Lookups("find-1000", 1000, 1.0),
    Lookups("find-65535", 65_535, 1.0),
    Lookups("find-262144", 262_144, 1.1),
    Copies("copy-64k", 64 << 10),
    Copies("copy-16m", 16 << 20),
    Copies("copy-bars", 16 << 20, bars=True),
]
NAMES: Final = [scenario.name for scenario in SCENARIOS]


@dataclass(frozen=True)
class Outcome:
    """What a scenario measured."""

    scenario: str
    what: str
    ours: float
    """Microseconds for a pair, nanoseconds for a lookup, GiB/s for copies: the median of the rounds."""
    theirs: float
    unit: str
    ratio: float
    """The median over rounds of our time to theirs."""
    spread: tuple[float, float]
    """The least and the greatest of the same."""
    target: float

    @property
    def met(self) -> bool:
        """Whether the target is reached."""
        return self.ratio <= self.target


def _outcome(
    scenario: Pairs | Lookups | Copies,
    ours: Sequence[float],
    theirs: Sequence[float],
    unit: str,
    shown: Callable[[float], float],
) -> Outcome:
    ratios = [mine / other for mine, other in zip(ours, theirs, strict=True)]
    return Outcome(
        scenario.name,
        scenario.what,
        shown(statistics.median(ours)),
        shown(statistics.median(theirs)),
        unit,
        statistics.median(ratios),
        (min(ratios), max(ratios)),
        scenario.target,
    )


# --- over the socket


def _pairs_once(scenario: Pairs, server: Server) -> float:
    """One turn of a server, which runs only meanwhile: the median pair in nanoseconds."""
    command: list[str | Path] = [dma_client(), "-c", str(scenario.client_cpu), "-n", str(scenario.rounds)]
    command += [*scenario.flags, server.path]
    server.thaw()
    try:
        done = subprocess.run(command, capture_output=True, check=False, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        raise PeerError(f"no answer: `{shlex.join(map(str, command))}`") from None
    finally:
        server.freeze()
    if done.returncode:
        raise PeerError(f"{server.path.stem}: {done.stderr.decode(errors='replace').strip()}")
    return statistics.median(array.array("I", done.stdout))


def measure_pairs(scenario: Pairs, command: str, rounds: int, scratch: Path) -> Outcome:
    """Both servers in turns, the first one changing from round to round."""
    commands = {"trionic": command, "libvfio-user": libvfio_user_dma_command()}
    seen: dict[str, list[float]] = {name: [] for name in commands}
    with ExitStack() as stack:
        servers = {}
        for name, words in commands.items():
            servers[name] = stack.enter_context(running(words, scratch / f"{name}.sock", SERVER_CPU))
            servers[name].freeze()
        for number in range(rounds):
            for name in list(servers)[:: 1 if number % 2 else -1]:
                seen[name].append(_pairs_once(scenario, servers[name]))
    return _outcome(scenario, seen["trionic"], seen["libvfio-user"], "us", lambda taken: taken / 1000)


# --- in this process


def _turns(rounds: int, ours: Callable[[], float], theirs: Callable[[], float]) -> tuple[list[float], ...]:
    """Both in turns, the first one changing from round to round, after one that does not count."""
    seen: tuple[list[float], ...] = ([], [])
    ours(), theirs()
    for number in range(rounds):
        for which in (0, 1) if number % 2 else (1, 0):
            seen[which].append((ours, theirs)[which]())
    return seen


def _memory(size: int) -> int:
    """A descriptor of memory that is there."""
    fd = os.memfd_create("bench", os.MFD_CLOEXEC)
    os.posix_fallocate(fd, 0, size)
    return fd


def measure_lookups(scenario: Lookups, rounds: int) -> Outcome:
    """The same addresses in the same windows, looked up here and in a C array by halving."""
    module = _in_process.windows()
    dma = DmaWindows()
    fd = _memory(PAGE_SIZE)
    try:
        for number in range(scenario.windows):
            dma.map(2 * number * PAGE_SIZE, PAGE_SIZE, BOTH, fd, 0)
    finally:
        os.close(fd)
    chosen = random.Random(SEED)
    addresses = array.array("Q", (2 * PAGE_SIZE * chosen.randrange(scenario.windows) for _ in range(LOOKUPS)))
    twin = module.Twin(dma)
    ours, theirs = _turns(
        rounds, lambda: module.find_ours(dma, addresses, 8), lambda: module.find_theirs(twin, addresses, 8)
    )
    return _outcome(scenario, ours, theirs, "ns", lambda taken: taken / LOOKUPS)


@contextmanager
def _two_files(scenario: Copies) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Where the source and the target are: a descriptor and an offset."""
    if scenario.bars:
        bars = [MemoryBar(2, scenario.size) for _ in range(2)]
        try:
            for bar in bars:
                os.posix_fallocate(bar.fd, 0, scenario.size)
            yield (bars[0].fd, 0), (bars[1].fd, 0)
        finally:
            for bar in bars:
                bar.close()
    else:
        fd = _memory(2 * scenario.size)
        try:
            yield (fd, 0), (fd, scenario.size)
        finally:
            os.close(fd)


def measure_copies(scenario: Copies, rounds: int) -> Outcome:
    """The same bytes between the same mappings, as the device copies and by memcpy alone."""
    module = _in_process.windows()
    dma = DmaWindows()
    source, target = 0, 2 * scenario.size
    with _two_files(scenario) as (from_, to):
        dma.map(source, scenario.size, PROT_DMA_READ, *from_)
        dma.map(target, scenario.size, BOTH, *to)
    times = max(1, COPIED_PER_ROUND // scenario.size)
    ours, theirs = _turns(
        rounds,
        lambda: module.copy_ours(dma, target, source, scenario.size, times),
        lambda: module.copy_theirs(dma, target, source, scenario.size, times),
    )
    moved = times * scenario.size * 1e9 / (1 << 30)
    return _outcome(scenario, ours, theirs, "GiB/s", lambda taken: moved / taken)


# --- what is printed


def _cells(outcome: Outcome) -> list[str]:
    low, high = outcome.spread
    return [
        outcome.scenario,
        f"{outcome.ours:.1f}",
        f"{outcome.theirs:.1f}",
        outcome.unit,
        f"{outcome.ratio:.2f}",
        f"{low:.2f}-{high:.2f}",
        f"{outcome.target:.2f}",
        "[green]met[/]" if outcome.met else "[red]missed[/]",
    ]


def _table(outcomes: Sequence[Outcome]) -> Table:
    table = Table(
        title="DMA windows: trionic (A) beside libvfio-user or plain C (B)",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("scenario", no_wrap=True)
    for heading in ("A", "B", ""):
        table.add_column(heading, justify="left" if not heading else "right", no_wrap=True)
    for heading in ("time A / B", "rounds", "target", ""):
        table.add_column(heading, justify="right", no_wrap=True)
    for outcome in outcomes:
        table.add_row(*_cells(outcome))
    return table


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "-s",
    "--scenario",
    "chosen",
    multiple=True,
    type=click.Choice(NAMES),
    help="Run only this one; repeat for several.  [default: all]",
)
@click.option("--rounds", type=click.IntRange(1), default=10, show_default=True, help="Turns of each side.")
@click.option(
    "--server-command",
    metavar="COMMAND",
    default=DEFAULT_COMMAND,
    help="The server to measure; {socket} is replaced by a path.  [default: `trionic serve` of this tree]",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@click.option("--check", is_flag=True, help="Exit with status 1 when a target is missed.")
def main(chosen: tuple[str, ...], rounds: int, server_command: str, as_json: bool, check: bool) -> None:
    """Measure what DMA windows cost, each time as a ratio to C that does the same in the same run.

    A guest with a virtual IOMMU maps and unmaps all the time, page by page, and waits for each answer
    (pair...); the device looks an address up for every descriptor that it follows (find-...); and what it
    then moves is memory (copy-...). The C library is built on first use from Debian's sources, which takes
    some ten seconds, a network and, to install its one dependency, root; the twins in C and Cython take
    seconds and gcc.

    \b
    Scenarios:
      pair             DMA_MAP and DMA_UNMAP of a page, whose file is mapped already; on one core
      pair-two-cores   the same with a core each: two wake-ups of an idle core are part of it
      pair-fifteen     fifteen are mapped, then fifteen are taken back
      pair-first       the only window of its file: both sides call mmap and munmap
      pair-by-message  no descriptor comes along
      find-N           an address at random among N windows, beside a search by halving in one array
      copy-N           N bytes from window to window, beside memcpy; A and B are GiB/s, the ratio is of times
      copy-bars        the same from one card's BAR to another's, as a third card does it

    \b
    Examples:
      python -m bench.dma
      python -m bench.dma -s pair -s pair-first --rounds 30
      python -m bench.dma --check --json > dma.json
    """
    console = Console(stderr=True)
    outcomes: list[Outcome] = []
    require_both_cpus()
    try:
        with tempfile.TemporaryDirectory(prefix="bench-dma-") as directory:
            for scenario in SCENARIOS:
                if chosen and scenario.name not in chosen:
                    continue
                with console.status(f"{scenario.name}: {scenario.what}"):
                    if isinstance(scenario, Pairs):
                        outcomes.append(measure_pairs(scenario, server_command, rounds, Path(directory)))
                    elif isinstance(scenario, Lookups):
                        outcomes.append(measure_lookups(scenario, rounds))
                    else:
                        outcomes.append(measure_copies(scenario, rounds))
    except PeerError as error:
        raise click.ClickException(str(error)) from error
    report(outcomes, _table, as_json=as_json, check=check)


if __name__ == "__main__":
    main()
