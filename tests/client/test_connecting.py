from __future__ import annotations

import json
import socket
import struct
from pathlib import Path

import pytest
import trio

import client
from protocol.limits import FIRST_ARGSZ, MAX_REGIONS
from protocol.vfio import RegionFlags
from tests.client.peer import GET_INFO, REGION_INFO, REPLY, VERSION, FakeRegion, Peer, session_with
from tests.descriptors import open_fds, settled_fds


def sparse(*areas: tuple[int, int]) -> bytes:
    """A sparse mmap capability, by hand."""
    header = struct.pack("=HHIII", 1, 1, 0, len(areas), 0)
    return header + b"".join(struct.pack("=QQ", *area) for area in areas)


async def test_the_proposal_is_a_version_with_capabilities() -> None:
    ours, theirs = socket.socketpair()
    peer = Peer(theirs)
    async with trio.open_nursery() as nursery:

        async def serve() -> None:
            message = await peer.expect(VERSION)
            major, _ = struct.unpack_from("=HH", message.payload)
            assert major == 0
            assert message.payload[-1] == 0
            said = json.loads(message.payload[4:-1])["capabilities"]
            assert said["max_msg_fds"] == 16
            theirs.close()

        nursery.start_soon(serve)
        with pytest.raises(client.ConnectError, match="closed the connection"):
            await client.over_socket(ours).__aenter__()
    assert ours.fileno() == -1


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (struct.pack("=HHIII", 0, VERSION, 16, REPLY | 32, 95), "not supported"),
        (struct.pack("=HHIIIHH", 0, VERSION, 20, REPLY, 0, 1, 0), "answered with 1.0"),
        (struct.pack("=HHIII", 0, 9, 16, 0, 0), "before VERSION"),
        (bytes(16), "0 bytes"),
        (
            struct.pack("=HHIIIHH", 0, VERSION, 20, REPLY, 0, 0, 0) + struct.pack("=HHIII", 1, 11, 16, 0, 0),
            "before it was asked",
        ),
    ],
)
async def test_a_server_that_does_not_agree_is_left(answer: bytes, reason: str) -> None:
    ours, theirs = socket.socketpair()
    peer = Peer(theirs)
    peer.send(answer)
    with pytest.raises(client.ConnectError, match=reason):
        await client.over_socket(ours).__aenter__()
    theirs.close()


async def test_a_path_where_nobody_is_says_so(tmp_path: Path) -> None:
    with pytest.raises(client.ConnectError, match="No such file"):
        await client.connect(tmp_path / "none").__aenter__()
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(tmp_path / "stale"))
    stale.close()
    with pytest.raises(client.ConnectError, match="refused"):
        await client.connect(tmp_path / "stale").__aenter__()


async def test_a_listener_is_connected_to(tmp_path: Path) -> None:
    path = tmp_path / "nic.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        listener.setblocking(False)

        async def serve() -> None:
            await trio.lowlevel.wait_readable(listener)
            sock, _ = listener.accept()
            peer = Peer(sock)
            await peer.agree()
            await peer.describe({})
            with pytest.raises(EOFError):
                await peer.next()
            sock.close()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve)
            async with client.connect(path) as session:
                assert session.info.num_regions == 9


async def test_what_the_device_has_is_asked_for() -> None:
    memory = settled_fds()
    fd = socket.socket(socket.AF_UNIX).detach()
    regions = {
        0: FakeRegion(0x4000),
        2: FakeRegion(0x10000, 7, fds=(fd,)),
        4: FakeRegion(0x8000, 7, sparse((0, 0x1000), (0x4000, 0x2000)), (fd,), 0x100000),
        7: FakeRegion(4096),
    }
    async with session_with(regions=regions) as (session, _):
        assert [region.size for region in session.regions] == [0x4000, 0, 0x10000, 0, 0x8000, 0, 0, 4096, 0]
        assert session.regions[0].areas == ()
        assert session.regions[0].fd == -1
        assert session.regions[2].areas == ((0, 0x10000),)
        assert session.regions[4].areas == ((0, 0x1000), (0x4000, 0x2000))
        assert session.regions[4].mmap_offset == 0x100000
        assert RegionFlags.MMAP in session.regions[4].flags
        assert [irq.count for irq in session.irqs] == [1, 32, 4, 1, 1]
    socket.socket(fileno=fd).close()
    assert open_fds() == memory


async def test_a_long_description_is_asked_for_again_with_more_room() -> None:
    fd = socket.socket(socket.AF_UNIX).detach()
    before = settled_fds()
    areas = [(index * 0x2000, 0x1000) for index in range(100)]
    assert len(sparse(*areas)) > FIRST_ARGSZ
    async with session_with(regions={0: FakeRegion(0x100000, 7, sparse(*areas), (fd,))}) as (session, _):
        assert session.regions[0].areas == tuple(areas)
    assert open_fds() == before
    socket.socket(fileno=fd).close()


async def negotiated_with(*answers: tuple[int, bytes, int]) -> None:
    """Begin a session whose questions get these (command, payload, error) answers."""
    ours, theirs = socket.socketpair()
    peer = Peer(theirs)

    async def serve() -> None:
        await peer.agree()
        for command, payload, error in answers:
            asked = await peer.expect(command)
            peer.reply(asked, payload, flags=REPLY | (32 if error else 0), error=error)

    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve)
            async with client.over_socket(ours):
                pass
    except ExceptionGroup as group:
        raise group.exceptions[0] from None
    finally:
        theirs.close()


INFO = (GET_INFO, struct.pack("=IIII", 16, 3, 1, 0), 0)


async def test_a_region_that_the_server_refuses_is_absent() -> None:
    await negotiated_with(INFO, (REGION_INFO, b"", 22))


@pytest.mark.parametrize(
    ("what", "answers"),
    [
        ("many regions", [(GET_INFO, struct.pack("=IIII", 16, 3, MAX_REGIONS + 1, 5), 0)]),
        ("many interrupts", [(GET_INFO, struct.pack("=IIII", 16, 3, 9, 51), 0)]),
        ("another region", [INFO, (REGION_INFO, struct.pack("=IIIIQQ", 32, 3, 1, 0, 4096, 0), 0)]),
        ("a huge chain", [INFO, (REGION_INFO, struct.pack("=IIIIQQ", 1 << 20, 3, 0, 0, 4096, 0), 0)]),
        (
            "never enough room",
            [INFO]
            + [
                (REGION_INFO, struct.pack("=IIIIQQ", FIRST_ARGSZ + turn, 3, 0, 0, 4096, 0), 0)
                for turn in range(1, 5)
            ],
        ),
        (
            "a chain outside",
            [INFO, (REGION_INFO, struct.pack("=IIIIQQ", 40, 15, 0, 999, 4096, 0) + bytes(8), 0)],
        ),
    ],
)
async def test_nonsense_about_the_device_is_refused(what: str, answers: list[tuple[int, bytes, int]]) -> None:
    before = settled_fds()
    with pytest.raises(client.BadReplyError):
        await negotiated_with(*answers)
    assert open_fds() == before
