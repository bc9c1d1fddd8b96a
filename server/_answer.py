"""What a handler gets and gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from device.function import PciFunction
from protocol import Request
from protocol.messages import Record

__all__ = ["Answer", "Handler", "Terms"]


@dataclass(frozen=True, slots=True)
class Terms:
    """What was agreed on with the client."""

    fds: int
    """Descriptors that it takes in one message. One that takes none is offered no mapping, only messages."""

    windows: int
    """DMA windows at a time."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The content of a reply. `fds` stay the device's: they are sent, not given away."""

    body: Record | None = None
    data: bytes = b""
    fds: tuple[int, ...] = ()


Handler = Callable[[PciFunction, Request, Any, Terms], Answer]
"""(function, request, the request's record, terms) to the answer; DeviceError refuses the request."""
