"""The stream port, and the card before it, with peers of other people's making: passt and QEMU."""

from __future__ import annotations

import os
import shutil
import socket
import struct
import subprocess
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from pathlib import Path

import pytest
import trio

from firmware import Nic
from firmware.ports import open_port, quote
from tests.firmware.driver import CONFIG_VECTOR, Driver, driver_of
from tests.guest import Network, RigError, Root, guest_root

GUEST = bytes.fromhex("020000000001")
PEER_TIMEOUT = 30  # seconds; a peer answers within milliseconds, on a busy machine too
GUEST_ADDRESS, GATEWAY = socket.inet_aton("10.77.0.5"), socket.inet_aton("10.77.0.254")


@contextmanager
def program(command: Sequence[str], **options: object) -> Iterator[subprocess.Popen[bytes]]:
    """A program that ends with the block."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, **options)  # type: ignore[call-overload]
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@asynccontextmanager
async def card(spec: str) -> AsyncIterator[Driver]:
    """The driver of a card that runs on a port."""
    with driver_of(Nic(open_port(spec), mac=GUEST)) as driver:
        driver.start()
        with trio.fail_after(PEER_TIMEOUT):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(driver.nic.run)
                yield driver
                nursery.cancel_scope.cancel()


async def link(driver: Driver, up: bool) -> None:
    """Wait until the driver is told that the link is up or down."""
    while driver.link_up != up:
        await driver.interrupted(CONFIG_VECTOR)


async def answer(driver: Driver, wanted: Callable[[bytes], bool]) -> bytes:
    while not wanted(frame := await driver.receive()):
        pass
    return frame


# --- passt


def passt(network: Network, path: Path) -> list[str]:
    """It gives the guest an address, and stands for the namespace's own host where the gateway would be."""
    options = ["--foreground", "--quiet", "--ipv4-only", "--socket", str(path), "--interface", network.tap]
    options += ["--address", "10.77.0.5", "--netmask", "24", "--gateway", "10.77.0.254"]
    return [*network.prefix, "passt", *options]


def who_has(address: bytes) -> bytes:
    return bytes(6 * [255]) + GUEST + b"\x08\x06" + arp(1, GUEST, GUEST_ADDRESS, bytes(6), address)


def arp(operation: int, *addresses: bytes) -> bytes:
    return struct.pack("!HHBBH", 1, 0x0800, 6, 4, operation) + b"".join(addresses)


def checksum(data: bytes) -> int:
    words: tuple[int, ...] = struct.unpack(f"!{len(data) // 2}H", data)
    return ~(sum(words) % 0xFFFF) & 0xFFFF


def datagram(target: bytes, port: int, payload: bytes) -> bytes:
    """UDP from the guest's port 4444 by way of the gateway; its checksum is left out, as IPv4 permits."""
    total = 20 + 8 + len(payload)
    head = struct.pack("!BBHHHBBH", 0x45, 0, total, 0, 0, 64, 17, 0) + GUEST_ADDRESS + GATEWAY
    head = head[:10] + struct.pack("!H", checksum(head)) + head[12:]
    udp = struct.pack("!HHHH", 4444, port, 8 + len(payload), 0)
    return target + GUEST + b"\x08\x00" + head + udp + payload


def is_arp_answer(frame: bytes) -> bool:
    return frame[12:14] == b"\x08\x06" and frame[20:22] == b"\0\2" and frame[28:32] == GATEWAY


def is_datagram(frame: bytes) -> bool:
    return frame[12:14] == b"\x08\x00" and frame[23] == 17


@pytest.fixture
def passt_socket(demand: Callable[[bool, str], None]) -> Iterator[Path]:
    demand(shutil.which("passt") is not None, "passt is not installed; apt-get install passt")
    # As root passt becomes nobody, who must be able to make the socket.
    with tempfile.TemporaryDirectory(prefix="trionic-") as folder:
        Path(folder).chmod(0o777)
        yield Path(folder, "passt.sock")


@pytest.mark.root
async def test_through_passt_the_card_reaches_a_socket_of_the_host_and_back(passt_socket: Path) -> None:
    with ExitStack() as held:
        network = held.enter_context(Network())
        service = network.run_inside(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        held.enter_context(service)
        service.bind(("127.0.0.1", 0))
        async with card(f"stream:path={quote(str(passt_socket))},reconnect=0.05") as driver:
            assert not driver.link_up
            for greeting in (b"hello", b"hello again"):  # and again after passt has gone and come back
                with program(passt(network, passt_socket), stderr=subprocess.DEVNULL):
                    await link(driver, up=True)
                    driver.send(who_has(GATEWAY))
                    gateway = (await answer(driver, is_arp_answer))[22:28]
                    driver.send(datagram(gateway, service.getsockname()[1], greeting))
                    await trio.lowlevel.wait_readable(service)
                    received, sender = service.recvfrom(2000)
                    assert received == greeting
                    service.sendto(received.upper(), sender)
                    frame = await answer(driver, is_datagram)
                    assert frame[:6] == GUEST
                    assert frame[42:] == greeting.upper()
                await link(driver, up=False)


# --- QEMU


@pytest.fixture
def rig(demand: Callable[[bool, str], None]) -> Root:
    try:
        return guest_root()
    except RigError as missing:
        demand(False, str(missing))
        raise


class World:
    """QEMU without a machine: a hub of its stream netdev and its datagram netdev, whose peer is the test.

    A Unix datagram is a frame, so nothing here knows how a stream holds them apart but QEMU and the card.
    """

    def __init__(self, rig: Root, folder: Path, stream: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(os.fspath(folder / "world.sock"))
        self._hub = folder / "hub.sock"
        datagrams = f"local.type=unix,local.path={self._hub}"
        datagrams += f",remote.type=unix,remote.path={folder / 'world.sock'}"
        self.command = [
            *rig.qemu(),
            *("-nodefaults", "-display", "none", "-machine", "none"),
            *("-netdev", f"stream,id=card,addr.type=unix,addr.path={folder / 'card.sock'},{stream}"),
            *("-netdev", "hubport,id=port0,hubid=0,netdev=card"),
            *("-netdev", f"dgram,id=world,{datagrams}"),
            *("-netdev", "hubport,id=port1,hubid=0,netdev=world"),
        ]

    def send(self, frame: bytes) -> None:
        self.socket.sendto(frame, os.fspath(self._hub))

    def forget_hub(self) -> None:
        """Make room for the next QEMU: a killed one leaves its socket behind."""
        self._hub.unlink()

    async def receive(self) -> bytes:
        await trio.lowlevel.wait_readable(self.socket)
        return self.socket.recv(70000)


@pytest.mark.guest
@pytest.mark.timeout(600)  # the first use of the rig downloads it
@pytest.mark.parametrize(
    ("port", "stream"),
    [("path={},reconnect=0.05", "server=on"), ("listen={}", "server=off,reconnect-ms=50")],
    ids=["QEMU listens", "QEMU connects"],
)
async def test_qemus_stream_netdev_gets_every_frame_and_its_are_all_received(
    rig: Root, tmp_path: Path, port: str, stream: str
) -> None:
    # From the shortest to the longest that one receive buffer of the driver's holds.
    frames = [
        GUEST + bytes([n]) * 6 + b"\x88\xb5" + bytes([n]) * size for n, size in enumerate((0, 46, 1500))
    ]
    world = World(rig, tmp_path, stream)
    with world.socket:
        async with card("stream:" + port.format(quote(str(tmp_path / "card.sock")))) as driver:
            for _ in range(2):  # and again after QEMU has gone and come back
                with program(world.command, env={**os.environ, **rig.environment}):
                    await link(driver, up=True)
                    for frame in frames:
                        driver.send(frame)
                        assert await world.receive() == frame
                    for frame in frames:
                        world.send(frame)
                        assert await driver.receive() == frame
                await link(driver, up=False)
                world.forget_hub()
