import array
import os
import resource
import socket
from collections.abc import Iterator

import pytest

from protocol.limits import MAX_FDS_PER_MESSAGE
from server._descriptors import close_all, receive

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    near, far = socket.socketpair()
    with near, far:
        yield near, far


def send(sender: socket.socket, fds: list[int]) -> None:
    sender.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])


def test_descriptors_that_came_are_not_inherited_by_programs_that_are_started(pair: Pair) -> None:
    near, far = pair
    send(far, [near.fileno(), far.fileno()])
    data, fds, lost = receive(near, 16)
    try:
        assert (data, len(fds), lost) == (b"x", 2, False)
        assert not any(os.get_inheritable(fd) for fd in fds)
    finally:
        close_all(fds)


def test_as_many_come_as_a_message_can_carry(pair: Pair) -> None:
    near, far = pair
    send(far, [near.fileno()] * MAX_FDS_PER_MESSAGE)
    _, fds, lost = receive(near, 16)
    close_all(fds)
    assert (len(fds), lost) == (MAX_FDS_PER_MESSAGE, False)


def test_what_the_kernel_dropped_is_told(pair: Pair) -> None:
    near, far = pair
    spare = os.dup(near.fileno())
    os.close(spare)  # the lowest number that is free
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    send(far, [near.fileno()])
    resource.setrlimit(resource.RLIMIT_NOFILE, (spare, hard))
    try:
        data, fds, lost = receive(near, 16)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert (data, fds, lost) == (b"x", (), True)
