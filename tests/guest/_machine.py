"""A guest: QEMU with the card plugged in, running a script, watched from trio."""

from __future__ import annotations

import os
import socket
import subprocess
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from tests.guest._accel import choose_accelerator
from tests.guest._arch import HOST
from tests.guest._arguments import Card, card_arguments, machine_arguments, serial_arguments, tap_arguments
from tests.guest._channel import Channel, ScriptOutput, Transcript
from tests.guest._errors import GuestError
from tests.guest._initrd import write_initrd
from tests.guest._network import Network
from tests.guest._qmp import Event, Qmp, QmpError
from tests.guest._root import Root, guest_root

Streams = dict[Transcript, trio.SocketStream]

_PANIC = "Kernel panic - not syncing"


@dataclass(frozen=True)
class GuestResult:
    """How a guest ended, and everything it said."""

    status: int | None
    """The script's exit status; None when it did not get to its end."""
    output: str
    """What the script printed, both streams together."""
    console: str
    qemu_stderr: str
    boots: int
    seconds: float
    """From the start of QEMU to its end."""


class Guest:
    """A running guest, made by `boot`."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        qmp: trio.SocketStream,
        channel: trio.SocketStream,
        expected_warnings: Sequence[str] = (),
    ) -> None:
        self.pid = process.pid
        """QEMU's process."""
        self._process = process
        self._started = trio.current_time()
        self._seconds = 0.0
        self._console = Transcript(self._watch_console)
        self._output = ScriptOutput()
        self._stderr = Transcript()
        self._expected_warnings = expected_warnings
        self._channel = Channel(channel, self._output)
        self._qmp = Qmp(qmp, self._on_event)
        self._exited = trio.Event()
        self._panic = trio.Event()
        self._stopped = trio.Event()
        self._killed = False
        self._waited = False
        self._failure: str | None = None
        self._scope = trio.CancelScope()

    # What a test does with a guest.

    async def expect(self, name: str) -> str:
        """Wait for the script's next ``tell NAME ARGS`` and return ARGS; another name is a failure."""
        try:
            told, rest = await self._channel.told.receive()
        except trio.EndOfChannel:
            raise self._failed(
                f"the script ended (status {self._channel.status}) without `tell {name}`"
            ) from None
        if told != name:
            raise self._failed(f"expected `tell {name}` from the script, got `tell {told} {rest}`")
        return rest

    def say(self, line: str = "go") -> None:
        """Give this line to the script's next ``await_host``, whether or not it waits already."""
        self._channel.say(line)

    async def printed(self, words: str) -> str:
        """Wait until the script has printed these words, and return what it printed before them, since the
        last time; a script that ends without them is a failure.
        """
        try:
            return await self._output.until(words)
        except EOFError:
            raise self._failed(f"the script ended without printing {words!r}") from None

    async def qmp(self, command: str, **arguments: Any) -> Any:
        """Run a monitor command: ``await guest.qmp("device_del", id="card0")``; QmpError if it fails."""
        return await self._qmp.execute(command, **arguments)

    async def qmp_event(self, name: str, **data: Any) -> Event:
        """Wait for a monitor event with these values in its data; each event is given once."""
        return await self._qmp.event(name, **data)

    async def monitor(self, command: str) -> str:
        """Run a command of the human monitor, such as ``info pci``, and return what it prints."""
        return str(await self.qmp("human-monitor-command", **{"command-line": command}))

    async def reset(self) -> None:
        """Press the reset button: the guest boots again, its script sees BOOT one higher."""
        self._channel.restarting = True
        await self.qmp("system_reset")

    async def wait(self, *, check: bool = True, clean_stderr: bool = True) -> GuestResult:
        """Wait until the script ended and the guest is off.

        Unless told otherwise, raises `GuestError` when the script's exit status is not 0 and when QEMU
        printed anything unexpected to its stderr: a guest can be content while QEMU reports broken DMA maps
        there.
        """
        await self._exited.wait()
        self._waited = True
        if check and self._channel.status != 0:
            raise self._failed(f"the script's exit status is {self._channel.status}")
        if clean_stderr and not all(
            any(expected in line for expected in self._expected_warnings)
            for line in self.qemu_stderr.splitlines()
        ):
            raise self._failed("QEMU printed to its stderr")
        return self.result

    def give_up_in(self, seconds: float) -> None:
        """Replace the guest's deadline by one that many seconds from now."""
        self._scope.deadline = trio.current_time() + seconds

    def kill(self) -> None:
        """Stop QEMU at once; leaving the guest's block then demands nothing any more."""
        self._killed = True
        self._process.kill()

    @property
    def output(self) -> str:
        """What the script printed so far."""
        return self._output.script_text

    @property
    def console(self) -> str:
        """What the kernel printed so far."""
        return self._console.text

    @property
    def qemu_stderr(self) -> str:
        """What QEMU itself printed so far."""
        return self._stderr.text

    @property
    def boots(self) -> int:
        """How often the guest came up so far."""
        return self._channel.boots

    @property
    def result(self) -> GuestResult:
        """Everything known so far; `wait` gives the final one."""
        seconds = self._seconds or trio.current_time() - self._started
        return GuestResult(
            self._channel.status, self.output, self.console, self.qemu_stderr, self.boots, round(seconds, 3)
        )

    # The watching.

    def _failed(self, reason: str) -> GuestError:
        return GuestError(f"guest: {reason}", self.result)

    def _fail(self, reason: str) -> None:
        """End the guest's block with this reason, unless it already ends with another."""
        if self._failure is None and not self._killed:
            self._failure = reason
            self._scope.cancel()

    def _watch_console(self, tail: str) -> None:
        if _PANIC in tail:
            self._panic.set()

    def _on_event(self, event: Event) -> None:
        if event["event"] == "RESET":
            # One restart can take several resets: the kernel tries one way after the other.
            if not self._channel.restarting:
                self._panic.set()
        elif event["event"] == "STOP":
            self._stopped.set()

    async def _report_panic(self) -> None:
        await self._panic.wait()
        await trio.sleep(0.2)  # the rest of the kernel's report
        panicked = _PANIC in self.console
        self._fail("its kernel panicked" if panicked else "it reset itself without having said so")

    async def _report_stop(self) -> None:
        await self._stopped.wait()
        try:
            status = (await self.qmp("query-status"))["status"]
        except QmpError:
            return
        if status in ("internal-error", "io-error", "guest-panicked"):
            self._fail(f"QEMU stopped it: {status}")

    async def _await_exit(self, readers: list[trio.Event]) -> None:
        pidfd = os.pidfd_open(self._process.pid)
        try:
            await trio.lowlevel.wait_readable(pidfd)
        finally:
            os.close(pidfd)
        code = self._process.wait()
        for reader in readers:
            await reader.wait()
        self._seconds = trio.current_time() - self._started
        if code != 0:
            self._fail(f"QEMU ended with status {code}")
        elif self._channel.status is None:
            self._fail("it went off before its script came to an end")
        self._exited.set()

    async def _run(self, streams: Streams, nursery: trio.Nursery) -> None:
        done = []

        async def read(transcript: Transcript, stream: trio.SocketStream, end: trio.Event) -> None:
            await transcript.fill(stream)
            end.set()

        for transcript, stream in streams.items():
            done.append(trio.Event())
            nursery.start_soon(read, transcript, stream, done[-1])
        channel_end = trio.Event()

        async def talk() -> None:
            await self._channel.run()
            channel_end.set()

        for task in (talk, self._qmp.run, self._report_panic, self._report_stop):
            nursery.start_soon(task)
        nursery.start_soon(self._await_exit, [*done, channel_end])
        try:
            await self._qmp.execute("qmp_capabilities")
        except QmpError:
            await trio.sleep_forever()  # QEMU did not even start: its end, noticed elsewhere, tells more


def _lone_error(group: BaseExceptionGroup[BaseException]) -> BaseException:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


async def accelerator(root: Root) -> str:
    """What accelerates guests here; the first call on a host with /dev/kvm boots one to find out."""
    if root.arch is not HOST:
        return "tcg"

    async def try_kvm() -> object:
        async with boot("exit 0", root=root, accel="kvm", deadline=8) as guest:
            return await guest.wait()

    return await choose_accelerator(try_kvm)


@asynccontextmanager
async def boot(
    script: str,
    sockets: Sequence[Path | str | Card] = (),
    *,
    root: Root | None = None,
    deadline: float = 60,
    smp: int = 1,
    memory: str = "512M",
    shared: bool = True,
    iommu: bool = False,
    accel: str | None = None,
    kernel_args: str = "quiet",
    qemu_args: Sequence[str] = (),
    network: Network | None = None,
    taps: Sequence[str] = (),
    files: Mapping[str, Path] | None = None,
    trees: Sequence[Path] = (),
    expected_warnings: Sequence[str] = (),
) -> AsyncIterator[Guest]:
    """Boot a guest with the cards at `sockets` plugged in and run the shell script `script` in it.

    The script runs under ``set -e`` with the functions of ``image/trionic.sh`` (`tell`, `await_host`,
    `reboot`, `nic`, `bring_up`, `wait_for`) and ``$BOOT``. The block may steer it through the `Guest`; at the
    block's end the guest is waited for, as by `Guest.wait`, unless that was done or the guest was killed.
    When the guest fails on the way (panic, surprising reset, QEMU's death) or `deadline` seconds pass, the
    block is cancelled and `GuestError` raised; any other error of the block gets the guest's words as a note.
    QEMU never outlives the block, nor this process.

    `files` are small files, such as kernel modules, which the guest finds by these names in ``/run/files``.
    `trees` are directories whose content the guest has over its own, links as links: a tree with ``usr/bin``
    and ``usr/lib`` brings programs and their libraries. All of it takes the guest's memory, and for a moment
    of its boot twice. ValueError for a directory in a place where guests have a link, such as ``lib``.
    Without `shared` the guest's memory is QEMU's own: cards get no descriptor of it and have to ask for what
    is there. With `iommu` (of x86-64) there is a virtual IOMMU, and Linux uses it for every card: they reach
    what their drivers map, and nothing else. `taps` are TAP devices that get QEMU's own virtio cards;
    `network` is the namespace that QEMU runs in; `accel` is ``tcg`` or ``kvm`` instead of what was found to
    work here. Lines of QEMU's stderr that contain one of `expected_warnings` are no failure.
    """
    if root is None:
        root = await trio.to_thread.run_sync(guest_root)
    accel = accel or await accelerator(root)
    with ExitStack() as stack:
        near, far = _socket_pairs(stack, 5)
        monitor, channel, console, output, stderr = near
        # It has no name: a killed run leaves nothing of it behind.
        initrd = stack.enter_context(tempfile.TemporaryFile())
        await trio.to_thread.run_sync(write_initrd, initrd, root, trees, script, files or {})
        inherited = [*(end.fileno() for end in far[:4]), initrd.fileno()]
        command = [
            # A killed test run takes its guests with it.
            *("setpriv", "--pdeathsig", "KILL", "--"),
            *(network.prefix if network else []),
            *root.qemu(),
            *machine_arguments(
                root,
                accel=accel,
                smp=smp,
                memory=memory,
                kernel_args=kernel_args,
                shared=shared,
                iommu=iommu,
                initrd=Path(f"/proc/self/fd/{initrd.fileno()}"),
            ),
            *serial_arguments(inherited[:4]),
            *tap_arguments(taps),
            *card_arguments(sockets),
            *qemu_args,
        ]
        # Started from this very thread: the death signal above is tied to the thread that starts QEMU.
        process = subprocess.Popen(  # noqa: ASYNC220
            command,
            env=os.environ | root.environment,
            stdin=subprocess.DEVNULL,
            stdout=far[4].fileno(),
            stderr=far[4].fileno(),
            pass_fds=inherited,
        )
        stack.callback(_end, process)
        for end in far:
            end.close()
        guest = Guest(process, monitor, channel, expected_warnings)
        streams: Streams = {guest._console: console, guest._output: output, guest._stderr: stderr}
        async with _watched(guest, streams, deadline):
            yield guest


def _socket_pairs(stack: ExitStack, count: int) -> tuple[list[trio.SocketStream], list[socket.socket]]:
    """Connected sockets, our ends for trio and the others for QEMU; `stack` closes both."""
    near, far = [], []
    for _ in range(count):
        ours, theirs = socket.socketpair()
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(ours))
        stack.callback(stream.socket.close)
        stack.callback(theirs.close)
        near.append(stream)
        far.append(theirs)
    return near, far


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


@asynccontextmanager
async def _watched(guest: Guest, streams: Streams, deadline: float) -> AsyncIterator[None]:
    """Watch over the block: cancel it when the guest fails, and turn its end into the right error."""
    guest.give_up_in(deadline)
    error: BaseException | None = None
    try:
        with guest._scope:
            async with trio.open_nursery() as nursery:
                await guest._run(streams, nursery)
                yield
                if not guest._killed and not guest._waited:
                    await guest.wait()
                nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        error = _lone_error(group)
        if isinstance(error, trio.Cancelled):
            raise  # somebody outside cancels us
    if guest._failure is None and guest._scope.cancelled_caught:
        guest._failure = f"its deadline passed, {guest.result.seconds:.1f} s after its start"
    if isinstance(error, GuestError):
        raise error
    if guest._failure is not None:
        raise guest._failed(guest._failure) from error
    if error is not None:
        error.add_note(str(guest._failed("what the guest had said by then:")))
        raise error
