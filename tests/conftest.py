"""What a test demands of the host by a marker, and what becomes of one whose demand this host cannot meet.

It is skipped and says why. With ``CI=true`` in the environment it fails instead, so that a green run there
means that every test ran; the guests' own fixtures in tests/guest keep the same rule.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from functools import cache
from typing import NoReturn

import pytest
import trio
from hypothesis import HealthCheck, settings

from client import ClientError
from client.kvm import open_machine, vm
from tests.peers.cache import PeerError
from tests.peers.engines import why_left_out
from tests.peers.libvfio_user import LibvfioUser, libvfio_user_under_test

# A property does not fail because the machine is busy.
settings.register_profile("unhurried", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("unhurried")


# A shell without job control starts what is in its background deaf to Ctrl-C, and children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


def cannot(reason: str) -> NoReturn:
    """End the running test: it is skipped, or with ``CI=true`` it fails."""
    if os.environ.get("CI", "").lower() == "true":
        pytest.fail(f"with CI=true no test is skipped, yet: {reason}", pytrace=False)
    pytest.skip(reason)


def _unopenable(device: str) -> str | None:
    try:
        os.close(os.open(device, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return f"{device} cannot be opened: {error.strerror}"
    return None


def _missing_root() -> str | None:
    if os.geteuid() != 0:
        return "it makes TAP devices and network namespaces, which needs root"
    if error := _unopenable("/dev/net/tun"):
        return f"{error}; `modprobe tun`, or pass it to this container"
    return None


def _missing_kvm() -> str | None:
    if error := _unopenable("/dev/kvm"):
        return error
    # A device that opens may still run no ordinary kernel; the rig found out by booting one, and remembers.
    from tests.guest import RigError, guest_root
    from tests.guest._machine import accelerator

    try:
        accel = trio.run(accelerator, guest_root())
    except RigError as error_of_rig:
        return str(error_of_rig)
    return None if accel == "kvm" else "/dev/kvm is there, but no guest comes up with it on this host"


@cache
def _missing_vcpu() -> str | None:
    if error := _unopenable(vm.DEVICE):
        return error

    async def start_a_guest() -> None:
        with trio.fail_after(_GUEST_STARTS), vm.Vm() as machine:
            async with open_machine(machine):
                pass

    try:
        trio.run(start_a_guest)
    except ClientError as refusal:
        return f"{vm.DEVICE} is there, but runs not even code in real mode: {refusal}"
    except trio.TooSlowError:
        return f"{vm.DEVICE} is there, but code in real mode does nothing in {_GUEST_STARTS} seconds"
    return None


_GUEST_STARTS = 10  # seconds for a few hundred instructions

# What each marker demands: None, or a line that says what is missing.
_DEMANDS: dict[str, Callable[[], str | None]] = {
    "root": _missing_root,
    "kvm": _missing_kvm,
    "vcpu": _missing_vcpu,
}


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker, missing in _DEMANDS.items():
        if item.get_closest_marker(marker) and (reason := missing()):
            cannot(reason)


@pytest.fixture
def demand() -> Callable[[bool, str], None]:
    """``demand(condition, reason)``: end the test as a marker would when the host lacks something else."""

    def check(met: bool, reason: str) -> None:
        if not met:
            cannot(reason)

    return check


@pytest.fixture(scope="session")
def libvfio_user() -> LibvfioUser:
    """The libvfio-user that is tested; building it needs Debian's archive once."""
    try:
        return libvfio_user_under_test()
    except PeerError as error:
        cannot(f"libvfio-user cannot be had here: {error}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what libvfio-user cannot do, by the name of the limit."""
    left_out = {item: reason for item in items if (reason := why_left_out(item))}
    if left_out:
        config.hook.pytest_deselected(items=list(left_out))
        items[:] = [item for item in items if item not in left_out]
        config.stash[_LEFT_OUT] = [f"{reason}: {item.nodeid}" for item, reason in left_out.items()]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if lines := config.stash.get(_LEFT_OUT, []):
        terminalreporter.section("left out: limits of libvfio-user")
        for line in lines:
            terminalreporter.line(line)


_LEFT_OUT = pytest.StashKey[list[str]]()
