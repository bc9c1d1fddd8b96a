"""Which cards to serve, from a TOML file or from the command line: one vocabulary for both.

A file holds any number of cards::

    poll_us = 0                     # optional: microseconds to spin before sleeping
    release_s = 0                   # optional: seconds for clients to let go when the server is ended
    engine = "libvfio-user"         # optional, native if absent; then, optional as well:
    libvfio_user = "/opt/lib/libvfio-user.so.0"
    libvfio_user_api = "2026"       # its interface, found out if absent

    [[card]]
    socket = "/run/trionic/a.sock"
    port = "tap:name=tap0"          # optional, loopback if absent
    mac = "02:00:00:00:00:01"       # optional, made from the socket path if absent
    mtu = 1500                      # optional, that of the port or 1500 if absent
    bar2_size = "16M"               # optional
    offloads = false                # optional: checksums and segmentation stay with the guest
    msix = false                    # optional: interrupts by INTx, so that QEMU can unplug the card
    revocation = "enforced"         # optional, cooperative if absent: who takes mapped BARs away
    profile = "c5000x:vectors=one"  # optional, n3000 if absent: which card it is
    record = "a.trace"              # optional: where each access to its registers is written down

Every error names the file, the card and the key, and says what is allowed. Unknown keys are refused: a
setting that is silently ignored is worse than one that is refused. Relative paths start where the command
does.
"""

from __future__ import annotations

import difflib
import os
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from device.profiles import N3000, Profile, parse_profile
from device.revocation import Revocation
from trionic.engines import INTERFACES, NATIVE, Engine, EngineConfig
from trionic.errors import ConfigError

__all__ = [
    "DEFAULT_BAR2_SIZE",
    "DEFAULT_PORT",
    "MAX_BAR2_SIZE",
    "MAX_MTU",
    "MAX_POLL_US",
    "MAX_RELEASE_S",
    "MIN_BAR2_SIZE",
    "MIN_MTU",
    "CardConfig",
    "ServeConfig",
    "derive_mac",
    "load_config",
    "parse_bar2_size",
    "parse_card_profile",
    "parse_mac",
    "parse_mtu",
    "parse_poll_us",
    "parse_release_s",
]

DEFAULT_PORT: Final = "loopback"

# Virtio 1.3, 5.1.4.1: a device offers an MTU from 68, the least that IPv4 asks of a link (RFC 791), to 65535.
MIN_MTU: Final = 68
MAX_MTU: Final = 65535

# A memory BAR that is mapped has at least one page; more than this few firmwares find room for.
DEFAULT_BAR2_SIZE: Final = 16 << 20
MIN_BAR2_SIZE: Final = 4 << 10
MAX_BAR2_SIZE: Final = 64 << 30

# Longer than a tick of the slowest usual kernel (100 Hz), spinning costs other cards more than it saves one.
MAX_POLL_US: Final = 10_000

# An hour: a guest that has not let go of a card by then is not going to, and somebody should look at it.
MAX_RELEASE_S: Final = 3600

_SIZE_UNITS: Final = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


@dataclass(frozen=True, slots=True)
class CardConfig:
    """One card: where it listens and what it is."""

    socket: Path
    port: str = DEFAULT_PORT
    mac: bytes | None = None
    """Six bytes; None: made from the socket path, see `derive_mac`."""
    mtu: int | None = None
    """Bytes; None: the port's own, or 1500."""
    bar2_size: int = DEFAULT_BAR2_SIZE
    """Bytes of on-card memory."""
    offloads: bool = True
    """Whether the guest may leave checksums and segmentation to the card."""
    msix: bool = True
    """Whether the card has MSI-X; QEMU 11.1 aborts when it unplugs one that has."""
    revocation: Revocation = Revocation.COOPERATIVE
    """Who sees to it that nobody uses on-card memory while the card does not decode it."""
    profile: Profile = N3000
    """Who the card says it is."""
    record: Path | None = None
    """The file in which each access to its registers is written down."""


@dataclass(frozen=True, slots=True)
class ServeConfig:
    """Everything that one ``trionic serve`` serves."""

    cards: tuple[CardConfig, ...]
    poll_us: int = 0
    """Microseconds to spin before sleeping."""
    engine: EngineConfig = NATIVE
    """Who speaks vfio-user."""
    release_s: int = 0
    """Seconds that clients have to let go of their cards when the server is ended; 0: none is asked."""


def derive_mac(path: Path) -> bytes:
    """A locally administered unicast address that stays the same as long as the socket path does.

    Paths that differ in one to four neighbouring bytes never share one: their CRCs differ.
    """
    return b"\x02\x54" + zlib.crc32(os.fsencode(path.absolute())).to_bytes(4, "big")


def parse_mac(text: object) -> bytes:
    """Six bytes from ``02:00:00:00:00:01``; `ConfigError` if it is no unicast address."""
    if not isinstance(text, str) or not re.fullmatch(r"[0-9A-Fa-f]{2}(?::[0-9A-Fa-f]{2}){5}", text):
        raise ConfigError(f"{text!r} is no MAC address; write six bytes like 02:00:00:00:00:01")
    mac = bytes.fromhex(text.replace(":", ""))
    if mac[0] & 1 or not any(mac):
        raise ConfigError(f"{text} is no address of a card; the first byte must be even and not all zero")
    return mac


def parse_mtu(value: object) -> int:
    """The largest packet in bytes, without its Ethernet header; `ConfigError` if virtio has no such MTU."""
    return _whole_number(value, "MTU", MIN_MTU, MAX_MTU)


def parse_poll_us(value: object) -> int:
    """Microseconds to spin before sleeping; `ConfigError` outside 0 to `MAX_POLL_US`."""
    return _whole_number(value, "time to poll in microseconds", 0, MAX_POLL_US)


def parse_release_s(value: object) -> int:
    """Seconds for clients to let go; `ConfigError` outside 0 to `MAX_RELEASE_S`."""
    return _whole_number(value, "time to let go in seconds", 0, MAX_RELEASE_S)


def parse_bar2_size(value: object) -> int:
    """Bytes from a number or from ``16M``; `ConfigError` if no BAR can have this size."""
    size: int | None = None
    if isinstance(value, int) and not isinstance(value, bool):
        size = value
    elif isinstance(value, str) and (
        match := re.fullmatch(r"([0-9]{1,20})([KMG]?)(?:i?B)?", value.strip(), re.I)
    ):
        size = int(match[1]) * _SIZE_UNITS[match[2].upper()]
    if size is None or not MIN_BAR2_SIZE <= size <= MAX_BAR2_SIZE or size & (size - 1):
        raise ConfigError(f"{value!r} is no BAR size; choose a power of two from 4K to 64G, such as 16M")
    return size


def parse_card_profile(text: object) -> Profile:
    """A personality from ``n3000`` or ``c5000x:vectors=one``; `ConfigError` says what is allowed."""
    try:
        return parse_profile(text if isinstance(text, str) else _text(text))
    except ValueError as error:
        raise ConfigError(str(error)) from None


def load_config(file: Path) -> ServeConfig:
    """What ``file`` asks for; `ConfigError` names the file, the card and the key, and what is allowed."""
    import tomllib  # here, for the command must start fast without a file

    try:
        with file.open("rb") as stream:
            document = tomllib.load(stream)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{file}: not TOML: {_one_line(error)}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: not TOML: byte {error.start} is no UTF-8") from error
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}; give the path of a TOML file") from error
    settings = _take(document, _TOP_KEYS, str(file))
    engine = {name: settings.pop(key) for key, name in _ENGINE_KEYS.items() if key in settings}
    cards = document.get("card", [])
    if not isinstance(cards, list) or not cards or not all(isinstance(card, dict) for card in cards):
        raise ConfigError(f"{file}: has no card; write at least one [[card]] with a socket")
    return ServeConfig(
        cards=check_files(
            tuple(_card(card, f"{file}: card {number}") for number, card in enumerate(cards, 1)), str(file)
        ),
        engine=EngineConfig(**engine),
        **settings,
    )


def check_files(cards: tuple[CardConfig, ...], where: str) -> tuple[CardConfig, ...]:
    """The same cards; `ConfigError` if two of them share a socket or a recording."""
    for what, files in (
        ("socket", [card.socket for card in cards]),
        ("recording", [card.record for card in cards]),
    ):
        seen: dict[str, int] = {}
        for number, file in enumerate(files, 1):
            if file is None:
                continue
            path = os.path.realpath(file)
            if path in seen:
                raise ConfigError(
                    f"{where}: cards {seen[path]} and {number} have the same {what} {file}; give each its own"
                )
            seen[path] = number
    return cards


def _card(table: Mapping[str, Any], where: str) -> CardConfig:
    settings = _take(table, _CARD_KEYS, where)
    if "socket" not in settings:
        raise ConfigError(f"{where}: socket is missing; give the path of the socket to make")
    return CardConfig(**settings)


def _take(table: Mapping[str, Any], keys: Mapping[str, Callable[[Any], Any]], where: str) -> dict[str, Any]:
    """The values of ``table`` by the parsers of ``keys``."""
    taken = {}
    for key, value in table.items():
        if key == "card" and keys is _TOP_KEYS:
            continue
        if key not in keys:
            raise ConfigError(f"{where}: unknown key {key}; {_allowed(key, keys)}")
        try:
            taken[key] = keys[key](value)
        except ConfigError as error:
            raise ConfigError(f"{where}: {key}: {error}") from None
    return taken


def _allowed(key: str, keys: Mapping[str, object]) -> str:
    names = [*keys, *(["[[card]]"] if keys is _TOP_KEYS else [])]
    close = difflib.get_close_matches(key, names, 1)
    return f"did you mean {close[0]}?" if close else f"allowed are {', '.join(names)}"


def _switch(value: object) -> bool:
    if not isinstance(value, bool):
        raise ConfigError(f"{value!r} is neither true nor false")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str) or not value or "\0" in value:
        raise ConfigError(f"{value!r} is no text; write it in quotes")
    return value


def _whole_number(value: object, what: str, least: int, most: int) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and least <= value <= most:
        return value
    raise ConfigError(f"{value!r} is no {what}; choose a whole number from {least} to {most}")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _one_of(value: object, names: Sequence[str]) -> str:
    if value not in names:
        raise ConfigError(f"{value!r} is none of {', '.join(names)}")
    return str(value)


_TOP_KEYS: Final[Mapping[str, Callable[[Any], Any]]] = {
    "poll_us": parse_poll_us,
    "release_s": parse_release_s,
    "engine": lambda value: Engine(_one_of(value, [engine.value for engine in Engine])),
    "libvfio_user": lambda value: Path(_text(value)),
    "libvfio_user_api": lambda value: _one_of(value, INTERFACES),
}
# Which of them describe the engine, and as what.
_ENGINE_KEYS: Final = {"engine": "engine", "libvfio_user": "library", "libvfio_user_api": "interface"}
_CARD_KEYS: Final[Mapping[str, Callable[[Any], Any]]] = {
    "socket": lambda value: Path(_text(value)),
    "port": _text,
    "mac": parse_mac,
    "mtu": parse_mtu,
    "bar2_size": parse_bar2_size,
    "offloads": _switch,
    "msix": _switch,
    "revocation": lambda value: Revocation(_one_of(value, [way.value for way in Revocation])),
    "profile": parse_card_profile,
    "record": lambda value: Path(_text(value)),
}
