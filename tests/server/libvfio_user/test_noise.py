"""Noise against the engine in a process of its own: whatever comes, the library neither ends nor leaks it."""

import array
import os
import random
import socket
import struct
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.peers.libvfio_user import LibvfioUser
from tests.server.raw import (
    DMA_MAP,
    DMA_UNMAP,
    GET_IO_FDS,
    GET_IRQ_INFO,
    GET_REGION_INFO,
    NO_REPLY,
    REGION_READ,
    REGION_WRITE,
    RESET,
    SET_IRQS,
    access,
    dma,
    irqs,
    message,
    version,
)
from tests.trionic.command import Serving, serving

SESSIONS, MESSAGES = 40, 100
PATIENCE_S = 20
NUMBERS = [0, 1, 2, 3, 4, 7, 8, 16, 32, 0x1000, 0x10000, 0x7FFF_FFFF, 0xFFFF_FFFE, 0xFFFF_FFFF]
ADDRESSES = [*NUMBERS, 1 << 32, 1 << 63, (1 << 64) - 0x1000, (1 << 64) - 1]
DIRTY_PAGES, FEATURE, MIG_READ, MIG_WRITE = 14, 16, 17, 18


class Noise:
    """Messages that are right in some of their fields, by a seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self._bodies: dict[int, Callable[[], bytes]] = {
            DMA_MAP: lambda: dma(self._far(), self._far(), flags=self._one(3, 3, 1), offset=self._far()),
            DMA_UNMAP: lambda: struct.pack("=IIQQ", 24, self._one(0, 2, 1), self._far(), self._far()),
            GET_REGION_INFO: lambda: struct.pack("=IIIIQQ", self._one(32, 4096), 0, self._near(), 0, 0, 0),
            GET_IO_FDS: lambda: struct.pack("=IIII", self._one(16, 4096), 0, self._near(), 0),
            GET_IRQ_INFO: lambda: struct.pack("=IIII", 16, 0, self._near(), 0),
            SET_IRQS: lambda: irqs(
                self._one(1, 2, 4) | self._one(8, 16, 32), self._one(*range(6)), self._near(), self._near()
            ),
            REGION_READ: lambda: access(self._far(), self._near(), self._near()),
            REGION_WRITE: lambda: access(self._near(), self.random.randrange(9), 4) + bytes(4),
            RESET: bytes,
            DIRTY_PAGES: lambda: struct.pack("=IIQQ", 48, self._one(1, 2, 4), self._far(), self._far()),
            FEATURE: lambda: struct.pack("=IIQ", 16, self._one(*range(9)) | 1 << self._one(16, 17, 18), 0),
            MIG_READ: lambda: struct.pack("=II", self._near(), self._near()),
            MIG_WRITE: lambda: struct.pack("=II", 16, 8) + bytes(8),
        }  # fmt: skip

    def _one(self, *values: int) -> int:
        return self.random.choice(values)

    def _near(self) -> int:
        return self.random.choice(NUMBERS)

    def _far(self) -> int:
        return self.random.choice(ADDRESSES)

    def message(self) -> bytes:
        command = self.random.choice([*self._bodies, self.random.randrange(25)])
        body = self._bodies.get(command, lambda: self.random.randbytes(self.random.randrange(64)))()
        if self.random.random() < 0.05:
            body = body[: self.random.randrange(len(body) + 1)]
        return message(command, body, flags=self._one(0, 0, 0, NO_REPLY))

    def fds(self, stack: ExitStack) -> list[int]:
        """Descriptors of every kind, often none."""
        made = []
        for _ in range(self._one(0, 0, 1, 1, 4, 20)):
            kind = self._one(0, 1, 2, 3)
            if kind == 0:
                made.append(os.eventfd(0))
            elif kind == 1:
                made.append(os.memfd_create("noise"))
                os.ftruncate(made[-1], self._one(0, 4096, 65536))
            elif kind == 2:
                made.append(os.open(os.devnull, os.O_RDWR))
            else:
                made.extend(os.pipe())
        for fd in made:
            stack.callback(os.close, fd)
        return made


def connect(path: Path) -> socket.socket:
    """A client that is being served."""
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(PATIENCE_S)
    client.connect(os.fspath(path))
    for request in (version(), message(REGION_READ, access(0, 7, 4))):
        client.sendall(request)
        assert client.recv(4096)
    return client


def one_stay(path: Path, noise: Noise) -> None:
    with connect(path) as client:
        for _ in range(MESSAGES):
            with ExitStack() as stack:
                fds = noise.fds(stack)
                rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
                try:
                    client.settimeout(PATIENCE_S)
                    client.sendmsg([noise.message()], rights, socket.MSG_NOSIGNAL)
                    client.setblocking(False)
                    while True:
                        data, sent, _, _ = socket.recv_fds(client, 1 << 16, 64)
                        for fd in sent:
                            os.close(fd)
                        if not data:
                            return  # dropped, which some noise deserves
                except BlockingIOError:
                    continue
                except (BrokenPipeError, ConnectionResetError):
                    return


def possessions(served: Serving, path: Path) -> list[str]:
    """What the server has open while nobody but an honest client is there."""
    with connect(path):
        folder = Path(f"/proc/{served.process.pid}/fd")
        return sorted(os.fspath(entry.readlink()).partition(":")[0] for entry in folder.iterdir())


@pytest.mark.parametrize("seed", [1, 2])
def test_noise_neither_ends_nor_fills_the_process(
    libvfio_user: LibvfioUser, tmp_path: Path, seed: int
) -> None:
    path = tmp_path / "card.sock"
    options = ("--engine", "libvfio-user", "--libvfio-user", libvfio_user.library, "--log-level", "error")
    noise = Noise(seed)
    with serving("--socket", path, *options) as served:
        before = possessions(served, path)
        for _ in range(SESSIONS):
            one_stay(path, noise)
            assert served.process.poll() is None
        assert possessions(served, path) == before
        served.process.terminate()
        _, errors = served.process.communicate(timeout=PATIENCE_S)
        assert (served.process.returncode, errors) == (0, "")
