"""Capture files as a port: what the guest sends is written, what it shall receive is read.

Frames cross to the data path over a pair of SOCK_SEQPACKET sockets, so a file that is slower than the guest
makes the guest wait instead of losing frames.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import socket
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import dpkt
import trio

from firmware.ports._capture import ETHERNET, LONGEST, CaptureError, frames
from firmware.ports._port import Port, PortError

log = logging.getLogger("trionic.port")

_BURST = 256                    # frames written before others get their turn of the event loop


class PcapPort(Port):
    """Writes to the file `write`, and replays the file `read`, in a `loop` if asked.

    `speed` is a multiple of the pace of the file's time stamps; None replays as fast as the guest takes the
    frames. Raises PortError for files that cannot be had or are damaged.
    """

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
        if read is None and (speed is not None or loop):
            raise PortError("port pcap: speed and loop go with read=FILE")
        self._speed = math.inf if speed is None else speed
        self._loop = loop
        self._in: BinaryIO | None = None
        self._out: BinaryIO | None = None
        self._writer: dpkt.pcap.Writer | None = None
        self._ours, self._cards = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._ours.setblocking(False)
        self._cards.setblocking(False)
        self.fd = self._cards.fileno()
        try:
            if read is not None:
                self._in = _open(read, os.O_RDONLY)
                self._check(read, self._in)
            if write is not None:
                if read is not None and Path(write).exists() and Path(write).samefile(read):
                    raise PortError(f"port pcap: {write!r} cannot be read and written at once")
                self._out = _open(write, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                self._writer = dpkt.pcap.Writer(self._out, snaplen=LONGEST, linktype=ETHERNET)
                self._out.flush()
        except BaseException:
            self.close()
            raise

    def _check(self, path: str, file: BinaryIO) -> None:
        """Read the whole file once, so that a damaged one is refused now and not amid a replay."""
        try:
            for _ in frames(file):
                pass
        except CaptureError as error:
            raise PortError(f"port pcap: {path!r} cannot be replayed: {error}") from None

    async def run(self) -> None:
        """Write and replay until cancelled; a replay that has ended leaves the link up and quiet."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._write)
            if self._in is not None:
                nursery.start_soon(self._replay, self._in)

    async def _write(self) -> None:
        while True:
            await trio.lowlevel.wait_readable(self._ours)
            self._drain(_BURST)

    def _drain(self, limit: float = math.inf) -> None:
        """Put the frames that wait, at most `limit`, into the file."""
        done = 0
        while done < limit:
            try:
                frame = self._ours.recv(LONGEST)
            except BlockingIOError:
                break
            if not frame:
                break
            done += 1
            if self._writer is not None:
                self._to_file(self._writer.writepkt, frame, time.time())
        if self._out is not None:
            self._to_file(self._out.flush)

    def _to_file(self, action: Callable[..., object], *args: object) -> None:
        """Do something with the file written; a file that takes no more, for its disk is full, ends there."""
        try:
            action(*args)
        except OSError as error:
            log.error("%s: no frame is written any more: %s", self.spec, error.strerror)
            out, self._out, self._writer = self._out, None, None
            if out is not None:
                with contextlib.suppress(OSError):
                    out.close()

    async def _replay(self, file: BinaryIO) -> None:
        try:
            while await self._replay_once(file) and self._loop:
                pass
        except CaptureError as error:
            log.error("%s: the replay ends, for the file has changed: %s", self.spec, error)

    async def _replay_once(self, file: BinaryIO) -> bool:
        """Returns whether there was a frame at all."""
        start = trio.current_time()
        first: float | None = None
        for stamp, frame in frames(file):
            first = stamp if first is None else first
            await trio.sleep_until(start + (stamp - first) / self._speed)
            await self._send(frame)
        return first is not None

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
        if self._out is not None:
            self._to_file(self._out.close)
        if self._in is not None:
            self._in.close()
        self._in = self._out = self._writer = None


def _open(path: str, flags: int) -> BinaryIO:
    """Open a regular file; anything else could block or never end."""
    action = "read" if flags == os.O_RDONLY else "written"
    try:
        fd = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)
    except OSError as error:
        raise PortError(f"port pcap: {path!r} cannot be {action}: {error.strerror}") from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise PortError(f"port pcap: {path!r} cannot be {action}: it is no regular file")
    return os.fdopen(fd, "rb" if flags == os.O_RDONLY else "wb")
