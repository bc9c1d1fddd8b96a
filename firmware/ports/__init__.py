"""Ports: what the card's cable is plugged into."""

from firmware.ports._grammar import Option, OptionType, quote
from firmware.ports._kinds import KINDS, PortKind, describe_ports, open_port
from firmware.ports._port import Framing, Offload, Port, PortError

__all__ = [
    "KINDS",
    "Framing",
    "Offload",
    "Option",
    "OptionType",
    "Port",
    "PortError",
    "PortKind",
    "describe_ports",
    "open_port",
    "quote",
]
