"""A server that watches its client: it carries a tiny device, asks questions of its own, and names what the
client does against the specification.
"""

from __future__ import annotations

import math
import os
import socket
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from errno import EEXIST, EINVAL, EOPNOTSUPP
from pathlib import Path
from typing import Any, Final

import trio

from conformance._messages import Message, message
from conformance._notes import Notes
from conformance._peer import HungUp, Wire
from conformance._questions import Questions
from conformance._rules import ClientWindow, Situation, check_command, check_version
from conformance._tiny_device import RefusedError, TinyDevice
from conformance.checks import Failed, Result
from conformance.clients import CLIENT_CHECKS
from protocol import Broken, Command, Connection, Limits, Negotiated, Refused, Request, Role
from protocol.messages import (
    DeviceInfo,
    DmaMap,
    DmaUnmap,
    IrqInfo,
    Record,
    RegionAccess,
    RegionInfo,
    WriteMulti,
)
from protocol.region_info import region_info_reply
from protocol.vfio import DeviceFlags, DmaUnmapFlags, RegionIndex
from protocol.write_multi import parse_writes

LIMITS: Final = Limits(max_msg_fds=8, max_data_xfer_size=64 << 10, max_dma_maps=256)
"""Smaller than those of other servers, so that a client that does not look at them is seen."""

QUESTION_AT: Final = 5
"""The command before whose reply the server asks something of its own."""

Answer = tuple[Record | None, bytes, Sequence[int]]
_DONE: Final[Answer] = (None, b"", ())


@contextmanager
def listening(path: Path) -> Iterator[socket.socket]:
    """A unix socket at a path, for its owner alone; removed at the end. Raises OSError."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as listener:
        os.fchmod(listener.fileno(), 0o600)
        listener.bind(os.fspath(path))
        try:
            listener.listen(1)
            yield listener
        finally:
            path.unlink(missing_ok=True)


async def watch(
    listener: socket.socket, *, patience: float, destructive: bool = False, limits: Limits = LIMITS
) -> tuple[Result, ...]:
    """Serve the next client until it leaves, and tell what was seen of it.

    `patience`: seconds in which the client has to answer questions. `destructive`: its memory is written,
    and put back.
    """
    await trio.lowlevel.wait_readable(listener)
    connected, _ = listener.accept()
    return await watch_socket(connected, patience=patience, destructive=destructive, limits=limits)


async def watch_socket(
    connected: socket.socket, *, patience: float, destructive: bool = False, limits: Limits = LIMITS
) -> tuple[Result, ...]:
    """The same for a client that is connected already; takes the socket over."""
    connected.setblocking(False)
    with ExitStack() as things:
        things.callback(connected.close)
        device = TinyDevice()
        things.callback(device.close)
        situation = Situation(Notes(CLIENT_CHECKS), device, limits)
        watcher = _Watcher(connected, situation, patience, destructive, things)
        await watcher.run()
        return situation.notes.results()


class _Watcher:
    def __init__(
        self,
        connected: socket.socket,
        situation: Situation,
        patience: float,
        destructive: bool,
        things: ExitStack,
    ) -> None:
        self._situation = situation
        self._patience = patience
        self._destructive = destructive
        self._things = things
        self._fds: list[int] = []
        # A client may be silent for as long as it likes.
        self._main = Wire(connected, math.inf, self._fds.append)
        self._engine = Connection(Role.SERVER, situation.limits)
        self._questions: Questions | None = None
        self._commands = 0
        self._expects: list[str] = []

    async def run(self) -> None:
        """Until the client leaves, or cannot be understood any more."""
        try:
            await self._converse()
        finally:
            self._situation.windows.clear()
            self._close_all()

    async def _converse(self) -> None:
        async with trio.open_nursery() as nursery:
            await self._watched(self._serve(nursery))
            nursery.cancel_scope.cancel()
        for index, needed in self._situation.cut.items():
            wanted = f"a question with argsz {needed} for region {index}"
            self._situation.judge("client-info.more-room", False, wanted, "none")
        if self._commands:
            left = len(self._situation.windows)
            self._situation.judge("client-dma-unmap.all", not left, "no window in the end", f"{left} of them")

    async def _watched(self, conversation: Awaitable[None]) -> None:
        """Until the client leaves; what cannot be taken apart is held against it, and the end."""
        try:
            await conversation
        except HungUp:
            pass
        except Failed as failure:
            self._situation.judge("client-header.size", False, failure.expected, failure.came)

    async def _serve(self, nursery: trio.Nursery) -> None:
        first = await self._main.receive("VERSION")
        if first is None:
            return
        check_version(self._situation.notes, first)
        if not await self._answer(first, nursery):
            return
        while (found := await self._main.receive("a message")) is not None:
            if found.is_reply:
                assert self._questions is not None
                self._questions.answered(found, "main")
            elif not await self._command(found, nursery):
                return
            if self._questions is not None:
                await self._questions.send(nursery)
            self._close_all()

    async def _command(self, found: Message, nursery: trio.Nursery) -> bool:
        kind = found.flags & 0xF
        self._situation.judge("client-header.type", kind == 0, "type 0 or 1", kind)
        for name in self._expects:
            self._situation.judge(name, True, "", "")
        self._expects.clear()
        self._commands += 1
        check_command(self._situation, found)
        if self._commands == QUESTION_AT and self._questions is not None:
            self._questions.unknown()
            await self._questions.send(nursery)
            if self._questions.over == "main":
                self._expects.append("client-asked.interleaved")
        return await self._answer(found, nursery)

    async def _answer(self, found: Message, nursery: trio.Nursery) -> bool:
        """Let the engine understand the message and the device answer it; False at the end."""
        data = message(
            found.command, found.payload, message_id=found.message_id, flags=found.flags, error=found.error
        )
        for event in self._engine.receive(data, found.fds):
            match event:
                case Negotiated():
                    await self._agree(event, nursery)
                case Request():
                    await self._handle(event)
                case Refused():
                    await self._main.send(self._engine.error(event, event.errno))
                case Broken():
                    await self._main.send(event.farewell)
                    return False
        return True

    async def _agree(self, event: Negotiated, nursery: trio.Nursery) -> None:
        self._situation.multiple = self._engine.write_multiple
        wire, over = self._main, "main"
        theirs: tuple[int, ...] = ()
        if event.twin:
            ours, other = socket.socketpair()
            self._things.callback(ours.close)
            ours.setblocking(False)
            wire, over = Wire(ours, math.inf, self._fds.append), "twin"
            theirs = (other.detach(),)
            self._fds += theirs
        self._questions = Questions(
            self._situation, wire, over, self._patience, destructive=self._destructive
        )
        await self._main.send(event.reply, theirs)
        self._close_all()
        if over == "twin":
            nursery.start_soon(self._watched, self._hear(wire, self._questions, nursery))

    async def _hear(self, wire: Wire, questions: Questions, nursery: trio.Nursery) -> None:
        """Answers that come over the twin socket."""
        while (found := await wire.receive("an answer")) is not None:
            good = found.is_reply
            if self._situation.judge("client-header.replies", good, "a reply over the twin", found):
                questions.answered(found, "twin")
                await questions.send(nursery)

    async def _handle(self, request: Request) -> None:
        handler = _HANDLERS.get(request.command)
        try:
            if handler is None:
                raise RefusedError(EOPNOTSUPP)
            body, data, fds = handler(self, request, request.body)
        except RefusedError as refusal:
            if request.command == Command.DEVICE_GET_REGION_INFO:
                self._expects.append("client-info.refusal")
            await self._main.send(self._engine.error(request, refusal.errno))
        else:
            await self._main.send(self._engine.reply(request, body, data, fds), fds)

    def _close_all(self) -> None:
        """The descriptors of a message that nobody kept."""
        kept = {window.fd for window in self._situation.windows.values()}
        for fd in self._fds:
            if fd not in kept:
                os.close(fd)
        self._fds = [fd for fd in self._fds if fd in kept]

    # the device's answers

    def _dma_map(self, request: Request, body: DmaMap) -> Answer:
        windows = self._situation.windows
        end = body.address + body.length
        if any(end > each.address and body.address < each.address + each.length for each in windows.values()):
            raise RefusedError(EEXIST)
        fd = request.fds[0] if request.fds else -1
        window = ClientWindow(body.address, body.length, body.offset, body.flags, fd)
        windows[body.address] = window
        assert self._questions is not None
        self._questions.window(window)
        return _DONE

    def _dma_unmap(self, request: Request, body: DmaUnmap) -> Answer:
        windows = self._situation.windows
        inside = range(body.address, body.address + body.length)
        everything = DmaUnmapFlags.ALL in body.flags
        for address in [each for each in windows if everything or each in inside]:
            del windows[address]
        return replace(body, argsz=DmaUnmap.size), b"", ()

    def _get_info(self, request: Request, body: DeviceInfo) -> Answer:
        device = self._situation.device
        flags = DeviceFlags.RESET | DeviceFlags.PCI
        return DeviceInfo(DeviceInfo.size, flags, len(device.regions), len(device.irqs)), b"", ()

    def _get_region_info(self, request: Request, body: RegionInfo) -> Answer:
        device = self._situation.device
        if body.index >= len(device.regions) or body.index == RegionIndex.VGA:
            raise RefusedError(EINVAL)
        region = device.regions[body.index]
        whole = region.areas == ((0, region.length),)
        info, chain = region_info_reply(
            body.argsz,
            index=body.index,
            flags=region.flags,
            length=region.length,
            areas=() if whole else region.areas,
        )
        if info.argsz > body.argsz:
            self._situation.cut[body.index] = info.argsz
        fds = () if region.fd is None or not self._engine.peer.max_msg_fds else (region.fd,)
        return info, chain, fds

    def _get_irq_info(self, request: Request, body: IrqInfo) -> Answer:
        irqs = self._situation.device.irqs
        if body.index >= len(irqs):
            raise RefusedError(EINVAL)
        return irqs[body.index], b"", ()

    def _set_irqs(self, request: Request, body: Record) -> Answer:
        return _DONE

    def _region_read(self, request: Request, body: RegionAccess) -> Answer:
        return body, self._situation.device.read(body.region, body.offset, body.count), ()

    def _region_write(self, request: Request, body: RegionAccess) -> Answer:
        self._write(body.region, body.offset, request.data)
        return body, b"", ()

    def _write(self, region: int, offset: int, data: bytes) -> None:
        self._situation.device.write(region, offset, data)
        if region == RegionIndex.CONFIG and self._questions is not None:
            self._questions.bus_master(self._situation.device.bus_master)

    def _write_multi(self, request: Request, body: WriteMulti) -> Answer:
        for region, offset, data in parse_writes(body, request.data):
            self._write(region, offset, data)
        return body, b"", ()

    def _reset(self, request: Request, body: None) -> Answer:
        return _DONE


_HANDLERS: Final[dict[Command, Callable[[_Watcher, Request, Any], Answer]]] = {
    Command.DMA_MAP: _Watcher._dma_map,
    Command.DMA_UNMAP: _Watcher._dma_unmap,
    Command.DEVICE_GET_INFO: _Watcher._get_info,
    Command.DEVICE_GET_REGION_INFO: _Watcher._get_region_info,
    Command.DEVICE_GET_IRQ_INFO: _Watcher._get_irq_info,
    Command.DEVICE_SET_IRQS: _Watcher._set_irqs,
    Command.REGION_READ: _Watcher._region_read,
    Command.REGION_WRITE: _Watcher._region_write,
    Command.REGION_WRITE_MULTI: _Watcher._write_multi,
    Command.DEVICE_RESET: _Watcher._reset,
}
