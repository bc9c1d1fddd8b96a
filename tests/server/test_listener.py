import errno
import os
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio

from server.errors import SocketBusyError, SocketPathError
from server.listener import BACKLOG, MAX_PATH_BYTES, Listener
from tests.descriptors import no_fd_leaks


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "card.sock"


@pytest.fixture
def stale(path: Path) -> Path:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dead:
        dead.bind(os.fspath(path))
    return path


@pytest.fixture
def umask_zero() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def connect(path: Path) -> socket.socket:
    client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    client.connect(os.fspath(path))
    return client


async def test_accepts_clients_one_after_another(path: Path) -> None:
    with Listener(path) as listener:
        for _ in range(3):
            with connect(path) as client, await listener.accept() as accepted:
                client.send(b"x")
                assert accepted.recv(1) == b"x"
                assert not accepted.getblocking()
                assert not accepted.get_inheritable()


@pytest.mark.usefixtures("umask_zero")
def test_only_the_owner_may_connect_whatever_the_umask(path: Path) -> None:
    with Listener(path):
        assert stat.S_IMODE(path.lstat().st_mode) == 0o600


def test_leaves_the_umask_alone(path: Path) -> None:
    before = os.umask(0o022)
    try:
        with Listener(path):
            pass
        assert os.umask(0o022) == 0o022
    finally:
        os.umask(before)


def test_replaces_a_stale_socket(stale: Path) -> None:
    with Listener(stale), connect(stale):
        pass


def test_refuses_a_path_where_another_listens_and_leaves_it_working(path: Path) -> None:
    with Listener(path):
        with pytest.raises(SocketBusyError, match="another process listens"):
            Listener(path)
        with connect(path):
            pass


def test_refuses_a_path_whose_listener_has_a_full_backlog(path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as full:
        full.bind(os.fspath(path))
        full.listen(0)
        with connect(path), pytest.raises(SocketBusyError):
            Listener(path)


def test_refuses_a_path_where_another_receives_datagrams(path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.bind(os.fspath(path))
        with pytest.raises(SocketBusyError):
            Listener(path)


@pytest.mark.parametrize("make", [Path.touch, Path.mkdir, lambda path: path.symlink_to("elsewhere")])
def test_refuses_what_is_no_socket_and_keeps_it(path: Path, make: Callable[[Path], object]) -> None:
    make(path)
    with pytest.raises(SocketPathError, match="not a socket"):
        Listener(path)
    assert path.lstat()


def test_refuses_a_path_one_byte_too_long_and_takes_the_longest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with Listener(Path("x" * MAX_PATH_BYTES)):
        pass
    with pytest.raises(SocketPathError, match="at most 107 bytes, this one has 108"):
        Listener(Path("x" * (MAX_PATH_BYTES + 1)))


def test_counts_bytes_of_a_path_not_letters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SocketPathError, match="this one has 108"):
        Listener(Path("é" * 54))


def test_says_that_the_folder_is_missing(tmp_path: Path) -> None:
    with pytest.raises(SocketPathError, match=r"the folder .*/nowhere does not exist"):
        Listener(tmp_path / "nowhere" / "card.sock")


def test_says_that_a_file_stands_where_a_folder_should(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SocketPathError, match=r"/file is not a folder"):
        Listener(tmp_path / "file" / "card.sock")


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.EADDRINUSE, errno.ENOSPC])
def test_tells_every_other_refusal_in_one_line(
    path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(socket.socket, "bind", refuse, raising=False)
    with pytest.raises(SocketPathError) as caught:
        Listener(path)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(path))


def test_removes_its_file_on_close(path: Path) -> None:
    listener = Listener(path)
    listener.close()
    assert not path.exists()
    listener.close()


def test_leaves_a_file_that_took_the_place_of_its_own(path: Path) -> None:
    listener = Listener(path)
    path.unlink()
    path.write_text("theirs")
    listener.close()
    assert path.read_text() == "theirs"


def test_bears_that_its_file_is_gone(path: Path) -> None:
    listener = Listener(path)
    path.unlink()
    listener.close()


def test_keeps_no_descriptor_after_a_refusal(path: Path) -> None:
    path.touch()
    with no_fd_leaks(), pytest.raises(SocketPathError):
        Listener(path)


async def test_a_client_that_hangs_up_before_it_is_accepted_does_no_harm(path: Path) -> None:
    with Listener(path) as listener:
        connect(path).close()
        with await listener.accept() as gone:
            assert gone.recv(1) == b""
        with connect(path), await listener.accept():
            pass


async def test_waits_for_a_descriptor_when_none_is_free(
    path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    refusals = [errno.EMFILE, errno.ENFILE, errno.ECONNABORTED, errno.EAGAIN]
    accept = socket.socket.accept

    def refuse_first(listening: socket.socket) -> tuple[socket.socket, object]:
        if refusals:
            raise OSError(refusals.pop(), "not now")
        return accept(listening)

    monkeypatch.setattr(socket.socket, "accept", refuse_first)
    with Listener(path) as listener, connect(path), await listener.accept():
        assert not refusals


async def test_passes_on_an_error_that_will_not_go_away(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: socket.socket) -> None:
        raise OSError(errno.EINVAL, "not listening")

    monkeypatch.setattr(socket.socket, "accept", refuse)
    with Listener(path) as listener, connect(path), pytest.raises(OSError, match="not listening"):
        await listener.accept()


async def test_others_wait_in_the_backlog(path: Path) -> None:
    with Listener(path) as listener:
        waiting = [connect(path) for _ in range(BACKLOG)]
        for client in waiting:
            (await listener.accept()).close()
            client.close()


# --- sockets that somebody else made


@pytest.fixture
def given(path: Path) -> Iterator[socket.socket]:
    """A socket that listens at ``path``, as a parent process passes it on."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
        listening.bind(os.fspath(path))
        listening.listen()
        yield listening


async def test_an_inherited_socket_accepts_and_its_file_stays(path: Path, given: socket.socket) -> None:
    fd = os.dup(given.fileno())
    with Listener.inherited(fd) as listener:
        assert listener.path == path
        assert not os.get_inheritable(fd)
        with connect(path), await listener.accept() as client:
            assert not client.getblocking()
    connect(path).close()  # somebody still listens there, and the file is there
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.close(fd)


def test_an_inherited_socket_needs_no_file() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as abstract:
        abstract.bind("\0trionic test of an abstract socket")
        abstract.listen()
        fd = os.dup(abstract.fileno())
        with Listener.inherited(fd) as listener:
            assert listener.path == Path(f"fd{fd}")


@pytest.mark.parametrize(
    ("family", "kind", "listens"),
    [
        (socket.AF_UNIX, socket.SOCK_STREAM, False),
        (socket.AF_UNIX, socket.SOCK_DGRAM, False),
        (socket.AF_UNIX, socket.SOCK_SEQPACKET, True),
        (socket.AF_INET, socket.SOCK_STREAM, True),
    ],
)
def test_what_is_no_listening_unix_stream_is_refused_and_stays_open(
    family: int, kind: int, listens: bool
) -> None:
    with socket.socket(family, kind) as other:
        if listens:
            other.bind(("127.0.0.1", 0) if family == socket.AF_INET else "\0trionic test of a packet socket")
            other.listen()
        with pytest.raises(SocketPathError, match=r"not a unix stream socket that listens; call listen\(\)"):
            Listener.inherited(other.fileno())
        os.fstat(other.fileno())


def test_what_is_no_socket_is_refused_and_stays_open(tmp_path: Path) -> None:
    with (tmp_path / "file").open("w") as file:
        with pytest.raises(SocketPathError, match="on non-socket; pass a listening unix socket"):
            Listener.inherited(file.fileno())
        os.fstat(file.fileno())
