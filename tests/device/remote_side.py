"""A client that answers DMA messages: its memory is reached through a thread of its own, as a session's."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager

from device.dma import DmaWindows
from device.dma.remote import Wanted, always
from tests.device.driver_side import GuestMemory

Ask = tuple[str, int, int]  # "read" or "write", address, bytes


PAGE = 4096


def map_by_message(dma: DmaWindows, client: Client, *, every: int = 1) -> None:
    """Show the device the client's memory, each `every`th page of it to be asked for, the others mapped."""
    memory = client.memory
    if every == 1:
        dma.map(memory.iova, memory.size, 3)
    else:
        for at in range(0, memory.size, PAGE):
            dma.map(memory.iova + at, PAGE, 3, None if at // PAGE % every == 0 else memory.fd, at)
    dma.remote = client


class Client:
    """`RemoteMemory` on `memory`: every access is answered by a second thread, after `meanwhile` was called.

    What `meanwhile` raises is the answer. `asked` lists every access.
    """

    def __init__(self, memory: GuestMemory) -> None:
        self.memory = memory
        self.beside: GuestMemory | None = None  # more of it
        self.asked: list[Ask] = []
        self.meanwhile: Callable[[Ask], None] = lambda ask: None
        self.answer: Callable[[bytes], bytes] = lambda data: data
        self._asks: queue.SimpleQueue[tuple[Ask, bytes, Future[bytes]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def read(self, iova: int, length: int, wanted: Wanted = always) -> bytes:
        return self._wait(("read", iova, length), b"")

    def write(self, iova: int, data: bytes, wanted: Wanted = always) -> None:
        self._wait(("write", iova, len(data)), data)

    def close(self) -> None:
        self._asks.put(None)
        self._thread.join()

    def _wait(self, ask: Ask, data: bytes) -> bytes:
        answer: Future[bytes] = Future()
        self._asks.put((ask, data, answer))
        return answer.result()

    def _serve(self) -> None:
        while (item := self._asks.get()) is not None:
            ask, data, answer = item
            self.asked.append(ask)
            try:
                self.meanwhile(ask)
                kind, iova, length = ask
                memory = self.memory
                if self.beside is not None and 0 <= iova - self.beside.iova < self.beside.size:
                    memory = self.beside
                if kind == "write":
                    memory.write(iova, data)
                    answer.set_result(b"")
                else:
                    answer.set_result(self.answer(memory.read(iova, length)))
            except BaseException as error:
                answer.set_exception(error)


@contextmanager
def client_of(memory: GuestMemory) -> Iterator[Client]:
    client = Client(memory)
    try:
        yield client
    finally:
        client.close()
