"""A listening unix socket whose file is ours from the first moment to the last.

Guarantees:

- The file is never open to others than its owner, not even between ``bind`` and a ``chmod``: Linux takes a
  bound socket's file mode from the mode of the unbound socket (``net/unix/af_unix.c``, ``unix_bind_bsd``),
  so the mode is set first and the process's umask, which other threads share, is left alone.
- A socket file that nobody listens on is replaced; one that somebody listens on, or that is no socket, is
  refused.
- Two servers that start at once cannot both replace the same stale file: the folder is locked meanwhile.
- On close the file is removed only if it is still the one made here.

It listens as soon as it is made. Only `accept` needs trio, so that a command can listen first and load the
rest while its client connects.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from server.errors import SocketBusyError, SocketPathError

__all__ = ["BACKLOG", "MAX_PATH_BYTES", "Listener"]

# sun_path of struct sockaddr_un holds 108 bytes with its final NUL (linux/un.h).
MAX_PATH_BYTES: Final = 107

# Clients that may wait while another is served. A card has one client; a second one waits here, which is
# what lets QEMU's device_del and device_add follow each other faster than the old connection's end is
# noticed.
BACKLOG: Final = 4

# Only the owner connects: whoever can connect can read and write what the card can.
_MODE: Final = 0o600

# accept(2) hands over errors of the new connection and asks to be tried again after these.
_ACCEPT_AGAIN: Final = frozenset({errno.ECONNABORTED, errno.EPROTO, errno.EINTR})

# No descriptor is free at the moment: waiting is better than dying, for others may give some back.
_ACCEPT_LATER: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
_ACCEPT_PAUSE_S: Final = 0.1

# Servers hold the folder for the few calls that make a socket; whoever holds it for longer is somebody
# else.
_LOCK_TRIES: Final = 50
_LOCK_PAUSE_S: Final = 0.01


class Listener:
    """A unix socket at ``path`` that accepts one client after another.

    Raises `SocketPathError` (one line, says what to do) where no socket can be made, and `SocketBusyError`
    where somebody listens already. A context manager; closing removes the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._identity: tuple[int, int] | None = None
        if len(os.fsencode(path)) > MAX_PATH_BYTES:
            raise SocketPathError(
                f"{path}: a socket path has at most {MAX_PATH_BYTES} bytes, this one has"
                f" {len(os.fsencode(path))}; choose a shorter one"
            )
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            with _locked_folder(path):
                _clear_stale(path)
                os.fchmod(self._socket.fileno(), _MODE)
                self._socket.bind(os.fspath(path))
                self._identity = _identity(path)
                # Within the lock: between bind and listen the socket looks stale to others.
                self._socket.listen(BACKLOG)
        except SocketPathError:
            self._socket.close()
            raise
        except OSError as error:
            self._socket.close()
            raise SocketPathError(f"{path}: {_advice(path, error)}") from error

    @classmethod
    def inherited(cls, fd: int) -> Self:
        """The listening unix stream socket that this process was started with as ``fd``.

        It is taken over and closed in the end, but its file, which somebody else made, is left alone. `path`
        is where it is bound, or tells the descriptor if it has no name in the file system. Raises
        `SocketPathError` for anything else than such a socket.
        """
        try:
            given = socket.socket(fileno=fd)
        except OSError as error:
            raise SocketPathError(
                f"descriptor {fd}: {os.strerror(error.errno or 0)}; pass a listening unix socket"
            ) from None
        kind = given.family, given.type, given.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        if kind != (socket.AF_UNIX, socket.SOCK_STREAM, 1):
            given.detach()
            raise SocketPathError(
                f"descriptor {fd}: not a unix stream socket that listens; call listen() before passing it on"
            )
        given.setblocking(False)
        given.set_inheritable(False)
        name = given.getsockname()
        listener = cls.__new__(cls)
        listener.path = Path(name) if isinstance(name, str) and name else Path(f"fd{fd}")
        listener._socket, listener._identity = given, None
        return listener

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def accept(self) -> socket.socket:
        """The next client's socket, non-blocking and closed on exec."""
        import trio

        while True:
            await trio.lowlevel.wait_readable(self._socket)
            try:
                client, _ = self._socket.accept()
            except BlockingIOError:
                continue
            except OSError as error:
                if error.errno in _ACCEPT_LATER:
                    await trio.sleep(_ACCEPT_PAUSE_S)
                elif error.errno not in _ACCEPT_AGAIN:
                    raise
                continue
            client.setblocking(False)
            return client

    def close(self) -> None:
        """Stop listening and remove the socket file, unless another has taken its place. Idempotent."""
        if self._socket.fileno() == -1:
            return
        with contextlib.suppress(OSError):
            if self._identity is not None and _identity(self.path) == self._identity:
                self.path.unlink()
        self._socket.close()


def _identity(path: Path) -> tuple[int, int]:
    status = path.lstat()
    return status.st_dev, status.st_ino


@contextlib.contextmanager
def _locked_folder(path: Path) -> Iterator[None]:
    """Hold the folder of ``path`` against other servers, or after `_LOCK_TRIES` go on without."""
    try:
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        yield  # what is wrong with the folder shows at bind, if it matters at all
        return
    try:
        for _ in range(_LOCK_TRIES):
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno != errno.EWOULDBLOCK:
                    break  # a file system without locks
                time.sleep(_LOCK_PAUSE_S)
        yield
    finally:
        os.close(folder)


def _clear_stale(path: Path) -> None:
    """Remove a socket file that nobody listens on; refuse everything else that stands at ``path``."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise SocketPathError(f"{path}: exists and is not a socket; remove it or choose another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
        except FileNotFoundError:
            return
        except BlockingIOError:
            pass  # a full backlog: somebody listens
        except OSError as error:
            if error.errno != errno.EPROTOTYPE:  # EPROTOTYPE: somebody receives datagrams there
                raise
    raise SocketBusyError(
        f"{path}: another process listens here; stop it (see `ss -xlp src {path}`) or choose another path"
    )


def _advice(path: Path, error: OSError) -> str:
    folder = path.parent
    match error.errno:
        case errno.ENOENT:
            return f"the folder {folder} does not exist; make it or choose another path"
        case errno.ENOTDIR:
            return f"{folder} is not a folder; choose another path"
        case errno.EACCES | errno.EPERM:
            return f"no permission to make a socket in {folder}; choose a folder of your own"
        case errno.EROFS:
            return f"{folder} is read-only; choose another path"
        case errno.EADDRINUSE:
            return "something else was made here meanwhile; try again or choose another path"
        case _:
            return f"cannot listen here: {os.strerror(error.errno or 0)}"
