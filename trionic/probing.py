"""What a vfio-user server offers, asked of it by an ordinary client: data first, text made of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import trio

import client
from client.pci import Command, ConfigSpace, PciControl, read_config
from client.regions import IrqDetails, RegionDetails
from client.virtio import Feature, VirtioPci
from protocol.vfio import IrqIndex, IrqInfoFlags, RegionFlags, RegionIndex
from trionic.errors import ONE_CLIENT, SERVER_THERE, TrionicError
from trionic.lspci import describe_config, size_name

__all__ = ["ProbeReport", "probe", "text"]

# A server that does not answer in this time is stuck, or busy with another client that came before.
PATIENCE_S: Final = 5.0

_VIRTIO_VENDOR: Final = 0x1AF4
_NETWORK: Final = 1
_MAX_QUEUES: Final = 64


@dataclass(frozen=True, slots=True)
class Region:
    """A VFIO region; `areas` (offset, length) may be mapped. Bytes."""

    name: str
    size: int
    flags: list[str]
    areas: list[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Irq:
    """A kind of interrupt."""

    name: str
    count: int
    flags: list[str]


@dataclass(frozen=True, slots=True)
class Virtio:
    """What the virtio structures say; `mac` and `mtu` of a network device."""

    device: int
    features: list[str]
    queues: list[int]
    mac: str | None = None
    mtu: int | None = None
    link_up: bool | None = None


@dataclass(frozen=True, slots=True)
class ProbeReport:
    """All that was found."""

    socket: str
    version: str
    capabilities: dict[str, Any]
    regions: list[Region]
    irqs: list[Irq]
    config: bytes
    virtio: Virtio | None

    def as_json(self) -> dict[str, Any]:
        """Plain data; configuration space in hex."""
        return {**asdict(self), "config": self.config.hex(), "lspci": _lspci(self)}


def probe(path: Path) -> ProbeReport:
    """Ask the server at ``path``; `TrionicError` if it does not answer as one."""
    try:
        return trio.run(_probe, path)
    except client.ClientError as error:
        raise TrionicError(f"{error}; {SERVER_THERE}") from error
    except trio.TooSlowError as error:
        raise TrionicError(f"{path}: no answer within {PATIENCE_S:g} s; {ONE_CLIENT}") from error


async def _probe(path: Path) -> ProbeReport:
    with trio.fail_after(PATIENCE_S):
        async with client.connect(path) as session:
            config = await read_config(session)
            version = session.connection.version
            peer = session.connection.peer
            return ProbeReport(
                socket=str(path),
                version=f"{version.major}.{version.minor}" if version else "?",
                capabilities={
                    name: getattr(peer, name) for name in sorted(peer.mentioned) if hasattr(peer, name)
                },
                regions=[_region(region) for region in session.regions],
                irqs=[_irq(irq) for irq in session.irqs],
                config=config.raw,
                virtio=await _virtio(session, config),
            )


def _region(region: RegionDetails) -> Region:
    return Region(
        name=_name(RegionIndex, region.index),
        size=region.size,
        flags=_names(region.flags & ~RegionFlags.CAPS),
        areas=list(region.areas),
    )


def _irq(irq: IrqDetails) -> Irq:
    return Irq(_name(IrqIndex, irq.index), irq.count, _names(irq.flags))


def _name(names: type[RegionIndex] | type[IrqIndex], index: int) -> str:
    try:
        return names(index).name
    except ValueError:
        return f"#{index}"


def _names(flags: RegionFlags | IrqInfoFlags | Feature) -> list[str]:
    """The names of the bits that are set, and the numbers of those without a name."""
    value = int(flags)
    bits = (1 << bit for bit in range(value.bit_length()) if value >> bit & 1)
    return [type(flags)(bit).name or f"bit {bit.bit_length() - 1}" for bit in bits]


async def _virtio(session: client.Session, config: ConfigSpace) -> Virtio | None:
    if config.vendor != _VIRTIO_VENDOR or not config.virtio:
        return None
    # Some servers answer in BARs only once decoding is on, as hardware would.
    await PciControl(session, config).set_command(Command.MEMORY)
    with VirtioPci(session, config) as transport:
        features = await transport.offered_features()
        queues: list[int] = []
        while len(queues) < _MAX_QUEUES and (size := await transport.queue_size(len(queues))):
            queues.append(size)
        device = config.device - 0x1040 if config.device >= 0x1040 else config.subsystem[1]
        if device != _NETWORK:
            return Virtio(device, _names(features), queues)
        data = (await transport.device_config(12)).ljust(12, b"\0")
        return Virtio(
            device,
            _names(features),
            queues,
            mac=data[:6].hex(":") if Feature.MAC in features else None,
            mtu=int.from_bytes(data[10:12], "little") if Feature.MTU in features else None,
            link_up=bool(data[6] & 1) if Feature.STATUS in features else None,
        )


def text(report: ProbeReport) -> str:
    """The report for people."""
    return "\n".join(_text(report))


def _text(report: ProbeReport) -> Iterator[str]:
    yield f"{report.socket}: vfio-user {report.version}"
    yield from (f"\t{name}: {value}" for name, value in report.capabilities.items())
    yield ""
    yield from _lspci(report)
    yield ""
    yield "Regions:"
    for region in report.regions:
        if region.size:
            whole = region.areas == [(0, region.size)]
            areas = " ".join(f"{start:#x}+{length:#x}" for start, length in region.areas)
            mappable = " mappable" + ("" if whole else f" at {areas}") if region.areas else ""
            yield f"\t{region.name:6} {size_name(region.size):>5} {_rights(region)}{mappable}"
    yield "Interrupts:"
    for irq in report.irqs:
        if irq.count:
            yield f"\t{irq.name:6} {irq.count:5} {' '.join(irq.flags).lower()}"
    if report.virtio is not None:
        yield from _virtio_text(report.virtio)


def _rights(region: Region) -> str:
    return " ".join(flag.lower() for flag in region.flags if flag != RegionFlags.MMAP.name)


def _virtio_text(virtio: Virtio) -> Iterator[str]:
    yield f"Virtio device {virtio.device}{' (network)' if virtio.device == _NETWORK else ''}:"
    yield f"\tqueues: {', '.join(map(str, virtio.queues))}"
    if virtio.mac is not None:
        yield f"\tmac: {virtio.mac}"
    if virtio.mtu is not None:
        yield f"\tmtu: {virtio.mtu}"
    if virtio.link_up is not None:
        yield f"\tlink: {'up' if virtio.link_up else 'down'}"
    yield f"\tfeatures: {' '.join(virtio.features)}"


def _lspci(report: ProbeReport) -> list[str]:
    return describe_config(ConfigSpace(report.config), [region.size for region in report.regions])
