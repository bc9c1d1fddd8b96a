"""One client's stay on a card: the bytes of its socket to the PCI function and back.

The loop drains: it takes from the socket without waiting, answers, sends each reply whole, and takes again;
only when nothing is there does it sleep. Register accesses and DMA windows stay within `_drain`, where that
costs least; the rest is done here. Guarantees:

- Requests are handled in the order in which they came, each before the next one is looked at.
- What takes memory away that somebody holds is answered when it is free (see `_unpinning`).
- No descriptor that a client sent outlives the handling of its message, unless the device made its own
  copy.
- While something waits to be sent nothing more is read, so a client that does not read its replies is held
  by its own requests, and dropped after a while.
- A handler that reads the client's memory by message before it answers sees only the answer to that; what
  the client asks for meanwhile is kept, up to a limit, and handled afterwards (see `_remote`).
- A mistake in this program that ends the stay is told first, by the ERR interrupt.
- However the stay ends, the function is reset with `ResetKind.LOST_CLIENT` if the client had come to terms.
  The specification would have the device's state kept for a client that comes back; but nobody can tell
  whether the next client is the same one, and a stranger must not find what another guest left behind.
"""

from __future__ import annotations

import errno
import logging
import socket
from collections import deque
from collections.abc import Sequence
from functools import partial

import trio

from device.dma import PinnedError
from device.errors import DeviceError
from device.function import PciFunction, ResetKind
from protocol import Broken, Connection, Event, Negotiated, Refused, Request, Role, command_name
from protocol.limits import (
    KEPT_DESCRIPTOR,
    KEPT_REQUEST,
    MAX_DMA_MAPS,
    MAX_KEPT,
    Limits,
    SessionLimits,
)
from protocol.quirks import Overrides, Quirk
from server._answer import Terms
from server._descriptors import close_all
from server._dma import map_window, unmap_span
from server._drain import Drain, Outcome
from server._remote import Answered, ByMessage, InBandMemory, TwinMemory
from server._resample import Resample
from server._unpinning import tell_balance, unpinned
from server._wire import ClientDroppedError, ClientLeftError, Wire, gone
from server.dispatch import handle

__all__ = ["Session"]

log = logging.getLogger("trionic.server")


class Session:
    """Serves ``function`` to the client at the other end of ``client``, a non-blocking unix stream socket.

    Takes over the socket: it is closed when `run` ends. ``offer`` is what the client is told that this end
    takes; ``quirks`` says what the client has or has not, whatever it looks like.
    """

    def __init__(
        self,
        function: PciFunction,
        client: socket.socket,
        *,
        poll_us: int = 0,
        limits: SessionLimits | None = None,
        offer: Limits | None = None,
        quirks: Overrides | None = None,
    ) -> None:
        self._function = function
        self._socket = client
        self._limits = limits or SessionLimits()
        self._engine = Connection(Role.SERVER, offer or Limits(max_dma_maps=MAX_DMA_MAPS), quirks)
        self._drain = Drain(
            client.fileno(),
            function.region_read,
            function.region_write,
            self._failed,
            dma_map=self._dma_map if self._engine.limits.max_msg_fds else None,
            dma_unmap=partial(unmap_span, function),
            poll_us=poll_us,
        )
        self._wire = Wire(client, self._limits.send_deadline)
        self._events: deque[Event] = deque()
        self._memory: ByMessage | None = None
        self._asleep = False
        self._kept_too_much = False
        self._patience = trio.CancelScope(deadline=trio.current_time() + self._limits.version_deadline)
        self._negotiated = False
        self._terms = Terms(fds=0, windows=0)
        self._tellings_left = self._limits.tellings

    async def run(self) -> None:
        """Serve until the client leaves or is dropped; raises nothing because of what a client does."""
        try:
            with self._patience:
                async with trio.open_nursery() as nursery:
                    self._resample = Resample(self._function, nursery)
                    try:
                        await self._serve()
                    except ClientLeftError:
                        log.info("%s: client left", self._function.name)
                    except ClientDroppedError as reason:
                        log.warning("%s: client dropped: %s", self._function.name, reason)
                    finally:
                        nursery.cancel_scope.cancel()
            if self._patience.cancelled_caught:
                log.warning("%s: client dropped: it does not say VERSION", self._function.name)
        except Exception:
            self._function.report_error()
            raise
        finally:
            self._end()

    def _end(self) -> None:
        if self._memory is not None:
            self._memory.close()
            with self._function.gate:
                self._function.dma.remote = None
        for event in self._events:
            close_all(event.fds)
        close_all(self._drain.take()[1])
        close_all(self._engine.close())
        self._socket.close()
        if self._negotiated:
            self._function.reset(ResetKind.LOST_CLIENT)
            tell_balance(self._function, log.debug)

    async def _serve(self) -> None:
        drain = self._drain
        drain.credit = self._limits.messages_per_turn
        while True:
            if self._wire.busy:
                await self._flush()
            if self._events:
                await self._work_off()
            try:
                outcome = drain.run()
            except OSError as error:
                raise gone(error) from None
            if outcome == Outcome.EMPTY:
                await self._sleep()
                drain.credit = self._limits.messages_per_turn
            elif outcome == Outcome.OTHER:
                self._understand(*drain.take())
            elif outcome == Outcome.BLOCKED:
                self._wire.put(drain.take_unsent())
            elif outcome == Outcome.TURN:
                await trio.lowlevel.checkpoint()
                drain.credit = self._limits.messages_per_turn
            else:
                raise ClientLeftError

    async def _sleep(self) -> None:
        """Until the client says something, or `_attend` finds something to do."""
        if self._wire.busy:
            return  # a worker's message came, and found no room, while others were let run
        self._asleep = True
        try:
            await trio.lowlevel.wait_readable(self._socket)
        except trio.ClosedResourceError:
            pass  # it is not closed; see `_attend`
        finally:
            self._asleep = False

    # --- what the client says

    def _understand(self, data: memoryview, fds: Sequence[int], fds_lost: bool) -> None:
        """Give answers to who waits for them, and put the rest where its turn will come."""
        for event in self._engine.receive(data, fds, fds_lost=fds_lost):
            if isinstance(event, Answered):
                close_all(event.fds)
                if self._memory is not None:
                    self._memory.answered(event)
            else:
                self._events.append(event)
        self._direct()

    def _direct(self) -> None:
        """Let the drain answer whenever nothing is before what it takes. Its refusals are bare headers."""
        engine = self._engine
        self._drain.direct = (
            not self._events
            and engine.ready
            and engine.at_boundary
            and Quirk.PADDED_ERRORS not in engine.quirks
        )

    async def _work_off(self) -> None:
        """Handle what was understood, one after the other."""
        while self._events:
            if self._kept_too_much:
                raise ClientDroppedError("it asks for much and does not answer")
            event = self._events.popleft()
            try:
                await self._answer(event)
            finally:
                close_all(event.fds)
            self._drain.credit -= 1
            if self._drain.credit <= 0:
                await trio.lowlevel.checkpoint()
                self._drain.credit = self._limits.messages_per_turn
        self._direct()

    async def _answer(self, event: Event) -> None:
        match event:
            case Request():
                await self._send(*await self._handle(event))
            case Refused():
                self._tell("%s: %s", self._function.name, event.reason)
                await self._send(self._engine.error(event, event.errno))
            case Negotiated():
                await self._agree(event)
            case Broken():
                if event.farewell:
                    self._wire.put(event.farewell)
                raise ClientDroppedError(event.error)
            case _:
                pass  # nothing is posted by a server, so there are no strays

    def _dma_map(self, flags: int, offset: int, address: int, length: int, fd: int | None) -> None:
        map_window(self._function, self._terms, flags, offset, address, length, fd)

    async def _handle(self, request: Request) -> tuple[bytes, Sequence[int]]:
        try:
            try:
                answer = handle(self._function, request, self._terms)
            except PinnedError as held:
                tell = partial(self._tell, "%s: %s %s", self._function.name, request.command.name)
                async with unpinned(self._function, held, self._socket, self._limits.unpin_deadline, tell):
                    answer = handle(self._function, request, self._terms)
            self._resample.follow(request)
        except ClientLeftError:
            raise
        except Exception as error:
            return self._engine.error(request, self._failed(request.command, error)), ()
        return self._engine.reply(request, answer.body, answer.data, answer.fds), answer.fds

    async def _send(self, message: bytes, fds: Sequence[int] = ()) -> None:
        """Send the whole message, b"" for none."""
        if message:
            self._wire.put(message, fds)
        if self._wire.busy:
            await self._flush()

    async def _flush(self) -> None:
        await self._wire.flush()
        self._drain.held = False

    # --- the client's memory

    def _pull(self) -> bool:
        """Within a handler: take in what has come. Requests are kept."""
        if self._engine.closed or self._kept_too_much:
            raise ClientDroppedError
        self._drain.direct = False
        self._drain.credit = 1
        before = len(self._events)
        try:
            outcome = self._drain.run()
        except OSError as error:
            raise gone(error) from None
        if outcome == Outcome.GONE:
            raise ClientLeftError
        if outcome == Outcome.OTHER:
            self._understand(*self._drain.take())
            if len(self._events) > before:
                self._kept_too_much = sum(map(_cost, self._events)) > MAX_KEPT
        return outcome == Outcome.OTHER

    def _attend(self) -> None:
        """Something was put aside, to be sent or to be handled: see to it before anything else is done."""
        self._drain.held = self._wire.busy
        self._drain.credit = 0
        self._direct()
        if self._asleep and (self._wire.busy or self._events):
            trio.lowlevel.notify_closing(self._socket)

    async def _agree(self, event: Negotiated) -> None:
        """The client has come to terms: answer it, and let the device reach its memory from then on."""
        self._negotiated = True
        self._patience.deadline = float("inf")
        engine, peer = self._engine, event.peer
        windows = engine.limits.max_dma_maps
        if Quirk.UNCOUNTED_WINDOWS not in engine.quirks:
            windows = min(windows, peer.max_dma_maps)
        self._terms = Terms(peer.max_msg_fds, windows)
        if event.twin:
            await self._share_twin(event.reply)
        else:
            await self._send(event.reply)
            self._memory = InBandMemory(
                engine,
                self._function.gate,
                self._limits.dma_deadline,
                wire=self._wire,
                fd=self._socket.fileno(),
                pull=self._pull,
                attend=self._attend,
            )
        most = min(engine.max_read, engine.max_write)
        if self._memory is not None and most > 0:
            with self._function.gate:
                self._function.dma.remote_limit = most
                self._function.dma.remote = self._memory

    async def _share_twin(self, reply: bytes) -> None:
        """Answer with one end of a new socket pair."""
        try:
            ours, theirs = socket.socketpair()
        except OSError as error:
            raise ClientDroppedError(f"no second socket for it: {error.strerror}") from None
        with theirs:
            if self._engine.closed:
                ours.close()  # what came along with VERSION ends the session at once
            else:
                gate, deadline = self._function.gate, self._limits.dma_deadline
                self._memory = TwinMemory(self._engine.twin(), gate, ours, deadline)
            await self._send(reply, (theirs.fileno(),))

    def _failed(self, command: int, error: Exception) -> int:
        """The errno that tells the client of ``error``: the device's refusal, or a mistake in its code."""
        if isinstance(error, DeviceError):
            log.debug("%s: %s refused: %s", self._function.name, command_name(command), error)
            return error.errno or errno.EIO
        self._tell("%s: %s failed", self._function.name, command_name(command), error=error)
        return errno.EIO

    def _tell(self, text: str, *args: object, error: Exception | None = None) -> None:
        """Log what a client can bring about as often as it likes, up to a limit."""
        if self._tellings_left > 0:
            self._tellings_left -= 1
            log.warning(text, *args, exc_info=error)
            if self._tellings_left == 0:
                log.warning("%s: no more of this client is told", self._function.name)


def _cost(event: Event) -> int:
    """What it takes to keep the event, in bytes."""
    data = len(event.data) if isinstance(event, Request) else 0
    return KEPT_REQUEST + data + KEPT_DESCRIPTOR * len(event.fds)
