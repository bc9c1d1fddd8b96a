"""How a session begins: connect, agree on a version, ask what the device has."""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from errno import EAGAIN

import trio

from client._nursery import background
from client._socket import close_all, receive
from client.errors import BadReplyError, ConnectError, ServerError
from client.regions import IrqDetails, RegionDetails, needed_argsz, region_from_reply
from client.session import Session
from protocol import Broken, Command, Connection, Event, Limits, Negotiated, Role
from protocol.limits import (
    BUSY_RETRY,
    FIRST_ARGSZ,
    MAX_IRQS,
    MAX_QUESTIONS,
    MAX_REGIONS,
    RECEIVE_SIZE,
)
from protocol.messages import DeviceInfo, IrqInfo, RegionInfo
from protocol.quirks import Overrides
from protocol.vfio import IrqInfoFlags, RegionFlags


@asynccontextmanager
async def connect(
    path: str | os.PathLike[str], *, limits: Limits | None = None, quirks: Overrides | None = None
) -> AsyncIterator[Session]:
    """A session with the server at a unix socket; it ends with the block.

    `limits` are announced to the server; `quirks` says which peers' habits to expect beyond those that are
    recognised.

    Raises ConnectError if nobody listens there or no version can be agreed on. There is no timeout of its
    own: use trio.fail_after.
    """
    sock = await _open(os.fspath(path))
    async with over_socket(sock, limits=limits, quirks=quirks) as session:
        yield session


@asynccontextmanager
async def over_socket(
    sock: socket.socket, *, limits: Limits | None = None, quirks: Overrides | None = None
) -> AsyncIterator[Session]:
    """A session over a connected unix stream socket, which it takes over; see `connect`."""
    sock.setblocking(False)
    connection = Connection(Role.CLIENT, limits, quirks=quirks or Overrides())
    try:
        twin = await _negotiate(sock, connection)
    except BaseException:
        close_all(connection.close())
        sock.close()
        raise
    session = Session(sock, connection, twin)
    try:
        async with background() as nursery:
            for wire in session.wires:
                nursery.start_soon(wire.read_loop)
                nursery.start_soon(wire.write_loop)
            await _ask(session)
            yield session
    finally:
        session.close()


async def _open(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        while True:
            try:
                sock.connect(path)
                return sock
            except OSError as error:
                if error.errno != EAGAIN:
                    raise ConnectError(f"cannot connect to {path}: {error.strerror or error}") from None
            await trio.sleep(BUSY_RETRY)
    except BaseException:
        sock.close()
        raise


async def _negotiate(sock: socket.socket, connection: Connection) -> socket.socket | None:
    """Agree on a version; the twin socket, if the server made one."""
    buffer = bytearray(RECEIVE_SIZE)
    proposal = connection.propose()
    try:
        if sock.send(proposal) != len(proposal):
            raise ConnectError("the server does not take VERSION")
        while True:
            await trio.lowlevel.wait_readable(sock)
            got = receive(sock, buffer, connection.limits.max_msg_fds)
            if got is None:
                continue
            size, fds, lost = got
            if size == 0:
                raise ConnectError("the server closed the connection instead of agreeing on a version")
            events = connection.receive(memoryview(buffer)[:size], fds, fds_lost=lost)
            if events:
                return _agreed(events)
    except OSError as error:
        raise ConnectError(f"no agreement with the server: {error.strerror}") from None


def _agreed(events: list[Event]) -> socket.socket | None:
    first = events[0]
    twin_fd = first.twin_fd if isinstance(first, Negotiated) and len(events) == 1 else None
    for event in events:
        close_all(fd for fd in event.fds if fd != twin_fd)
        if isinstance(event, Broken):
            raise ConnectError(f"no agreement with the server: {event.error}")
    if len(events) > 1 or not isinstance(first, Negotiated):
        raise ConnectError("the server speaks before it was asked")
    return None if twin_fd is None else _twin_socket(twin_fd)


def _twin_socket(fd: int) -> socket.socket:
    """A descriptor of the server's as a socket of ours; takes it over."""
    try:
        twin = socket.socket(fileno=fd)
    except OSError:
        os.close(fd)
        raise ConnectError("the server's twin socket is none") from None
    if (twin.family, twin.type) != (socket.AF_UNIX, socket.SOCK_STREAM):
        twin.close()
        raise ConnectError("the server's twin socket is not a unix stream socket")
    twin.setblocking(False)
    return twin


async def _ask(session: Session) -> None:
    """Fill in what the server offers; a region or an interrupt that it refuses to describe is absent."""
    reply = await session.request(Command.DEVICE_GET_INFO, DeviceInfo(DeviceInfo.size))
    assert isinstance(reply.body, DeviceInfo)
    info = reply.body
    if info.num_regions > MAX_REGIONS or info.num_irqs > MAX_IRQS:
        raise BadReplyError(
            reply.command, f"{info.num_regions} regions and {info.num_irqs} kinds of interrupts"
        )
    session.info = info
    session.regions = ()
    session.irqs = ()
    for index in range(info.num_regions):
        session.regions += (await _ask_region(session, index),)
    for index in range(info.num_irqs):
        session.irqs += (await _ask_irq(session, index),)


async def _ask_region(session: Session, index: int) -> RegionDetails:
    argsz = FIRST_ARGSZ
    for _ in range(MAX_QUESTIONS):
        try:
            reply = await session.request(Command.DEVICE_GET_REGION_INFO, RegionInfo(argsz, index=index))
        except ServerError:
            return RegionDetails(index, 0, RegionFlags(0), 0, (), ())
        try:
            needed = needed_argsz(reply, argsz)
            if needed is None:
                return region_from_reply(index, reply)
        except BadReplyError:
            close_all(reply.fds)
            raise
        close_all(reply.fds)
        argsz = needed
    raise BadReplyError(Command.DEVICE_GET_REGION_INFO, "it needs more room each time")


async def _ask_irq(session: Session, index: int) -> IrqDetails:
    try:
        reply = await session.request(Command.DEVICE_GET_IRQ_INFO, IrqInfo(IrqInfo.size, index=index))
    except ServerError:
        return IrqDetails(index, 0, IrqInfoFlags(0))
    assert isinstance(reply.body, IrqInfo)
    return IrqDetails(index, reply.body.count, reply.body.flags)
