from __future__ import annotations

import os
import struct
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

import pytest
import trio
import trio.testing

import client
from protocol.vfio import IrqIndex
from tests.client.peer import SET_IRQS, Message, Peer, session_with
from tests.descriptors import open_fds, settled_fds

INTX, MSI, MSIX, ERR, REQ = 0, 1, 2, 3, 4
NONE, BOOL, EVENTFD, MASK, UNMASK, TRIGGER = 1, 2, 4, 8, 16, 32


async def irqs(peer: Peer, index: int, flags: int, start: int, count: int) -> Message:
    """A SET_IRQS with these fields, accepted."""
    message = await peer.expect(SET_IRQS)
    assert message.payload == struct.pack("=IIIII", 20, flags, index, start, count)
    peer.reply(message)
    return message


async def test_vectors_are_wired_in_as_many_messages_as_the_server_needs_and_taken_back() -> None:
    before = settled_fds()
    async with session_with(irqs=(1, 32, 20, 1, 1)) as (session, peer), trio.open_nursery() as nursery:

        async def serve() -> None:
            fds: list[int] = []
            for start, count in ((0, 8), (8, 8), (16, 4)):
                message = await irqs(peer, MSIX, EVENTFD | TRIGGER, start, count)
                assert len(message.fds) == count
                fds += message.fds
            os.eventfd_write(fds[17], 1)
            os.eventfd_write(fds[17], 2)
            await irqs(peer, MSIX, NONE | TRIGGER, 0, 0)
            for fd in fds:
                os.close(fd)

        nursery.start_soon(serve)
        async with client.msix(session, 20) as vectors:
            with trio.fail_after(5):
                assert await vectors[17].wait() >= 1
            await trio.testing.wait_all_tasks_blocked()
            assert vectors[17].poll() in (0, 1, 2)
            assert vectors[3].poll() == 0
    assert open_fds() == before


async def test_a_kind_that_does_not_grow_is_claimed_whole_before_it_is_wired_in_pieces() -> None:
    async with session_with() as (session, peer), trio.open_nursery() as nursery:

        async def serve() -> None:
            claim = await irqs(peer, MSI, EVENTFD | TRIGGER, 0, 20)
            assert not claim.fds
            for start, count in ((0, 8), (8, 8), (16, 4)):
                message = await irqs(peer, MSI, EVENTFD | TRIGGER, start, count)
                assert len(message.fds) == count
                for fd in message.fds:
                    os.close(fd)
            await irqs(peer, MSI, NONE | TRIGGER, 0, 0)

        nursery.start_soon(serve)
        with trio.fail_after(5):
            async with client.msi(session, 20):
                pass


async def test_a_vector_counts_what_was_not_heard() -> None:
    async with session_with() as (session, peer), trio.open_nursery() as nursery:
        wired = trio.Event()
        fds: list[int] = []

        async def serve() -> None:
            fds.extend((await irqs(peer, MSI, EVENTFD | TRIGGER, 0, 2)).fds)
            wired.set()
            await irqs(peer, MSI, NONE | TRIGGER, 0, 0)

        nursery.start_soon(serve)
        async with client.msi(session, 2) as vectors:
            await wired.wait()
            for _ in range(5):
                os.eventfd_write(fds[1], 1)
            assert await vectors[1].wait() == 5
            assert vectors[1].poll() == 0
            for fd in fds:
                os.close(fd)


async def test_more_vectors_than_the_device_has_are_refused() -> None:
    async with session_with() as (session, _):
        with pytest.raises(client.ClientError, match="the device has 4"):
            await client.msix(session, 5).__aenter__()


async def test_a_server_that_takes_no_descriptors_cannot_be_wired() -> None:
    capabilities = b'{"capabilities":{"max_msg_fds":0}}\0'
    async with session_with(capabilities=capabilities) as (session, _):
        with pytest.raises(client.ClientError, match="takes no descriptors"):
            await client.intx(session).__aenter__()


async def test_intx_is_unmasked_by_message() -> None:
    async with session_with() as (session, peer), trio.open_nursery() as nursery:

        async def serve() -> None:
            (fd,) = (await irqs(peer, INTX, EVENTFD | TRIGGER, 0, 1)).fds
            os.eventfd_write(fd, 1)
            await irqs(peer, INTX, NONE | UNMASK, 0, 1)
            os.eventfd_write(fd, 1)
            await irqs(peer, INTX, NONE | MASK, 0, 1)
            await irqs(peer, INTX, NONE | TRIGGER, 0, 1)
            await irqs(peer, INTX, NONE | TRIGGER, 0, 0)
            os.close(fd)

        nursery.start_soon(serve)
        async with client.intx(session) as line:
            assert await line.wait() == 1
            await line.unmask()
            assert await line.wait() == 1
            await line.mask()
            await line.trigger()


async def test_intx_can_be_unmasked_by_eventfd() -> None:
    async with session_with() as (session, peer), trio.open_nursery() as nursery:

        async def serve() -> None:
            (fd,) = (await irqs(peer, INTX, EVENTFD | TRIGGER, 0, 1)).fds
            (resample,) = (await irqs(peer, INTX, EVENTFD | UNMASK, 0, 1)).fds
            os.eventfd_write(fd, 1)
            await trio.lowlevel.wait_readable(resample)
            assert os.eventfd_read(resample) == 1
            await irqs(peer, INTX, NONE | TRIGGER, 0, 0)
            os.close(fd)
            os.close(resample)

        nursery.start_soon(serve)
        async with client.intx(session) as line:
            with pytest.raises(client.ClientError, match="wire_unmask"):
                line.unmask_now()
            await line.wire_unmask()
            await line.wait()
            line.unmask_now()


async def test_a_server_that_is_gone_does_not_hold_up_the_end() -> None:
    async with session_with() as (session, peer), trio.open_nursery() as nursery:

        async def serve() -> None:
            message = await irqs(peer, INTX, EVENTFD | TRIGGER, 0, 1)
            os.close(message.fds[0])
            peer.sock.close()

        nursery.start_soon(serve)
        async with client.intx(session):
            await trio.testing.wait_all_tasks_blocked()


async def test_a_server_cannot_make_looking_at_an_interrupt_block() -> None:
    async with session_with() as (session, _):
        interrupt = client.Interrupt(session, IrqIndex.MSIX, 0)
        os.set_blocking(interrupt.fd, True)  # a flag of the open file, which the server has as well
        assert interrupt.poll() == 0
        os.eventfd_write(interrupt.fd, 3)
        assert (interrupt.poll(), interrupt.poll()) == (3, 0)
        interrupt.close()


@pytest.mark.parametrize(("kind", "index"), [(client.err, ERR), (client.req, REQ)], ids=["err", "req"])
async def test_errors_and_requests_are_heard_beside_everything_else(
    kind: Callable[[client.Session], AbstractAsyncContextManager[client.Interrupt]], index: int
) -> None:
    before = settled_fds()
    async with session_with() as (session, peer), trio.open_nursery() as nursery:

        async def serve() -> None:
            vector = await irqs(peer, MSIX, EVENTFD | TRIGGER, 0, 1)
            message = await irqs(peer, index, EVENTFD | TRIGGER, 0, 1)
            os.eventfd_write(message.fds[0], 1)
            for of in (index, MSIX):
                await irqs(peer, of, NONE | TRIGGER, 0, 0)
            for fd in (*vector.fds, *message.fds):
                os.close(fd)

        nursery.start_soon(serve)
        async with client.msix(session, 1), kind(session) as interrupt:
            assert await interrupt.wait() == 1
    assert open_fds() == before


async def test_a_device_that_cannot_ask_to_be_let_go_is_told() -> None:
    async with session_with(irqs=(1, 32, 4, 1, 0)) as (session, _):
        with pytest.raises(client.ClientError, match="1 vectors of REQ: the device has 0"):
            await client.req(session).__aenter__()
