"""The client's memory by message: DMA_READ and DMA_WRITE, for whatever thread of the device needs them.

There are two roads. With a twin socket any thread sends and waits there itself. Without one all messages go
over the session's own socket: a worker thread hands its request to the trio thread and waits; the trio thread
itself, in a handler that reads memory before it answers, reads on from the socket until its reply is there,
and what the client asks for meanwhile keeps its order and is handled afterwards. Guarantees:

- Nobody waits longer than the deadline (ETIMEDOUT); an answer that comes later is dropped.
- When the session ends everybody who waits has ENOTCONN at once, and so has everybody who asks later.
- What the device wants no more, because it was reset or a window went away, is not asked for after that: the
  request is on its way before the gate is left in which it was found to be wanted.
- A client that answers with something else than was asked for is EIO; its own refusal is its errno.

Whoever asks must not hold the gate: the trio thread may need it before it can see the answer.
"""

from __future__ import annotations

import contextlib
import math
import select
import socket
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from errno import EBUSY, ECANCELED, EIO, ENOTCONN, ETIMEDOUT
from typing import Final

import trio

from device._gate import Gate
from device.dma.remote import UnwantedError, Wanted, always
from device.errors import DeviceError
from protocol import BadReply, Command, Connection, ErrorReply, LocalProtocolError, Refused, Reply
from protocol.limits import MAX_DMA_UNANSWERED, RECEIVE_SIZE
from protocol.messages import DmaAccess
from server._descriptors import close_all, receive
from server._wire import ClientDroppedError, ClientLeftError, Wire, gone

__all__ = ["Answered", "ByMessage", "InBandMemory", "TwinMemory"]

Answered = Reply | ErrorReply | BadReply
"""What the engine says of a request that is over."""


@dataclass(frozen=True, slots=True)
class _Access:
    """One request of the device; whoever asks waits for `answer`."""

    command: Command
    body: DmaAccess
    data: bytes
    wanted: Wanted
    answer: Future[Reply] = field(default_factory=Future)


# What a DMA_READ reply of a QEMU with a count of 32 bits has its data early by.
_WORD: Final = 4


class ByMessage(ABC):
    """What both roads have in common. `read` and `write` may be called by any thread."""

    def __init__(self, engine: Connection, gate: Gate, deadline: float) -> None:
        self._engine = engine
        self._gate = gate
        self._deadline = deadline
        self._answers: dict[tuple[int, Command], Future[Reply]] = {}

    def read(self, iova: int, length: int, wanted: Wanted = always) -> bytes:
        """The client's ``length`` bytes at ``iova``; DeviceError as the module says, or what the client
        refuses with.
        """
        data = self._read(iova, length, wanted)
        if self._engine.dma_layout_in_doubt and any(data):
            self._settle_layout(iova, data, wanted)
            data = self._read(iova, length, wanted)
        return data

    def _read(self, iova: int, length: int, wanted: Wanted) -> bytes:
        data = self._ask(_Access(Command.DMA_READ, DmaAccess(iova, length), b"", wanted)).data
        if len(data) != length:
            raise DeviceError(EIO, f"DMA_READ of {length} bytes at {iova:#x} answered with {len(data)}")
        return data

    def _settle_layout(self, iova: int, data: bytes, wanted: Wanted) -> None:
        """Find out where the client has its data, which a reply with zeros at both ends does not show.

        ``data`` were read as if they stood 4 bytes early, so what is not zero in them stands where it seems
        or 4 bytes before. A read of no more than 4 bytes that are not all zero shows it.
        """
        first = next(at for at, byte in enumerate(data) if byte) // _WORD * _WORD
        for at in (first - _WORD, first):
            if self._engine.dma_layout_in_doubt:
                self._read(iova + at, min(_WORD, len(data) - at), wanted)

    def write(self, iova: int, data: bytes, wanted: Wanted = always) -> None:
        """Write to the client's memory and wait until it is there; errors as those of `read`."""
        self._ask(_Access(Command.DMA_WRITE, DmaAccess(iova, len(data)), data, wanted))

    def answered(self, event: Answered) -> None:
        """Tell who asked, if he still waits."""
        answer = self._answers.pop((event.message_id, event.command), None)
        if answer is None or answer.done():
            return
        if isinstance(event, Reply):
            answer.set_result(event)
        elif isinstance(event, ErrorReply):
            answer.set_exception(DeviceError(event.errno, f"the client refuses {event.command.name}"))
        else:
            answer.set_exception(DeviceError(EIO, event.reason))

    @abstractmethod
    def close(self) -> None:
        """The session is over; called by the trio thread, which alone makes and ends sessions."""

    @abstractmethod
    def _ask(self, access: _Access) -> Reply: ...

    def _put(self, wire: Wire, access: _Access) -> None:
        """Make the request and give it to the wire, which is not busy or has what is sent next behind it."""
        if self._engine.closed:
            raise _nobody()
        if self._engine.outstanding >= MAX_DMA_UNANSWERED:
            raise DeviceError(EBUSY, f"the client owes {MAX_DMA_UNANSWERED} answers already")
        with self._gate:
            if not access.wanted():
                raise UnwantedError(ECANCELED, "the access came too late")
            try:
                message_id, message = self._engine.request(access.command, access.body, access.data)
            except LocalProtocolError as error:
                raise DeviceError(error.errno, error.reason) from None
            self._answers[message_id, access.command] = access.answer
            wire.put(message)

    def _wait(
        self, wire: Wire, fd: int, over: Callable[[], bool], pull: Callable[[], bool], until: float
    ) -> None:
        """Send and receive in this thread until it is ``over``; ``pull`` takes what has come."""
        while True:
            busy = wire.push()
            heard = pull()
            if over():
                return
            left = until - time.monotonic()
            if left <= 0:
                raise _late()
            if not heard:
                readiness = select.poll()
                readiness.register(fd, select.POLLIN | (select.POLLOUT if busy else 0))
                readiness.poll(math.ceil(left * 1000))


class TwinMemory(ByMessage):
    """Over ``ours``, our end of the second socket, which this object owns; one access at a time.

    A client that breaks off this socket, or breaks the protocol on it, keeps its session: only its memory
    cannot be reached any more.
    """

    def __init__(self, engine: Connection, gate: Gate, ours: socket.socket, deadline: float) -> None:
        super().__init__(engine, gate, deadline)
        ours.setblocking(False)
        self._socket = ours
        self._wire = Wire(ours, deadline)
        self._turn = threading.Lock()
        self._closed = False

    def close(self) -> None:
        """See the base class. Whoever waits on the socket is woken by its end."""
        self._hang_up()
        with self._turn:
            close_all(self._engine.close())
            self._socket.close()

    def _ask(self, access: _Access) -> Reply:
        until = time.monotonic() + self._deadline
        if not self._turn.acquire(timeout=self._deadline):
            raise _late()
        try:
            if self._closed:
                raise _nobody()
            fd = self._socket.fileno()
            if self._wire.busy:  # with the rest of an access that was given up
                self._wait(self._wire, fd, lambda: not self._wire.busy, self._pull, until)
            self._put(self._wire, access)
            self._wait(self._wire, fd, access.answer.done, self._pull, until)
            return access.answer.result()
        except (ClientLeftError, ClientDroppedError):
            self._hang_up()
            raise _nobody() from None
        finally:
            self._turn.release()

    def _hang_up(self) -> None:
        self._closed = True
        with contextlib.suppress(OSError):  # the client's end is gone already, which wakes as well
            self._socket.shutdown(socket.SHUT_RDWR)

    def _pull(self) -> bool:
        try:
            data, fds, lost = receive(self._socket, RECEIVE_SIZE)
        except BlockingIOError:
            return False
        except OSError as error:
            raise gone(error) from None
        if not data:
            close_all(fds)
            raise ClientLeftError
        for event in self._engine.receive(data, fds, fds_lost=lost):
            close_all(event.fds)
            if isinstance(event, Answered):
                self.answered(event)
            elif isinstance(event, Refused):
                if self._wire.busy:
                    raise ClientDroppedError("it asks on the second socket and takes no answers")
                self._wire.put(self._engine.error(event, event.errno))
        if self._engine.closed:
            raise ClientDroppedError("it breaks the protocol on the second socket")
        return True


class InBandMemory(ByMessage):
    """Over the session's own socket, ``fd``, between its replies. Made in the trio thread of the session.

    ``pull`` takes in what the client has said, gives answers to `answered`, keeps the rest, and says whether
    there was anything. ``attend`` makes the session see to what was kept, and to what waits in ``wire``.
    """

    def __init__(
        self,
        engine: Connection,
        gate: Gate,
        deadline: float,
        *,
        wire: Wire,
        fd: int,
        pull: Callable[[], bool],
        attend: Callable[[], None],
    ) -> None:
        super().__init__(engine, gate, deadline)
        self._wire = wire
        self._fd = fd
        self._pull = pull
        self._attend = attend
        self._thread = threading.get_ident()
        self._token = trio.lowlevel.current_trio_token()
        self._lock = threading.Lock()
        self._waiting: set[Future[Reply]] = set()
        self._closed = False

    def close(self) -> None:
        """See the base class."""
        with self._lock:
            self._closed = True
            for answer in self._waiting:
                if not answer.done():
                    answer.set_exception(_nobody())
        self._answers.clear()

    def _ask(self, access: _Access) -> Reply:
        answer = access.answer
        if threading.get_ident() == self._thread:
            return self._ask_here(access)
        with self._lock:
            if self._closed:
                raise _nobody()
            self._waiting.add(answer)
        try:
            self._token.run_sync_soon(self._ask_for, access)
            return answer.result(self._deadline)
        except TimeoutError:
            raise _late() from None
        except trio.RunFinishedError:
            raise _nobody() from None
        finally:
            with self._lock:
                self._waiting.discard(answer)

    def _ask_for(self, access: _Access) -> None:
        """In the trio thread, for another one; raises nothing."""
        answer = access.answer
        with self._lock:
            if answer not in self._waiting or answer.done():
                return  # he has given up, or the session is over
        try:
            self._put(self._wire, access)
        except (ClientLeftError, ClientDroppedError):
            answer.set_exception(_nobody())  # and the session finds out by itself
        except Exception as error:
            answer.set_exception(error)
        if self._wire.busy:
            self._attend()

    def _ask_here(self, access: _Access) -> Reply:
        """In the trio thread: nothing else runs there until the answer has come."""
        if self._closed:
            raise _nobody()
        until = time.monotonic() + self._deadline
        try:
            self._put(self._wire, access)
            self._wait(self._wire, self._fd, access.answer.done, self._pull, until)
            return access.answer.result()
        except (ClientLeftError, ClientDroppedError):
            raise _nobody() from None
        finally:
            self._attend()


def _late() -> DeviceError:
    return DeviceError(ETIMEDOUT, "the client does not answer a DMA message in time")


def _nobody() -> DeviceError:
    return DeviceError(ENOTCONN, "there is no client to ask for its memory")
