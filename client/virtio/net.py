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
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Final, ParamSpec, TypeVar

import trio

from client._nursery import background
from client.dma import Arena, DmaMemory, dma_memory, mapped_in
from client.errors import ClientError, DeviceError
from client.irqchip import Intx
from client.migration import MigrationReport, migrate
from client.session import Session
from client.virtio import _queues
from client.virtio._attachment import Attachment, Listener, Slot, Wiring, quietly
from client.virtio._queues import CTRL, RX, TX, QueuePlan, Queues, plan_queues
from client.virtio._ring import ReceiveRing, TransmitRing
from client.virtio._signal import Signal
from client.virtio.config import read_net_config
from client.virtio.control import Command, ControlQueue, Kind, RxMode, mac_table
from client.virtio.counters import Counters
from client.virtio.features import PLAIN, REQUIRED, Feature, usable
from client.virtio.header import NetHeader
from client.virtio.transport import Doorbell, Doorbells, Status

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

P = ParamSpec("P")
T = TypeVar("T")
AnyRing = TypeVar("AnyRing", ReceiveRing, TransmitRing)

MEMORY_GONE: Final = "the memory of the driver's queues was taken away"


class NetDriver:
    """Made by `open_net`. `mac`, `mtu` and `link_up` are what the device last said; None or True where it
    says nothing. `memory` has the rings and the frames.

    Methods without `async` never wait. Tasks may send and receive concurrently.
    """

    def __init__(
        self,
        attachment: Attachment,
        memory: Arena,
        plan: QueuePlan,
        features: Feature,
        nursery: trio.Nursery,
    ) -> None:
        self.features = features
        self.counters = Counters()
        self.mac: bytes | None = None
        self.mtu: int | None = None
        self.link_up = True
        self._attachment = attachment
        self.memory = memory
        self._queues = Queues(memory, plan)
        self._nursery = nursery
        # where the memory is mapped; the first session's window is open_net's
        self._shares = {attachment.session: AsyncExitStack()}
        self._doorbells: list[Doorbell] = []
        self._rx: ReceiveRing | None = None
        self._tx: TransmitRing | None = None
        self._control: ControlQueue | None = None
        self._rx_signal, self._tx_signal, self._config_signal = Signal(), Signal(), Signal()
        self._backlog: deque[tuple[bytes, bytes]] = deque()
        self._failure: ClientError | None = ClientError("the driver is not started")
        self._changing = trio.Lock()
        self._watching = False
        self._listen()

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
        """Start the device anew with the same features; frames under way are lost, commands fail."""
        async with self._changing:
            if not self.memory.present:
                raise DeviceError(MEMORY_GONE)
            self._stop(ClientError("the device is being reset"))
            if not self._watching:
                self._watching = True
                self._nursery.start_soon(self._watch_memory)
            try:
                await self._start()
            except DeviceError:
                if self._kept:
                    raise
            if not self._kept:  # it may be back, but what was written there meanwhile is not
                self._failure = DeviceError(MEMORY_GONE)
            self._check()

    @property
    def _kept(self) -> bool:
        return self._watching and self.memory.present  # and was since the last reset

    async def stop(self) -> None:
        """Reset the device and let go of it; called at the end of `open_net`, whatever happened."""
        await quietly(self._attachment.transport.reset)
        self._stop(ClientError("the driver is stopped"))
        await self._attachment.close()
        for share in self._shares.values():
            await share.aclose()

    # moving

    @property
    def session(self) -> Session:
        """The session whose device this drives."""
        return self._attachment.session

    @property
    def line(self) -> Intx | None:
        """The card's INTx where it goes through an irqchip."""
        return self._attachment.line

    async def share_with(self, session: Session) -> None:
        """Map the driver's memory in another session too, at the same addresses, until `open_net` ends;
        raises as `dma_memory` does. Memory that is the caller's is his to map.
        """
        if session in self._shares or not isinstance(self.memory, DmaMemory):
            return
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(mapped_in(session, self.memory))
            self._shares[session] = stack.pop_all()

    async def move_to(self, session: Session) -> None:
        """Drive the device behind another session, to which the present one's state was moved (see
        `client.migration`): same rings, same frames under way.

        What happened between the two is not missed: every queue is looked at and notified. Raises as
        `open_net` does; the driver stays with its session then.
        """
        await self.share_with(session)
        async with self._changing:
            old = self._attachment
            old.check_fits(session)
            new = await Attachment.open(session, old.wiring, old.doorbells, old.slot)
            try:
                await new.wire(len(self._doorbells), self._nursery)
                doorbells = [await new.transport.doorbell(queue) for queue in range(len(self._doorbells))]
            except BaseException:
                await new.close()
                raise
            self._attachment, self._doorbells = new, doorbells
            self._listen()
            await old.close()
            self.look_again()
            try:
                await self._config_changed()
            except ClientError as error:
                self._fail(error)
                raise

    async def migrate_to(self, session: Session, *, precopy: bool = True) -> MigrationReport:
        """Move the device to another session and the driver with it; frames go on. Raises MigrationError, and
        goes on with the present device then. If the device moved and the driver cannot follow, it is reset
        and the driver fails.
        """
        self._attachment.check_fits(session)
        await self.share_with(session)
        try:
            report = await migrate(self.session, session, precopy=precopy)
        except BaseException:
            self.look_again()
            raise
        try:
            await self.move_to(session)
        except BaseException as error:
            await quietly(session.reset)
            self._fail(DeviceError(f"the device moved and its driver could not follow: {error!r}"))
            raise
        return report

    def look_again(self) -> None:
        """Look at every queue and notify it, as if all interrupts and notifications since had been lost."""
        if self._failure is not None:
            return
        self._interrupted((RX, TX, CTRL), 0)
        for queue in range(len(self._doorbells)):
            self._kick(queue)

    async def _start(self) -> None:
        transport, features = self._attachment.transport, self.features
        await transport.reset()
        await transport.add_status(Status.ACKNOWLEDGE)
        await transport.add_status(Status.DRIVER)
        if missing := features & ~(await transport.offered_features()):
            raise DeviceError(f"the device does not offer {missing!r} any more")
        await transport.accept_features(features)
        config_vector, vectors = self._attachment.vectors
        await transport.set_config_vector(config_vector)
        await self._read_config()
        rx, tx = self._queues.receive_ring(features), self._queues.transmit_ring(features)
        rings = enumerate((rx, tx))
        self._doorbells = [await _queues.start_queue(transport, n, ring, vectors[n]) for n, ring in rings]
        control = None
        if self._queues.plan.ctrl_size:
            ring = self._queues.control_ring(features)
            self._doorbells.append(await _queues.start_queue(transport, CTRL, ring, vectors[CTRL]))
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
        control = self._control
        acknowledge = None if control is None else self._guard(control.once, Command.ANNOUNCED)
        config = await read_net_config(self._attachment.transport)
        if Feature.MAC in self.features:
            self.mac = config.mac
        if Feature.MTU in self.features:
            self.mtu = config.mtu
        if Feature.STATUS in self.features:
            self.link_up = config.link_up
        if Feature.GUEST_ANNOUNCE in self.features and config.announce and acknowledge is not None:
            acknowledge()

    # interrupts

    def _listen(self) -> None:
        self._attachment.listen(self._nursery, Listener(self._interrupted, self._config_changed, self._fail))

    def _interrupted(self, queues: Sequence[int], count: int = 1) -> None:
        self.counters.interrupts += count
        if RX in queues:
            self._rx_signal.set()
        if TX in queues:
            self._tx_signal.set()
        if CTRL in queues and self._control is not None:
            self._guard(self._control.collect)

    async def _config_changed(self) -> None:
        if self._failure is not None:
            return
        if Status.NEEDS_RESET in await self._attachment.transport.status():
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
            self._check()
            raise

    async def _watch_memory(self) -> None:
        await self.memory.wait_gone()
        self._watching = False
        self._fail(DeviceError(MEMORY_GONE))
        async with self._changing:
            if self._failure is not None:  # the device must not find what is there when the memory is back
                await quietly(self._attachment.transport.reset)

    def _fail(self, error: ClientError) -> None:
        self._failure = self._failure or (error if self.memory.present else DeviceError(MEMORY_GONE))
        if self._control is not None:
            self._control.abandon()
        self._wake_all()

    def _wake_all(self) -> None:
        for signal in (self._rx_signal, self._tx_signal, self._config_signal):
            signal.set()

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure.with_traceback(None)


@asynccontextmanager
async def open_net(
    session: Session,
    *,
    wiring: Wiring = Wiring.MSIX,
    slot: Slot | None = None,
    features: Feature = PLAIN,
    queue_size: int = 256,
    slot_size: int = 2048,
    doorbells: Doorbells = "mapped",
    shared: bool = True,
    memory: Arena | None = None,
) -> AsyncIterator[NetDriver]:
    """Find the card behind a session, start it and drive it until the block ends. With `slot` its INTx goes
    through the irqchip of a machine (`client.irqchip`), else straight to the driver.

    `features` are those to take if offered; `queue_size` is the most descriptors of a queue, `slot_size`
    the bytes of one buffer; `doorbells` says how queues are notified, and `shared` whether the card may map
    their memory or reaches it by messages alone. `memory` is used instead if given (the defaults need 1.1
    MiB), and stays the caller's: when it is taken away the driver fails, and `reset` works when it is back.
    Raises DeviceError if it is no modern virtio network card or lacks the interrupts or doorbells,
    ServerError if the server refuses something, ClientError if `memory` is too small.
    """
    async with AsyncExitStack() as stack:
        attachment = await Attachment.open(session, wiring, doorbells, slot)
        stack.push_async_callback(attachment.close)
        transport = attachment.transport
        await transport.reset()
        taken = usable(await transport.offered_features() & features)
        if REQUIRED not in taken:
            raise DeviceError("the device does not offer VERSION_1: it is a legacy one")
        mtu = (await read_net_config(transport)).mtu if Feature.MTU in taken else None
        plan = await plan_queues(transport, taken, queue_size, slot_size, mtu)
        if memory is None:
            memory = await stack.enter_async_context(dma_memory(session, plan.memory, shared=shared))
        nursery = await stack.enter_async_context(background())
        await attachment.wire(3 if plan.ctrl_size else 2, nursery)
        driver = NetDriver(attachment, memory, plan, taken, nursery)
        stack.push_async_callback(driver.stop)
        await driver.reset()
        yield driver
