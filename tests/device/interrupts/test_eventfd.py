"""Eventfds that belong to somebody else."""

import errno
import os
import select
import subprocess
import sys
from collections.abc import Callable
from threading import Thread

import pytest

from device.errors import DeviceError
from device.interrupts._eventfd import borrow, drain, release
from device.interrupts._lines import KERNEL_SIGNALS, signal
from tests.device.interrupts.listener import listeners

FULL = (1 << 64) - 2  # the largest value an eventfd's counter takes; one more write would block


def test_a_borrowed_eventfd_outlives_the_clients_copy() -> None:
    with listeners(1) as (ear,):
        fd = borrow(ear.fd)
        signal(fd)
        assert ear.heard() == 1
        os.close(ear.fd)
        signal(fd)
        assert drain(fd)
        ear.fd = fd


def test_other_files_are_no_eventfds() -> None:
    others = [*os.pipe(), os.memfd_create("no eventfd"), os.open("/", os.O_RDONLY)]
    try:
        for fd in others:
            with pytest.raises(DeviceError) as refusal:
                borrow(fd)
            assert refusal.value.errno == errno.EINVAL
    finally:
        for fd in others:
            os.close(fd)


def test_an_epoll_fd_is_no_eventfd_either() -> None:
    with select.epoll() as epoll, pytest.raises(DeviceError) as refusal:
        borrow(epoll.fileno())
    assert refusal.value.errno == errno.EINVAL


@pytest.mark.parametrize("fd", [-1, 1 << 30])
def test_a_closed_fd_is_ebadf(fd: int) -> None:
    with pytest.raises(DeviceError) as refusal:
        borrow(fd)
    assert refusal.value.errno == errno.EBADF


@pytest.mark.parametrize("flags", [0, os.EFD_NONBLOCK])
def test_signalling_a_full_counter_does_not_block(flags: int, demand: Callable[[bool, str], None]) -> None:
    """Nor is room asked for first, which its owner could take away before it is used."""
    demand(KERNEL_SIGNALS, "this kernel has no asynchronous I/O to signal eventfds with")
    fd = os.eventfd(0, flags | os.EFD_CLOEXEC)
    os.eventfd_write(fd, FULL)
    signal(fd)
    assert os.eventfd_read(fd) == FULL + 1  # what only the kernel can add
    release(fd)


def test_many_signals_from_many_threads_are_all_counted() -> None:
    fd = os.eventfd(0, os.EFD_CLOEXEC)

    def signals() -> None:
        for _ in range(1000):
            signal(fd)

    threads = [Thread(target=signals) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert os.eventfd_read(fd) == 4000
    release(fd)


@pytest.mark.parametrize("flags", [0, os.EFD_NONBLOCK])
def test_draining_never_blocks_and_says_whether_anything_was_there(flags: int) -> None:
    fd = os.eventfd(0, flags | os.EFD_CLOEXEC)
    assert not drain(fd)
    os.eventfd_write(fd, 7)
    assert drain(fd)
    assert not drain(fd)
    release(fd)


FORKED = """
import os
from device.interrupts._lines import signal
fd = os.eventfd(0, os.EFD_NONBLOCK)
signal(fd)
child = os.fork()
for _ in range(300):  # more than the kernel keeps unread
    signal(fd)
if child == 0:
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
signal(fd)
print(os.eventfd_read(fd))
"""


def test_a_forked_process_signals_as_well_and_disturbs_nobody() -> None:
    """Asynchronous I/O is not inherited, though the memory is where it keeps its results."""
    done = subprocess.run([sys.executable, "-c", FORKED], stdout=subprocess.PIPE, check=True)
    assert done.stdout == b"602\n"
