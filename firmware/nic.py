"""The network card's program: it negotiates with the driver, runs the data path, follows the port's link."""

from __future__ import annotations

import contextlib
import logging
import os
import struct
from collections.abc import Callable

import trio

from device.card import DEFAULT_BAR2_SIZE, NetworkCard
from device.errors import DeviceError
from device.function import PciFunction, ResetKind
from device.interrupts._eventfd import drain
from device.profiles import N3000, Profile
from device.revocation import Revocation
from device.virtio.features import Feature
from device.virtio.net import CONTROL_QUEUE, MAX_MTU, MIN_MTU, RX_QUEUE, TX_QUEUE, LinkStatus, NetConfig
from device.virtio.transport import Isr, Status
from firmware._datapath import DataPath
from firmware._filter import ReceiveFilter
from firmware.control import ControlQueue
from firmware.ports import Framing, Offload, Port

log = logging.getLogger("trionic.nic")

# What the card offers whatever its port can do.
BASE_FEATURES = (
    Feature.VERSION_1
    | Feature.ACCESS_PLATFORM
    | Feature.ORDER_PLATFORM
    | Feature.RING_INDIRECT_DESC
    | Feature.RING_EVENT_IDX
    | Feature.NET_MAC
    | Feature.NET_STATUS
    | Feature.NET_MTU
    | Feature.NET_MRG_RXBUF
    | Feature.NET_CTRL_VQ
    | Feature.NET_CTRL_RX
    | Feature.NET_CTRL_RX_EXTRA
    | Feature.NET_CTRL_MAC_ADDR
    | Feature.NET_GUEST_ANNOUNCE
    | Feature.NET_CSUM  # completed by the data path where the port cannot
    | Feature.NET_GUEST_CSUM
)

# What a port adds: segmentation that it takes from the driver and may give to it.
PORT_FEATURES: tuple[tuple[Offload, Feature, Feature], ...] = (
    (Offload.CSUM, Feature.NET_CSUM, Feature.NET_GUEST_CSUM),
    (Offload.TSO4, Feature.NET_HOST_TSO4, Feature.NET_GUEST_TSO4),
    (Offload.TSO6, Feature.NET_HOST_TSO6, Feature.NET_GUEST_TSO6),
    (Offload.ECN, Feature.NET_HOST_ECN, Feature.NET_GUEST_ECN),
)

# MAC address, permanent MAC address, link status as the driver knows it, whether the control queue is broken
_SAVED = struct.Struct("<6s6sHB")

_FRAMINGS = {Framing.PACKETS: 0, Framing.STREAM: 1, Framing.LOOPBACK: 2}


def random_mac() -> bytes:
    """A locally administered unicast address."""
    octets = bytearray(os.urandom(6))
    octets[0] = octets[0] & 0xFC | 0x02
    return bytes(octets)


class Nic:
    """A card on `port`, with the personality `profile`.

    `mac` is 6 octets (None: random), `mtu` in bytes (None: the port's, or 1500), `busy_poll_us` how long the
    worker looks for more work before it sleeps; without `offloads` checksums and segmentation stay with the
    driver, without `msix` it gets INTx, `revocation` says what takes mappings of its memory away. Raises
    ValueError for a MAC or an MTU that no interface can have.
    """

    def __init__(
        self,
        port: Port,
        *,
        name: str = "nic0",
        profile: Profile = N3000,
        mac: bytes | None = None,
        mtu: int | None = None,
        bar2_size: int = DEFAULT_BAR2_SIZE,
        busy_poll_us: int = 0,
        offloads: bool = True,
        msix: bool = True,
        revocation: Revocation = Revocation.COOPERATIVE,
    ) -> None:
        mac = random_mac() if mac is None else mac
        mtu = (port.mtu or 1500) if mtu is None else mtu
        if len(mac) != 6 or mac[0] & 1 or not any(mac):
            raise ValueError(f"{mac.hex(':')} is no address of an interface: 6 octets, unicast, not zero")
        if not MIN_MTU <= mtu <= MAX_MTU:
            raise ValueError(f"an MTU is {MIN_MTU} to {MAX_MTU} bytes, not {mtu}")
        self.name = name
        self.port = port
        self._own_mac = self._permanent_mac = mac
        self._features = BASE_FEATURES & ~profile.withholds
        if offloads:
            for offload, host, guest in PORT_FEATURES:
                if port.offloads & offload:
                    self._features |= host | guest
        else:
            self._features &= ~(Feature.NET_CSUM | Feature.NET_GUEST_CSUM)
        self.config = NetConfig(mac, mtu=mtu)
        self.filter = ReceiveFilter(mac)
        self.card = NetworkCard(
            self,
            name=name,
            bar2_size=bar2_size,
            profile=profile,
            msix=msix,
            revocation=revocation,
        )
        self.function: PciFunction = self.card.function
        queues = self.card.queues
        self.control = ControlQueue(queues[CONTROL_QUEUE], self.filter, self._set_mac, self._announced)
        self.datapath = DataPath(
            self.function.gate,
            self.function.dma,
            self.function.interrupts.lines,
            queues[RX_QUEUE],
            queues[TX_QUEUE],
            self.filter,
        )
        self.function.dma.on_map = self.datapath.windows_changed
        self.function.on_reset = self._reset
        self.function.on_bus_master = lambda _enabled: self._allow_dma()
        self.function.on_stop = self._rest
        self.function.on_run = self._go_on
        self._allow_dma()
        self.datapath.poll_ns = 1000 * busy_poll_us
        self._attached: int | None = None
        self._arrived = False
        self._control_broken = False
        self._executing = False
        self._commands = trio.Event()
        self._token: trio.lowlevel.TrioToken | None = None
        self._link_up = False
        port.on_change = self._port_changed
        self._port_changed()
        self.card.connect_doorbells(self.datapath.doorbell_fds)
        self.card.make_movable(
            {b"NETC": self, b"FILT": self.filter, b"PATH": self.datapath},
            {"features": f"{int(self._features):#x}", "mtu": f"{mtu}"},
        )

    # --- the model behind the virtio transport

    def offered_features(self) -> Feature:
        """See Model."""
        return self._features

    def read_config(self, offset: int, count: int) -> bytes:
        """See Model."""
        return self.config.encode()[offset : offset + count].ljust(count, b"\0")

    def driver_ready(self, features: int) -> None:
        """See Model."""
        accepted = Offload(0)
        for offload, _, guest in PORT_FEATURES:
            if features & guest:
                accepted |= offload
        self.port.set_offloads(accepted)
        self.datapath.start(
            mergeable=bool(features & Feature.NET_MRG_RXBUF),
            checksum_to_driver=bool(features & Feature.NET_GUEST_CSUM),
            tso4_to_driver=bool(features & Feature.NET_GUEST_TSO4),
            tso6_to_driver=bool(features & Feature.NET_GUEST_TSO6),
            ecn_to_driver=bool(features & Feature.NET_GUEST_ECN),
        )
        self.notified(CONTROL_QUEUE)
        log.info("%s: driver ready, features %#x", self.name, features)

    def driver_gone(self) -> None:
        """See Model."""
        if self.datapath.running:
            self.datapath.halt()
            self.port.set_offloads(Offload(0))
            log.info("%s: driver gone", self.name)
        self._arrived = self._control_broken = False
        self.config.mac = self._permanent_mac
        self.config.status &= ~LinkStatus.ANNOUNCE
        self.filter.reset(self._permanent_mac)

    def notified(self, queue: int) -> None:
        """See Model."""
        if queue != CONTROL_QUEUE:
            self.datapath.kick()
        elif self.function.dma.by_message:
            self._commands.set()
        else:
            self._execute_commands()

    def _execute_commands(self) -> None:
        """Serve the control queue; by one thread at a time, for the client may be asked for its memory."""
        with self.function.gate:
            if self._control_broken or not (self.datapath.running and self.datapath.bus_master):
                return
            if self._executing:
                self._commands.set()  # the other thread may have looked for the last time
                return
            self._executing = True
            try:
                if self.control.service():
                    self.function.interrupts.lines.signal(Isr.QUEUE, self.control.queue.vector)
            except DeviceError as error:
                log.warning("%s: control queue: %s", self.name, error)
                self._control_broken = True
                self.card.transport.needs_reset()
            else:
                if self.control.unfinished:
                    os.eventfd_write(self.datapath.event_fd, 1)  # after whatever else waits for its turn
            finally:
                self._executing = False
                if self.function.dma.guest_log_owed:  # the card changed in the middle of it
                    self.datapath.wake()

    def _allow_dma(self) -> None:
        """Software allows or forbids DMA, or the card is stopped or runs again."""
        self.datapath.bus_master = self.function.bus_master and self.function.running
        if self.datapath.bus_master:
            self.datapath.wake()
            self.notified(CONTROL_QUEUE)

    def _rest(self) -> None:
        """The card is stopped."""
        self._allow_dma()
        self._report_faults()

    def _go_on(self) -> None:
        """The card was stopped, or is another one now: look at everything, and say everything again."""
        self._follow_port()
        if self._arrived:
            self._arrived = False
            self._ask_to_announce()
        self.card.transport.resignal()
        self._allow_dma()

    def _ask_to_announce(self) -> None:
        """The driver is somewhere else in its network now, which hears of it from the driver (5.1.6.5.4)."""
        transport = self.card.transport
        if transport.status & Status.DRIVER_OK and transport.driver_features & Feature.NET_GUEST_ANNOUNCE:
            self.config.status |= LinkStatus.ANNOUNCE
            transport.config_differs()

    def _announced(self) -> bool:
        """The driver has done so; whether it was to."""
        if LinkStatus.ANNOUNCE not in self.config.status:
            return False
        self.config.status &= ~LinkStatus.ANNOUNCE
        self.card.transport.config_differs()
        return True

    def _set_mac(self, mac: bytes) -> None:
        self.config.mac = mac
        self.filter.set_mac(mac)
        self.card.transport.config_differs()

    # --- port and link

    def _port_changed(self) -> None:
        """The port's link or file descriptor is another one now; the old one is closed when this returns."""
        if self.port.fd != self._attached:
            self._attached = None
            if not self.function.running:
                self.datapath.detach()
        self.set_link(self.port.link_up)

    def set_link(self, up: bool) -> None:
        """Plug or pull the cable: the driver sees it, and no frame passes while it is out.

        A card that is stopped does it when it runs again.
        """
        self._link_up = up
        if self.function.running:
            self._follow_port()

    def _follow_port(self) -> None:
        """Attaching forgets what was read of a stream, so it is done only for another descriptor."""
        if self._attached is None:
            self._attached = self.port.fd
            self.datapath.attach(self.port.fd, _FRAMINGS[self.port.framing], self.port.vnet_header_size)
        link = LinkStatus.LINK_UP if self._link_up else LinkStatus(0)
        status = self.config.status & ~LinkStatus.LINK_UP | link
        with self.function.gate:
            self.datapath.link_up = self._link_up
            if status != self.config.status:
                self.config.status = status
                self.card.transport.config_changed()
                log.info("%s: link %s", self.name, "up" if self._link_up else "down")

    # --- moving to another card

    def save(self) -> bytes:
        """What the driver knows of the card, for `stage` of another one."""
        return _SAVED.pack(self.config.mac, self._permanent_mac, self.config.status, self._control_broken)

    def stage(self, data: bytes) -> Callable[[], None]:
        """What makes this the card that saved `data`; ValueError if none did.

        The address goes along, until the client is lost; the link is that of the port here, and if it
        differs the driver is told. It is asked to announce itself when the card runs.
        """
        if len(data) != _SAVED.size:
            raise ValueError(f"{len(data)} bytes of {_SAVED.size}")
        mac, permanent_mac, status, broken = _SAVED.unpack(data)
        if (
            permanent_mac[0] & 1
            or not any(permanent_mac)
            or status & ~int(LinkStatus.LINK_UP | LinkStatus.ANNOUNCE)
            or broken > 1
        ):
            raise ValueError("what no card shows its driver")

        def apply() -> None:
            self.config.mac, self._permanent_mac = mac, permanent_mac
            self.config.status = LinkStatus(status)
            self._control_broken = bool(broken)
            self._arrived = True

        return apply

    # --- life

    def _reset(self, kind: ResetKind) -> None:
        lost = kind is ResetKind.LOST_CLIENT
        if lost:
            self._permanent_mac = self._own_mac
        self.card.reset(kind)
        if lost:
            self._renew_doorbells()

    def _renew_doorbells(self) -> None:
        """New eventfds in the places of the old ones, which a client that left may go on ringing, or read
        before the card does. OSError without a descriptor for it.
        """
        for doorbell in self.datapath.doorbell_fds:
            fresh = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            os.dup2(fresh, doorbell, inheritable=False)
            os.close(fresh)
        self.datapath.wake()
        if self._token is not None:
            self._token.run_sync_soon(
                trio.lowlevel.notify_closing, self.datapath.doorbell_fds[CONTROL_QUEUE], idempotent=True
            )

    async def run(self) -> None:
        """Serve until cancelled: the worker thread, its reports, and the port's own background work.

        If one of them fails the card is of no use any more: its client is told (ERR), then it is raised.
        """
        self._token = trio.lowlevel.current_trio_token()
        try:
            await self._serve()
        except Exception:
            if self.function.report_error():
                log.error("%s: the card failed, and its client was told (ERR)", self.name)
            raise
        finally:
            self._token = None

    async def _serve(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._work)
            nursery.start_soon(self._listen)
            nursery.start_soon(self._hear_doorbell)
            nursery.start_soon(self._obey)
            nursery.start_soon(self.port.run)

    async def _work(self) -> None:
        done = trio.Event()

        async def worker() -> None:
            # Shielded, so that the stop() below always meets a thread: it would end the next one otherwise.
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(self.datapath.run, limiter=trio.CapacityLimiter(1))
            done.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(worker)
            try:
                await done.wait()
            finally:
                self.datapath.stop()

    async def _hear_doorbell(self) -> None:
        """The control queue's eventfd; the data path hears the others."""
        doorbell = self.datapath.doorbell_fds[CONTROL_QUEUE]
        while True:
            with contextlib.suppress(trio.ClosedResourceError):  # another eventfd has taken its place
                await trio.lowlevel.wait_readable(doorbell)
            if drain(doorbell):
                self.notified(CONTROL_QUEUE)

    async def _obey(self) -> None:
        """Commands in memory that the client must be asked for, which this thread has to go on serving."""
        limiter = trio.CapacityLimiter(1)
        while True:
            await self._commands.wait()
            self._commands = trio.Event()
            await trio.to_thread.run_sync(self._execute_commands, limiter=limiter)

    async def _listen(self) -> None:
        while True:
            await trio.lowlevel.wait_readable(self.datapath.event_fd)
            os.eventfd_read(self.datapath.event_fd)
            self._look_after()

    def _look_after(self) -> None:
        """Act on what the worker reported."""
        if self.control.unfinished:
            self.notified(CONTROL_QUEUE)
        self._report_faults()
        if self.datapath.port_lost:
            log.warning("%s: port %s lost its peer", self.name, self.port.spec)
            self.datapath.detach()
            self._attached = None
            self.port.peer_lost()

    def _report_faults(self) -> None:
        with self.function.gate:
            for queue in self.card.queues:
                if queue.fault:
                    log.warning("%s: queue %d is broken: %s", self.name, queue.index, queue.fault)
                    self.card.transport.needs_reset()

    def close(self) -> None:
        """Let go of the port and the function; run() must have ended."""
        self.datapath.halt()
        self.datapath.detach()
        self.port.close()
        self.function.dma.on_map = None
        self.function.close()
