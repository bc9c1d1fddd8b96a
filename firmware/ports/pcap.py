"""Capture files as a port: what the guest sends is written, what it shall receive is read.

Frames cross to the data path over a pair of SOCK_SEQPACKET sockets, so a file that is slower than the guest makes the guest wait
instead of losing frames.
"""

from __future__ import annotations

import math
import os
import socket
import time
from collections.abc import Iterator
from typing import BinaryIO

import dpkt
import trio

from firmware.ports._port import Port, PortError

SNAPLEN = 65535 + 18            # the largest frame a card sends
DLT_EN10MB = 1                  # Ethernet, the only link type that fits the card


class PcapPort(Port):
    """Writes to the file `write`, replays the file `read` at `speed` times its own pace (None: at once), in a `loop` if asked."""

    kind = "pcap"

    def __init__(
        self,
        spec: str,
        *,
        write: str | None = None,
        read: str | None = None,
        speed: float | None = None,
        loop: bool = False,
    ) -> None:
        super().__init__(spec)
        if write is None and read is None:
            raise PortError("port pcap needs write=FILE or read=FILE, or both")
        self._speed = math.inf if speed is None else speed
        self._loop = loop
        self._in: BinaryIO | None = None
        self._out: BinaryIO | None = None
        self._ours, self._cards = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._ours.setblocking(False)
        self._cards.setblocking(False)
        self.fd = self._cards.fileno()
        self._writer: dpkt.pcap.Writer | None = None
        try:
            if read is not None:
                self._in = _open(read, "rb")
                self._check(read)
            if write is not None:
                self._out = _open(write, "wb")
                self._writer = dpkt.pcap.Writer(self._out, snaplen=SNAPLEN, linktype=DLT_EN10MB)
        except BaseException:
            self.close()
            raise

    def _frames(self) -> Iterator[tuple[float, bytes]]:
        assert self._in is not None
        self._in.seek(0)
        reader = dpkt.pcap.UniversalReader(self._in)
        if reader.datalink() != DLT_EN10MB:
            raise ValueError(f"link type {reader.datalink()} where Ethernet (1) is needed")
        for stamp, frame in reader:
            yield float(stamp), bytes(frame)

    def _check(self, path: str) -> None:
        """Read the whole file once, so that a damaged one is refused now and not in the middle of a replay."""
        count = 0
        try:
            for count, (_, frame) in enumerate(self._frames(), 1):  # noqa: B007
                if len(frame) > SNAPLEN:
                    raise ValueError(f"frame {count} has {len(frame)} bytes; the card takes {SNAPLEN}")
        except (ValueError, dpkt.UnpackError, dpkt.NeedData) as error:
            raise PortError(f"port pcap: {path} cannot be replayed: after {count} frames: {error}") from None

    async def run(self) -> None:
        """Write and replay until cancelled; a replay that has ended leaves the link up and quiet."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._write)
            if self._in is not None:
                nursery.start_soon(self._replay)

    async def _write(self) -> None:
        while True:
            await trio.lowlevel.wait_readable(self._ours)
            self._drain()

    def _drain(self) -> None:
        """Put every frame that waits into the file."""
        while True:
            try:
                frame = self._ours.recv(SNAPLEN)
            except BlockingIOError:
                break
            if not frame:
                break
            if self._writer is not None:
                self._writer.writepkt(frame, time.time())
        if self._out is not None:
            self._out.flush()

    async def _replay(self) -> None:
        while True:
            start = trio.current_time()
            first: float | None = None
            for stamp, frame in self._frames():
                first = stamp if first is None else first
                await trio.sleep_until(start + (stamp - first) / self._speed)
                await self._send(frame)
            if not self._loop or first is None:
                return

    async def _send(self, frame: bytes) -> None:
        while True:
            try:
                self._ours.send(frame)
            except BlockingIOError:
                await trio.lowlevel.wait_writable(self._ours)
            else:
                return

    def close(self) -> None:
        """Write what still waits, and close the files; nothing the guest sent is lost."""
        if self.fd >= 0:
            self._drain()
            self._ours.close()
            self._cards.close()
            self.fd = -1
        for file in (self._in, self._out):
            if file is not None:
                file.close()
        self._in = self._out = None


def _open(path: str, mode: str) -> BinaryIO:
    try:
        return open(path, mode)  # type: ignore[return-value]  # noqa: PTH123, SIM115
    except OSError as error:
        action = "read" if mode == "rb" else "written"
        raise PortError(f"port pcap: {os.fspath(path)} cannot be {action}: {error.strerror}") from None
