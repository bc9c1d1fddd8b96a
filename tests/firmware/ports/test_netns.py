import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from firmware.ports import PortError
from firmware.ports._netns import inside
from tests.descriptors import open_fds, settled_fds
from tests.firmware.ports.unprivileged import without_capabilities
from tests.guest import Network


@pytest.fixture
def network() -> Iterator[Network]:
    with Network() as made:
        yield made


def here() -> str:
    return str(Path("/proc/thread-self/ns/net").readlink())


def test_without_a_namespace_the_callers_own_is_used() -> None:
    assert inside(None, here) == here()


@pytest.mark.root
def test_only_the_action_is_inside(network: Network) -> None:
    before = here()
    assert inside(network.path, here) == network.run_inside(here) != before
    assert here() == before


@pytest.mark.root
def test_sockets_made_inside_stay_inside(network: Network) -> None:
    with inside(network.path, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as made:
        made.bind((network.address, 0))


@pytest.mark.root
def test_what_the_action_raises_reaches_the_caller(network: Network) -> None:
    with pytest.raises(ZeroDivisionError):
        inside(network.path, lambda: 1 // 0)


@pytest.mark.parametrize("mark", ["", "/"])
def test_an_unknown_path_is_refused(tmp_path: Path, mark: str) -> None:
    with pytest.raises(PortError, match="give the path of a namespace, like /proc/PID/ns/net"):
        inside(f"{tmp_path}/nowhere{mark}", here)


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(PortError, match="no network namespace 'nowhere'; make it with `ip netns add`"):
        inside("nowhere", here)


@pytest.mark.root
def test_a_file_that_is_no_namespace_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(PortError, match="is not a network namespace; `ip netns list` shows those there are"):
        inside(str(tmp_path / "file"), here)


@pytest.mark.root
def test_entering_needs_the_permission(network: Network) -> None:
    with pytest.raises(PortError, match="cannot be entered: no permission; run as root"):
        without_capabilities(lambda: inside(network.path, here))


def test_no_descriptor_is_left_behind(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    before = settled_fds()
    with pytest.raises(PortError, match="network namespace"):
        inside(str(tmp_path / "file"), here)
    assert open_fds() == before
