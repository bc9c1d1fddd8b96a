"""Requests and DMA messages on the way at once, cut anywhere, answered in any order, from several threads."""

import random
import socket
import struct
from functools import partial

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from device.dma import DmaWindows
from server.session import Session
from tests.descriptors import no_fd_leaks
from tests.server.guest import Guest
from tests.server.raw import (
    ERROR,
    GET_INFO,
    NO_REPLY,
    REGION_READ,
    REGION_WRITE,
    access,
    message,
)
from tests.server.world import PAGE, Card

INFO = struct.pack("=IIII", 16, 0, 0, 0)

# The guest's memory: what registers show is below, and a part for each worker above.
REGISTERS = 256
WORKERS = 2
WORKER_PART = 64

operations = st.lists(
    st.one_of(
        st.tuples(st.just("show"), st.integers(0, 60).map(lambda n: 4 * n)),
        st.tuples(st.just("change"), st.integers(0, 60).map(lambda n: 4 * n)),
        st.tuples(st.just("post"), st.integers(0, 60).map(lambda n: 4 * n)),
        st.tuples(st.just("long"), st.integers(0, 4000)),
        st.tuples(st.sampled_from(["info", "none"]), st.just(0)),
    ),
    max_size=40,
)


class Mirror:
    """Registers that are the guest's memory: each access is a DMA message within its handler."""

    dma: DmaWindows

    def read(self, offset: int, count: int) -> int:
        """What the guest has there."""
        return int.from_bytes(self.dma.read(offset, count), "little")

    def write(self, offset: int, count: int, value: int) -> None:
        """Have it there."""
        self.dma.write(offset, value.to_bytes(count, "little"))


def requests(guest: Guest, plan: list[tuple[str, int]]) -> tuple[bytes, list[tuple[int, bytes | None]]]:
    """The plan as messages, and the command and content of each reply that must come."""
    memory = bytearray(guest.memory[:REGISTERS])
    expected: list[tuple[int, bytes | None]] = []
    stream = b""
    for number, (what, where) in enumerate(plan):
        content = struct.pack("=I", 1000 + number)
        match what:
            case "show":
                stream += message(REGION_READ, access(where, 0, 4), message_id=number)
                expected.append((REGION_READ, access(where, 0, 4) + bytes(memory[where : where + 4])))
            case "change" | "post":
                flags = NO_REPLY if what == "post" else 0
                stream += message(REGION_WRITE, access(where, 0, 4) + content, message_id=number, flags=flags)
                memory[where : where + 4] = content
                if what == "change":
                    expected.append((REGION_WRITE, access(where, 0, 4)))
            case "long":
                stream += message(REGION_READ, access(0, 2, where), message_id=number)
                expected.append((REGION_READ, access(0, 2, where) + bytes(where)))
            case "info":
                stream += message(GET_INFO, INFO, message_id=number)
                expected.append((GET_INFO, struct.pack("=IIII", 16, 3, 9, 5)))
            case _:
                stream += message(99, message_id=number)
                expected.append((99, None))
    return stream, expected


def work(card: Card, part: int, rounds: int) -> None:
    """A worker of the device: what it writes it reads again."""
    dma = card.function.dma
    start = REGISTERS + part * WORKER_PART
    for number in range(rounds):
        content = random.Random(number).randbytes(1 + number % WORKER_PART)
        with card.function.gate:
            dma.write(start, content)
            assert dma.read(start, len(content)) == content


def live(guest: Guest, plan: list[tuple[str, int]], dma_messages: int) -> None:
    """The guest's side: the whole plan at once."""
    stream, expected = requests(guest, plan)
    guest.main.out += stream
    guest.until(lambda: len(guest.replies) == len(expected) and len(guest.asked) == dma_messages)
    for reply, (command, content) in zip(guest.replies, expected, strict=True):
        assert reply.command == command
        assert reply.flags & ERROR if content is None else reply.payload == content
    guest.replies.clear()
    guest.until(lambda: not any(link.out for link in guest.links) and not guest.owes)


async def scenario(plan: list[tuple[str, int]], seed: int, twin: bool, rounds: int) -> None:
    mirror = Mirror()
    card = Card(registers=mirror)
    mirror.dma = card.function.dma
    mirror.dma.map(0, PAGE, 3)
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    nested = sum(what in ("show", "change", "post") for what, _ in plan)
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(Session(card.function, ours).run)
            guest = await trio.to_thread.run_sync(partial(Guest, theirs, twin=twin, seed=seed))
            async with trio.open_nursery() as workers:
                for part in range(WORKERS):
                    workers.start_soon(trio.to_thread.run_sync, work, card, part, rounds)
                messages = nested + WORKERS * 2 * rounds
                workers.start_soon(trio.to_thread.run_sync, live, guest, plan, messages)
            guest.close()
    card.function.close()


@pytest.mark.parametrize("twin", [False, True], ids=["one socket", "two sockets"])
@settings(deadline=None, max_examples=60)
@given(plan=operations, seed=st.integers(0, 1 << 32), rounds=st.integers(0, 4))
def test_requests_keep_their_order_and_answers_find_who_asked(
    twin: bool, plan: list[tuple[str, int]], seed: int, rounds: int
) -> None:
    with no_fd_leaks():
        trio.run(scenario, plan, seed, twin, rounds)
