"""A TAP device (linux/if_tun.h, Documentation/networking/tuntap.rst): the card's frames are the host's."""

from __future__ import annotations

import errno
import fcntl
import ipaddress
import logging
import os
import re
import socket
import struct
from contextlib import ExitStack

import trio

from firmware.ports._netns import inside
from firmware.ports._port import Offload, Port, PortError

log = logging.getLogger("trionic.port")

TUNSETIFF = 0x400454CA
TUNSETOFFLOAD = 0x400454D0
TUNGETIFF = 0x800454D2
TUNSETVNETHDRSZ = 0x400454D8
TUNSETVNETLE = 0x400454DC
IFF_TAP = 0x0002
IFF_NO_PI = 0x1000
IFF_VNET_HDR = 0x4000
TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6, TUN_F_TSO_ECN = 1, 2, 4, 8

SIOCGIFFLAGS, SIOCSIFFLAGS, SIOCGIFMTU, SIOCSIFMTU = 0x8913, 0x8914, 0x8921, 0x8922
IFF_UP = 1
RTMGRP_LINK = 1                 # linux/rtnetlink.h: tell of links that change

HEADER_SIZE = 12                # struct virtio_net_hdr_v1
MIN_MTU, MAX_MTU = 68, 65521    # what the kernel takes: ETH_MIN_MTU; 65535 less the Ethernet header

MAX_NAME = 15                   # IFNAMSIZ - 1
_NAME = re.compile(r"[^\s/:%]*(%d)?[^\s/:%]*")   # as net/core/dev.c has it

_OFFLOADS = {
    Offload.CSUM: TUN_F_CSUM,
    Offload.TSO4: TUN_F_TSO4,
    Offload.TSO6: TUN_F_TSO6,
    Offload.ECN: TUN_F_TSO_ECN,
}


class TapPort(Port):
    """A TAP with virtio-net headers; the guest's link is up while the device is.

    A device that did not exist is gone when the port closes. Raises PortError when the device cannot be had.
    """

    kind = "tap"
    vnet_header_size = HEADER_SIZE
    offloads = Offload.CSUM | Offload.TSO4 | Offload.TSO6 | Offload.ECN

    def __init__(
        self,
        spec: str,
        *,
        name: str,
        netns: str | None = None,
        up: bool | None = None,
        mtu: int | None = None,
        ip: str | None = None,
    ) -> None:
        super().__init__(spec)
        if len(os.fsencode(name)) > MAX_NAME or name in (".", "..") or not _NAME.fullmatch(name):
            raise PortError(
                f"port tap: {name!r} is no interface name: at most {MAX_NAME} bytes, no space, slash or"
                " colon, one %d where a number shall stand"
            )
        address = None if ip is None else _interface_address(ip)
        if mtu is not None and not MIN_MTU <= mtu <= MAX_MTU:
            raise PortError(f"port tap: an MTU is {MIN_MTU} to {MAX_MTU} bytes, not {mtu}")
        self.name = name
        self._created = False
        inside(netns, self._open)
        try:
            if mtu is not None:
                self._set("take an MTU", SIOCSIFMTU, mtu)
            if address is not None:
                inside(netns, lambda: self._add_address(address))
            if up or (up is None and self._created):
                self._set("come up", SIOCSIFFLAGS, self._get(SIOCGIFFLAGS) & 0xFFFF | IFF_UP)
            self.mtu = self._get(SIOCGIFMTU)
            self.link_up = self._is_up()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        """What belongs to the namespace: the device, a socket to ask about it, one to be told of changes."""
        existing = {name for _, name in socket.if_nameindex()}
        with ExitStack() as undo:
            try:
                fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
            except OSError as error:
                raise PortError(
                    f"port tap: /dev/net/tun: {error.strerror}; `modprobe tun` makes it, and root may open it"
                ) from None
            undo.callback(os.close, fd)
            request = struct.pack("16sH22x", os.fsencode(self.name), IFF_TAP | IFF_NO_PI | IFF_VNET_HDR)
            try:
                self.name = _name_in(fcntl.ioctl(fd, TUNSETIFF, request))
                fcntl.ioctl(fd, TUNSETVNETHDRSZ, struct.pack("i", HEADER_SIZE))
                fcntl.ioctl(fd, TUNSETVNETLE, struct.pack("i", 1))
                fcntl.ioctl(fd, TUNSETOFFLOAD, 0)
            except OSError as error:
                raise PortError(f"port tap: {self.name}: {_advice(error, self.name)}") from None
            self._created = self.name not in existing
            self._control = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
            undo.callback(self._control.close)
            kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
            self._changes = socket.socket(socket.AF_NETLINK, kind, socket.NETLINK_ROUTE)
            undo.callback(self._changes.close)
            self._changes.bind((0, RTMGRP_LINK))
            undo.pop_all()
        self.fd = fd

    def _get(self, request: int) -> int:
        """One of the interface ioctls that answer with an integer in struct ifreq."""
        packed = struct.pack("16si20x", os.fsencode(self.name), 0)
        answer: int = struct.unpack_from("i", fcntl.ioctl(self._control, request, packed), 16)[0]
        return answer

    def _set(self, what: str, request: int, value: int) -> None:
        try:
            fcntl.ioctl(self._control, request, struct.pack("16si20x", os.fsencode(self.name), value))
        except OSError as error:
            why = _advice(error, self.name)
            raise PortError(f"port tap: {self.name} does not {what}: {why}") from None

    def _is_up(self) -> bool:
        if self.fd < 0:
            return False
        try:
            self.name = _name_in(fcntl.ioctl(self.fd, TUNGETIFF, bytes(40)))    # it may have been renamed
            return bool(self._get(SIOCGIFFLAGS) & IFF_UP)
        except OSError:
            return False        # the device has been deleted, or is in another namespace now

    def _add_address(self, address: ipaddress.IPv4Interface | ipaddress.IPv6Interface) -> None:
        # Imported here, for it takes longer to import than the server to start.
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
        except NetlinkError as error:
            why = _advice(OSError(error.code, os.strerror(error.code)), self.name)
            raise PortError(f"port tap: {self.name} does not take the address {address}: {why}") from None

    def set_offloads(self, accepted: Offload) -> None:
        """Let the kernel hand over frames that still need the accepted work."""
        wanted = sum(flag for offload, flag in _OFFLOADS.items() if accepted & offload)
        try:
            fcntl.ioctl(self.fd, TUNSETOFFLOAD, wanted)
        except (OSError, ValueError) as error:
            if not self._deleted():
                raise
            log.debug("%s: offloads of a device that has been deleted: %s", self.name, error)

    def _deleted(self) -> bool:
        try:
            fcntl.ioctl(self.fd, TUNGETIFF, bytes(40))
        except (OSError, ValueError):
            return True
        return False

    def peer_lost(self) -> None:
        """The device has been deleted: nothing can be plugged in any more."""
        log.warning("%s: the TAP device has been deleted; its card has no link from now on", self.name)
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        super().peer_lost()

    async def run(self) -> None:
        """Follow the device: the guest's link goes up and down with it."""
        while True:
            await trio.lowlevel.wait_readable(self._changes)
            try:
                while self._changes.recv(65536):
                    pass
            except BlockingIOError:
                pass
            except OSError as error:
                if error.errno != errno.ENOBUFS:        # changes were lost; asking below makes good for them
                    raise
            if self._is_up() != self.link_up:
                self.link_up = not self.link_up
                self.on_change()

    def close(self) -> None:
        """Close the device; one that was created here vanishes."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        self._control.close()
        self._changes.close()


def _interface_address(text: str) -> ipaddress.IPv4Interface | ipaddress.IPv6Interface:
    try:
        return ipaddress.ip_interface(text)
    except ValueError:
        raise PortError(f"port tap: ip={text!r} is no address such as 10.0.0.1/24 or fd00::1/64") from None


def _name_in(answer: bytes) -> str:
    return os.fsdecode(answer[:16].partition(b"\0")[0])


def _advice(error: OSError, name: str) -> str:
    """The reason and the way out."""
    match error.errno:
        case errno.EPERM | errno.EACCES:
            return (
                "permission denied; run as root, or let root prepare it:"
                f" ip tuntap add dev {name} mode tap vnet_hdr user $USER"
            )
        case errno.EBUSY:
            return "another program uses it; stop that one or take another name"
        case errno.EINVAL:
            return "it exists and is not a TAP device with a single queue; take another name"
        case _:
            return str(error.strerror)
