"""A TAP device (linux/if_tun.h, Documentation/networking/tuntap.rst): the card's frames are the host's."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct

import trio

from firmware.ports._netns import inside
from firmware.ports._port import Offload, Port, PortError

TUNSETIFF = 0x400454CA
TUNSETOFFLOAD = 0x400454D0
TUNSETVNETHDRSZ = 0x400454D8
IFF_TAP = 0x0002
IFF_NO_PI = 0x1000
IFF_VNET_HDR = 0x4000
TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6, TUN_F_TSO_ECN = 1, 2, 4, 8

SIOCGIFFLAGS, SIOCSIFFLAGS, SIOCGIFMTU, SIOCSIFMTU = 0x8913, 0x8914, 0x8921, 0x8922
IFF_UP = 1
RTMGRP_LINK = 1                 # linux/rtnetlink.h: tell of links that change

HEADER_SIZE = 12                # struct virtio_net_hdr_v1
MAX_NAME = 15                   # IFNAMSIZ - 1

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
        if len(name.encode()) > MAX_NAME or "/" in name:
            raise PortError(f"port tap: {name!r} is no interface name: at most {MAX_NAME} bytes, no slash")
        self.name = name
        inside(netns, self._open)
        try:
            if mtu is not None:
                self._set_mtu(mtu)
            if ip is not None:
                inside(netns, lambda: self._set_address(ip))
            if up or (up is None and self._created):
                self._set_up()
            self.mtu = self._interface(SIOCGIFMTU)
            self.link_up = self._is_up()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        """Everything that belongs to the namespace: the device, a socket to ask about it, one to be told of changes."""
        existing = {name for _, name in socket.if_nameindex()}
        try:
            self.fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise PortError(f"port tap: /dev/net/tun: {error.strerror}; `modprobe tun` makes it, root or its group may open it") from None
        try:
            request = struct.pack("16sH22x", self.name.encode(), IFF_TAP | IFF_NO_PI | IFF_VNET_HDR)
            self.name = fcntl.ioctl(self.fd, TUNSETIFF, request)[:16].rstrip(b"\0").decode()
            fcntl.ioctl(self.fd, TUNSETVNETHDRSZ, struct.pack("i", HEADER_SIZE))
            self.set_offloads(Offload(0))
        except OSError as error:
            os.close(self.fd)
            raise PortError(f"port tap: {self.name}: {_advice(error, self.name)}") from None
        self._created = self.name not in existing
        self._control = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._changes = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        self._changes.bind((0, RTMGRP_LINK))

    def _interface(self, request: int, value: int = 0) -> int:
        """One of the interface ioctls with an integer in struct ifreq."""
        packed = struct.pack("16si20x", self.name.encode(), value)
        answer: int = struct.unpack_from("i", fcntl.ioctl(self._control, request, packed), 16)[0]
        return answer

    def _is_up(self) -> bool:
        try:
            return bool(self._interface(SIOCGIFFLAGS) & IFF_UP)
        except OSError:
            return False        # the device has been deleted

    def _set_up(self) -> None:
        try:
            self._interface(SIOCSIFFLAGS, self._interface(SIOCGIFFLAGS) & 0xFFFF | IFF_UP)
        except OSError as error:
            raise PortError(f"port tap: {self.name} cannot be brought up: {_advice(error, self.name)}") from None

    def _set_mtu(self, mtu: int) -> None:
        try:
            self._interface(SIOCSIFMTU, mtu)
        except (OSError, struct.error) as error:
            why = _advice(error, self.name) if isinstance(error, OSError) and error.errno == errno.EPERM else "68 to 65521 is possible"
            raise PortError(f"port tap: {self.name} does not take an MTU of {mtu} bytes: {why}") from None

    def _set_address(self, address: str) -> None:
        from pyroute2 import IPRoute  # noqa: PLC0415  (it takes longer to import than the server to start)
        from pyroute2.netlink.exceptions import NetlinkError  # noqa: PLC0415

        try:
            with IPRoute() as route:
                index = route.link_lookup(ifname=self.name)[0]
                route.addr("replace", index=index, address=address)
        except (NetlinkError, OSError, ValueError, IndexError) as error:
            reason = error.args[-1] if error.args else error
            raise PortError(f"port tap: {self.name} does not take the address {address!r}: {reason}") from None

    def set_offloads(self, accepted: Offload) -> None:
        """Let the kernel hand over frames that still need the accepted work."""
        fcntl.ioctl(self.fd, TUNSETOFFLOAD, sum(flag for offload, flag in _OFFLOADS.items() if accepted & offload))

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
            self._control.close()
            self._changes.close()
            self.fd = -1


def _advice(error: OSError, name: str) -> str:
    """The reason and the way out."""
    match error.errno:
        case errno.EPERM | errno.EACCES:
            return f"permission denied; run as root, or let root prepare it: ip tuntap add dev {name} mode tap vnet_hdr user $USER"
        case errno.EBUSY:
            return "another program uses it; stop that one or take another name"
        case errno.EINVAL:
            return "it exists and is not a TAP device with a single queue; take another name"
        case _:
            return str(error.strerror)
