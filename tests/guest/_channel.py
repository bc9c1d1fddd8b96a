"""The guest's serial ports as the host sees them: text that accumulates, and the channel of lines with the
script.
"""

from __future__ import annotations

import codecs
import math
import re
from collections import deque
from collections.abc import Callable

import trio

_END = re.compile(r"\nTRIONIC-END-OF-OUTPUT (\d+)\r?\n")


class Transcript:
    """Text that a stream brought so far, readable at any time."""

    def __init__(self, on_text: Callable[[str], None] | None = None) -> None:
        self._parts: list[str] = []
        self._tail = ""
        self._decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode
        self._on_text = on_text

    @property
    def text(self) -> str:
        """Everything so far, with plain line ends."""
        return "".join(self._parts).replace("\r\n", "\n")

    async def fill(self, stream: trio.abc.ReceiveStream) -> None:
        """Read the stream to its end."""
        try:
            async for chunk in stream:
                text = self._decode(chunk)
                self._parts.append(text)
                if self._on_text is not None:
                    # A mark may have come in two pieces; no mark is longer than this.
                    self._tail = self._tail[-100:] + text
                    self._on_text(self._tail)
        except trio.BrokenResourceError:
            return


class ScriptOutput(Transcript):
    """What the script prints, up to the mark that the guest puts behind it."""

    def __init__(self) -> None:
        super().__init__(self._look)
        self.complete = trio.Event()
        self._grown = trio.Event()
        self._given = 0  # of the text, by `until`

    def _look(self, tail: str) -> None:
        if _END.search(tail):
            self.complete.set()
        self._grown.set()
        self._grown = trio.Event()

    async def until(self, words: str) -> str:
        """Wait for the next `words` and give the text before them, behind what was given before.

        Raises EOFError when the script ends without them.
        """
        while (end := self.text.find(words, self._given)) < 0:
            if self.complete.is_set():
                raise EOFError(words)
            await self._grown.wait()
        start, self._given = self._given, end + len(words)
        return self.text[start:end]

    @property
    def script_text(self) -> str:
        """The output without the mark."""
        return _END.sub("", self.text)


class Channel:
    """The line protocol with the guest's script; its other end is ``image/trionic.sh``.

    The host speaks only when asked: bytes sent before the guest opened its port would be lost, also after a
    reboot.
    """

    def __init__(self, stream: trio.SocketStream, output: ScriptOutput) -> None:
        self._stream = stream
        self._output = output
        self._lines: deque[str] = deque()
        self._awaited = False
        self._said = trio.Event()
        self._tell, self.told = trio.open_memory_channel[tuple[str, str]](math.inf)
        self.boots = 0
        """How often the guest came up."""
        self.restarting = False
        """Whether a restart was asked for and is not yet over."""
        self.status: int | None = None
        """The script's exit status, once it has one."""

    def say(self, line: str) -> None:
        """Queue a line; the guest gets it when its script awaits one."""
        if "\n" in line:
            raise ValueError("one line at a time")
        self._lines.append(line)
        self._said.set()

    async def run(self) -> None:
        """Talk until QEMU closes the port."""
        buffer = b""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._answer_awaits)
            try:
                async for chunk in self._stream:
                    *lines, buffer = (buffer + chunk).split(b"\n")
                    for line in lines:
                        await self._take(line.decode("utf-8", errors="replace").strip("\r\0"))
            except trio.BrokenResourceError:
                pass
            nursery.cancel_scope.cancel()
        self._tell.close()

    async def _take(self, line: str) -> None:
        if self.restarting and line.endswith("?boot"):
            line = "?boot"  # the reset may have cut off a line, which stands before it
        kind, (name, _, rest) = line[:1], line[1:].partition(" ")
        if kind == "@":
            self._tell.send_nowait((name, rest))
        elif kind == "?" and name == "boot":
            self.boots += 1
            self._awaited = False
            self.restarting = False
            await self._send(str(self.boots))
        elif kind == "?" and name == "await":
            self._awaited = True
            self._said.set()
        elif kind == "?" and name == "reboot":
            self.restarting = True
            await self._send("go")
        elif kind == "?" and name == "exit":
            await self._output.complete.wait()
            self.status = int(rest)
            self._tell.close()
            await self._send("off")

    async def _answer_awaits(self) -> None:
        while True:
            await self._said.wait()
            self._said = trio.Event()
            if self._awaited and self._lines:
                self._awaited = False
                await self._send(self._lines.popleft())

    async def _send(self, line: str) -> None:
        try:
            await self._stream.send_all(line.encode() + b"\n")
        except trio.BrokenResourceError:
            return
