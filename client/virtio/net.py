"""A driver for virtio network cards: frames out, frames in, control commands, link changes.

    async with open_net(session) as nic:
        await nic.send(frame)
        answer = await nic.receive()

It works with MSI-X, a vector for each queue if there are enough, and with INTx. Interrupts wake tasks; a
burst that finds work never waits for one. Nothing the device writes is trusted: what cannot be raises
DeviceError, and the driver stays down until `reset`.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Final, ParamSpec, TypeVar

import trio

from client._nursery import background
from client.dma import dma_memory
from client.errors import ClientError, DeviceError
from client.interrupts import Interrupt, IntxLine, intx, msix
from client.pci import Command as PciCommand
from client.pci import PciControl, read_config
from client.session import Session
from client.virtio import _queues
from client.virtio._queues import CTRL, RX, TX, Queues, plan_queues
from client.virtio._ring import ReceiveRing, TransmitRing
from client.virtio._signal import Signal
from client.virtio.control import Command, ControlQueue, Kind, RxMode, mac_table
from client.virtio.features import PLAIN, REQUIRED, Feature, usable
from client.virtio.header import NetHeader
from client.virtio.transport import NO_VECTOR, Doorbell, Isr, Status, VirtioPci, plan_vectors
from protocol.vfio import IrqIndex

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

P = ParamSpec("P")
T = TypeVar("T")
AnyRing = TypeVar("AnyRing", ReceiveRing, TransmitRing)

STOP_TIMEOUT: Final = 2.0
"""Seconds that a device gets to stop when the block of `open_net` ends by an exception or a cancellation."""

CONFIG_SIZE: Final = 12
"""Bytes of the device configuration up to the MTU (virtio 1.3, 5.1.4)."""

LINK_UP: Final = 1
ANNOUNCE: Final = 2
"""Bits of the configuration's status."""


class Wiring(Enum):
    """Which interrupts the driver uses."""

    MSIX = "msix"
    INTX = "intx"


@dataclass(slots=True)
class Counters:
    """What went through the driver; `kicks` are notifications, `interrupts` those that were heard."""

    sent: int = 0
    received: int = 0
    kicks: int = 0
    interrupts: int = 0


class NetDriver:
    """Made by `open_net`. `mac`, `mtu` and `link_up` are what the device last said; None or True where it
    says nothing.

    Methods without `async` never wait. Tasks may send and receive concurrently.
    """

    def __init__(
        self, transport: VirtioPci, queues: Queues, features: Feature, vectors: tuple[int, list[int]]
    ) -> None:
        self.features = features
        self.counters = Counters()
        self.mac: bytes | None = None
        self.mtu: int | None = None
        self.link_up = True
        self._transport = transport
        self._queues = queues
        self._vectors = vectors
        self._doorbells: list[Doorbell] = []
        self._rx: ReceiveRing | None = None
        self._tx: TransmitRing | None = None
        self._control: ControlQueue | None = None
        self._rx_signal, self._tx_signal, self._config_signal = Signal(), Signal(), Signal()
        self._backlog: deque[tuple[bytes, bytes]] = deque()
        self._failure: ClientError | None = ClientError("the driver is not started")
        self._resetting = trio.Lock()

    # frames

    async def send(self, frame: ReadableBuffer, header: NetHeader | None = None) -> None:
        """Give the device one frame, waiting while its queue is full; raises DeviceError if the device
        fails.
        """
        encoded = header.encode() if header is not None else None
        await trio.lowlevel.checkpoint()
        while not self._push([frame], 0, encoded):
            await self.wait_sendable()

    async def send_all(self, frames: Sequence[ReadableBuffer]) -> None:
        """Give the device many frames in order, waiting while its queue is full."""
        done = 0
        while done < len(frames):
            sent = self._push(frames, done, None)
            done += sent
            if not sent:
                await self.wait_sendable()
        await trio.lowlevel.checkpoint()

    def send_burst(self, frames: Sequence[ReadableBuffer], start: int = 0) -> int:
        """Give the device frames[start:] as far as its queue has room; how many."""
        return self._push(frames, start, None)

    def send_repeated(self, frame: ReadableBuffer, count: int) -> int:
        """Give the device the same frame up to `count` times; how many. For load: no objects are made."""
        ring = self._ring(self._tx)
        sent = self._guard(ring.repeat, frame, count)
        self._sent(ring, sent)
        return sent

    async def wait_sendable(self) -> None:
        """Until the device has given back some of the frames it was given."""
        ring = self._ring(self._tx)
        if ring.outstanding == 0 or self._guard(ring.enable_interrupts, ring.outstanding // 2):
            await trio.lowlevel.checkpoint()
        else:
            await self._tx_signal.wait()
            self._check()
        ring.disable_interrupts()

    async def receive(self) -> bytes:
        """The next frame, waiting for it; raises DeviceError if the device fails."""
        return (await self.receive_with_header())[1]

    async def receive_with_header(self) -> tuple[NetHeader, bytes]:
        """The next frame with its header, waiting for it."""
        await trio.lowlevel.checkpoint()
        while not self._backlog:
            ring = self._ring(self._rx)
            found = self._guard(ring.pop_with_headers, 64)
            self._received(ring, len(found))
            self._backlog.extend(found)
            if not found:
                await self.wait_receivable()
        header, frame = self._backlog.popleft()
        return NetHeader.decode(header), frame

    def receive_burst(self, limit: int = 256) -> list[bytes]:
        """Up to `limit` frames that are there."""
        if self._backlog:
            return [self._backlog.popleft()[1] for _ in range(min(limit, len(self._backlog)))]
        ring = self._ring(self._rx)
        found = self._guard(ring.pop, limit)
        self._received(ring, len(found))
        return found

    def discard(self) -> tuple[int, int]:
        """Throw away all frames that are there: how many, and their bytes. For load: no objects are made."""
        frames, octets = len(self._backlog), sum(len(frame) for _, frame in self._backlog)
        self._backlog.clear()
        ring = self._ring(self._rx)
        more = self._guard(ring.drain)
        self._received(ring, more[0])
        return frames + more[0], octets + more[1]

    async def wait_receivable(self) -> None:
        """Until a frame is there."""
        ring = self._ring(self._rx)
        if self._backlog:
            await trio.lowlevel.checkpoint()
            return
        if self._guard(ring.enable_interrupts):
            await trio.lowlevel.checkpoint()
            return
        await self._rx_signal.wait()
        self._check()
        ring.disable_interrupts()

    # control

    async def set_rx_mode(self, mode: RxMode, on: bool) -> None:
        """Which frames beyond its own the device passes on; raises ControlError if it refuses."""
        await self._commands().command(Kind(0, mode), bytes([on]))

    async def set_mac(self, mac: bytes) -> None:
        """Change the device's address; raises ControlError if it refuses."""
        if len(mac) != 6:
            raise ClientError(f"a MAC address of {len(mac)} bytes")
        await self._commands().command(Command.MAC_ADDRESS, mac)
        self.mac = mac

    async def set_mac_table(self, unicast: Iterable[bytes] = (), multicast: Iterable[bytes] = ()) -> None:
        """Addresses to receive besides the own; raises ControlError if the device refuses."""
        await self._commands().command(Command.MAC_TABLE, mac_table(list(unicast), list(multicast)))

    async def set_vlan(self, vlan: int, on: bool) -> None:
        """Whether frames of a VLAN are received; raises ControlError if the device refuses."""
        kind = Command.VLAN_ADD if on else Command.VLAN_REMOVE
        await self._commands().command(kind, struct.pack("<H", vlan))

    async def set_guest_offloads(self, offloads: Feature) -> None:
        """Which of the negotiated GUEST_ offloads the device may use from now on; raises ControlError if it
        refuses.
        """
        await self._commands().command(Command.GUEST_OFFLOADS, struct.pack("<Q", int(offloads)))

    async def wait_config_change(self) -> None:
        """Until the device says that its configuration changed; `link_up`, `mtu` and `mac` are new then."""
        await self._config_signal.wait()
        self._check()

    # life

    async def reset(self) -> None:
        """Reset the device and start it anew with the same features; frames under way are lost, commands
        fail.
        """
        async with self._resetting:
            self._stop(ClientError("the device is being reset"))
            await self._start()

    async def stop(self) -> None:
        """Reset the device and leave it so; called at the end of `open_net`, whatever happened."""
        await _quietly(self._transport.reset)
        self._stop(ClientError("the driver is stopped"))

    async def _start(self) -> None:
        transport, features = self._transport, self.features
        await transport.reset()
        await transport.add_status(Status.ACKNOWLEDGE)
        await transport.add_status(Status.DRIVER)
        if missing := features & ~(await transport.offered_features()):
            raise DeviceError(f"the device does not offer {missing!r} any more")
        await transport.accept_features(features)
        config_vector, queue_vectors = self._vectors
        await transport.set_config_vector(config_vector)
        await self._read_config()
        rx, tx = self._queues.receive_ring(features), self._queues.transmit_ring(features)
        self._doorbells = [
            await _queues.start_queue(transport, RX, rx, queue_vectors[RX]),
            await _queues.start_queue(transport, TX, tx, queue_vectors[TX]),
        ]
        control = None
        if self._queues.plan.ctrl_size:
            ring = self._queues.control_ring(features)
            self._doorbells.append(await _queues.start_queue(transport, CTRL, ring, queue_vectors[CTRL]))
            control = ControlQueue(ring, self._queues.control_memory, lambda: self._kick(CTRL))
        status = await transport.add_status(Status.DRIVER_OK)
        if Status.NEEDS_RESET in status or Status.DRIVER_OK not in status:
            raise DeviceError(f"the device does not start: status {status!r}")
        self._rx, self._tx, self._control = rx, tx, control
        self._failure = None
        self._config_signal.clear()
        tx.disable_interrupts()
        if rx.publish():
            self._kick(RX)

    def _stop(self, reason: ClientError) -> None:
        self._failure = reason
        for ring in (self._rx, self._tx):
            if ring is not None:
                ring.release()
        if self._control is not None:
            self._control.close()
        self._rx = self._tx = self._control = None
        self._backlog.clear()
        self._wake_all()

    async def _read_config(self) -> None:
        data = (await self._transport.device_config(CONFIG_SIZE)).ljust(CONFIG_SIZE, b"\0")
        status, _, mtu = struct.unpack_from("<HHH", data, 6)
        if Feature.MAC in self.features:
            self.mac = data[:6]
        if Feature.MTU in self.features:
            self.mtu = mtu
        if Feature.STATUS in self.features:
            self.link_up = bool(status & LINK_UP)
        if Feature.GUEST_ANNOUNCE in self.features and status & ANNOUNCE and self._control is not None:
            self._control.post(Command.ANNOUNCED)

    # interrupts

    async def listen_msix(self, interrupt: Interrupt) -> None:
        """Background task for one vector."""
        config_vector, queue_vectors = self._vectors
        queues = [queue for queue, vector in enumerate(queue_vectors) if vector == interrupt.vector]
        try:
            while True:
                self.counters.interrupts += await interrupt.wait()
                self._interrupted(queues)
                if interrupt.vector != config_vector:
                    continue
                # the ISR tells a configuration change even with MSI-X (virtio 1.3, 4.1.4.5.1)
                if not queues or Isr.CONFIG in await self._transport.isr():
                    await self._config_changed()
        except ClientError as error:
            self._fail(error)

    async def listen_intx(self, line: IntxLine) -> None:
        """Background task for the INTx line: the ISR says what happened and takes the line down, then it is
        unmasked.
        """
        try:
            while True:
                self.counters.interrupts += await line.wait()
                isr = await self._transport.isr()
                if Isr.QUEUE in isr:
                    self._interrupted((RX, TX, CTRL))
                if Isr.CONFIG in isr:
                    await self._config_changed()
                await line.unmask()
        except ClientError as error:
            self._fail(error)

    async def listen_session(self) -> None:
        """Background task: no interrupt comes when the server is gone."""
        self._fail(await self._transport.session.wait_end())

    def _interrupted(self, queues: Sequence[int]) -> None:
        if RX in queues:
            self._rx_signal.set()
        if TX in queues:
            self._tx_signal.set()
        if CTRL in queues and self._control is not None:
            self._guard(self._control.collect)

    async def _config_changed(self) -> None:
        if self._failure is not None:
            return
        if Status.NEEDS_RESET in await self._transport.status():
            self._fail(DeviceError("the device needs a reset"))
            return
        await self._read_config()
        self._config_signal.set()

    # inside

    def _push(self, frames: Sequence[ReadableBuffer], start: int, header: bytes | None) -> int:
        ring = self._ring(self._tx)
        sent = self._guard(ring.push, frames, start, header)
        self._sent(ring, sent)
        return sent

    def _sent(self, ring: TransmitRing, count: int) -> None:
        self.counters.sent += count
        if ring.publish():
            self._kick(TX)

    def _received(self, ring: ReceiveRing, count: int) -> None:
        self.counters.received += count
        if ring.publish():
            self._kick(RX)

    def _kick(self, queue: int) -> None:
        self.counters.kicks += 1
        self._doorbells[queue].ring()

    def _commands(self) -> ControlQueue:
        self._check()
        if self._control is None:
            raise ClientError("the device has no control queue")
        return self._control

    def _ring(self, ring: AnyRing | None) -> AnyRing:
        self._check()
        assert ring is not None
        return ring

    def _guard(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call what reads the device's writing; its nonsense takes the driver down."""
        try:
            return function(*args, **kwargs)
        except DeviceError as error:
            self._fail(error)
            raise

    def _fail(self, error: ClientError) -> None:
        self._failure = self._failure or error
        if self._control is not None:
            self._control.abandon()
        self._wake_all()

    def _wake_all(self) -> None:
        for signal in (self._rx_signal, self._tx_signal, self._config_signal):
            signal.set()

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure.with_traceback(None)


async def _quietly(function: Callable[P, Awaitable[None]], *args: P.args, **kwargs: P.kwargs) -> None:
    """A farewell to the device: bounded in time, and nobody is left to hear of a failure."""
    with trio.move_on_after(STOP_TIMEOUT, shield=True), suppress(ClientError):
        await function(*args, **kwargs)


@asynccontextmanager
async def open_net(
    session: Session,
    *,
    wiring: Wiring = Wiring.MSIX,
    features: Feature = PLAIN,
    queue_size: int = 256,
    slot_size: int = 2048,
) -> AsyncIterator[NetDriver]:
    """Find the card behind a session, start it and drive it until the block ends.

    `features` are those to take if offered; `queue_size` is the most descriptors of a queue, `slot_size`
    the bytes of one buffer. Raises DeviceError if it is no modern virtio network card or lacks the
    interrupts.
    """
    async with AsyncExitStack() as stack:
        config = await read_config(session)
        transport = stack.enter_context(VirtioPci(session, config))
        pci = PciControl(session, config)
        await pci.set_command(PciCommand.MEMORY | PciCommand.MASTER)
        await pci.set_command(PciCommand.INTX_DISABLE, on=wiring is Wiring.MSIX)
        await transport.reset()
        taken = usable(await transport.offered_features() & features)
        if REQUIRED not in taken:
            raise DeviceError("the device does not offer VERSION_1: it is a legacy one")
        raw = (await transport.device_config(CONFIG_SIZE)).ljust(CONFIG_SIZE, b"\0")
        mtu = struct.unpack_from("<H", raw, 10)[0] if Feature.MTU in taken else None
        plan = await plan_queues(transport, taken, queue_size, slot_size, mtu)
        queues = 3 if plan.ctrl_size else 2
        memory = await stack.enter_async_context(dma_memory(session, plan.memory))
        interrupts: tuple[Interrupt, ...]
        if wiring is Wiring.MSIX:
            available = session.irqs[IrqIndex.MSIX].count if len(session.irqs) > IrqIndex.MSIX else 0
            vectors = plan_vectors(available, queues)
            await pci.set_msix(enabled=True)
            stack.push_async_callback(_quietly, pci.set_msix, enabled=False)
            count = max(vectors[0], *vectors[1]) + 1
            interrupts = await stack.enter_async_context(msix(session, count))
        else:
            vectors = NO_VECTOR, [NO_VECTOR] * queues
            interrupts = (await stack.enter_async_context(intx(session)),)
        driver = NetDriver(transport, Queues(memory, plan), taken, vectors)
        stack.push_async_callback(driver.stop)
        nursery = await stack.enter_async_context(background())
        nursery.start_soon(driver.listen_session)
        for interrupt in interrupts:
            if isinstance(interrupt, IntxLine):
                nursery.start_soon(driver.listen_intx, interrupt)
            else:
                nursery.start_soon(driver.listen_msix, interrupt)
        await driver.reset()
        yield driver
