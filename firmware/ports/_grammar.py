"""The grammar of a port: `kind:key=value,key=value`.

Quoting is the shell's: between `"…"` or `'…'` a comma is a comma, and a backslash, except between `'…'`,
makes the next character an ordinary one. An equals sign after the first needs nothing:
`pcap:write=a=b.pcap` writes the file `a=b.pcap`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from firmware.ports._port import PortError

__all__ = [
    "RECONNECT",
    "SPEED",
    "TEXT",
    "YES_NO",
    "Option",
    "OptionType",
    "Value",
    "check",
    "quote",
    "split",
    "whole",
]

# Two paths of the greatest length that Linux takes (PATH_MAX) with every character escaped fit.
MAX_SPEC = 20_000

Value = str | int | float | bool | None


@dataclass(frozen=True, slots=True)
class OptionType:
    """How an option's text becomes a value: `parse` raises ValueError for what is not `wanted`."""

    placeholder: str
    wanted: str
    parse: Callable[[str], Value]
    show: Callable[[Value], str] = str


@dataclass(frozen=True, slots=True)
class Option:
    """A key of a port: its type, what it is when not given, and what it is for."""

    name: str
    type: OptionType
    help: str
    default: Value = None
    required: bool = False

    def parse(self, kind: str, text: str) -> Value:
        """Read a value; raises PortError."""
        try:
            return self.type.parse(text)
        except ValueError:
            raise PortError(
                f"port {kind}: {self.name}={text!r} should be {self.type.wanted}: {self.help}"
            ) from None


def _parse_text(text: str) -> str:
    if not text or "\0" in text:
        raise ValueError
    os.fsencode(text)  # UnicodeEncodeError, a ValueError: what no file system and no kernel can be asked for
    return text


_WORDS = {
    "yes": True,
    "on": True,
    "true": True,
    "1": True,
    "no": False,
    "off": False,
    "false": False,
    "0": False,
}


def _parse_yes_no(text: str) -> bool:
    if text.lower() not in _WORDS:
        raise ValueError
    return _WORDS[text.lower()]


def _parse_positive(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise ValueError
    return value


def _parse_reconnect(text: str) -> float | None:
    return None if _WORDS.get(text.lower()) is False else _parse_positive(text)


def _parse_speed(text: str) -> float:
    words = {"real": 1.0, "max": math.inf}
    return words[text.lower()] if text.lower() in words else _parse_positive(text)


TEXT = OptionType("TEXT", "some text", _parse_text)
YES_NO = OptionType("yes|no", "yes or no", _parse_yes_no, lambda value: "yes" if value else "no")
RECONNECT = OptionType(
    "SECONDS|no", "seconds, more than 0, or no", _parse_reconnect, lambda value: f"{value:g}"
)
SPEED = OptionType("real|max|NUMBER", "real, max, or a number more than 0", _parse_speed, lambda _: "real")


def whole(placeholder: str, least: int, most: int) -> OptionType:
    """The type of a whole number from `least` to `most`."""

    def parse(text: str) -> int:
        if not (text.isascii() and text.isdigit() and len(text) < 20 and least <= int(text) <= most):
            raise ValueError
        return int(text)

    return OptionType(placeholder, f"a whole number from {least} to {most}", parse)


def quote(value: str) -> str:
    """`value` as it is written in a port, for programs that compose one."""
    return "".join(f"\\{character}" if character in "\\\"'," else character for character in value)


def split(spec: str) -> tuple[str, dict[str, str]]:
    """Take a port apart into its kind and its keys; raises PortError."""
    if len(spec) > MAX_SPEC:
        raise PortError(f"a port of {len(spec)} characters is too long; at most {MAX_SPEC} make sense")
    kind, _, rest = spec.partition(":")
    options: dict[str, str] = {}
    if not rest:
        return kind, options
    for part in _fields(spec, rest):
        key, equals, value = part.partition("=")
        if not equals or not key:
            raise PortError(
                f'port {spec!r}: {part!r} should be key=value; quote a comma within a value: "a,b"'
            )
        if key in options:
            raise PortError(f"port {spec!r}: {key!r} is given twice; give it once")
        options[key] = value
    return kind, options


def _fields(spec: str, text: str) -> list[str]:
    """Split at the commas that are not quoted, and take the quotes off."""
    fields = [""]
    quoted_by = ""
    characters = iter(text)
    for character in characters:
        if character == "\\" and quoted_by != "'":
            escaped = next(characters, None)
            if escaped is None:
                raise PortError(f"port {spec!r} ends in a backslash; write two for one")
            fields[-1] += escaped
        elif quoted_by:
            if character == quoted_by:
                quoted_by = ""
            else:
                fields[-1] += character
        elif character in "\"'":
            quoted_by = character
        elif character == ",":
            fields.append("")
        else:
            fields[-1] += character
    if quoted_by:
        raise PortError(
            f"port {spec!r}: a quote {quoted_by} is not closed; close it, or write \\{quoted_by} for the mark"
        )
    return fields


def check(kind: str, known: tuple[Option, ...], given: Mapping[str, str]) -> dict[str, Value]:
    """Every known option's value; raises PortError for a key that is unknown, missing or wrong."""
    by_name = {option.name: option for option in known}
    for key in given:
        if key not in by_name:
            names = f"it knows {', '.join(by_name)}" if by_name else "it takes none"
            raise PortError(f"port {kind} has no key {key!r}; {names}")
    for option in known:
        if option.required and option.name not in given:
            raise PortError(f"port {kind} needs {option.name}={option.type.placeholder}: {option.help}")
    return {
        option.name: option.parse(kind, given[option.name]) if option.name in given else option.default
        for option in known
    }
