import ctypes
import json
import os
import shlex
import signal
import socket
import stat
from pathlib import Path

import pytest
import trio

import client
from client.virtio import Wiring, open_net
from client.virtio.features import PLAIN, Feature
from tests.server.raw import CONFIG, EVENTFD, REQ, SET_IRQS, TRIGGER, RawClient, connect, irqs
from tests.trionic.command import PATIENCE_S, refusal, run, serving, start
from trionic.config import derive_mac

PR_CAPBSET_DROP, CAP_NET_ADMIN = 24, 12  # linux/prctl.h, linux/capability.h

OFFLOADS = Feature.CSUM | Feature.GUEST_CSUM | Feature.HOST_TSO4 | Feature.GUEST_TSO4
ALL = PLAIN | OFFLOADS


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "card.sock"


def without_net_admin() -> None:
    """Take from the process to be what it takes to make a TAP, root or not."""
    if os.geteuid() == 0:
        assert ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, CAP_NET_ADMIN, 0, 0, 0) == 0


# --- serving


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_cleanly(path: Path, number: int) -> None:
    with serving("--socket", path) as served:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        status, errors = served.end(number)
    assert (status, errors) == (0, "")
    assert not path.exists()


def test_a_signal_ends_it_cleanly_with_a_client_connected(path: Path) -> None:
    with serving("--socket", path, "--log-level", "warning") as served, socket.socket(socket.AF_UNIX) as peer:
        peer.connect(os.fspath(path))
        assert served.end(signal.SIGTERM) == (0, "")
    assert not path.exists()


def test_a_signal_ends_it_cleanly_while_it_still_loads(path: Path) -> None:
    with start("serve", "--socket", path) as process:
        while not path.is_socket():
            assert process.poll() is None
        process.terminate()
        _, errors = process.communicate()
    assert (process.returncode, errors) == (0, "")
    assert not path.exists()


def test_the_qemu_line_names_socket_and_shared_memory(path: Path) -> None:
    with serving("--socket", path) as served:
        about, line = served.said
    assert about.startswith(f"{path}: loopback, {derive_mac(path).hex(':')};")
    words = shlex.split(line)
    device = json.loads(words[words.index("-device") + 1])
    assert device == {"driver": "vfio-user-pci", "socket": {"path": str(path), "type": "unix"}}
    assert "memory-backend-memfd,id=ram,size=1G,share=on" in words
    assert "q35,memory-backend=ram" in words


def test_a_stale_socket_is_replaced(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(os.fspath(path))
    with serving("--socket", path) as served:
        assert served.end(signal.SIGTERM)[0] == 0


def test_the_conventions_for_backends_are_kept(path: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.sock"
    with serving("--socket-path", path) as served:
        assert path.is_socket()
        assert served.end(signal.SIGTERM) == (0, "")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(os.fspath(other))
        listening.listen()
        with serving("--fd", str(listening.fileno()), "--log-level", "warning", fds=[listening]) as served:
            assert served.said[0].startswith(f"{other}: loopback, {derive_mac(other).hex(':')}")
            with socket.socket(socket.AF_UNIX) as peer:
                peer.connect(os.fspath(other))
            assert served.end(signal.SIGTERM) == (0, "")
        assert other.is_socket(), "whoever made the socket's file removes it"


def test_nothing_is_advised_for_a_socket_without_a_file() -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("")  # the kernel makes up an abstract name (unix(7), autobind)
        listening.listen()
        fd = listening.fileno()
        with serving("--fd", str(fd), "--mac", "02:00:00:00:00:07", fds=[listening]) as served:
            assert served.said == [f"fd{fd}: loopback, 02:00:00:00:00:07"]


async def test_a_card_is_as_the_options_say(path: Path) -> None:
    options = ("--mac", "02:00:00:00:00:07", "--mtu", "9000", "--bar2-size", "64K", "--poll", "10")
    with serving("--socket", path, *options):
        async with client.connect(path) as session, open_net(session) as nic:
            assert nic.mac == bytes.fromhex("020000000007")
            assert nic.mtu == 9000
            assert session.regions[2].size == 64 << 10


async def test_a_card_can_do_without_msix_and_offloads(path: Path) -> None:
    with serving("--socket", path, "--no-msix", "--no-offloads"):
        async with (
            client.connect(path) as session,
            open_net(session, wiring=Wiring.INTX, features=ALL) as nic,
        ):
            assert [session.irqs[index].count for index in (0, 2)] == [1, 0]
            assert not nic.features & OFFLOADS


async def test_a_card_can_take_its_memory_back(path: Path) -> None:
    with serving("--socket", path, "--revocation", "enforced"):
        async with client.connect(path) as session:
            memory = session.regions[2]
            assert (os.fstat(memory.fd).st_size, memory.size) == (0, 16 << 20)
            async with open_net(session):
                assert os.fstat(memory.fd).st_size == 16 << 20
            await session.reset()
            assert os.fstat(memory.fd).st_size == 0


async def test_many_cards_from_options(tmp_path: Path) -> None:
    a, b = tmp_path / "a.sock", tmp_path / "b.sock"
    macs = ("--mac", "02:00:00:00:00:0a", "--mac", "02:00:00:00:00:0b")
    with serving("-s", a, "-s", b, "-p", "loopback", "-p", f"pcap:write={tmp_path}/b.pcap", *macs) as served:
        assert len(served.said) == 4
        for path, last in ((a, 0x0A), (b, 0x0B)):
            async with client.connect(path) as session, open_net(session) as nic:
                assert nic.mac is not None
                assert nic.mac[-1] == last
        assert served.end(signal.SIGTERM)[0] == 0
    assert not a.exists()
    assert not b.exists()


async def test_many_cards_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "cards.toml"
    paths = [tmp_path / f"{number}.sock" for number in range(3)]
    file.write_text("".join(f'[[card]]\nsocket = "{path}"\nmtu = 2000\n' for path in paths))
    with serving("--config", file):
        for path in paths:
            async with client.connect(path) as session, open_net(session) as nic:
                assert nic.mtu == 2000
                assert nic.mac == derive_mac(path)


async def requested(path: Path) -> tuple[RawClient, int]:
    """A client, and the eventfd by which it is asked to let go."""
    fd = os.eventfd(0, os.EFD_CLOEXEC)
    host = await connect(path)
    (await host.negotiate()).close()
    await host.do(SET_IRQS, irqs(EVENTFD | TRIGGER, REQ, 0, 1), [fd])
    return host, fd


async def test_it_ends_when_clients_that_were_asked_have_let_go(path: Path) -> None:
    with serving("--socket", path, "--release", "3600") as served:
        host, fd = await requested(path)
        served.process.terminate()
        await trio.lowlevel.wait_readable(fd)
        assert os.eventfd_read(fd) == 1
        await host.read(CONFIG, 0, 4)
        host.close()
        _, errors = served.process.communicate(timeout=PATIENCE_S)
    assert served.process.returncode == 0
    assert "ending within 3600 s; another signal ends at once" in errors
    assert "card.sock: client asked to let go" in errors
    os.close(fd)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_second_signal_ends_it_at_once(path: Path, number: int) -> None:
    with serving("--socket", path, "--release", "3600") as served:
        host, fd = await requested(path)
        served.process.terminate()
        await trio.lowlevel.wait_readable(fd)
        assert served.end(number)[0] == 0
        assert await host.hung_up()
        host.close()
    os.close(fd)


async def test_nobody_is_asked_unless_there_is_time_to_let_go(path: Path) -> None:
    with serving("--socket", path, "--log-level", "warning") as served:
        host, fd = await requested(path)
        assert served.end(signal.SIGTERM) == (0, "")
        assert await host.hung_up()
        host.close()
    os.set_blocking(fd, False)
    with pytest.raises(BlockingIOError):
        os.eventfd_read(fd)
    os.close(fd)


def test_without_clients_nothing_is_waited_for(path: Path) -> None:
    with serving("--socket", path, "--release", "3600") as served:
        assert served.end(signal.SIGTERM)[0] == 0


# --- refusals: one line, what to do, status 2, no traceback


def test_a_missing_folder(tmp_path: Path) -> None:
    said = refusal("serve", "--socket", tmp_path / "no" / "card.sock")
    assert (
        said
        == f"{tmp_path}/no/card.sock: the folder {tmp_path}/no does not exist; make it or choose another path"
    )


def test_a_busy_socket(path: Path) -> None:
    with serving("--socket", path):
        assert "another process listens here; stop it" in refusal("serve", "--socket", path)
        assert path.is_socket()


def test_a_file_in_the_way(path: Path) -> None:
    path.touch()
    assert "exists and is not a socket; remove it" in refusal("serve", "--socket", path)


def test_a_path_too_long(tmp_path: Path) -> None:
    assert "at most 107 bytes" in refusal("serve", "--socket", tmp_path / ("x" * 200))


def test_a_tap_without_permission(path: Path) -> None:
    said = refusal("serve", "--socket", path, "--port", "tap:name=trionic0", setup=without_net_admin)
    assert "trionic0" in said
    assert not path.exists()


@pytest.mark.parametrize(
    ("spec", "word"),
    [("warp:x=1", "warp"), ("tap:", "tap"), ("tap:name=x,colour=red", "colour"), ("stream:", "stream")],
)
def test_a_port_that_does_not_exist(path: Path, spec: str, word: str) -> None:
    assert word in refusal("serve", "--socket", path, "--port", spec)
    assert not path.exists()


def test_a_recording_that_cannot_be_made(path: Path, tmp_path: Path) -> None:
    said = refusal("serve", "--socket", path, "--record", tmp_path)
    assert said == f"cannot record in {tmp_path}: Is a directory"
    assert not path.exists()


def test_a_malformed_file(tmp_path: Path) -> None:
    file = tmp_path / "cards.toml"
    file.write_text("[[card]\n")
    assert refusal("serve", "--config", file).startswith(f"{file}: not TOML: ")


def test_a_missing_file(tmp_path: Path) -> None:
    file = tmp_path / "cards.toml"
    assert (
        refusal("serve", "--config", file)
        == f"{file}: No such file or directory; give the path of a TOML file"
    )


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ((), "no card to serve; give --socket PATH, or --config FILE with [[card]] tables"),
        (("-s", "a", "-s", "a"), "command line: cards 1 and 2 have the same socket a; give each its own"),
        (
            ("-s", "a", "-s", "b", "-r", "x", "-r", "x"),
            "command line: cards 1 and 2 have the same recording x; give each its own",
        ),
        (
            ("-s", "a", "-r", "x", "-r", "y"),
            "--record: 2 given for 1 --socket; give one for each, or none at all",
        ),
        (
            ("-c", "b", "--record", "x"),
            "--config says which cards there are and who serves them; leave out the other options",
        ),
        (
            ("-s", "a", "-s", "b", "-p", "loopback"),
            "--port: 1 given for 2 --socket; give one for each, or none at all",
        ),
        (
            ("-s", "a", "-m", "02:00:00:00:00:01", "-m", "02:00:00:00:00:02"),
            "--mac: 2 given for 1 --socket; give one for each, or none at all",
        ),
        (("-s", "a", "-m", "x"), "--mac: 'x' is no MAC address; write six bytes like 02:00:00:00:00:01"),
        (("-s", "a", "--mtu", "x"), "--mtu: 'x' is no MTU; choose a whole number from 68 to 65535"),
        (("-s", "a", "--mtu", "67"), "--mtu: 67 is no MTU; choose a whole number from 68 to 65535"),
        (
            ("-s", "a", "--bar2-size", "5M"),
            "--bar2-size: '5M' is no BAR size; choose a power of two from 4K to 64G, such as 16M",
        ),
        (
            ("-s", "a", "--poll", "-1"),
            "--poll: '-1' is no time to poll in microseconds; choose a whole number from 0 to 10000",
        ),
        (
            ("-s", "a", "--release", "soon"),
            "--release: 'soon' is no time to let go in seconds; choose a whole number from 0 to 3600",
        ),
        (("-s", "a", "--profile", ""), "--profile: profile '' is none of n3000, c5000x, virtio"),
        (
            ("-s", "a", "--profile", "n3000:vectors=two"),
            "--profile: profile n3000: vectors='two' should be per-queue, shared or one: MSI-X vectors",
        ),
        (
            ("-s", "a", "--fd", "3"),
            "--fd is the socket of the only card; leave out --socket and --config",
        ),
        (("--fd", "99"), "descriptor 99: Bad file descriptor; pass a listening unix socket"),
        (("--fd", "0"), "descriptor 0: Socket operation on non-socket; pass a listening unix socket"),
        (
            ("-c", "b", "--no-msix"),
            "--config says which cards there are and who serves them; leave out the other options",
        ),
        (
            ("-s", "a", "-c", "b"),
            "--config says which cards there are and who serves them; leave out the other options",
        ),
    ],
)
def test_options_that_make_no_sense(options: tuple[str, ...], expected: str) -> None:
    assert refusal("serve", *options) == expected


def test_help_teaches_by_example() -> None:
    done = run("serve", "--help")
    assert done.returncode == 0
    for word in (
        "Examples:",
        "tap:name=tap0",
        "[[card]]",
        "READY=1",
        "--poll",
        "--release",
        "cooperative  ",
        "enforced  ",
        "--record driver.trace",
    ):
        assert word in done.stdout
