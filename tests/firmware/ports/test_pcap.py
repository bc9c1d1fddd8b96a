"""The pcap port, with the test in the data path's place at `fd`."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import resource
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio
import trio.testing

from firmware.ports import Framing, Offload, PortError, open_port, quote
from firmware.ports._port import MAX_FRAME
from firmware.ports.pcap import BURST, PcapPort
from tests.descriptors import open_fds, settled_fds
from tests.firmware.ports.changes import Changes
from tests.firmware.ports.test_capture import pcap, section

HEADER = 24  # bytes of a pcap file before its first record


def frame(number: int, size: int = 60) -> bytes:
    return number.to_bytes(4, "big") + bytes(size - 4)


def capture(path: Path, *moments: float, size: int = 60) -> Path:
    """A file of frames that are numbered from 0, at these seconds."""
    path.write_bytes(
        pcap(*((int(when), round(when % 1 * 1e6), frame(n, size)) for n, when in enumerate(moments)))
    )
    return path


def written(path: Path) -> list[bytes]:
    """The frames of a file, read by hand; it must end with a whole one."""
    data = path.read_bytes()
    assert data[:4] == b"\xd4\xc3\xb2\xa1"
    frames, at = [], HEADER
    while at < len(data):
        captured, length = struct.unpack_from("<II", data, at + 8)
        assert captured == length
        assert at + 16 + captured <= len(data)
        frames.append(data[at + 16 : at + 16 + captured])
        at += 16 + captured
    return frames


class Opener:
    """Opens ports, and closes them when the test ends."""

    def __init__(self) -> None:
        self.held = contextlib.ExitStack()

    def __call__(self, options: str = "", **paths: Path) -> PcapPort:
        files = [f"{key}={quote(str(path))}" for key, path in paths.items()]
        port = open_port("pcap:" + ",".join([*files, *filter(None, [options])]))
        assert isinstance(port, PcapPort)
        self.held.callback(port.close)
        return port

    def refused(self, options: str = "", **paths: Path) -> str:
        with pytest.raises(PortError) as refusal:
            self(options, **paths)
        text = str(refusal.value)
        assert len(text.splitlines()) == 1
        return text


@pytest.fixture
def open_pcap() -> Iterator[Opener]:
    opener = Opener()
    with opener.held:
        yield opener


class Card:
    """The card's end of the port."""

    def __init__(self, port: PcapPort) -> None:
        self.fd = port.fd
        self.received: list[int] = []
        self.moments: list[float] = []

    def send(self, *numbers: int, size: int = 60) -> None:
        for number in numbers:
            assert os.write(self.fd, frame(number, size)) == size

    def take(self) -> bool:
        """Receive one frame, if there is one."""
        try:
            got = os.read(self.fd, MAX_FRAME)
        except BlockingIOError:
            return False
        self.received.append(int.from_bytes(got[:4], "big"))
        self.moments.append(trio.current_time())
        return True

    async def receive(self, count: int) -> list[int]:
        """The numbers of the next frames."""
        while len(self.received) < count:
            if not self.take():
                await trio.lowlevel.wait_readable(self.fd)
        return self.received


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """No file can grow beyond `size` bytes: what a full disk is like."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_it_carries_one_frame_at_a_time_without_a_header(open_pcap: Opener, tmp_path: Path) -> None:
    port = open_pcap(write=tmp_path / "out.pcap")
    assert (port.kind, port.framing, port.vnet_header_size) == ("pcap", Framing.PACKETS, 0)
    assert (port.offloads, port.mtu, port.link_up) == (Offload(0), None, True)
    assert not os.get_blocking(port.fd)
    assert not os.get_inheritable(port.fd)


# --- writing


async def test_what_the_card_sends_is_in_the_file_while_the_port_runs(
    open_pcap: Opener, tmp_path: Path, nursery: trio.Nursery
) -> None:
    path = tmp_path / "out.pcap"
    port = open_pcap(write=path)
    nursery.start_soon(port.run)
    Card(port).send(0, 1, 2)
    await trio.testing.wait_all_tasks_blocked()
    assert written(path) == [frame(0), frame(1), frame(2)]


async def test_frames_of_every_size_are_written_whole(
    open_pcap: Opener, tmp_path: Path, nursery: trio.Nursery
) -> None:
    path = tmp_path / "out.pcap"
    port = open_pcap(write=path)
    nursery.start_soon(port.run)
    for size in (14, 1514, 9014, MAX_FRAME):
        Card(port).send(size, size=size)
        await trio.testing.wait_all_tasks_blocked()
    assert [len(frame) for frame in written(path)] == [14, 1514, 9014, MAX_FRAME]


def test_what_waits_when_the_port_closes_is_written(open_pcap: Opener, tmp_path: Path) -> None:
    path = tmp_path / "out.pcap"
    port = open_pcap(write=path)
    Card(port).send(*range(100))
    port.close()
    assert written(path) == [frame(number) for number in range(100)]
    port.close()


async def test_nothing_is_lost_when_the_port_is_cancelled(open_pcap: Opener, tmp_path: Path) -> None:
    path = tmp_path / "out.pcap"
    port = open_pcap(write=path)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(port.run)
        Card(port).send(*range(100))
        nursery.cancel_scope.cancel()
    port.close()
    assert written(path) == [frame(number) for number in range(100)]


async def test_a_card_that_is_faster_than_the_file_waits(
    open_pcap: Opener, tmp_path: Path, nursery: trio.Nursery
) -> None:
    path = tmp_path / "out.pcap"
    port = open_pcap(write=path)
    card = Card(port)
    sent = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            card.send(sent, size=1514)
            sent += 1
    nursery.start_soon(port.run)
    await trio.lowlevel.wait_writable(card.fd)
    card.send(sent, size=1514)
    await trio.testing.wait_all_tasks_blocked()
    assert written(path) == [frame(number, 1514) for number in range(sent + 1)]


class Busy(socket.socket):
    """A socket with always one frame more."""

    count = 0

    def recv(self, size: int, flags: int = 0) -> bytes:
        self.count += 1
        return frame(self.count)


async def test_a_busy_card_leaves_others_their_turn(
    open_pcap: Opener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = open_pcap(write=tmp_path / "out.pcap")
    Card(port).send(0)
    with Busy(fileno=os.dup(port._ours.fileno())) as busy, monkeypatch.context() as patched:
        patched.setattr(port, "_ours", busy)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(port.run)
            for _ in range(10):
                await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()
        assert 0 < busy.count <= 11 * BURST


async def test_without_a_file_to_write_what_the_card_sends_is_dropped(
    open_pcap: Opener, tmp_path: Path, nursery: trio.Nursery
) -> None:
    port = open_pcap(read=capture(tmp_path / "in.pcap"))
    nursery.start_soon(port.run)
    for number in range(2000):
        Card(port).send(number)
        if number % 50 == 0:
            await trio.testing.wait_all_tasks_blocked()
    assert port.link_up


async def test_a_full_disk_pulls_the_cable_and_leaves_a_whole_file(
    open_pcap: Opener, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "out.pcap"
    port = open_pcap(write=path)
    card = Card(port)
    with file_size_limit(HEADER + 100):
        async with trio.open_nursery() as nursery:
            changes = Changes(port, nursery)
            card.send(0)
            await trio.testing.wait_all_tasks_blocked()
            card.send(1)
            assert await changes.link() is False
    assert (port.link_up, port.fd) == (False, -1)
    assert f"port pcap:write={path}: File too large; so the card's link is down" in caplog.messages
    assert written(path) == [frame(0)]
    port.close()
    assert written(path) == [frame(0)]


def test_a_disk_that_is_full_at_the_end_is_reported(
    open_pcap: Opener, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "out.pcap"
    port = open_pcap(write=path)
    Card(port).send(0)
    with file_size_limit(HEADER + 10):
        port.close()
    assert [message for message in caplog.messages if "File too large" in message]
    assert written(path) == []


# --- replaying


async def test_a_file_is_replayed_at_its_own_pace(
    open_pcap: Opener, tmp_path: Path, nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    port = open_pcap(read=capture(tmp_path / "in.pcap", 100, 100.5, 103, 102))
    nursery.start_soon(port.run)
    card = Card(port)
    await card.receive(4)
    assert card.received == [0, 1, 2, 3]
    assert card.moments == pytest.approx([0, 0.5, 3, 3])
    await trio.sleep(1000)
    assert not card.take()
    assert port.link_up


@pytest.mark.parametrize(("speed", "factor"), [("real", 1), ("max", math.inf), ("10", 10), ("0.5", 0.5)])
async def test_the_pace_can_be_chosen(
    open_pcap: Opener,
    tmp_path: Path,
    nursery: trio.Nursery,
    autojump_clock: trio.testing.MockClock,
    speed: str,
    factor: float,
) -> None:
    port = open_pcap(f"speed={speed}", read=capture(tmp_path / "in.pcap", 100, 110, 130))
    nursery.start_soon(port.run)
    card = Card(port)
    await card.receive(3)
    assert card.moments == pytest.approx([0, 10 / factor, 30 / factor])


async def test_a_replay_can_begin_again(
    open_pcap: Opener, tmp_path: Path, nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    port = open_pcap("loop=yes", read=capture(tmp_path / "in.pcap", 100, 110))
    nursery.start_soon(port.run)
    card = Card(port)
    await card.receive(6)
    assert card.received == [0, 1, 0, 1, 0, 1]
    assert card.moments == pytest.approx([0, 10, 10, 20, 20, 30])


async def test_a_loop_over_no_frames_comes_to_an_end(
    open_pcap: Opener, tmp_path: Path, nursery: trio.Nursery
) -> None:
    port = open_pcap("loop=yes,speed=max", read=capture(tmp_path / "in.pcap"))
    nursery.start_soon(port.run)
    await trio.testing.wait_all_tasks_blocked()


@pytest.mark.parametrize("options", ["speed=max", "speed=max,loop=yes"])
async def test_a_card_that_is_slower_than_the_replay_loses_nothing(
    open_pcap: Opener, tmp_path: Path, nursery: trio.Nursery, options: str
) -> None:
    port = open_pcap(options, read=capture(tmp_path / "in.pcap", *range(5000), size=1000))
    nursery.start_soon(port.run)
    card = Card(port)
    await trio.testing.wait_all_tasks_blocked()  # the replay waits for the card now
    assert await card.receive(5000) == list(range(5000))


async def test_a_card_that_was_not_ready_finds_the_pace_kept_from_then_on(
    open_pcap: Opener, tmp_path: Path, nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    moments = [0.0] * 2000 + [10.0]
    port = open_pcap(read=capture(tmp_path / "in.pcap", *moments, size=1000))
    nursery.start_soon(port.run)
    await trio.sleep(1000)
    card = Card(port)
    await card.receive(2001)
    assert card.moments[0] == pytest.approx(1000)
    assert card.moments[-1] == pytest.approx(1010)


async def test_both_writes_what_is_replayed_too(
    open_pcap: Opener, tmp_path: Path, nursery: trio.Nursery
) -> None:
    path = tmp_path / "out.pcap"
    source = capture(tmp_path / "in.pcap", 0, 0, 0)
    port = open_pcap("both=yes,speed=max", read=source, write=path)
    nursery.start_soon(port.run)
    card = Card(port)
    await card.receive(3)
    card.send(7)
    await trio.testing.wait_all_tasks_blocked()
    assert written(path) == [frame(0), frame(1), frame(2), frame(7)]


async def test_otherwise_only_what_the_card_sends_is_written(
    open_pcap: Opener, tmp_path: Path, nursery: trio.Nursery
) -> None:
    path = tmp_path / "out.pcap"
    port = open_pcap("speed=max", read=capture(tmp_path / "in.pcap", 0, 0, 0), write=path)
    nursery.start_soon(port.run)
    card = Card(port)
    await card.receive(3)
    card.send(7)
    await trio.testing.wait_all_tasks_blocked()
    assert written(path) == [frame(7)]


async def test_a_full_disk_ends_the_replay_that_is_written(open_pcap: Opener, tmp_path: Path) -> None:
    path = tmp_path / "out.pcap"
    port = open_pcap("both=yes", read=capture(tmp_path / "in.pcap", 0, 0, 1000), write=path)
    with file_size_limit(HEADER + 100), trio.fail_after(5):
        await port.run()
    assert (port.link_up, port.fd) == (False, -1)
    assert written(path) == [frame(0)]


async def test_a_file_that_is_damaged_later_ends_the_replay_and_not_the_port(
    open_pcap: Opener,
    tmp_path: Path,
    nursery: trio.Nursery,
    autojump_clock: trio.testing.MockClock,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = capture(tmp_path / "in.pcap", *range(1000), size=1000)
    port = open_pcap(read=path)
    nursery.start_soon(port.run)
    card = Card(port)
    await card.receive(1)
    os.truncate(path, HEADER + 50 * (16 + 1000) + 500)
    await trio.sleep(10_000)
    while card.take():
        pass
    assert card.received == list(range(50))
    assert [message for message in caplog.messages if "for the file has changed: it ends within" in message]
    assert port.link_up


async def test_the_log_tells_of_the_end(
    open_pcap: Opener, tmp_path: Path, nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    path = capture(tmp_path / "in.pcap", 0, 0)
    with caplog.at_level(logging.INFO, "trionic.port"):
        port = open_pcap(read=path)
        nursery.start_soon(port.run)
        await trio.testing.wait_all_tasks_blocked()
    assert caplog.messages == [f"port pcap:read={path}: the replay has ended after 2 frames"]


# --- refusals


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("", "port pcap needs write=FILE or read=FILE, or both of them"),
        ("both=yes,write=x", "port pcap: both=yes writes what is read; it needs write=FILE and read=FILE"),
        ("both=yes,read=x", "port pcap: both=yes writes what is read; it needs write=FILE and read=FILE"),
        (
            "loop=yes,write=x",
            "port pcap: speed and loop are about a replay; add read=FILE, or leave them out",
        ),
        (
            "speed=max,write=x",
            "port pcap: speed and loop are about a replay; add read=FILE, or leave them out",
        ),
    ],
)
def test_options_that_do_not_fit_together_are_refused(open_pcap: Opener, options: str, reason: str) -> None:
    assert open_pcap.refused(options) == reason


def test_a_damaged_file_is_refused_before_the_replay(open_pcap: Opener, tmp_path: Path) -> None:
    path = capture(tmp_path / "in.pcap", 0, 0)
    os.truncate(path, path.stat().st_size - 1)
    assert open_pcap.refused(read=path) == (
        f"port pcap: '{path}' cannot be replayed: after 1 frames: it ends within frame 2"
    )


def test_a_pcapng_file_is_taken(open_pcap: Opener, tmp_path: Path) -> None:
    path = tmp_path / "in.pcapng"
    path.write_bytes(section())
    open_pcap(read=path)


def test_a_file_that_is_not_there_is_refused(open_pcap: Opener, tmp_path: Path) -> None:
    text = open_pcap.refused(read=tmp_path / "missing")
    assert text.endswith("missing' cannot be read: No such file or directory; choose another file")


def test_a_folder_that_is_not_there_is_refused(open_pcap: Opener, tmp_path: Path) -> None:
    text = open_pcap.refused(write=tmp_path / "missing" / "out.pcap")
    assert text.endswith("out.pcap' cannot be written: No such file or directory; choose another file")


@pytest.mark.parametrize("key", ["read", "write"])
def test_what_could_block_is_refused(open_pcap: Opener, tmp_path: Path, key: str) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        assert "is not a regular file" in open_pcap.refused(f"{key}={path}")
    finally:
        os.close(reader)


def test_a_folder_is_refused(open_pcap: Opener, tmp_path: Path) -> None:
    assert "is not a regular file" in open_pcap.refused(read=tmp_path)
    assert "cannot be written: Is a directory" in open_pcap.refused(write=tmp_path)


@pytest.mark.parametrize("alias", ["in.pcap", "hard.pcap", "soft.pcap"])
def test_a_file_is_not_overwritten_by_its_own_replay(open_pcap: Opener, tmp_path: Path, alias: str) -> None:
    path = capture(tmp_path / "in.pcap", 0, 0)
    (tmp_path / "hard.pcap").hardlink_to(path)
    (tmp_path / "soft.pcap").symlink_to(path)
    before = path.read_bytes()
    assert "read and write are the same file" in open_pcap.refused(read=path, write=tmp_path / alias)
    assert path.read_bytes() == before


def test_a_full_disk_is_refused(open_pcap: Opener) -> None:
    text = open_pcap.refused(write=Path("/dev/full"))
    assert text == (
        "port pcap: '/dev/full' cannot be written: No space left on device; make room or choose another"
    )


@pytest.mark.parametrize("path", ["a,b.pcap", "a'b\"c.pcap", "a\\b.pcap", "a=b.pcap", "größe ☃.pcap"])
def test_any_name_can_be_quoted(open_pcap: Opener, tmp_path: Path, path: str) -> None:
    open_pcap(write=tmp_path / path).close()
    assert (tmp_path / path).exists()


def attempts(open_pcap: Opener, folder: Path) -> list[Callable[[], object]]:
    good = capture(folder / "good.pcap", 0)
    bad = folder / "bad.pcap"
    bad.write_bytes(b"bad")
    return [
        lambda: open_pcap(read=good, write=folder / "out.pcap").close(),
        lambda: open_pcap.refused(read=bad),
        lambda: open_pcap.refused(read=good, write=folder),
        lambda: open_pcap.refused(read=good, write=good),
        lambda: open_pcap.refused(read=good, write=Path("/dev/full")),
    ]


@pytest.mark.parametrize("number", range(5))
def test_no_descriptor_is_left_behind(open_pcap: Opener, tmp_path: Path, number: int) -> None:
    before = settled_fds()
    attempts(open_pcap, tmp_path)[number]()
    assert open_fds() == before
