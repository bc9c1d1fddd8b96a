"""Descriptors that stand for writes to parts of a region (spec, "VFIO_USER_DEVICE_GET_REGION_IO_FDS").

KVM can signal an ioeventfd without waking the client; a driver in user space can as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from client._socket import close_all
from client.errors import BadReplyError, ClientError
from protocol import Command, RemoteProtocolError
from protocol.io_fds import parse_io_fds
from protocol.limits import FIRST_ARGSZ, MAX_INFO_SIZE, MAX_QUESTIONS
from protocol.messages import IoEventFd, IoRegionFd, RegionIoFds
from protocol.vfio import IoEventFdFlags

if TYPE_CHECKING:
    from client.session import Session


@dataclass(frozen=True, slots=True)
class IoFds:
    """Parts of a region, each with the index of its descriptor in `fds`; a context manager closes those."""

    region: int
    entries: tuple[IoEventFd | IoRegionFd, ...]
    fds: tuple[int, ...]

    def find(self, offset: int, width: int, value: int) -> int | None:
        """The eventfd that stands for writing `value`, of `width` bytes, at an offset: KVM's rule, by which
        a length of 0 means any width.
        """
        for entry in self.entries:
            if not isinstance(entry, IoEventFd) or entry.offset != offset or entry.length not in (0, width):
                continue
            if IoEventFdFlags.DATAMATCH in entry.flags and entry.datamatch != value:
                continue
            return self.fds[entry.fd_index]
        return None

    def close(self) -> None:
        """Close the descriptors; once."""
        close_all(self.fds)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


async def ask_io_fds(session: Session, index: int) -> IoFds:
    """See `Session.io_fds`."""
    if not 0 <= index < len(session.regions) or session.regions[index].size == 0:
        raise ClientError(f"the device has no region {index}")
    argsz = FIRST_ARGSZ
    for _ in range(MAX_QUESTIONS):
        reply = await session.request(Command.DEVICE_GET_REGION_IO_FDS, RegionIoFds(argsz, index=index))
        assert isinstance(reply.body, RegionIoFds)
        needed = reply.body.argsz
        if needed > argsz:
            close_all(reply.fds)
            if needed > MAX_INFO_SIZE:
                raise BadReplyError(reply.command, f"{needed} bytes of sub-regions")
            argsz = needed
            continue
        try:
            return _checked(session, index, reply.body, reply.data, reply.fds)
        except BaseException:
            close_all(reply.fds)
            raise
    raise BadReplyError(Command.DEVICE_GET_REGION_IO_FDS, "it needs more room each time")


def _checked(session: Session, index: int, body: RegionIoFds, data: bytes, fds: tuple[int, ...]) -> IoFds:
    command = Command.DEVICE_GET_REGION_IO_FDS
    try:
        entries = parse_io_fds(body, data, len(fds))
    except RemoteProtocolError as error:
        raise BadReplyError(command, error.reason) from None
    size = session.regions[index].size
    for entry in entries:
        if entry.offset >= size or entry.length > size - entry.offset:
            place = f"{entry.offset:#x}+{entry.length:#x}"
            raise BadReplyError(command, f"{place} of region {index}, {size:#x} long")
    return IoFds(index, entries, fds)
