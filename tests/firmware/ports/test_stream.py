"""The stream port against peers made of plain sockets; those of other people's making are in test_peers."""

from __future__ import annotations

import logging
import os
import socket
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import trio
import trio.testing

from firmware.ports import Framing, Offload, PortError, open_port, quote
from firmware.ports._listening import MAX_PATH
from firmware.ports.stream import StreamPort
from tests.descriptors import open_fds, settled_fds
from tests.firmware.ports.changes import Changes
from tests.firmware.ports.unprivileged import without_capabilities

FRAME = bytes(range(64))


class World:
    """Sockets and ports that end with the test."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "peer.sock"
        self.held = ExitStack()

    def open(self, options: str) -> StreamPort:
        port = open_port(f"stream:{options}")
        assert isinstance(port, StreamPort)
        self.held.callback(port.close)
        return port

    def connecting(self, more: str = "") -> StreamPort:
        return self.open(f"path={quote(str(self.path))}{more}")

    def listening(self, more: str = "") -> StreamPort:
        return self.open(f"listen={quote(str(self.path))}{more}")

    def refused(self, options: str) -> str:
        with pytest.raises(PortError) as refusal:
            self.open(options)
        text = str(refusal.value)
        assert len(text.splitlines()) == 1
        return text

    def make_socket(self, kind: int = socket.SOCK_STREAM) -> socket.socket:
        return self.held.enter_context(socket.socket(socket.AF_UNIX, kind))

    def peer(self, backlog: int = 5) -> socket.socket:
        """Somebody who listens at `path`."""
        self.path.unlink(missing_ok=True)
        made = self.make_socket()
        made.bind(os.fspath(self.path))
        made.listen(backlog)
        return made

    def accept(self, peer: socket.socket) -> socket.socket:
        peer.settimeout(5)
        return self.held.enter_context(peer.accept()[0])

    def connect(self) -> socket.socket:
        """Somebody who comes to `path`."""
        made = self.make_socket()
        made.connect(os.fspath(self.path))
        return made


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    with made.held:
        yield made


# --- connecting


def test_a_peer_that_listens_is_connected_to_when_the_port_opens(world: World) -> None:
    peer = world.peer()
    port = world.connecting()
    assert port.link_up
    assert not os.get_blocking(port.fd)
    assert not os.get_inheritable(port.fd)
    end = world.accept(peer)
    os.write(port.fd, b"\0\0\0\x40" + FRAME)
    assert end.recv(100) == b"\0\0\0\x40" + FRAME
    end.send(b"\0\0\0\x40" + FRAME)
    assert os.read(port.fd, 100) == b"\0\0\0\x40" + FRAME


def test_it_carries_frames_behind_their_length_and_no_virtio_header(world: World) -> None:
    world.peer()
    port = world.connecting()
    assert (port.kind, port.framing, port.vnet_header_size) == ("stream", Framing.STREAM, 0)
    assert (port.offloads, port.mtu) == (Offload(0), None)
    port.set_offloads(Offload.CSUM | Offload.TSO4)


async def test_a_peer_that_comes_later_is_found(
    world: World, nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    port = world.connecting(",reconnect=60")
    assert (port.link_up, port.fd) == (False, -1)
    changes = Changes(port, nursery)
    await trio.testing.wait_all_tasks_blocked()
    peer = world.peer()
    assert await changes.link() is True
    assert trio.current_time() == pytest.approx(60)
    os.write(port.fd, b"hello")
    assert world.accept(peer).recv(10) == b"hello"


async def test_a_peer_that_has_gone_is_followed_by_the_next(
    world: World, nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    peer = world.peer()
    port = world.connecting(",reconnect=60")
    changes = Changes(port, nursery)
    world.accept(peer).close()
    assert os.read(port.fd, 10) == b""
    port.peer_lost()
    assert await changes.link() is False
    assert await changes.link() is True
    os.write(port.fd, b"again")
    assert world.accept(peer).recv(10) == b"again"


async def test_attempts_keep_their_distance_even_from_a_peer_that_hangs_up_at_once(
    world: World, nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    world.peer(backlog=100)
    port = world.connecting(",reconnect=60")
    changes = Changes(port, nursery)
    moments = []
    for _ in range(4):
        port.peer_lost()
        assert await changes.link() is False
        assert await changes.link() is True
        moments.append(trio.current_time())
    assert moments == pytest.approx([0, 60, 120, 180])


async def test_the_log_complains_once_for_each_reason(
    world: World,
    nursery: trio.Nursery,
    autojump_clock: trio.testing.MockClock,
    caplog: pytest.LogCaptureFixture,
) -> None:
    port = world.connecting(",reconnect=60")
    changes = Changes(port, nursery)
    with caplog.at_level(logging.WARNING, "trionic.port"):
        await trio.sleep(1000)
        (complaint,) = caplog.messages
        assert complaint.startswith("port stream: nobody listens at")
        assert complaint.endswith("; still trying")
        world.peer()
        assert await changes.link() is True
        world.path.unlink()
        port.peer_lost()
        assert await changes.link() is False
        await trio.sleep(1000)
        assert len(caplog.messages) == 2


def test_without_reconnecting_the_peer_must_be_there(world: World) -> None:
    text = world.refused(f"path={world.path},reconnect=no")
    assert text.startswith(f"port stream: nobody listens at '{world.path}'; start the peer")


@pytest.mark.parametrize("mode", ["path", "listen"])
async def test_without_reconnecting_the_port_ends_with_its_peer(world: World, mode: str) -> None:
    if mode == "path":
        world.peer()
        port = world.connecting(",reconnect=no")
    else:
        port = world.listening(",reconnect=no")
        world.connect()
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            changes = Changes(port, nursery)
            if mode == "listen":
                assert await changes.link() is True
            port.peer_lost()
    assert (port.link_up, port.fd) == (False, -1)


def test_a_peer_with_a_full_backlog_holds_nobody_up(world: World) -> None:
    world.peer(backlog=0)
    waiting = world.make_socket()
    waiting.setblocking(False)
    while waiting.connect_ex(os.fspath(world.path)) == 0:
        waiting = world.make_socket()
        waiting.setblocking(False)
    assert not world.connecting().link_up
    text = world.refused(f"path={world.path},reconnect=no")
    assert text == f"port stream: the peer at '{world.path}' is busy with others; end one of them"


def test_what_is_no_socket_is_refused(world: World) -> None:
    world.path.touch()
    assert world.refused(f"path={world.path}") == (
        f"port stream: '{world.path}' is not a socket; choose another path"
    )


def test_a_socket_of_another_kind_is_refused(world: World) -> None:
    packets = world.make_socket(socket.SOCK_SEQPACKET)
    packets.bind(os.fspath(world.path))
    packets.listen()
    assert "is not a stream socket" in world.refused(f"path={world.path}")


@pytest.mark.root
def test_without_permission_it_says_who_has_it(world: World) -> None:
    world.peer()
    world.path.chmod(0)
    text = without_capabilities(lambda: world.refused(f"path={world.path}"))
    assert text == (
        f"port stream: no permission to connect to '{world.path}'; run as its owner, or ask for a chmod"
    )


# --- listening


async def test_a_peer_may_come_to_a_listening_port(world: World, nursery: trio.Nursery) -> None:
    port = world.listening()
    assert (port.link_up, port.fd) == (False, -1)
    changes = Changes(port, nursery)
    end = world.connect()
    assert await changes.link() is True
    assert not os.get_blocking(port.fd)
    assert not os.get_inheritable(port.fd)
    os.write(port.fd, b"hello")
    assert end.recv(10) == b"hello"


async def test_the_next_peer_waits_until_the_one_before_has_gone(world: World, nursery: trio.Nursery) -> None:
    port = world.listening()
    changes = Changes(port, nursery)
    first, second = world.connect(), world.connect()
    assert await changes.link() is True
    await trio.testing.wait_all_tasks_blocked()
    os.write(port.fd, b"first")
    assert first.recv(10) == b"first"
    first.close()
    port.peer_lost()
    assert await changes.link() is False
    assert await changes.link() is True
    os.write(port.fd, b"second")
    assert second.recv(10) == b"second"


async def test_without_a_free_descriptor_it_complains_and_goes_on_waiting(
    world: World,
    nursery: trio.Nursery,
    autojump_clock: trio.testing.MockClock,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    port = world.listening(",reconnect=60")
    accept = socket.socket.accept
    refusals = iter([OSError(24, "Too many open files"), OSError(103, "Software caused connection abort")])

    def refusing(self: socket.socket) -> tuple[socket.socket, object]:
        for refusal in refusals:
            raise refusal
        return accept(self)

    monkeypatch.setattr(socket.socket, "accept", refusing)
    world.connect()
    changes = Changes(port, nursery)
    assert await changes.link() is True
    assert trio.current_time() == pytest.approx(60)
    assert [message for message in caplog.messages if "Too many open files" in message]


def test_the_file_is_the_owners_alone_and_goes_with_the_port(world: World) -> None:
    port = world.listening()
    assert stat.S_IMODE(world.path.stat().st_mode) == 0o600
    port.close()
    assert not world.path.exists()
    port.close()


def test_a_file_that_has_taken_the_place_of_ours_stays(world: World) -> None:
    port = world.listening()
    world.path.unlink()
    world.path.touch()
    port.close()
    assert world.path.exists()


def test_a_file_that_is_gone_already_is_no_mistake(world: World) -> None:
    port = world.listening()
    world.path.unlink()
    port.close()


def test_a_stale_socket_is_replaced(world: World) -> None:
    world.peer().close()
    world.listening()
    world.connect()


def test_a_live_socket_is_refused(world: World) -> None:
    peer = world.peer()
    assert world.refused(f"listen={world.path}").startswith(
        f"port stream: another program listens at '{world.path}'"
    )
    world.accept(peer)
    world.connect()


@pytest.mark.parametrize("kind", [socket.SOCK_DGRAM, socket.SOCK_SEQPACKET])
def test_a_live_socket_of_another_kind_is_refused(world: World, kind: int) -> None:
    other = world.make_socket(kind)
    other.bind(os.fspath(world.path))
    if kind == socket.SOCK_SEQPACKET:
        other.listen()
    assert world.refused(f"listen={world.path}").startswith(
        f"port stream: another program listens at '{world.path}'"
    )


def test_a_file_is_not_replaced(world: World) -> None:
    world.path.write_text("precious")
    assert "exists and is no socket; choose another path" in world.refused(f"listen={world.path}")
    assert world.path.read_text() == "precious"


# --- both


@pytest.mark.parametrize("options", ["", "reconnect=5", "path=a,listen=b"])
def test_it_either_connects_or_listens(world: World, options: str) -> None:
    text = world.refused(options)
    assert text == "port stream needs either path=SOCKET, to connect, or listen=SOCKET, to be connected to"


@pytest.mark.parametrize("mode", ["path", "listen"])
def test_a_path_without_a_folder_is_refused(world: World, mode: str) -> None:
    assert "there is no folder for" in world.refused(f"{mode}={world.path.parent}/missing/peer.sock")


@pytest.mark.parametrize("mode", ["path", "listen"])
def test_a_path_that_no_socket_can_have_is_refused(world: World, mode: str) -> None:
    text = world.refused(f"{mode}={world.path.parent / ('x' * MAX_PATH)}")
    assert f"is too long; the path of a socket has at most {MAX_PATH} bytes" in text


def test_the_longest_path_is_taken(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world.path.parent)
    port = world.open("listen=" + "x" * MAX_PATH)
    port.close()


@pytest.mark.parametrize("mode", ["path", "listen"])
async def test_a_lost_descriptor_is_closed_only_after_everybody_was_told(world: World, mode: str) -> None:
    if mode == "path":
        world.peer()
        port = world.connecting()
    else:
        port = world.listening()
        world.connect()
        async with trio.open_nursery() as nursery:
            assert await Changes(port, nursery).link() is True
            nursery.cancel_scope.cancel()
    lost = port.fd
    seen: list[tuple[int, bool, bool]] = []
    port.on_change = lambda: seen.append((port.fd, port.link_up, stat.S_ISSOCK(os.fstat(lost).st_mode)))
    port.peer_lost()
    port.peer_lost()
    assert seen == [(-1, False, True)]
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(lost)


def refuse_all_of(world: World) -> list[Callable[[], object]]:
    return [
        lambda: world.refused(f"path={world.path},reconnect=no"),
        lambda: world.refused(f"listen={world.path.parent}"),
        lambda: world.connecting().close(),
        lambda: world.listening().close(),
    ]


@pytest.mark.parametrize("attempt", range(4))
def test_no_descriptor_is_left_behind(world: World, attempt: int) -> None:
    before = settled_fds()
    refuse_all_of(world)[attempt]()
    assert open_fds() == before
