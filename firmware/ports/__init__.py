"""Ports: what the card's cable is plugged into."""

from __future__ import annotations

import importlib
from dataclasses import dataclass

from firmware.ports._grammar import Option, boolean, check, positive, split, whole
from firmware.ports._port import Framing, Offload, Port, PortError

__all__ = ["KINDS", "Framing", "Offload", "Port", "PortError", "PortKind", "describe_ports", "open_port"]


@dataclass(frozen=True, slots=True)
class PortKind:
    """A kind of port: the module and class behind it, imported when one is opened, and its keys."""

    help: str
    module: str
    type: str
    options: tuple[Option, ...] = ()


KINDS: dict[str, PortKind] = {
    "loopback": PortKind("what the guest sends comes back to it", "firmware.ports.loopback", "LoopbackPort"),
    "tap": PortKind(
        "a TAP device of this machine",
        "firmware.ports.tap",
        "TapPort",
        (
            Option(
                "name", "the device; made if it does not exist, a %d in it becomes a number", required=True
            ),
            Option("netns", "the network namespace it lives in: a name under /run/netns, or a path"),
            Option("up", "bring the device up (default: yes if it is created here)", boolean),
            Option("mtu", "set the device's MTU, in bytes", whole),
            Option("ip", "give the device this address, such as 10.0.0.1/24"),
        ),
    ),
    "stream": PortKind(
        "a Unix stream socket as QEMU's stream netdev and passt speak it",
        "firmware.ports.stream",
        "StreamPort",
        (
            Option("path", "the peer's socket; it may appear later and come back after it is gone"),
            Option("listen", "the socket to make and wait at for a peer, instead of path"),
            Option("reconnect", "seconds between attempts to connect (default: 1)", positive),
        ),
    ),
    "pcap": PortKind(
        "capture files: write what the guest sends, replay what it shall receive",
        "firmware.ports.pcap",
        "PcapPort",
        (
            Option("write", "a pcap file for the frames that the guest sends"),
            Option("read", "a pcap or pcapng file of frames for the guest"),
            Option("speed", "replay at this multiple of the pace of the file (default: at once)", positive),
            Option("loop", "begin again at the end of the file", boolean),
        ),
    ),
}


def open_port(spec: str) -> Port:
    """Open the port that `spec` describes; raises PortError with one line that says what to do."""
    if (named := spec.partition(":")[0]) not in KINDS:
        raise PortError(f"there is no port {named!r}; the kinds are {', '.join(KINDS)}")
    kind, given = split(spec)
    options = check(kind, KINDS[kind].options, given)
    factory: type[Port] = getattr(importlib.import_module(KINDS[kind].module), KINDS[kind].type)
    return factory(spec, **options)


def describe_ports() -> str:
    """Every kind of port with its keys, for a help text."""
    lines = []
    for name, kind in KINDS.items():
        lines.append(f"{name}: {kind.help}")
        lines += [f"    {option.name}=…  {option.help}" for option in kind.options]
    return "\n".join(lines)
