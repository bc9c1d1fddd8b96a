"""The grammar of `--port`: `kind:key=value,key=value`.

A value with a comma, a quotation mark or a backslash in it is quoted as for a shell: `pcap:read="a,b.pcap"`.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from firmware.ports._port import PortError

MAX_SPEC = 2 * 4096 + 1024      # two paths of the greatest length that Linux takes (PATH_MAX), and the rest

Value = str | int | float | bool


def boolean(text: str) -> bool:
    """yes or no."""
    match text.lower():
        case "yes" | "on" | "true" | "1":
            return True
        case "no" | "off" | "false" | "0":
            return False
    raise ValueError("yes or no")


def positive(text: str) -> float:
    """a positive number."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise ValueError("a positive number")
    return value


def whole(text: str) -> int:
    """a whole number."""
    return int(text, 10)


def text(value: str) -> str:
    """some text."""
    if not value or "\0" in value:
        raise ValueError("some text")
    os.fsencode(value)          # UnicodeEncodeError, a ValueError, for what no file can be called
    return value


@dataclass(frozen=True, slots=True)
class Option:
    """A key of a port: how its value is read, and what it is for."""

    name: str
    help: str
    read: Callable[[str], Value] = text
    required: bool = False

    def parse(self, kind: str, value: str) -> Value:
        """Read a value; raises PortError."""
        try:
            return self.read(value)
        except ValueError:
            wanted = (self.read.__doc__ or "").rstrip(".")
            raise PortError(f"port {kind}: {self.name}={value!r} should be {wanted}: {self.help}") from None


def split(spec: str) -> tuple[str, dict[str, str]]:
    """Take a port apart into its kind and its keys; raises PortError."""
    if len(spec) > MAX_SPEC:
        raise PortError(f"a port of {len(spec)} characters; at most {MAX_SPEC} make sense")
    kind, _, rest = spec.partition(":")
    lexer = shlex.shlex(rest, posix=True)
    lexer.whitespace = ","
    lexer.whitespace_split = True
    lexer.commenters = ""
    try:
        parts = list(lexer)
    except ValueError:
        raise PortError(f"port {spec!r}: a quotation is not closed") from None
    options: dict[str, str] = {}
    for part in parts:
        key, equals, value = part.partition("=")
        if not equals or not key:
            raise PortError(f"port {spec!r}: {part!r} should be key=value")
        if key in options:
            raise PortError(f"port {spec!r}: {key!r} is given twice")
        options[key] = value
    return kind, options


def check(kind: str, known: tuple[Option, ...], given: Mapping[str, str]) -> dict[str, Value]:
    """Read every given value by its option; raises PortError for what is unknown, missing or wrong."""
    by_name = {option.name: option for option in known}
    for key in given:
        if key not in by_name:
            names = ", ".join(by_name) or "no keys at all"
            raise PortError(f"port {kind} has no key {key!r}; it knows {names}")
    for option in known:
        if option.required and option.name not in given:
            raise PortError(f"port {kind} needs {option.name}=…: {option.help}")
    return {key: by_name[key].parse(kind, value) for key, value in given.items()}
