"""The JSON of VERSION: what a side announces, declared as a table of keys (spec, "VFIO_USER_VERSION").

Keys that the table does not have are ignored. A key with a value of the wrong kind is malformed, and the
session does not begin.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from errno import EINVAL
from typing import Any, Final

from protocol.errors import RemoteProtocolError
from protocol.limits import (
    DEFAULT_MAX_DATA_XFER_SIZE,
    DEFAULT_MAX_DMA_MAPS,
    DEFAULT_MAX_MSG_FDS,
    DEFAULT_PGSIZES,
    MAX_JSON_NUMBER,
    MAX_VERSION_DATA,
    Limits,
)


@dataclass(frozen=True, slots=True)
class Capabilities:
    """One side's announcement; the defaults are what the spec says of a side that does not mention the key.

    `migration_pgsize` and `twin_socket_fd_index` are None when absent; `mentioned` holds the keys that were
    really there.
    """

    max_msg_fds: int = DEFAULT_MAX_MSG_FDS
    max_data_xfer_size: int = DEFAULT_MAX_DATA_XFER_SIZE
    max_dma_maps: int = DEFAULT_MAX_DMA_MAPS
    pgsizes: int = DEFAULT_PGSIZES
    write_multiple: bool = False
    migration_pgsize: int | None = None
    twin_socket: bool = False
    twin_socket_fd_index: int | None = None
    mentioned: frozenset[str] = frozenset()


def _number(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_JSON_NUMBER:
        raise ValueError("is not a number")
    return value


def _boolean(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError("is not a boolean")
    return value


@dataclass(frozen=True, slots=True)
class Key:
    """A capability's place in the JSON and in `Capabilities`."""

    path: tuple[str, ...]
    attribute: str
    kind: Callable[[object], Any]


KEYS: Final = (
    Key(("max_msg_fds",), "max_msg_fds", _number),
    Key(("max_data_xfer_size",), "max_data_xfer_size", _number),
    Key(("max_dma_maps",), "max_dma_maps", _number),
    Key(("pgsizes",), "pgsizes", _number),
    Key(("write_multiple",), "write_multiple", _boolean),
    Key(("migration", "pgsize"), "migration_pgsize", _number),
    Key(("twin_socket", "supported"), "twin_socket", _boolean),
    Key(("twin_socket", "fd_index"), "twin_socket_fd_index", _number),
)


def parse_capabilities(data: bytes) -> Capabilities:
    """Read the bytes after a Version record: none, or JSON with its NUL. Raises RemoteProtocolError(EINVAL)
    if malformed.
    """
    if not data:
        return Capabilities()
    if len(data) > MAX_VERSION_DATA:
        raise RemoteProtocolError(
            EINVAL, f"VERSION carries {len(data)} bytes of JSON, more than {MAX_VERSION_DATA}"
        )
    text, nul, rest = data.partition(b"\0")
    if not nul or rest.strip(b"\0"):
        raise RemoteProtocolError(EINVAL, "the JSON of VERSION does not end with one NUL")
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        raise RemoteProtocolError(EINVAL, "VERSION does not carry JSON") from None
    capabilities = document.get("capabilities", {}) if isinstance(document, dict) else None
    if not isinstance(capabilities, dict):
        raise RemoteProtocolError(EINVAL, "the JSON of VERSION has no object of capabilities")
    return _from_document(capabilities)


def _from_document(document: Mapping[str, object]) -> Capabilities:
    found: dict[str, Any] = {}
    for key in KEYS:
        value: object = document
        for name in key.path:
            if not isinstance(value, dict):
                raise RemoteProtocolError(EINVAL, f"capability {key.path[0]} is not an object")
            value = value.get(name)
            if value is None:
                break
        if value is None:
            continue
        try:
            found[key.attribute] = key.kind(value)
        except ValueError as error:
            raise RemoteProtocolError(EINVAL, f"capability {'.'.join(key.path)} {error}") from None
    return Capabilities(**found, mentioned=frozenset(document))


def offer(limits: Limits) -> bytes:
    """The JSON, NUL included, with which a client proposes itself."""
    said: dict[str, object] = {
        "max_msg_fds": limits.max_msg_fds,
        "max_data_xfer_size": limits.max_data_xfer_size,
        "max_dma_maps": limits.max_dma_maps,
        "pgsizes": limits.pgsizes,
    }
    if limits.write_multiple:
        said["write_multiple"] = True
    if limits.twin_socket:
        said["twin_socket"] = {"supported": True}
    return _encode(said)


def twin_agreed(limits: Limits, proposed: Capabilities) -> bool:
    """Whether a server with these limits gives this client a twin socket: both want one, and the client
    takes the descriptor.
    """
    return limits.twin_socket and proposed.twin_socket and proposed.max_msg_fds > 0


def answer(limits: Limits, proposed: Capabilities) -> bytes:
    """The JSON with which a server answers: of what it could say, only what the client proposed.

    A client that does not mention a limit reckons with the spec's default; one that is lower it has to be
    told all the same. A twin socket is the first descriptor of the reply.
    """
    said: dict[str, object] = {}
    if "max_msg_fds" in proposed.mentioned or limits.max_msg_fds < DEFAULT_MAX_MSG_FDS:
        said["max_msg_fds"] = limits.max_msg_fds
    if "max_data_xfer_size" in proposed.mentioned or limits.max_data_xfer_size < DEFAULT_MAX_DATA_XFER_SIZE:
        said["max_data_xfer_size"] = limits.max_data_xfer_size
    if "max_dma_maps" in proposed.mentioned:
        said["max_dma_maps"] = min(limits.max_dma_maps, proposed.max_dma_maps)
    if "pgsizes" in proposed.mentioned:
        said["pgsizes"] = limits.pgsizes
    if limits.write_multiple and proposed.write_multiple:
        said["write_multiple"] = True
    if twin_agreed(limits, proposed):
        said["twin_socket"] = {"supported": True, "fd_index": 0}
    return _encode(said)


def _encode(capabilities: dict[str, object]) -> bytes:
    return json.dumps({"capabilities": capabilities}, separators=(",", ":")).encode() + b"\0"
