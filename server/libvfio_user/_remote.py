"""The client's memory by message, as the library asks for it: over the twin socket, in the trio thread.

The library waits for an answer in the thread that calls it, and may be called in that of its messages only.
So a worker hands its access over and waits; meanwhile no card of the process is served. A client that does
not answer in time loses its twin socket, which is what ends the library's waiting, and with it the session.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from errno import ECANCELED, EFAULT, ENOTCONN, ETIMEDOUT
from functools import partial
from typing import Final

import trio

from device._gate import Gate
from device.dma.remote import UnwantedError, Wanted, always
from device.errors import DeviceError
from server.libvfio_user._context import Context
from server.libvfio_user.library import LibraryError

__all__ = ["TwinMemory"]

# Accesses of other workers that may be served before one's own.
_TURNS: Final = 4


class TwinMemory:
    """The memory of the client of ``context``; ``twin``, which becomes this object's, is a descriptor of the
    client's end. Made in the trio thread; `read` and `write` may be called by any.
    """

    def __init__(
        self, context: Context, gate: Gate, twin: int, deadline: float, end: Callable[[], None]
    ) -> None:
        self._context = context
        self._gate = gate
        self._twin = socket.socket(fileno=twin)
        self._deadline = deadline
        self._end = end
        self._thread = threading.get_ident()
        self._token = trio.lowlevel.current_trio_token()
        self._lock = threading.Lock()
        self._waiting: set[Future[bytes]] = set()
        self._closed = False

    def read(self, iova: int, length: int, wanted: Wanted = always) -> bytes:
        """See `device.dma.remote.RemoteMemory`."""
        return self._ask(partial(self._context.read_memory, iova, length), wanted)

    def write(self, iova: int, data: bytes, wanted: Wanted = always) -> None:
        """See `device.dma.remote.RemoteMemory`."""
        self._ask(partial(self._context.write_memory, iova, data), wanted)

    def close(self) -> None:
        """The session is over: whoever waits has ENOTCONN."""
        with self._lock:
            self._closed = True
            for future in self._waiting:
                if not future.done():
                    future.set_exception(_nobody())
        self._twin.close()

    def _ask(self, access: Callable[[], bytes], wanted: Wanted) -> bytes:
        if threading.get_ident() == self._thread:
            return self._do(access)
        future: Future[bytes] = Future()
        with self._lock:
            if self._closed:
                raise _nobody()
            self._waiting.add(future)
        try:
            self._token.run_sync_soon(self._do_for, future, access, wanted)
            return future.result(_TURNS * self._deadline)
        except TimeoutError:
            raise DeviceError(ETIMEDOUT, "the client answers other DMA messages too slowly") from None
        except trio.RunFinishedError:
            raise _nobody() from None
        finally:
            with self._lock:
                self._waiting.discard(future)

    def _do_for(self, future: Future[bytes], access: Callable[[], bytes], wanted: Wanted) -> None:
        with self._lock:
            if future not in self._waiting or future.done():
                return
        try:
            with (
                self._gate
            ):  # resets and unmaps are made in this thread, so none comes before the access is made
                late = not wanted()
            if late:
                raise UnwantedError(ECANCELED, "the access came too late")
            future.set_result(self._do(access))
        except BaseException as error:
            future.set_exception(error)

    def _do(self, access: Callable[[], bytes]) -> bytes:
        if self._closed:
            raise _nobody()
        watch = threading.Timer(self._deadline, self._give_up)
        watch.start()
        try:
            return access()
        except LibraryError as error:
            if error.errno == ENOTCONN:
                self._end()
            raise DeviceError(error.errno or EFAULT, str(error)) from error
        finally:
            watch.cancel()
            watch.join()

    def _give_up(self) -> None:
        with suppress(OSError):  # it is gone already
            self._twin.shutdown(socket.SHUT_RDWR)


def _nobody() -> DeviceError:
    return DeviceError(ENOTCONN, "there is no client to ask for its memory")
