"""TAP devices of the kernel's, each in a network namespace of the test's own."""

from __future__ import annotations

import fcntl
import os
import select
import socket
import struct
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import trio
import trio.testing
from pyroute2 import IPRoute

from firmware import Nic
from firmware.ports import Offload, PortError, open_port
from firmware.ports.tap import TapPort
from tests.descriptors import open_fds, settled_fds
from tests.firmware.driver import CONFIG_VECTOR, driver_of
from tests.firmware.ports.unprivileged import without_capabilities
from tests.guest import Network

root = pytest.mark.root

GUEST = bytes.fromhex("525400000001")
HEADER = struct.Struct("<BBHHHHH")  # struct virtio_net_hdr_v1
NEEDS_CSUM, GSO_NONE, GSO_TCPV4 = 1, 0, 1

TUNSETPERSIST, TUNSETOWNER = 0x400454CB, 0x400454CC
SOL_PACKET, PACKET_VNET_HDR = 263, 15
SIOCGIFFLAGS, IFF_RUNNING = 0x8913, 0x40  # linux/sockios.h, linux/if.h
IFF_UP, IFF_LOWER_UP = 1, 0x10000


@pytest.fixture
def network() -> Iterator[Network]:
    with Network() as made:
        yield made


class Opener:
    """Opens ports in the test's namespace, and closes them at its end."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.ports: list[TapPort] = []

    def __call__(self, options: str) -> TapPort:
        port = open_port(f"tap:{options},netns={self.network.path}")
        assert isinstance(port, TapPort)
        self.ports.append(port)
        return port

    def refused(self, options: str) -> str:
        with pytest.raises(PortError) as refusal:
            self(options)
        text = str(refusal.value)
        assert len(text.splitlines()) == 1
        return text


@pytest.fixture
def tap(network: Network) -> Iterator[Opener]:
    opener = Opener(network)
    yield opener
    for port in opener.ports:
        port.close()


def link(network: Network, name: str) -> dict[str, Any]:
    """What the kernel says of an interface; empty when there is none."""

    def ask() -> dict[str, Any]:
        with IPRoute() as route:
            found = list(route.get_links(ifname=name)) if route.link_lookup(ifname=name) else []
        if not found:
            return {}
        flags, mtu = found[0]["flags"], found[0].get_attr("IFLA_MTU")
        return {"up": bool(flags & IFF_UP), "carrier": bool(flags & IFF_LOWER_UP), "mtu": mtu}

    return network.run_inside(ask)


def change(network: Network, name: str, action: str = "set", **what: Any) -> None:
    def ask() -> None:
        with IPRoute() as route:
            route.link(action, index=route.link_lookup(ifname=name)[0], **what)

    network.run_inside(ask)


def next_frame(port: TapPort, wanted: Callable[[bytes], bool]) -> tuple[tuple[int, ...], bytes]:
    """The next `wanted` frame on the port, behind its header: the kernel sends others of its own."""
    poll = select.poll()
    poll.register(port.fd, select.POLLIN)
    while True:
        assert poll.poll(5000)
        data = os.read(port.fd, 70000)
        if wanted(data[12:]):
            return HEADER.unpack(data[:12]), data[12:]


def udp(port: int) -> Callable[[bytes], bool]:
    def matches(frame: bytes) -> bool:
        return frame[12:14] == b"\x08\x00" and frame[23] == 17 and frame[36:38] == struct.pack("!H", port)

    return matches


def guest_is_known(network: Network) -> None:
    """The namespace need not ask for the guest's address."""

    def tell() -> None:
        with IPRoute() as route:
            index = route.link_lookup(ifname=network.tap)[0]
            neighbour = {"dst": network.guest_address, "lladdr": GUEST.hex(":")}
            route.neigh("replace", ifindex=index, state="permanent", **neighbour)

    network.run_inside(tell)


# --- the device


@root
def test_a_device_that_does_not_exist_is_made_and_brought_up_and_goes_with_the_port(
    network: Network, tap: Opener
) -> None:
    port = tap("name=new0")
    assert link(network, "new0") == {"up": True, "carrier": True, "mtu": 1500}
    assert (port.link_up, port.mtu, port.vnet_header_size) == (True, 1500, 12)
    port.close()
    assert link(network, "new0") == {}


@root
def test_a_numbered_name_gets_the_next_number(network: Network, tap: Opener) -> None:
    assert [tap("name=card%d").name for _ in range(2)] == ["card0", "card1"]
    assert link(network, "card1")["up"]


@root
def test_an_existing_device_is_used_as_it_is_and_stays(network: Network, tap: Opener) -> None:
    change(network, "tap0", state="down", mtu=1400)
    port = tap("name=tap0")
    assert (port.link_up, port.mtu) == (False, 1400)
    port.close()
    assert link(network, "tap0") == {"up": False, "carrier": False, "mtu": 1400}


@root
@pytest.mark.parametrize(("up", "expected"), [("yes", True), ("no", False)])
def test_up_decides_for_a_new_device(network: Network, tap: Opener, up: str, expected: bool) -> None:
    assert tap(f"name=new0,up={up}").link_up is expected
    assert link(network, "new0")["up"] is expected


@root
def test_up_brings_an_existing_device_up(network: Network, tap: Opener) -> None:
    change(network, "tap0", state="down")
    assert tap("name=tap0,up=yes").link_up
    assert link(network, "tap0")["up"]


@root
@pytest.mark.parametrize("mtu", [68, 9000, 65521])
def test_the_mtu_is_set(network: Network, tap: Opener, mtu: int) -> None:
    assert tap(f"name=new0,mtu={mtu}").mtu == mtu
    assert link(network, "new0")["mtu"] == mtu


@root
@pytest.mark.parametrize("address", ["10.9.8.7/20", "fd00:1::7/64"])
def test_the_device_gets_its_address(network: Network, tap: Opener, address: str) -> None:
    tap(f"name=new0,ip={address}")

    def addresses() -> list[str]:
        with IPRoute() as route:
            found = route.get_addr(index=route.link_lookup(ifname="new0")[0])
            return [f"{one.get_attr('IFA_ADDRESS')}/{one['prefixlen']}" for one in found]

    assert address in network.run_inside(addresses)


@root
def test_an_address_that_is_there_already_is_no_mistake(network: Network, tap: Opener) -> None:
    tap(f"name=tap0,ip={network.address}/24")


@root
def test_a_device_prepared_for_a_user_opens_without_privileges(network: Network) -> None:
    def prepare() -> None:
        fd = os.open("/dev/net/tun", os.O_RDWR)
        fcntl.ioctl(fd, 0x400454CA, struct.pack("16sH22x", b"mine0", 0x1002))
        fcntl.ioctl(fd, TUNSETOWNER, os.geteuid())
        fcntl.ioctl(fd, TUNSETPERSIST, 1)
        os.close(fd)

    def use() -> None:
        port = open_port("tap:name=mine0")
        port.set_offloads(Offload.CSUM)
        port.close()
        with pytest.raises(PortError, match="mine0 does not take an MTU of 1400 bytes: no permission"):
            open_port("tap:name=mine0,mtu=1400")
        with pytest.raises(PortError, match="mine0 cannot be brought up: no permission"):
            open_port("tap:name=mine0,up=yes")
        with pytest.raises(PortError, match=r"mine0 does not take the address 10\.1\.1\.1/24: no permission"):
            open_port("tap:name=mine0,ip=10.1.1.1/24")

    network.run_inside(prepare)
    network.run_inside(lambda: without_capabilities(use))


# --- refusals


@pytest.mark.parametrize("name", ["a/b", "a b", "a:b", ".", "..", "%", "%s", "a%d%d", "a%%d"])
def test_what_no_interface_is_called_is_refused(name: str) -> None:
    with pytest.raises(PortError, match=r"is no name of an interface|more than one %d") as refused:
        open_port(f"tap:name={name}")
    assert repr(name) in str(refused.value)


@pytest.mark.parametrize("name", ["sixteen-letters-", "ünïcödë-näme"])
def test_a_name_that_is_too_long_is_refused(name: str) -> None:
    with pytest.raises(PortError, match=f"the name '{name}' is too long; an interface has at most 15 bytes"):
        open_port(f"tap:name={name}")


@pytest.mark.parametrize("mtu", [-1, 0, 67, 65522, 1 << 40])
def test_an_mtu_out_of_range_is_refused(mtu: int) -> None:
    with pytest.raises(PortError, match=f"^port tap: mtu='{mtu}' should be a whole number from 68 to 65521"):
        open_port(f"tap:name=new0,mtu={mtu}")


@root
@pytest.mark.parametrize(
    "address", ["10.0.0.1", "10.0.0/8", "10.0.0.1/33", "10.0.0.1/", "fd00::1/129", "host/24"]
)
def test_what_is_no_address_is_refused(tap: Opener, address: str) -> None:
    text = tap.refused(f"name=new0,ip={address}")
    assert text == f"port tap: ip={address!r} should be an address with its prefix length, like 10.0.0.1/24"


@root
def test_a_device_in_use_is_refused(tap: Opener) -> None:
    tap("name=new0")
    text = tap.refused("name=new0")
    assert text == "port tap: 'new0': another program uses it; stop that one or take another name"


@root
def test_an_interface_that_is_no_tap_is_refused(tap: Opener) -> None:
    text = tap.refused("name=lo")
    assert text == "port tap: 'lo' exists and is not a TAP device; take another name"


@root
def test_without_the_permission_root_is_told_what_to_prepare(network: Network) -> None:
    def attempt() -> str:
        with pytest.raises(PortError) as refused:
            open_port("tap:name=new0")
        return str(refused.value)

    assert network.run_inside(lambda: without_capabilities(attempt)) == (
        "port tap: 'new0': no permission; run as root, or let root prepare it:"
        " ip tuntap add dev new0 mode tap user $USER"
    )


@root
def test_a_port_in_an_unknown_namespace_is_refused() -> None:
    with pytest.raises(PortError, match="there is no network namespace 'nowhere'"):
        open_port("tap:name=new0,netns=nowhere")


@root
def test_a_refusal_leaves_nothing_behind(network: Network, tap: Opener) -> None:
    before = settled_fds()
    tap.refused("name=lo")
    with pytest.raises(PortError, match="does not take the address"):
        tap("name=new0,ip=::/0")
    assert link(network, "new0") == {}
    assert open_fds() == before


# --- frames


@root
def test_what_the_kernel_sends_arrives_behind_a_header(network: Network, tap: Opener) -> None:
    port = tap("name=tap0")
    guest_is_known(network)
    with network.run_inside(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as sender:
        sender.sendto(b"to the guest", (network.guest_address, 4444))
    header, frame = next_frame(port, udp(4444))
    assert header[:2] == (0, GSO_NONE)
    assert (frame[:6], frame[42:]) == (GUEST, b"to the guest")
    assert checksum_is_right(frame)


@root
def test_checksums_may_be_left_to_a_guest_that_computes_them(network: Network, tap: Opener) -> None:
    port = tap("name=tap0")
    port.set_offloads(Offload.CSUM)
    guest_is_known(network)
    with network.run_inside(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as sender:
        sender.sendto(b"to the guest", (network.guest_address, 4444))
    (flags, gso, _, _, start, offset, _), frame = next_frame(port, udp(4444))
    assert (flags, gso, start, offset) == (NEEDS_CSUM, GSO_NONE, 34, 6)
    assert not checksum_is_right(frame)


@root
@pytest.mark.parametrize("needs_csum", [False, True])
def test_what_the_card_sends_reaches_a_socket(network: Network, tap: Opener, needs_csum: bool) -> None:
    port = tap("name=tap0")
    frame = datagram(network, b"to the host", complete=not needs_csum)
    header = HEADER.pack(NEEDS_CSUM, GSO_NONE, 0, 0, 34, 6, 0) if needs_csum else bytes(12)

    def listen() -> socket.socket:
        receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        receiver.bind((network.address, 5555))
        receiver.settimeout(5)
        return receiver

    with network.run_inside(listen) as receiver:
        assert os.write(port.fd, header + frame) == 12 + len(frame)
        assert receiver.recvfrom(2000) == (b"to the host", (network.guest_address, 6666))


@root
def test_a_large_segment_from_the_card_is_taken_whole(network: Network, tap: Opener) -> None:
    port = tap("name=tap0")
    frame = segment(network.address, network.guest_address, 8000)
    header = HEADER.pack(NEEDS_CSUM, GSO_TCPV4, 54, 1448, 34, 16, 0)

    def watch() -> socket.socket:
        watcher = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0800))
        watcher.bind((network.tap, 0x0800))
        watcher.settimeout(5)
        return watcher

    with network.run_inside(watch) as watcher:
        os.write(port.fd, header + frame)
        assert watcher.recv(70000)[54:] == frame[54:]


def wait_running(network: Network) -> None:
    """Until the device takes frames: the kernel learns of a carrier some time after the port has brought it,
    and drops what is sent before.
    """
    deadline = time.monotonic() + 10
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        name = struct.pack("16s24x", network.tap.encode())
        while not struct.unpack_from("<H", fcntl.ioctl(asking, SIOCGIFFLAGS, name), 16)[0] & IFF_RUNNING:
            assert time.monotonic() < deadline
            os.sched_yield()


def received_of_a_large_segment(network: Network, port: TapPort) -> tuple[int, set[int]]:
    """Let the namespace send 8000 bytes of TCP at once: how many frames come, and their segmentation."""
    sent = segment(network.guest_address, network.address, 8000)

    def send() -> None:
        wait_running(network)
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sender:
            sender.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
            sender.bind((network.tap, 0x0800))
            sender.send(struct.pack("<BBHHHH", NEEDS_CSUM, GSO_TCPV4, 54, 1448, 34, 16) + sent)

    network.run_inside(send)
    payload, frames, kinds = b"", 0, set()
    while len(payload) < 8000:
        header, frame = next_frame(port, lambda frame: frame[:6] == GUEST)
        payload += frame[54:]
        frames += 1
        kinds.add(header[1])
        assert header[1] == GSO_TCPV4 or len(frame) <= 1514
    assert payload == sent[54:]
    return frames, kinds


@root
@pytest.mark.parametrize(
    "accepted",
    [
        Offload.CSUM | Offload.TSO4,
        Offload.CSUM | Offload.TSO4 | Offload.TSO6,
        Offload.CSUM | Offload.TSO4 | Offload.TSO6 | Offload.ECN,
    ],
)
def test_large_segments_arrive_whole_where_the_guest_takes_them(
    network: Network, tap: Opener, accepted: Offload
) -> None:
    port = tap("name=tap0")
    port.set_offloads(accepted)
    assert received_of_a_large_segment(network, port) == (1, {GSO_TCPV4})


@root
@pytest.mark.parametrize(
    "accepted",
    [
        Offload(0),
        Offload.CSUM,
        Offload.CSUM | Offload.TSO6,
        Offload.CSUM | Offload.ECN,
        Offload.TSO4,
        Offload.ECN,
    ],
)
def test_large_segments_are_cut_where_the_guest_does_not_take_them(
    network: Network, tap: Opener, accepted: Offload
) -> None:
    port = tap("name=tap0")
    port.set_offloads(accepted)
    assert received_of_a_large_segment(network, port) == (6, {GSO_NONE})


@root
def test_offloads_are_taken_back(network: Network, tap: Opener) -> None:
    port = tap("name=tap0")
    port.set_offloads(Offload.CSUM | Offload.TSO4)
    port.set_offloads(Offload(0))
    assert received_of_a_large_segment(network, port) == (6, {GSO_NONE})


@root
def test_a_device_of_several_queues_is_used_by_one_of_them(tap: Opener) -> None:
    with Network(multi_queue=True) as network:
        port = open_port(f"tap:name=tap0,netns={network.path}")
        assert port.link_up
        port.close()


# --- the link


class Watch:
    """Counts the changes a port tells of, while it runs."""

    def __init__(self, port: TapPort, nursery: trio.Nursery) -> None:
        self.port = port
        self._changed = trio.Event()
        port.on_change = lambda: self._changed.set()
        nursery.start_soon(port.run)

    async def link(self) -> bool:
        """The link after the next change."""
        with trio.fail_after(10):
            await self._changed.wait()
        self._changed = trio.Event()
        return self.port.link_up


@root
async def test_the_link_follows_the_device(network: Network, tap: Opener, nursery: trio.Nursery) -> None:
    watch = Watch(tap("name=tap0"), nursery)
    for state in ("down", "up", "down"):
        change(network, "tap0", state=state)
        assert await watch.link() is (state == "up")


@root
async def test_other_changes_are_none_of_the_link(
    network: Network, tap: Opener, nursery: trio.Nursery
) -> None:
    watch = Watch(tap("name=tap0"), nursery)
    change(network, "tap0", mtu=1400)
    change(network, "lo", state="down")
    change(network, "tap0", state="down")
    assert await watch.link() is False


@root
async def test_a_renamed_device_is_followed_still(
    network: Network, tap: Opener, nursery: trio.Nursery
) -> None:
    port = tap("name=new0")
    watch = Watch(port, nursery)
    change(network, "new0", state="down")
    assert await watch.link() is False
    change(network, "new0", ifname="other0")
    change(network, "other0", state="up")
    assert await watch.link() is True
    assert port.name == "other0"


@root
async def test_a_deleted_device_is_a_link_that_is_down_for_good(
    network: Network, tap: Opener, nursery: trio.Nursery
) -> None:
    port = tap("name=new0")
    watch = Watch(port, nursery)
    change(network, "new0", "del")
    assert await watch.link() is False
    with pytest.raises(OSError, match="File descriptor in bad state"):
        os.read(port.fd, 2000)
    port.set_offloads(Offload.CSUM)
    port.peer_lost()
    assert await watch.link() is False
    assert port.fd == -1
    port.set_offloads(Offload(0))


@root
async def test_a_running_card_survives_its_device(network: Network, nursery: trio.Nursery) -> None:
    port = open_port(f"tap:name=new0,netns={network.path}")
    with driver_of(Nic(port, mac=GUEST)) as driver:
        async with trio.open_nursery() as running:
            running.start_soon(driver.nic.run)
            driver.start()
            lost, tell_the_card = trio.Event(), port.on_change

            def changed() -> None:
                tell_the_card()
                if port.fd < 0:
                    lost.set()

            port.on_change = changed
            change(network, "new0", "del")
            with trio.fail_after(10):
                await driver.interrupted(CONFIG_VECTOR)
                await lost.wait()
            assert not driver.link_up
            sleeps = driver.nic.datapath.counters()["sleeps"]
            await trio.testing.wait_all_tasks_blocked(0.05)
            assert driver.nic.datapath.counters()["sleeps"] - sleeps < 10
            driver.status = 0
            running.cancel_scope.cancel()


@root
async def test_a_card_and_the_kernel_exchange_frames(network: Network) -> None:
    guest_is_known(network)
    with driver_of(Nic(open_port(f"tap:name=tap0,netns={network.path}"), mac=GUEST)) as driver:
        async with trio.open_nursery() as running:
            running.start_soon(driver.nic.run)
            driver.start()
            with network.run_inside(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as host:
                host.bind((network.address, 5555))
                host.sendto(b"to the guest", (network.guest_address, 4444))
                with trio.fail_after(10):
                    while not udp(4444)(await driver.receive()):
                        pass
                driver.send(datagram(network, b"to the host", complete=True))
                with trio.fail_after(10):
                    await trio.lowlevel.wait_readable(host)
                assert host.recv(2000) == b"to the host"
            running.cancel_scope.cancel()


# --- frames made by hand


def checksum_of(data: bytes) -> int:
    """The Internet checksum (RFC 1071)."""
    total: int = sum(struct.unpack(f"!{(len(data) + 1) // 2}H", data + b"\0" * (len(data) % 2)))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return 0xFFFF & ~total


def pseudo(frame: bytes) -> bytes:
    """What TCP and UDP checksums cover of the IPv4 header."""
    return frame[26:34] + bytes([0, frame[23]]) + struct.pack("!H", len(frame) - 34)


def checksum_is_right(frame: bytes) -> bool:
    return checksum_of(pseudo(frame) + frame[34:]) == 0


def ipv4(source: str, target: str, protocol: int, payload: bytes) -> bytes:
    header = struct.pack("!BBHIBBH", 0x45, 0, 20 + len(payload), 0, 64, protocol, 0)
    header += socket.inet_aton(source) + socket.inet_aton(target)
    return header[:10] + struct.pack("!H", checksum_of(header)) + header[12:] + payload


def datagram(network: Network, payload: bytes, *, complete: bool) -> bytes:
    """A datagram from the guest to the namespace; `complete`: with its checksum, not the pseudo header's."""

    def hardware() -> bytes:
        with IPRoute() as route:
            found = next(iter(route.get_links(ifname=network.tap)))
            return bytes.fromhex(found.get_attr("IFLA_ADDRESS").replace(":", ""))

    body = struct.pack("!HHHH", 6666, 5555, 8 + len(payload), 0) + payload
    frame = network.run_inside(hardware) + GUEST + b"\x08\x00"
    frame += ipv4(network.guest_address, network.address, 17, body)
    covered = pseudo(frame) + frame[34:] if complete else pseudo(frame)
    value = checksum_of(covered) if complete else 0xFFFF & ~checksum_of(covered)
    return frame[:40] + struct.pack("!H", value) + frame[42:]


def segment(target: str, source: str, size: int) -> bytes:
    """A TCP segment of `size` bytes, larger than any frame, its checksum left open."""
    payload = b"".join(struct.pack("!I", n) for n in range(size // 4))
    header = struct.pack("!HHIIBBHHH", 7777, 8888, 1000, 1, 5 << 4, 0x10, 65535, 0, 0)
    frame = GUEST + bytes.fromhex("525400000099") + b"\x08\x00" + ipv4(source, target, 6, header + payload)
    return frame[:50] + struct.pack("!H", 0xFFFF & ~checksum_of(pseudo(frame))) + frame[52:]
