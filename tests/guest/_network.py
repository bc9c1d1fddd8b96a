"""A network of a test's own: a namespace with a TAP device in it, which goes away with its owner."""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct
import subprocess
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import trio
from pyroute2 import IPRoute

from tests.guest._errors import RigError
from tests.guest._root import Root

T = TypeVar("T")

_CLONE_NEWNET = 0x40000000
_TUNSETIFF, _TUNSETPERSIST = 0x400454CA, 0x400454CB
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR, _IFF_MULTI_QUEUE = 0x0002, 0x1000, 0x4000, 0x0100
_IFA_F_NODAD = 0x02
_libc = ctypes.CDLL(None, use_errno=True)


def _enter(namespace: int) -> None:
    if _libc.setns(namespace, _CLONE_NEWNET):
        error = ctypes.get_errno()
        raise OSError(error, f"cannot enter the network namespace: {os.strerror(error)}")


def _in_thread(work: Callable[[], T]) -> T:
    """Run `work` in a thread that ends with it, so that its change of namespace ends there too."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    thread = threading.Thread(target=run, name="netns")
    thread.start()
    thread.join()
    return future.result()


def open_tap(name: str, *, vnet_hdr: bool = False, multi_queue: bool = False) -> int:
    """Attach to a TAP device in this thread's network namespace, making it if need be; gives its fd."""
    flags = _IFF_TAP | _IFF_NO_PI
    flags |= _IFF_VNET_HDR if vnet_hdr else 0
    flags |= _IFF_MULTI_QUEUE if multi_queue else 0
    tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        fcntl.ioctl(tap, _TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
    except OSError:
        os.close(tap)
        raise
    return tap


class Network:
    """A network namespace with one TAP device, which is up and has the addresses that the guest's peer needs.

    Use it as a context manager. The namespace has no name in the file system: it lasts as long as this
    object, its TAP fds and the programs in it, so not even a killed test run leaves one behind. Addresses
    cannot collide with anybody's, as nothing leaves the namespace.
    """

    def __init__(
        self, *, tap: str = "tap0", subnet: str = "10.77.0", mtu: int = 1500, multi_queue: bool = False
    ) -> None:
        self.tap = tap
        """The TAP device's name inside the namespace."""
        self.address, self.guest_address = f"{subnet}.1", f"{subnet}.2"
        self.address6, self.guest_address6 = "fd77::1", "fd77::2"
        self.prefix_length, self.prefix_length6 = 24, 64
        self._mtu = mtu
        self._multi_queue = multi_queue
        self._namespace = -1

    def __enter__(self) -> Network:
        if os.geteuid() != 0:
            raise RigError("making a network namespace with a TAP device needs root")
        if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
            raise RigError(
                "/dev/net/tun is missing or not writable: `modprobe tun`, or pass it to this container"
            )
        self._namespace = _in_thread(self._make)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._namespace)
        self._namespace = -1

    def _make(self) -> int:
        if _libc.unshare(_CLONE_NEWNET):
            error = ctypes.get_errno()
            raise RigError(f"cannot make a network namespace: {os.strerror(error)}")
        namespace = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            device = open_tap(self.tap, multi_queue=self._multi_queue)
            fcntl.ioctl(device, _TUNSETPERSIST, 1)
            os.close(device)
            with IPRoute() as netlink:
                netlink.link("set", index=1, state="up")
                index = netlink.link_lookup(ifname=self.tap)[0]
                netlink.link("set", index=index, mtu=self._mtu, state="up")
                netlink.addr("add", index=index, address=self.address, prefixlen=self.prefix_length)
                # Usable at once: duplicate address detection would hold it back for a second.
                netlink.addr(
                    "add",
                    index=index,
                    address=self.address6,
                    prefixlen=self.prefix_length6,
                    flags=_IFA_F_NODAD,
                )
        except BaseException:
            os.close(namespace)
            raise
        return namespace

    def run_inside(self, work: Callable[[], T]) -> T:
        """Run a function in a thread inside the namespace; sockets that it makes stay there."""

        def entered() -> T:
            _enter(self._namespace)
            return work()

        return _in_thread(entered)

    def open_tap(self, *, vnet_hdr: bool = False) -> int:
        """A new fd on the namespace's TAP device, usable from outside the namespace. The caller closes it."""
        return self.run_inside(lambda: open_tap(self.tap, vnet_hdr=vnet_hdr, multi_queue=self._multi_queue))

    @property
    def path(self) -> str:
        """A path that names the namespace while this object lives, for ``nsenter --net=`` and the like."""
        return f"/proc/{os.getpid()}/fd/{self._namespace}"

    @property
    def prefix(self) -> list[str]:
        """The beginning of a command line that runs the rest of it inside the namespace."""
        return ["nsenter", f"--net={self.path}", "--"]

    def command(self, root: Root, program: str, *arguments: str) -> list[str]:
        """The command line of one of the rig's own programs (``ip``, ``iperf3``, ``ping``) in here."""
        return [*self.prefix, *root.program(program), *arguments]

    async def run(self, root: Root, program: str, *arguments: str, check: bool = True) -> str:
        """Run such a program to its end and return what it printed, or raise with that if it failed."""
        done = await trio.run_process(
            self.command(root, program, *arguments),
            stdin=subprocess.DEVNULL,
            capture_stdout=True,
            stderr=subprocess.STDOUT,
            check=False,
        )
        printed = done.stdout.decode("utf-8", errors="replace")
        if check and done.returncode:
            raise AssertionError(f"{program} {' '.join(arguments)}: status {done.returncode}\n{printed}")
        return printed

    @asynccontextmanager
    async def running(self, root: Root, program: str, *arguments: str, port: int) -> AsyncIterator[None]:
        """Run such a program beside the block, which begins when it listens on this TCP port."""
        process = subprocess.Popen(  # noqa: ASYNC220
            ["setpriv", "--pdeathsig", "KILL", "--", *self.command(root, program, *arguments)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            with trio.fail_after(10):
                while not self.run_inside(lambda: _listens(port)):
                    if process.poll() is not None:
                        raise AssertionError(f"{program} ended with status {process.returncode}")
                    await trio.sleep(0.02)
            yield
        finally:
            process.kill()
            process.wait()


def _listens(port: int) -> bool:
    """Whether anybody listens on a TCP port in this thread's namespace."""
    listening, wanted = "0A", f":{port:04X}"
    for table in ("tcp", "tcp6"):
        for line in Path("/proc/thread-self/net", table).read_text(encoding="ascii").splitlines()[1:]:
            fields = line.split()
            if fields[3] == listening and fields[1].endswith(wanted):
                return True
    return False
