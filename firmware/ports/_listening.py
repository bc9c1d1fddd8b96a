"""A Unix socket that waits for a peer: its file is the owner's alone and replaces none that is in use."""

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

from firmware.ports._port import PortError

__all__ = ["MAX_PATH", "Listening", "check_path"]

MAX_PATH = 107  # sun_path of struct sockaddr_un, less its final zero

_MODE = 0o600  # whoever can connect is on the guest's network
_BACKLOG = 1  # a peer that comes back before its old connection is seen to have ended

# Two programs must not replace one stale file at once, so the folder is locked for the few calls it takes.
# Anybody who may read the folder may lock it; one who does not let go is not waited for.
_LOCK_TRIES, _LOCK_PAUSE_S = 50, 0.01


def check_path(path: str) -> None:
    """Raises PortError for a path that no socket can have."""
    if len(os.fsencode(path)) > MAX_PATH:
        raise PortError(
            f"port stream: {path!r} is too long; the path of a socket has at most {MAX_PATH} bytes"
        )
    if not Path(path).absolute().parent.is_dir():
        raise PortError(f"port stream: there is no folder for {path!r}; make it or choose another path")


class Listening:
    """A non-blocking socket that listens at `path`; raises PortError where none can."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            with _locked(self.path.absolute().parent):
                _clear_stale(self.path)
                os.fchmod(self.socket.fileno(), _MODE)  # the file takes over the unbound socket's mode
                self.socket.bind(path)
                self._identity = _identity(self.path)
                self.socket.listen(_BACKLOG)
        except OSError as error:
            self.socket.close()
            raise PortError(
                f"port stream: cannot listen at {path!r}: {error.strerror}; choose another path"
            ) from None
        except PortError:
            self.socket.close()
            raise

    def close(self) -> None:
        """Stop listening; the file goes, unless another has taken its place."""
        with contextlib.suppress(OSError):
            if self.socket.fileno() >= 0 and _identity(self.path) == self._identity:
                self.path.unlink()
        self.socket.close()


def _identity(path: Path) -> tuple[int, int]:
    status = path.lstat()
    return status.st_dev, status.st_ino


def _clear_stale(path: Path) -> None:
    """Remove a socket file that nobody listens on; raises PortError for anything else that stands there."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise PortError(f"port stream: {str(path)!r} exists and is no socket; choose another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
        except BlockingIOError:
            pass  # its backlog is full: somebody listens
        except OSError as error:
            if error.errno != errno.EPROTOTYPE:  # somebody receives datagrams there
                raise
    raise PortError(f"port stream: another program listens at {str(path)!r}; stop it or choose another path")


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for _ in range(_LOCK_TRIES):
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(_LOCK_PAUSE_S)
        yield
    finally:
        os.close(fd)
