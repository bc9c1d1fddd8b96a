"""``trionic serve``."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from device.profiles import N3000, Profile
from device.revocation import Revocation
from server import Listener, ServerError
from trionic.config import (
    DEFAULT_BAR2_SIZE,
    DEFAULT_PORT,
    CardConfig,
    ServeConfig,
    check_files,
    derive_mac,
    load_config,
    parse_bar2_size,
    parse_card_profile,
    parse_mac,
    parse_mtu,
    parse_poll_us,
    parse_release_s,
)
from trionic.engines import INTERFACES, NATIVE, Engine, EngineConfig, limits
from trionic.errors import ConfigError, TrionicError
from trionic.qemu import OLDEST_QEMU, attach_line

__all__ = ["serve"]


class _Parsed(click.ParamType[Any]):
    """An option whose text is read by the parser that also reads the TOML file."""

    def __init__(self, name: str, parse: Callable[[Any], Any], *, number: bool = False) -> None:
        self.name = name
        self._parse = parse
        self._number = number

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return self._parse(int(value) if self._number and value.isdecimal() else value)
        except ConfigError as error:
            raise ConfigError(f"{param.opts[-1] if param else self.name}: {error}") from None


@click.command(short_help="Serve cards.")
@click.option(
    *("-s", "--socket", "--socket-path", "sockets"),
    type=click.Path(path_type=Path),
    multiple=True,
    help="Where to listen; repeat for several cards.",
)
@click.option(
    "--fd",
    type=click.IntRange(min=0),
    help="The descriptor of a unix socket that listens already, instead of --socket: one card.",
)
@click.option(
    *("-p", "--port", "ports"),
    metavar="SPEC",
    multiple=True,
    help="The network behind the card; one for each --socket, in the same order.  [default: loopback]",
)
@click.option(
    *("-m", "--mac", "macs"),
    type=_Parsed("MAC", parse_mac),
    multiple=True,
    help="The address; one for each --socket.  [default: made from the socket path]",
)
@click.option(
    "--mtu",
    type=_Parsed("BYTES", parse_mtu, number=True),
    help="The largest packet.  [default: the port's, or 1500]",
)
@click.option(
    "--bar2-size",
    type=_Parsed("SIZE", parse_bar2_size, number=True),
    default=DEFAULT_BAR2_SIZE,
    help="On-card memory: a power of two such as 16M.  [default: 16M]",
)
@click.option(
    "--profile",
    type=_Parsed("PROFILE", parse_card_profile),
    default=N3000.name,
    show_default=True,
    help="Which card it is, as NAME or NAME:key=value,...; see below.",
)
@click.option(
    *("-r", "--record", "records"),
    type=click.Path(path_type=Path),
    metavar="FILE",
    multiple=True,
    help="Write down each access to the card's registers; one for each --socket.  [default: none]",
)
@click.option(
    "--no-offloads",
    is_flag=True,
    help="Leave checksums and segmentation to the guest.",
)
@click.option(
    "--no-msix",
    is_flag=True,
    help="Interrupts by INTx only. QEMU 11.1 aborts when it unplugs a card that has MSI-X.",
)
@click.option(
    "--revocation",
    type=click.Choice([way.value for way in Revocation]),
    default=Revocation.COOPERATIVE.value,
    show_default=True,
    help="Who takes mapped on-card memory away while a card is reset or its memory switched off; see above.",
)
@click.option(
    *("--poll", "poll_us"),
    type=_Parsed("US", parse_poll_us, number=True),
    help="Microseconds to spin for the next message before sleeping: less latency, more heat.  [default: 0]",
)
@click.option(
    *("--release", "release_s"),
    type=_Parsed("S", parse_release_s, number=True),
    help="Seconds for clients to let go of their cards when it is ended.  [default: 0, none is asked]",
)
@click.option(
    "--engine",
    type=click.Choice([engine.value for engine in Engine]),
    default=Engine.NATIVE.value,
    show_default=True,
    help="Who speaks vfio-user: trionic, or Nutanix's C library.",
)
@click.option(
    "--libvfio-user",
    type=click.Path(path_type=Path),
    help="The library's file.  [default: $TRIONIC_LIBVFIO_USER, or where the loader finds libvfio-user.so.0]",
)
@click.option(
    "--libvfio-user-api",
    type=click.Choice(INTERFACES),
    help="The library's interface, by its year.  [default: found out]",
)
@click.option(
    "--limits",
    "show_limits",
    is_flag=True,
    help="List what the engine cannot do, and serve nothing.",
)
@click.option(
    *("-c", "--config"),
    type=click.Path(path_type=Path),
    help="A TOML file with one [[card]] for each card, instead of the options above.",
)
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    default="info",
    show_default=True,
    help="How much to tell on standard error.",
)
def serve(
    sockets: tuple[Path, ...],
    fd: int | None,
    ports: tuple[str, ...],
    macs: tuple[bytes, ...],
    mtu: int | None,
    bar2_size: int,
    profile: Profile,
    records: tuple[Path, ...],
    no_offloads: bool,
    no_msix: bool,
    revocation: str,
    poll_us: int | None,
    release_s: int | None,
    engine: str,
    libvfio_user: Path | None,
    libvfio_user_api: str | None,
    show_limits: bool,
    config: Path | None,
    log_level: str,
) -> None:
    """Serve cards to QEMU 10.1 or newer, or to any other vfio-user client.

    Each card has its own socket and its own network port. For each one the QEMU command line that plugs it in
    is printed, then READY=1 once all of them listen. Ctrl-C or SIGTERM ends it and removes the sockets. A
    guest may leave and another come at any time; one that comes early waits until the card is free.

    With --release 30 it takes no new client, ends when all have let go of their cards, and waits for that for
    30 seconds at most; a second signal ends it at once. Clients that listen for the REQ interrupt are asked,
    as a host kernel asks before it takes a device away. QEMU 11.1 does not listen: unplug with device_del.

    \b
    Ports:
      loopback                     every packet comes back to its sender
      tap:name=tap0                a TAP device, made if it does not exist (root)
      stream:path=/run/x.sock      a unix stream: passt, or QEMU's -netdev stream
      pcap:write=out.pcap          packets into a file; read=in.pcap replays one

    \b
    Profiles, and which drivers take them by their ids:
      n3000    Intel's N3000 (1af4:1041, 8086:001a): ifcvf and virtio-pci
      c5000x   Intel's C5000X-PL (1af4:1000, 8086:0001): the same, today's ids
      virtio   a plain virtio-net NIC (1af4:1041): virtio-pci
    vp_vdpa (by driver_override) and DPDK's net_virtio drive each of them.
    with these keys, the first of each being the default:
      vectors=per-queue|shared|one   MSI-X vectors: one a queue and one for
                                     configuration, two, or one for everything.
                                     vp_vdpa needs the first
      queue-size=N                   descriptors a queue, 64 to 32768; 256, and
                                     1024 of c5000x
      lm=exposed|hidden              whether BAR 4 is there, in which ifcvf finds
                                     ring state and dirty-page log, and without
                                     which it refuses a card. Not of virtio
      ring-state=auto|pairs|words    where that ring state is: told apart by the
                                     width of accesses, where DPDK and Linux
                                     before 6.5 look, where Linux looks since
    A card moves only to one with the same profile and keys.

    \b
    Revocation, when a guest's driver or a reset switches a card's memory off:
      cooperative  The client lets go by itself. Nothing it maps can fail under
                   it; one that does not let go goes on using the memory.
      enforced     The card takes its memory back: whoever touches it gets
                   SIGBUS, and BARs answer EIO, until it is switched on again.
                   Protects the card from its client, but not the client from
                   SIGBUS: a guest that touches the memory while it switches it
                   off ends its QEMU. Switching copies what was written.

    With --record FILE each access to the card's registers is written into FILE as it comes, a line each. So
    who writes a driver, or wonders what one does, sees what it did up to the moment when it went wrong:

    \b
      r2 common.num_queues = 3           2 bytes read; they were 3
      w1 common.device_status 0x0f       1 byte written
      w4 common.queue_desc+4 0x1         the upper half of a register
      r1 device+0x6 = 1                  device configuration, at byte 6
      w2 notify+0x1000 1                 a doorbell: 0x1000 a queue
      w2 lm+0x20 0xff                    BAR 4: ring state, dirty-page log
      # reset: the client is gone, ...   what is no access stands behind a #
    Registers have their names of virtio 1.3, 4.1.4.3. FILE is made anew, and gets 16 MiB at most. Not in it
    are configuration space, on-card memory, and what the card does by itself. While it is recorded every
    doorbell comes as a write; else clients may ring them by eventfd.

    \b
    Examples:
      trionic serve --socket /tmp/card.sock
      trionic serve -s /tmp/a.sock -p tap:name=tap0 -s /tmp/b.sock -p tap:name=tap1
      trionic serve --config cards.toml
      trionic serve -s /tmp/card.sock --release 30
      trionic serve -s /tmp/card.sock --profile c5000x:vectors=shared
      trionic serve -s /tmp/card.sock --record driver.trace
      trionic serve --engine libvfio-user --limits

    \b
    cards.toml:
      [[card]]
      socket = "/tmp/a.sock"
      port = "tap:name=tap0"       # the rest may be left out
      mac = "02:00:00:00:00:01"
      mtu = 1500
      bar2_size = "16M"
      offloads = true
      msix = true
      revocation = "cooperative"
      profile = "n3000"
      record = "/tmp/a.trace"      # none if left out
    """
    every = CardConfig(
        Path(),
        mtu=mtu,
        bar2_size=bar2_size,
        offloads=not no_offloads,
        msix=not no_msix,
        revocation=Revocation(revocation),
        profile=profile,
    )
    chosen = EngineConfig(Engine(engine), libvfio_user, libvfio_user_api)
    if show_limits:
        _tell_limits(chosen)
        return
    if fd is not None and (sockets or config is not None):
        raise ConfigError("--fd is the socket of the only card; leave out --socket and --config")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt), contextlib.ExitStack() as opened:
        try:
            given = [] if fd is None else [opened.enter_context(Listener.inherited(fd))]
            sockets = sockets or tuple(listener.path for listener in given)
            settings = _settings(sockets, ports, macs, records, every, chosen, config)
            settings = replace(
                settings,
                poll_us=settings.poll_us if poll_us is None else poll_us,
                release_s=settings.release_s if release_s is None else release_s,
            )
            with _signals_held():
                listeners = given or [opened.enter_context(Listener(card.socket)) for card in settings.cards]
        except ServerError as error:
            raise TrionicError(str(error)) from error
        from trionic.serving import run  # late: clients may connect while the rest is loaded

        run(settings, listeners, log_level, lambda: _tell(settings))


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """No signal comes between a socket's birth and the promise to remove it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _tell_limits(engine: EngineConfig) -> None:
    """A paragraph for each limit: its name, what cannot be done, and why."""
    if engine == NATIVE:
        click.echo("The native engine does everything that vfio-user says of its cards.")
    try:
        for name, what, why in limits(engine):
            click.echo(f"{name}\n    {what};\n    {why}")
    except ServerError as error:
        raise TrionicError(str(error)) from error


def _tell(settings: ServeConfig) -> None:
    """For each card the line that plugs it in, then the word that scripts wait for."""
    for card in settings.cards:
        mac = card.mac or derive_mac(card.socket)
        told = f"{card.socket}: {card.port}, {mac.hex(':')}"
        if card.socket.is_socket():  # --fd may be one without a name that another process could use
            told += f"; plug it into QEMU {OLDEST_QEMU} or newer with\n  {attach_line(card.socket)}"
        click.echo(told)
    click.echo("READY=1")


def _settings(
    sockets: tuple[Path, ...],
    ports: tuple[str, ...],
    macs: tuple[bytes, ...],
    records: tuple[Path, ...],
    every: CardConfig,
    engine: EngineConfig,
    config: Path | None,
) -> ServeConfig:
    """The cards of the command line, each like ``every``, or those of the file."""
    if config is not None:
        if sockets or ports or macs or records or every != CardConfig(Path()) or engine != NATIVE:
            raise ConfigError(
                "--config says which cards there are and who serves them; leave out the other options"
            )
        return load_config(config)
    if not sockets:
        raise ConfigError("no card to serve; give --socket PATH, or --config FILE with [[card]] tables")
    _need_one_each("--port", ports, sockets)
    _need_one_each("--mac", macs, sockets)
    _need_one_each("--record", records, sockets)
    cards = tuple(
        replace(
            every,
            socket=socket,
            port=ports[number] if ports else DEFAULT_PORT,
            mac=macs[number] if macs else None,
            record=records[number] if records else None,
        )
        for number, socket in enumerate(sockets)
    )
    return ServeConfig(check_files(cards, "command line"), engine=engine)


def _need_one_each(option: str, values: tuple[object, ...], sockets: tuple[Path, ...]) -> None:
    if values and len(values) != len(sockets):
        raise ConfigError(
            f"{option}: {len(values)} given for {len(sockets)} --socket; give one for each, or none at all"
        )
