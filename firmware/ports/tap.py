"""A TAP device (linux/if_tun.h, Documentation/networking/tuntap.rst): the card's frames are the host's."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import socket
import struct
from typing import TYPE_CHECKING

import trio

from firmware.ports._netns import inside
from firmware.ports._port import Offload, Port, PortError

if TYPE_CHECKING:
    from ipaddress import IPv4Interface, IPv6Interface

__all__ = ["TapPort"]

log = logging.getLogger("trionic.port")

TUNSETIFF = 0x400454CA
TUNSETOFFLOAD = 0x400454D0
TUNGETIFF = 0x800454D2
TUNSETVNETHDRSZ = 0x400454D8
TUNSETVNETLE = 0x400454DC
IFF_TAP, IFF_MULTI_QUEUE, IFF_NO_PI, IFF_VNET_HDR = 0x0002, 0x0100, 0x1000, 0x4000
TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6, TUN_F_TSO_ECN = 1, 2, 4, 8

# linux/sockios.h, linux/if.h, linux/rtnetlink.h
SIOCGIFFLAGS, SIOCSIFFLAGS, SIOCGIFMTU, SIOCSIFMTU = 0x8913, 0x8914, 0x8921, 0x8922
IFF_UP = 1
RTMGRP_LINK = 1

HEADER_SIZE = 12  # struct virtio_net_hdr_v1, which virtio 1.x drivers always use
MAX_NAME = 15  # IFNAMSIZ less its final zero

_SEGMENTATION = {Offload.TSO4: TUN_F_TSO4, Offload.TSO6: TUN_F_TSO6}


class TapPort(Port):
    """A TAP with virtio-net headers; the guest's link is up while the device is.

    A device made here is gone when the port closes; one that existed stays. Raises PortError when the
    device cannot be had.
    """

    kind = "tap"
    vnet_header_size = HEADER_SIZE
    offloads = Offload.CSUM | Offload.TSO4 | Offload.TSO6 | Offload.ECN

    def __init__(
        self, spec: str, *, name: str, netns: str | None, up: bool | None, mtu: int | None, ip: str | None
    ) -> None:
        super().__init__(spec)
        _check_name(name)
        address = None if ip is None else _interface_address(ip)
        self.name = name
        self._tap = -1
        self._sockets = contextlib.ExitStack()
        try:
            inside(netns, lambda: self._open(up, mtu, address))
        except BaseException:
            self.close()
            raise

    def _open(self, up: bool | None, mtu: int | None, address: IPv4Interface | IPv6Interface | None) -> None:
        """Everything that must happen inside the namespace."""
        existing = {name for _, name in socket.if_nameindex()}
        self._tap = _open_tun()
        try:
            self.name = _attach(self._tap, self.name)
            fcntl.ioctl(self._tap, TUNSETVNETHDRSZ, struct.pack("i", HEADER_SIZE))
            fcntl.ioctl(self._tap, TUNSETVNETLE, struct.pack("i", 1))  # as virtio 1.x has it, on any host
        except OSError as error:
            if error.errno == errno.EINVAL:
                problem = (
                    "exists and is not a TAP device" if self.name in existing else "is refused by the kernel"
                )
                raise PortError(f"port tap: {self.name!r} {problem}; take another name") from None
            raise PortError(f"port tap: {self.name!r}: {_advice(error, self.name)}") from None
        self.fd = self._tap
        self.set_offloads(Offload(0))
        # Told of changes before asked for the state: no change falls between.
        self._changes = self._sockets.enter_context(
            socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        )
        self._changes.bind((0, RTMGRP_LINK))
        self._control = self._sockets.enter_context(
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        )
        if mtu is not None:
            self._change(SIOCSIFMTU, mtu, f"does not take an MTU of {mtu} bytes")
        if address is not None:
            self._add_address(address)
        if up is None:
            up = self.name not in existing or None
        if up is not None:
            flags = self._interface(SIOCGIFFLAGS) & 0xFFFF
            wanted = flags | IFF_UP if up else flags & ~IFF_UP
            if wanted != flags:
                self._change(SIOCSIFFLAGS, wanted, f"cannot be brought {'up' if up else 'down'}")
        self.mtu = self._interface(SIOCGIFMTU)
        self.link_up = self._is_up()

    def _interface(self, request: int, value: int = 0) -> int:
        """One of the interface ioctls (netdevice(7)) with an integer in struct ifreq."""
        packed = struct.pack("16si20x", os.fsencode(self.name), value)
        answer: int = struct.unpack_from("i", fcntl.ioctl(self._control, request, packed), 16)[0]
        return answer

    def _change(self, request: int, value: int, failure: str) -> None:
        try:
            self._interface(request, value)
        except OSError as error:
            raise PortError(f"port tap: {self.name} {failure}: {_advice(error, self.name)}") from None

    def _is_up(self) -> bool:
        if self.fd < 0:
            return False
        try:
            self.name = _name_of(fcntl.ioctl(self.fd, TUNGETIFF, bytes(40)))  # it may have been renamed
            return bool(self._interface(SIOCGIFFLAGS) & IFF_UP)
        except OSError:
            return False  # deleted, or moved to another namespace

    def _add_address(self, address: IPv4Interface | IPv6Interface) -> None:
        # Imported here: it takes longer than a server needs to start.
        from pyroute2 import IPRoute
        from pyroute2.netlink.exceptions import NetlinkError

        try:
            with IPRoute() as route:
                route.addr(
                    "replace",
                    index=socket.if_nametoindex(self.name),
                    address=str(address.ip),
                    prefixlen=address.network.prefixlen,
                )
        except (NetlinkError, OSError) as error:
            code = error.code if isinstance(error, NetlinkError) else error.errno
            reason = _advice(OSError(code, os.strerror(code or 0)), self.name)
            raise PortError(f"port tap: {self.name} does not take the address {address}: {reason}") from None

    def set_offloads(self, accepted: Offload) -> None:
        """Let the kernel hand over frames that still need the accepted work.

        It takes segmentation only together with checksums (drivers/net/tun.c, set_offload).
        """
        flags = 0
        if accepted & Offload.CSUM:
            flags = TUN_F_CSUM | sum(flag for offload, flag in _SEGMENTATION.items() if accepted & offload)
            if accepted & Offload.ECN and flags != TUN_F_CSUM:
                flags |= TUN_F_TSO_ECN
        self._tell(TUNSETOFFLOAD, flags)

    def _tell(self, request: int, argument: int | bytes) -> None:
        if self.fd < 0:
            return
        try:
            fcntl.ioctl(self.fd, request, argument)
        except OSError as error:  # deleted meanwhile: the data path is about to notice, too
            log.debug("%s: ioctl %#x: %s", self.name, request, error.strerror)

    async def run(self) -> None:
        """Follow the device: the guest's link goes up and down with it."""
        while True:
            if self._is_up() != self.link_up:
                self.link_up = not self.link_up
                self.on_change()
            await trio.lowlevel.wait_readable(self._changes)
            # What the messages say does not matter, nor that some are lost (ENOBUFS): the state is asked for.
            with contextlib.suppress(OSError):
                while self._changes.recv(65536):
                    pass

    def peer_lost(self) -> None:
        """The device has been deleted; it does not come back."""
        if self.fd >= 0:
            log.error("port %s: the device is gone; so is the card's link", self.spec)
        super().peer_lost()

    def _hang_up(self) -> None:
        if self._tap >= 0:
            os.close(self._tap)
            self._tap = -1

    def close(self) -> None:
        """Close the device; one that was made here vanishes."""
        self.fd = -1
        self._hang_up()
        self._sockets.close()


def _check_name(name: str) -> None:
    """What dev_valid_name() (net/core/dev.c) and dev_alloc_name() take."""
    if len(os.fsencode(name)) > MAX_NAME:
        raise PortError(f"port tap: the name {name!r} is too long; an interface has at most {MAX_NAME} bytes")
    if (
        name in (".", "..")
        or any(c in "/:" or c.isspace() for c in name)
        or ("%" in name and name.count("%") != name.count("%d"))
    ):
        raise PortError(f"port tap: {name!r} is no name of an interface; take letters and digits, like tap0")
    if name.count("%d") > 1:
        raise PortError(f"port tap: the name {name!r} has more than one %d; one is possible")


def _interface_address(text: str) -> IPv4Interface | IPv6Interface:
    from ipaddress import ip_interface

    try:
        if "/" not in text:
            raise ValueError
        return ip_interface(text)
    except ValueError:
        raise PortError(
            f"port tap: ip={text!r} should be an address with its prefix length, like 10.0.0.1/24"
        ) from None


def _open_tun() -> int:
    try:
        return os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENODEV, errno.ENXIO):
            advice = "`modprobe tun` makes it; a container needs --device=/dev/net/tun"
        else:
            advice = "run as root, or as a user that may open it"
        raise PortError(f"port tap: /dev/net/tun: {error.strerror}; {advice}") from None


def _attach(tap: int, name: str) -> str:
    """Bind the descriptor to the device, or to one of its queues if it has several; gives its real name."""
    flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR
    try:
        return _name_of(fcntl.ioctl(tap, TUNSETIFF, struct.pack("16sH22x", os.fsencode(name), flags)))
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    return _name_of(
        fcntl.ioctl(tap, TUNSETIFF, struct.pack("16sH22x", os.fsencode(name), flags | IFF_MULTI_QUEUE))
    )


def _name_of(request: bytes) -> str:
    return os.fsdecode(request[:16].rstrip(b"\0"))


def _advice(error: OSError, name: str) -> str:
    """The reason and the way out."""
    match error.errno:
        case errno.EPERM | errno.EACCES:
            example = "tap0" if "%" in name else name
            return (
                "no permission; run as root, or let root prepare it:"
                f" ip tuntap add dev {example} mode tap user $USER"
            )
        case errno.EBUSY:
            return "another program uses it; stop that one or take another name"
        case _:
            return f"{error.strerror}"
