"""Capture files as a port: what the guest sends is written, what it shall receive is read.

Frames cross to the data path over a pair of SOCK_SEQPACKET sockets, so that a file slower than the guest
makes the guest wait, and a guest slower than the file makes the replay wait; neither loses a frame.
"""

from __future__ import annotations

import logging
import os
import socket
import stat
import time
from typing import BinaryIO

import trio

from firmware.ports._capture import CaptureError, CaptureWriter, read_frames
from firmware.ports._port import MAX_FRAME, Port, PortError

__all__ = ["PcapPort"]

log = logging.getLogger("trionic.port")

BURST = 64  # frames written before other tasks have their turn


class PcapPort(Port):
    """Writes what the guest sends to the file `write` and gives it what is in the file `read`.

    The replay goes at `speed` times the pace of the time stamps, in a `loop` if asked; with `both`, its
    frames are written, too. The file is whole after each burst, nothing waits in a buffer of ours. Raises
    PortError where a file cannot be had, and for a damaged one: it is read through once before the replay
    begins.
    """

    kind = "pcap"

    def __init__(
        self, spec: str, *, write: str | None, read: str | None, both: bool, speed: float, loop: bool
    ) -> None:
        super().__init__(spec)
        _check_combination(write, read, both, replaying=speed != 1 or loop)
        self._speed = speed
        self._loop = loop
        self._both = both
        self._in: BinaryIO | None = None
        self._out: CaptureWriter | None = None
        self._tasks = trio.CancelScope()
        self._ours, self._cards = socket.socketpair(
            socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
        )
        self.fd = self._cards.fileno()
        try:
            if read is not None:
                self._in = os.fdopen(_open(read, os.O_RDONLY), "rb")
                _check_capture(self._in, read)
            if write is not None:
                self._out = self._begin(write)
        except BaseException:
            self._close_all()
            raise

    def _begin(self, path: str) -> CaptureWriter:
        fd = _open(path, os.O_WRONLY | os.O_CREAT)
        try:
            if self._in is not None and os.path.sameopenfile(self._in.fileno(), fd):
                raise PortError(f"port pcap: read and write are the same file, {path!r}; write another one")
            return CaptureWriter(fd)
        except OSError as error:
            os.close(fd)
            raise PortError(
                f"port pcap: {path!r} cannot be written: {error.strerror}; make room or choose another"
            ) from None
        except PortError:
            os.close(fd)
            raise

    async def run(self) -> None:
        """Write and replay until cancelled, or until the file takes no more.

        A replay that has ended leaves the link up and quiet.
        """
        with self._tasks:
            async with trio.open_nursery() as nursery:
                if self._in is not None:
                    nursery.start_soon(self._replay, self._in)
                while True:
                    await trio.lowlevel.wait_readable(self._ours)
                    self._drain(BURST)

    def _drain(self, most: int | None = None) -> None:
        """Put the frames that wait into the file, at `most` so many."""
        frames: list[tuple[int, bytes]] = []
        while most is None or len(frames) < most:
            try:
                frame = self._ours.recv(MAX_FRAME)
            except BlockingIOError:
                break
            if not frame:
                break
            frames.append((time.time_ns(), frame))
        self._write(frames)

    def _write(self, frames: list[tuple[int, bytes]]) -> None:
        """Where the file takes no more, the cable is out: no traffic passes that the file lacks."""
        if self._out is None:
            return
        try:
            self._out.write(frames)
        except OSError as error:
            log.error("port %s: %s; so the card's link is down", self.spec, error.strerror)
            self._out.close()
            self._out = None
            self._tasks.cancel()
            self.peer_lost()

    async def _replay(self, file: BinaryIO) -> None:
        count = 0
        try:
            while True:
                start = trio.current_time()
                first: float | None = None
                for stamp, frame in read_frames(file):
                    first = stamp if first is None else first
                    await trio.sleep_until(start + (stamp - first) / self._speed)
                    due = trio.current_time()
                    if await self._send(frame):
                        start += trio.current_time() - due  # the guest made us wait: keep the pace from here
                    count += 1
                    if self._both:
                        self._write([(time.time_ns(), frame)])
                if not self._loop or first is None:
                    break
            log.info("port %s: the replay has ended after %d frames", self.spec, count)
        except (CaptureError, OSError) as error:  # it was sound when it was opened
            log.error(
                "port %s: the replay has ended after %d frames, for the file has changed: %s",
                self.spec,
                count,
                error,
            )

    async def _send(self, frame: bytes) -> bool:
        """Give the card a frame; tells whether that had to wait."""
        waited = False
        while True:
            try:
                self._ours.send(frame)
            except BlockingIOError:
                waited = True
                await trio.lowlevel.wait_writable(self._ours)
            else:
                return waited

    def close(self) -> None:
        """Write what still waits and close the files: nothing that the guest sent is lost."""
        self.fd = -1
        self.link_up = False
        if self._ours.fileno() >= 0:
            self._drain()
        self._close_all()

    def _close_all(self) -> None:
        self.fd = -1
        self._ours.close()
        self._cards.close()
        for file in (self._in, self._out):
            if file is not None:
                file.close()
        self._in = self._out = None


def _check_combination(write: str | None, read: str | None, both: bool, replaying: bool) -> None:
    if write is None and read is None:
        raise PortError("port pcap needs write=FILE or read=FILE, or both of them")
    if replaying and read is None:
        raise PortError("port pcap: speed and loop are about a replay; add read=FILE, or leave them out")
    if both and (write is None or read is None):
        raise PortError("port pcap: both=yes writes what is read; it needs write=FILE and read=FILE")


def _open(path: str, flags: int) -> int:
    writing = flags != os.O_RDONLY
    try:
        # O_NONBLOCK: a FIFO must not make us wait for somebody.
        fd = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)
    except OSError as error:
        action = "written" if writing else "read"
        raise PortError(
            f"port pcap: {path!r} cannot be {action}: {error.strerror}; choose another file"
        ) from None
    mode = os.fstat(fd).st_mode
    if stat.S_ISREG(mode) or (writing and stat.S_ISCHR(mode)):
        return fd
    os.close(fd)
    raise PortError(f"port pcap: {path!r} is not a regular file; choose one, for others could stop the card")


def _check_capture(file: BinaryIO, path: str) -> None:
    count = 0
    try:
        for _ in read_frames(file):
            count += 1
    except (CaptureError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise PortError(f"port pcap: {path!r} cannot be replayed: after {count} frames: {reason}") from None
