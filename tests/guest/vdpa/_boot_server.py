"""What a machine needs to boot from its network: DHCP, a router that says that there is nothing to configure,
and TFTP (RFC 2131, 4861, 1350 with the options of 2347), on the TAP device of a test's network.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Final

import trio

from tests.guest import Network

_DHCP_SERVER, _DHCP_CLIENT, _TFTP = 67, 68, 69
_DISCOVER, _OFFER, _REQUEST, _ACK = 1, 2, 3, 5
_COOKIE = bytes.fromhex("63825363")
_OPTIONS_AT, _LEAST = 240, 300
_PAD, _SUBNET, _ROUTER, _LEASE, _KIND, _SERVER, _IPXE, _END = 0, 1, 3, 51, 53, 54, 175, 255
_NO_PROXY = b"\xb0\x01\x01"  # iPXE: it need not wait for another server with more to say

_SOLICITATION, _ADVERTISEMENT = 133, 134
_ALL_NODES, _ALL_ROUTERS = "ff02::1", "ff02::2"

_READ, _DATA, _ACKNOWLEDGED, _ERROR, _OPTIONS_TAKEN = 1, 3, 4, 5, 6
_PATIENCE: Final = 1.0
"""Seconds without an answer after which a block is sent again. What comes late is no reason: it would be
answered twice ever after."""

_LONGEST = 2048


@dataclass
class BootServer:
    """Gives `files` by TFTP, and the name of the first of them by DHCP."""

    network: Network
    files: Mapping[str, bytes]
    requests: dict[str, int] = field(default_factory=dict)
    """How often each was asked for."""
    _given: dict[str, int] = field(default_factory=dict)
    _changed: trio.Event = field(default_factory=trio.Event)
    _blocks: int = 0

    async def fetched(self, name: str) -> None:
        """Wait until the file has been asked for once more, and given to its end once more."""
        asked, given = self.requests.get(name, 0), self._given.get(name, 0)
        while self.requests.get(name, 0) == asked or self._given.get(name, 0) == given:
            await self._changed.wait()

    async def blocks(self, count: int) -> None:
        """Wait until that many blocks more were acknowledged, of whichever file."""
        wanted = self._blocks + count
        while self._blocks < wanted:
            await self._changed.wait()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    def _udp(self, port: int) -> trio.socket.SocketType:
        def make() -> socket.socket:
            made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            made.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
            made.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, self.network.tap.encode())
            made.bind(("", port))
            return made

        return trio.socket.from_stdlib_socket(self.network.run_inside(make))

    async def _give_addresses(self, listening: trio.socket.SocketType) -> None:
        while True:
            question = await listening.recv(_LONGEST)
            kind = {_DISCOVER: _OFFER, _REQUEST: _ACK}.get(_kind(question))
            if kind is not None:
                await listening.sendto(self._answer(question, kind), ("255.255.255.255", _DHCP_CLIENT))

    def _answer(self, question: bytes, kind: int) -> bytes:
        own, theirs = (
            socket.inet_aton(address) for address in (self.network.address, self.network.guest_address)
        )
        first = next(iter(self.files)).encode()
        reply = b"\x02" + question[1:8] + bytes(8) + theirs + own + bytes(4) + question[28:44]
        reply = reply.ljust(108, b"\0") + first.ljust(128, b"\0") + _COOKIE
        options = {
            _KIND: bytes([kind]),
            _SERVER: own,
            _LEASE: struct.pack(">I", 3600),
            _SUBNET: socket.inet_aton("255.255.255.0"),
            _ROUTER: own,
            _IPXE: _NO_PROXY,
        }
        reply += b"".join(bytes([code, len(value)]) + value for code, value in options.items())
        return (reply + bytes([_END])).ljust(_LEAST, b"\0")

    async def _route_nothing(self) -> None:
        def make() -> tuple[socket.socket, int]:
            made = socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6)
            index = socket.if_nametoindex(self.network.tap)
            group = socket.inet_pton(socket.AF_INET6, _ALL_ROUTERS) + struct.pack("@I", index)
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, group)
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_HOPS, 255)
            return made, index

        raw, index = self.network.run_inside(make)
        advertisement = struct.pack(">BBHBBHII", _ADVERTISEMENT, 0, 0, 64, 0, 0, 0, 0)
        with trio.socket.from_stdlib_socket(raw) as listening:
            while True:
                message = await listening.recv(_LONGEST)
                if message[0] == _SOLICITATION:
                    await listening.sendto(advertisement, (_ALL_NODES, 0, 0, index))

    async def _take_requests(self, listening: trio.socket.SocketType) -> None:
        async with trio.open_nursery() as nursery:
            while True:
                request, client = await listening.recvfrom(_LONGEST)
                if struct.unpack_from(">H", request)[0] == _READ:
                    nursery.start_soon(self._give_file, request, client)

    async def _give_file(self, request: bytes, client: tuple[str, int]) -> None:
        words = [word.decode() for word in request[2:].split(b"\0")]
        name = words[0].lstrip("/")
        self.requests[name] = self.requests.get(name, 0) + 1
        self._tell()
        options = dict(zip(words[2::2], words[3::2], strict=False))
        content = self.files[name]
        size = int(options.get("blksize", 512))
        taken = {"blksize": str(size), "tsize": str(len(content))}
        agreed = "".join(f"{key}\0{taken[key]}\0" for key in options if key in taken)
        packets = [struct.pack(">H", _OPTIONS_TAKEN) + agreed.encode()]
        for number in range(len(content) // size + 1):
            block = content[number * size : (number + 1) * size]
            packets.append(struct.pack(">HH", _DATA, number + 1) + block)
        with self._udp(0) as own:
            for number, packet in enumerate(packets):
                if not await self._acknowledged(own, client, packet, number):
                    return
        self._given[name] = self._given.get(name, 0) + 1
        self._tell()

    async def _acknowledged(
        self, own: trio.socket.SocketType, client: tuple[str, int], packet: bytes, number: int
    ) -> bool:
        """Send a packet until it is acknowledged; False when the client does not want any more."""
        while True:
            await own.sendto(packet, client)
            with trio.move_on_after(_PATIENCE):
                while True:
                    answer = await own.recv(_LONGEST)
                    kind, acknowledged = struct.unpack_from(">HH", answer)
                    if kind == _ERROR:
                        return False
                    if kind == _ACKNOWLEDGED and acknowledged == number:
                        self._blocks += 1
                        self._tell()
                        return True


def _kind(question: bytes) -> int:
    """Of a DHCP message; 0 if it does not say."""
    options = question[_OPTIONS_AT:]
    while options and options[0] != _END:
        if options[0] == _PAD:
            options = options[1:]
            continue
        if options[0] == _KIND:
            return options[2]
        options = options[2 + options[1] :]
    return 0


@asynccontextmanager
async def boot_server(network: Network, files: Mapping[str, bytes]) -> AsyncIterator[BootServer]:
    """Serve beside the block."""
    server = BootServer(network, files)
    with server._udp(_DHCP_SERVER) as dhcp, server._udp(_TFTP) as tftp:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server._give_addresses, dhcp)
            nursery.start_soon(server._take_requests, tftp)
            nursery.start_soon(server._route_nothing)
            yield server
            nursery.cancel_scope.cancel()
