"""The kinds of ports and their keys, as data; what is behind a kind is imported when one is opened."""

from __future__ import annotations

import importlib
from dataclasses import dataclass

from firmware.ports._grammar import RECONNECT, SPEED, TEXT, YES_NO, Option, OptionType, check, split, whole
from firmware.ports._port import Port, PortError

__all__ = ["KINDS", "PortKind", "describe_ports", "open_port"]

# net/ethernet/eth.c and drivers/net/tun.c: ETH_MIN_MTU, and 65535 less an Ethernet header.
MIN_TAP_MTU = 68
MAX_TAP_MTU = 65521

_FILE = OptionType("FILE", TEXT.wanted, TEXT.parse)
_SOCKET = OptionType("SOCKET", TEXT.wanted, TEXT.parse)


@dataclass(frozen=True, slots=True)
class PortKind:
    """A kind of port: the module and class behind it, and its keys."""

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
                "name",
                OptionType("NAME", TEXT.wanted, TEXT.parse),
                "the device; made if there is none, and then gone with the card; %d becomes a free number",
                required=True,
            ),
            Option(
                "netns",
                OptionType("NAME|PATH", TEXT.wanted, TEXT.parse),
                "the network namespace it lives in, as `ip netns list` names it, or a path",
            ),
            Option("up", YES_NO, "bring the device up; a device made here is, unless this is no"),
            Option("mtu", whole("BYTES", MIN_TAP_MTU, MAX_TAP_MTU), "the device's MTU"),
            Option(
                "ip",
                OptionType("ADDRESS/PREFIX", TEXT.wanted, TEXT.parse),
                "an address for the device: 10.0.0.1/24",
            ),
        ),
    ),
    "stream": PortKind(
        "a unix stream socket, as passt and QEMU's -netdev stream speak it",
        "firmware.ports.stream",
        "StreamPort",
        (
            Option(
                "path", _SOCKET, "connect to the peer that listens here; it may come later, go and come back"
            ),
            Option("listen", _SOCKET, "or listen here for a peer, one after another"),
            Option(
                "reconnect",
                RECONNECT,
                "how long to wait between attempts to find a peer; no: one peer, once",
                1.0,
            ),
        ),
    ),
    "pcap": PortKind(
        "capture files: write what the guest sends, replay what it shall receive",
        "firmware.ports.pcap",
        "PcapPort",
        (
            Option("write", _FILE, "a pcap file, made anew, for the frames that the guest sends"),
            Option("read", _FILE, "a pcap or pcapng file with frames for the guest"),
            Option("both", YES_NO, "write the frames that are replayed, too", default=False),
            Option(
                "speed",
                SPEED,
                "replay at the pace of the time stamps, at once, or so many times as fast",
                1.0,
            ),
            Option("loop", YES_NO, "begin again at the end of the file", default=False),
        ),
    ),
}


def open_port(spec: str) -> Port:
    """Open the port that `spec` describes; raises PortError: one line, what is wrong and what to do."""
    kind = spec.partition(":")[0]
    if kind not in KINDS:
        problem = f"there is no port {kind!r}" if kind else f"port {spec!r} does not begin with a kind"
        raise PortError(f"{problem}; the kinds are {', '.join(KINDS)}")
    options = check(kind, KINDS[kind].options, split(spec)[1])
    factory: type[Port] = getattr(importlib.import_module(KINDS[kind].module), KINDS[kind].type)
    return factory(spec, **options)


def describe_ports() -> str:
    """Every kind of port with its keys, for a help text: one line each."""
    lines = []
    for name, kind in KINDS.items():
        lines.append(f"{name}: {kind.help}")
        for option in kind.options:
            line = f"    {option.name}={option.type.placeholder}  {option.help}"
            if option.required:
                line += " (required)"
            elif option.default is not None:
                line += f" (default: {option.type.show(option.default)})"
            lines.append(line)
    return "\n".join(lines)
