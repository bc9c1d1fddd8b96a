"""A device's INTx line into the machine's irqchip, which may become another one at any time.

    async with open_intx(session, controller, slot=3) as intx:
        await intx.enable()

On the fast path server and irqchip talk by two eventfds. When irqchip or route change these are taken apart
and put together again in QEMU's order (hw/vfio/pci.c: vfio_intx_enable_kvm, vfio_intx_disable_kvm,
vfio_intx_update), so that a line which is high is told of once, whoever heard of it before. Where there is no
fast path the line is driven by its level; see `client.irqchip._slow`.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager, nullcontext, suppress
from typing import Final

import trio

from client._eventfd import make_eventfd, signal, take
from client._nursery import background
from client.errors import ClientError
from client.interrupts import require
from client.irqchip._bypass import Bypass
from client.irqchip._requests import IntxRequests
from client.irqchip._slow import IntxCounters, SlowPath
from client.irqchip.controller import InterruptController
from client.irqchip.routes import NOWHERE, IntxMode, IntxRoute, root_line
from client.pci import read_config
from client.session import Session
from protocol.vfio import IrqIndex, IrqInfoFlags

log = logging.getLogger(__name__)

DARK_KEPT: Final = 1 << 14
"""How many of the last changes `Intx.dark` has: half a megabyte."""


class Intx:
    """Made by `open_intx`. `pin` is 1 for INTA, 0 if the device has none; `line` is that of the root bus.

    It changes in one way after the other, each to its end whatever is cancelled meanwhile, and in bounded
    time. What fails on the way of a change is logged and kept in `failure`; a line that cannot be put on the
    fast path is on the slow one.
    """

    def __init__(
        self,
        session: Session,
        controller: InterruptController,
        nursery: trio.Nursery,
        *,
        pin: int,
        slot: int,
        bypass: bool,
    ) -> None:
        self.session = session
        self.pin: Final = pin
        self.line: Final = root_line(slot, pin) if pin else None
        self.route = NOWHERE
        """Where the line went when it was enabled, or followed a change."""
        self.enabled = False
        """Whether INTx is what the device uses; while it is not, changes are no affair of this line."""
        self.failure: ClientError | None = None
        """What went wrong first since the last change began; None if nothing did."""
        self.trigger_fd = -1
        """The eventfd that the server signals; -1 while the line is not enabled."""
        self.counters: Final = IntxCounters()
        self.dark: Final[deque[float]] = deque(maxlen=DARK_KEPT)
        """Seconds from the first MASK to the last UNMASK of each change that said anything to the server."""
        self._name: Final = f"INT{'-ABCD'[pin]} of the device in slot {slot}"
        self._controller: Final = controller
        self._wants_bypass: Final = bypass
        self._bypass: Bypass | None = None
        self._slow: Final = SlowPath(nursery, self.counters, self._drive, self._unmask_owed)
        self._lock: Final = trio.Lock()

    @property
    def accelerated(self) -> bool:
        """Whether the line is on the fast path."""
        return self._bypass is not None

    @property
    def resample_fd(self) -> int:
        """The eventfd that the irqchip signals at the end of interrupt; -1 on the slow path."""
        return -1 if self._bypass is None else self._bypass.resample_fd

    @property
    def pending(self) -> bool:
        """Whether an interrupt of the slow path waits for its end."""
        return self._slow.pending

    async def enable(self) -> None:
        """The device uses INTx from now on (vfio_intx_enable); does nothing if it does already.

        Raises ClientError if it has no INTx, if another `Intx` of the session has it, if the server takes no
        eventfds or does not answer, ServerError if it refuses, Disconnected, and OSError if there can be no
        further eventfd.
        """
        if self.line is None:
            raise ClientError("the device has no interrupt pin")
        async with self._change() as requests:
            if self.enabled:
                return
            self._require(self.session)
            self.trigger_fd = make_eventfd()
            self.enabled = True
            try:
                self._slow.listen(self.trigger_fd)
                await self._wire(requests)
            except BaseException:
                await self._end(requests)
                raise

    async def disable(self) -> None:
        """The device does not use INTx any more (vfio_intx_disable); does nothing if it does not. Raises
        nothing, and is not given up by a cancellation.
        """
        with trio.CancelScope(shield=True):
            async with self._change() as requests:
                if self.enabled:
                    await self._end(requests)

    async def reconnect(self, session: Session) -> None:
        """The same device is behind another session now: wire its line there, where it is live again. For the
        present session it is wired anew.

        Raises as `enable` does; the line is dead then, and this may be tried again.
        """
        async with self._change() as requests:
            if self.enabled:
                self._require(session)
                self._slow.deafen()
                self._detach()
                # A line that is wired already would stay masked; one that masks none would lose something.
                if session is not self.session or self._masks_itself:
                    with suppress(ClientError):
                        await requests.unwire()
                self.session = session
                self._clear()
                self._slow.listen(self.trigger_fd)
                await self._wire(IntxRequests(session))
            self.session = session

    # what the controller tells

    async def irqchip_changed(self) -> None:
        """Follow to another irqchip: the same route leads elsewhere there."""
        async with self._change() as requests:
            if self.enabled:
                await self._update(requests)

    async def routing_changed(self) -> None:
        """Follow to another input, if it is another."""
        async with self._change() as requests:
            if self.enabled and self.route != self._current_route():
                await self._update(requests)

    def _current_route(self) -> IntxRoute:
        assert self.line is not None
        return self._controller.route(self.line)

    # what the slow path asks for

    def _drive(self, level: bool) -> None:
        assert self.line is not None
        if level:
            self._controller.assert_line(self.line, self)
        else:
            self._controller.deassert_line(self.line, self)

    async def _unmask_owed(self) -> None:
        """Say that an interrupt was ended, unless a change has said so meanwhile: between its messages an
        UNMASK would have the line signal twice.
        """
        async with self._change() as requests:
            if self._slow.owed:
                await self._unmask(requests)

    async def _unmask(self, requests: IntxRequests) -> None:
        self._slow.owed = False
        self.counters.ends += 1
        await self._attempt(requests.unmask())

    # steps of changes

    @asynccontextmanager
    async def _change(self) -> AsyncIterator[IntxRequests]:
        """No other change meanwhile, and no cancellation."""
        async with self._lock:
            with trio.CancelScope(shield=True):
                yield IntxRequests(self.session)

    def _require(self, session: Session) -> None:
        require(session, IrqIndex.INTX, 1)
        self._slow.check_free(session.trapping)

    async def _wire(self, requests: IntxRequests) -> None:
        """Make the line live; raises if the server does not take its eventfd."""
        self.failure = None
        self._slow.watch(self.session.trapping)
        try:
            await requests.wire(self.trigger_fd)
        except (ClientError, OSError) as error:
            self._failed(error)
            raise
        self.route = self._current_route()
        await self._take_bypass(requests)

    async def _update(self, requests: IntxRequests) -> None:
        """vfio_intx_update: apart from here, and together again there."""
        self.failure = None
        self.counters.changes += 1
        began = trio.current_time()
        said = await self._leave_bypass(requests)
        self.route = self._current_route()
        said |= await self._take_bypass(requests)
        if said:
            self.dark.append(trio.current_time() - began)
        elif self.pending and self.route.mode is IntxMode.ENABLED:
            # its end may have gone unseen; where something was said, an UNMASK was the last of it
            self._clear()
            await self._unmask(requests)

    async def _take_bypass(self, requests: IntxRequests) -> bool:
        """vfio_intx_enable_kvm: take the fast path where there is one. Whether the server was told."""
        chip = self._controller.chip
        if not (self._wants_bypass and self._masks_itself) or self.route.mode is not IntxMode.ENABLED:
            return False
        if not chip.resample:
            self._failed(ClientError(f"irqchip {chip.name} does not tell the end of an interrupt"))
        if requests.late or not chip.resample:
            self.counters.fallbacks += 1
            return False
        self._slow.deafen()
        try:
            await requests.mask()
            self._clear()
            if self._controller.chip is chip and self._current_route() == self.route:
                self._bypass = Bypass(chip, self.route.gsi, self.trigger_fd)
                await requests.wire_unmask(self._bypass.resample_fd)
            else:  # this line is being told, which waits for us
                self._slow.listen(self.trigger_fd)
            await requests.unmask()
        except BaseException as error:
            self._failed(error)
            self.counters.fallbacks += 1
            self._detach()
            self._slow.listen(self.trigger_fd)
            await self._attempt(requests.unmask())
            if not isinstance(error, (ClientError, OSError)):
                raise
        return True

    async def _leave_bypass(self, requests: IntxRequests) -> bool:
        """vfio_intx_disable_kvm: back to the slow path. Whether the server was told.

        Our own half is done whatever the server says, for the irqchip may be on its way out.
        """
        if self._bypass is None:
            return False
        masked = await self._attempt(requests.mask())
        self._detach()
        if masked:
            self._drain()
        self._slow.listen(self.trigger_fd)
        await self._attempt(requests.unmask())
        return True

    async def _end(self, requests: IntxRequests) -> None:
        """Leave nothing of the line, here and at the server."""
        try:
            await self._leave_bypass(requests)
            await self._attempt(requests.unwire())
        finally:
            self._detach()
            self._slow.deafen()
            self._slow.unwatch()
            self._drain()
            os.close(self.trigger_fd)
            self.trigger_fd = -1
            self.enabled = False
            try:
                self._slow.clear()
            except ClientError as error:
                self._failed(error)

    def _detach(self) -> None:
        """Take the eventfds out of the irqchip, if they are in one."""
        bypass, self._bypass = self._bypass, None
        if bypass is not None:
            try:
                bypass.close()
            except (ClientError, OSError) as error:
                self._failed(error)

    def _clear(self) -> None:
        """Forget what was signalled so far: UNMASK, or being wired, makes the device say it again.

        One that does not mask itself says everything once. What it has signalled stays, and what is pending
        goes back, for it may not have reached a CPU.
        """
        pending = self._slow.clear()
        if self._masks_itself:
            self._drain()
        elif pending:
            signal(self.trigger_fd)

    def _drain(self) -> None:
        self.counters.drained += take(self.trigger_fd)

    @property
    def _masks_itself(self) -> bool:
        """Whether the line is a level, which UNMASK tells of again. Without that the fast path loses what is
        signalled before the end of an interrupt, for that takes the input down.
        """
        return IrqInfoFlags.AUTOMASKED in self.session.irqs[IrqIndex.INTX].flags

    async def _attempt(self, request: Awaitable[None]) -> bool:
        """Whether the server did it; if not, that is a failure, and the change goes on."""
        try:
            await request
        except (ClientError, OSError) as error:
            self._failed(error)
            return False
        return True

    def _failed(self, error: BaseException) -> None:
        if self.failure is None:
            self.failure = error if isinstance(error, ClientError) else ClientError(str(error))
            log.warning("%s: %s", self._name, error)


@asynccontextmanager
async def open_intx(
    session: Session, controller: InterruptController, *, slot: int = 0, bypass: bool = True
) -> AsyncIterator[Intx]:
    """The INTx line of the device in this slot of the root bus, not enabled yet; it is disabled at the end of
    the block. It follows the controller for exactly as long, if the device has an interrupt pin.

    `bypass=False` keeps it on the slow path (QEMU's x-no-kvm-intx), where a device that does not mask itself
    (AUTOMASKED) always is. Raises ClientError for a pin that is none, DeviceError without configuration
    space, and as `Session.request` does.
    """
    pin = (await read_config(session)).interrupt_pin
    async with background() as nursery:
        intx = Intx(session, controller, nursery, pin=pin, slot=slot, bypass=bypass)
        with (
            controller.irqchip_change.subscribed(intx.irqchip_changed) if pin else nullcontext(),
            controller.routing_change.subscribed(intx.routing_changed) if pin else nullcontext(),
        ):
            try:
                yield intx
            finally:
                await intx.disable()
