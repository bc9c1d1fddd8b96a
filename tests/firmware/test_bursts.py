"""Bursts whose memory only the client reaches, and what happens to the card while it is asked."""

import errno
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from device.errors import DeviceError
from device.virtio.faults import FAULTS
from firmware._bursts import BURST
from tests.device.remote_side import Ask
from tests.firmware.test_datapath import LOOPBACK, NO_HEADER, PACKETS, STREAM, Card, frame

Action = Callable[[Card], None]


@pytest.fixture
def make() -> Iterator[Callable[..., Card]]:
    made: list[Card] = []

    def card(framing: int = PACKETS, header: int = 0, *, mapped_rings: bool = False, size: int = 256) -> Card:
        made.append(Card(framing, header, by_message=True, size=size))
        if mapped_rings:
            map_rings(made[-1])
        return made[-1]

    yield card
    for each in made:
        each.close()


def map_rings(card: Card) -> None:
    """Let the rings be in this process; what is allocated from now on is reached by messages."""
    memory = card.memory
    memory.allocate(0, 4096)
    rings = memory.allocate(0) - memory.iova
    card.dma.unmap_all()
    card.dma.map(memory.iova, rings, 3, memory.fd, 0)
    card.dma.map(memory.iova + rings, memory.size - rings, 3)


def once(card: Card, action: Action, when: Callable[[Ask], bool] = lambda _: True) -> list[Ask]:
    """A control thread does this while the client is asked for what `when` says, the first time."""
    done: list[Ask] = []

    def meanwhile(ask: Ask) -> None:
        if not done and when(ask):
            done.append(ask)
            with card.path.gate:
                action(card)

    card.client.meanwhile = meanwhile
    return done


def nth(number: int) -> Callable[[Ask], bool]:
    """The access with this number, from 0."""
    seen = iter(range(number + 1))
    return lambda _: next(seen, None) == number


def numbered(number: int) -> bytes:
    return frame(b"%04d" % number)


def numbers(frames: list[bytes]) -> list[int]:
    return [int(each[14:18]) for each in frames]


def arrived(card: Card, addresses: list[int]) -> list[int]:
    """The numbers of the frames that were received, one a buffer."""
    return [
        int(card.memory.read(addresses[head] + 12 + 14, 4)) for head, written in card.rx.used() if written
    ]


def sent(card: Card) -> list[bytes]:
    frames = []
    while True:
        try:
            frames.append(card.network.recv(1 << 17))
        except BlockingIOError:
            return frames


# --- roads


@pytest.mark.parametrize("mapped_rings", [False, True])
def test_a_frame_with_the_ports_own_header_is_gathered_by_asking(
    make: Callable[..., Card], mapped_rings: bool
) -> None:
    card = make(PACKETS, 12, mapped_rings=mapped_rings)
    header = struct.pack("<BBHHHHH", 1, 1, 54, 1448, 34, 16, 0)
    card.send(frame(b"first "), b"second", header=header)
    card.settle()
    assert sent(card) == [header + frame(b"first second")]
    assert [written for _, written in card.tx.used()] == [0]


def test_a_frame_may_lie_partly_in_this_process(make: Callable[..., Card]) -> None:
    card = make(mapped_rings=True)
    near = card.memory.iova + 4096  # behind the rings, in their window
    card.memory.write(near, NO_HEADER + frame(b"near "))
    far = card.memory.allocate(16)
    card.memory.write(far, b"far")
    card.tx.add([(near, 12 + len(frame(b"near ")), False), (far, 3, False)])
    card.settle()
    assert sent(card) == [frame(b"near far")]


def test_a_burst_asks_for_its_rings_once(make: Callable[..., Card]) -> None:
    card = make()
    for number in range(10):
        card.send(numbered(number))
    card.settle()
    assert numbers(sent(card)) == list(range(10))
    entries = range(card.tx.device + 4, card.tx.device + 4 + 8 * 256)
    assert [ask for ask in card.client.asked if ask[1] in entries] == [("write", entries.start, 80)]


def test_a_frame_in_one_buffer_is_one_message(make: Callable[..., Card]) -> None:
    card = make()
    (address,) = card.offer(2000)
    card.network.send(frame())
    card.settle()
    assert card.memory.read(address, 12 + len(frame())) == bytes(10) + b"\1\0" + frame()
    assert [ask for ask in card.client.asked if ask[1] >= address] == [("write", address, 12 + len(frame()))]


def test_more_completions_than_are_kept_are_written_in_time(make: Callable[..., Card]) -> None:
    card = make(size=1024)
    frames, total = 15, 12 + len(frame(b"z" * 1000))
    each = -(-total // 20)
    addresses = card.offer(*[20] * (frames * each))
    for _ in range(frames):
        card.network.send(frame(b"z" * 1000))
    card.settle()
    assert frames * each > 512
    assert card.rx.used() == [
        (head, 20 if head % each < each - 1 else total - 20 * (each - 1)) for head in range(frames * each)
    ]
    assert card.memory.read(addresses[0] + 10, 2) == struct.pack("<H", each)


def test_what_a_burst_owes_is_paid_before_it_does_more(make: Callable[..., Card]) -> None:
    card = make()
    card.send(numbered(1))
    once(card, lambda card: card.dma.disturb(), lambda ask: ask[1] == card.tx.driver + 2 and sent(card) != [])
    assert card.path.service()
    assert card.tx.used() == []
    card.client.asked.clear()
    card.settle()
    assert card.client.asked[0] == ("write", card.tx.device + 4, 8)
    assert len(card.tx.used()) == 1


# --- refusals


@pytest.mark.parametrize("number", [errno.EIO, errno.ETIMEDOUT, errno.EFAULT])
@pytest.mark.parametrize("direction", ["tx", "rx"])
@pytest.mark.parametrize("mapped_rings", [False, True])
def test_a_client_that_refuses_or_says_nothing_breaks_the_queue_and_it_is_reported(
    make: Callable[..., Card], number: int, direction: str, mapped_rings: bool
) -> None:
    card = make(mapped_rings=mapped_rings)
    if direction == "tx":
        card.send(frame())
    else:
        card.offer(100)
        card.network.send(frame())

    def refuse(_: Ask) -> None:
        raise DeviceError(number, "no")

    card.client.meanwhile = refuse
    card.settle()
    queue = card.path.tx if direction == "tx" else card.path.rx
    assert queue.fault == FAULTS[8 if mapped_rings else 10]
    assert os.eventfd_read(card.path.event_fd) == 1


def test_an_answer_of_another_length_breaks_the_queue(make: Callable[..., Card]) -> None:
    card = make(mapped_rings=True)
    card.send(frame())
    card.client.answer = lambda data: data[:-1]
    card.settle()
    assert card.path.tx.fault == FAULTS[8]
    assert sent(card) == []


def test_a_client_that_is_gone_is_asked_once_and_the_worker_sleeps(make: Callable[..., Card]) -> None:
    card = make()
    card.send(frame())
    card.offer(100)
    gone = threading.Event()

    def leave(_: Ask) -> None:
        gone.set()
        raise DeviceError(errno.ENOTCONN, "gone")

    card.client.meanwhile = leave
    worker = threading.Thread(target=card.path.run)
    worker.start()
    assert gone.wait(10)
    while card.path.awaited:
        os.sched_yield()
    card.path.stop()
    worker.join(10)
    assert (card.path.tx.fault, card.path.rx.fault) == (None, None)
    assert len(card.client.asked) == 1
    assert card.path.counters()["sleeps"] < 10
    card.client.meanwhile = lambda _: None
    with card.path.gate:
        card.dma.remote = card.client
    card.settle()
    assert sent(card) == [frame()]


# --- the card becomes another one


def reset(card: Card) -> None:
    card.path.halt()
    for queue in (card.path.rx, card.path.tx):
        queue.reset()


def halt_and_go_on(card: Card) -> None:
    card.path.halt()
    card.path.start(mergeable=True, checksum_to_driver=False)


def forbid(card: Card) -> None:
    card.path.bus_master = False


def forbid_and_allow(card: Card) -> None:
    card.path.bus_master = False
    card.path.bus_master = True


def unmap(number: int) -> Action:
    """The window with this number goes."""

    def act(card: Card) -> None:
        card.dma.unmap(*card.dma.windows()[number][:2])

    return act


def lose_client(card: Card) -> None:
    reset(card)
    card.dma.remote = None
    card.dma.unmap_all()


@pytest.mark.parametrize("mapped_rings", [False, True])
@pytest.mark.parametrize("change", [reset, forbid, lose_client])
@pytest.mark.parametrize("number", range(12))
def test_after_a_card_was_stopped_its_worker_asks_for_nothing(
    make: Callable[..., Card], change: Action, number: int, mapped_rings: bool
) -> None:
    card = make(LOOPBACK, mapped_rings=mapped_rings)
    card.offer(100, 100)
    card.send(numbered(1))
    card.send(numbered(2))
    done = once(card, change, nth(number))
    card.settle()
    if done:
        assert card.client.asked[-1] == done[0]
    assert (card.path.tx.fault, card.path.rx.fault) == (None, None)


@pytest.mark.parametrize("mapped_rings", [False, True])
@pytest.mark.parametrize("number", range(25))
def test_a_driver_that_came_back_meanwhile_meets_a_fresh_card(
    make: Callable[..., Card], number: int, mapped_rings: bool
) -> None:
    card = make(PACKETS, mapped_rings=mapped_rings)
    rings = (card.rx, card.tx)

    def start_over(card: Card) -> None:
        reset(card)
        for queue, ring in zip((card.path.rx, card.path.tx), rings, strict=True):
            card.memory.write(ring.driver, bytes(4))
            card.memory.write(ring.device, bytes(4))
            ring.__init__(card.memory, 256)  # type: ignore[misc]
            queue.enable(256, *ring.addresses, indirect=True)
            queue.vector = queue.index
        card.path.start(mergeable=True, checksum_to_driver=False)

    card.send(numbered(1))
    card.offer(100)
    card.network.send(numbered(2))
    done = once(card, start_over, nth(number))
    card.settle()
    if not done:
        return
    assert card.rx.used() == card.tx.used() == []
    sent(card)
    card.send(numbered(3))
    card.settle()
    assert numbers(sent(card)) == [3]
    assert len(card.tx.used()) == 1


def test_a_port_that_changes_while_a_frame_is_delivered_takes_the_frame_along(
    make: Callable[..., Card],
) -> None:
    card = make()
    addresses = card.offer(100, 100)
    card.network.send(numbered(1))

    def attach_again(card: Card) -> None:
        card.path.attach(card.port.fileno(), PACKETS, 0)

    done = once(card, attach_again, lambda ask: ask[0] == "write" and ask[1] == addresses[0])
    card.settle()
    assert done
    assert card.rx.used() == []
    card.network.send(numbered(2))
    card.settle()
    assert arrived(card, addresses) == [2]


def test_windows_that_go_while_a_frame_is_delivered_break_the_queue(make: Callable[..., Card]) -> None:
    card = make(mapped_rings=True)
    card.offer(100, 100)
    card.network.send(frame(b"z" * 80))
    once(card, unmap(1))
    card.path.mergeable = True
    card.dma.remote_limit = 8
    card.settle()
    assert card.path.rx.fault == FAULTS[8]


def test_rings_that_move_while_a_frame_is_gathered_are_found_again(make: Callable[..., Card]) -> None:
    """They were mapped when the chain was popped; its completion goes by message."""
    card = make(mapped_rings=True)
    card.send(numbered(1))
    rings = card.dma.windows()[0]

    def hide(card: Card) -> None:
        card.dma.unmap(*rings[:2])
        card.dma.map(*rings[:3])

    once(card, hide)
    card.settle()
    assert numbers(sent(card)) == [1]
    assert card.tx.used() == [(0, 0)]
    card.send(numbered(2))
    card.settle()
    assert numbers(sent(card)) == [2]


def test_rings_that_go_while_a_frame_is_gathered_are_completed_when_they_are_back(
    make: Callable[..., Card],
) -> None:
    card = make(mapped_rings=True)
    card.send(numbered(1))
    rings = card.dma.windows()[0]
    once(card, unmap(0))
    card.settle()
    assert numbers(sent(card)) == [1]
    assert card.tx.used() == []
    assert card.path.tx.last_avail == 0
    assert card.path.tx.owed_list() == [(0, 0)]
    card.dma.map(*rings[:3], card.memory.fd, 0)
    card.settle()
    assert card.tx.used() == [(0, 0)]
    assert sent(card) == []
    assert card.lines.vector_pending(1)


# --- nothing is lost, and nothing comes twice


CHANGES: list[Action] = [lambda card: card.dma.disturb(), forbid_and_allow, lambda card: card.path.wake()]


@settings(max_examples=150, deadline=None)
@given(
    disturbances=st.lists(st.sampled_from([None, None, *CHANGES]), max_size=80),
    steps=st.lists(st.sampled_from(["send", "offer", "network", "serve"]), max_size=30),
    framing=st.sampled_from([PACKETS, STREAM, LOOPBACK]),
    mapped_rings=st.booleans(),
    limit=st.sampled_from([7, 64, 1 << 20]),
)
def test_whatever_disturbs_the_bursts_each_frame_passes_once_and_in_order(
    disturbances: list[Action | None], steps: list[str], framing: int, mapped_rings: bool, limit: int
) -> None:
    card = Card(framing, by_message=True)
    try:
        if mapped_rings:
            map_rings(card)
        card.dma.remote_limit = limit
        coming = iter(disturbances)

        def meanwhile(_: Ask) -> None:
            if change := next(coming, None):
                with card.path.gate:
                    change(card)

        card.client.meanwhile = meanwhile
        out: list[int] = []
        into: list[int] = []
        buffers: list[int] = []
        for number, step in enumerate(steps):
            if step == "send":
                card.send(numbered(number))
                out.append(number)
            elif step == "offer":
                buffers += card.offer(100)
            elif step == "network" and framing != LOOPBACK:
                prefix = struct.pack("!I", 18) * (framing == STREAM)
                card.network.send(prefix + numbered(number))
                into.append(number)
            else:
                card.settle()
        coming = iter(())
        buffers += card.offer(*[100] * len(out + into))
        card.settle()
        left = b"".join(sent(card))
        size = 22 if framing == STREAM else 18
        gone = numbers([left[at : at + size][size - 18 :] for at in range(0, len(left), size)])
        if framing == LOOPBACK:
            gone, into = out, out
        assert gone == out
        assert len(card.tx.used()) == len(out)
        assert arrived(card, buffers) == into
        assert card.counter("tx_dropped") == card.counter("rx_dropped") == 0
    finally:
        card.close()


def test_control_and_worker_go_on_beside_each_other(make: Callable[..., Card]) -> None:
    """A worker thread, a client thread, and this one that stops the card's DMA again and again."""
    card = make(LOOPBACK)
    fired = os.eventfd(0, os.EFD_NONBLOCK)
    card.lines.vector_arm(0, fired)
    worker = threading.Thread(target=card.path.run)
    worker.start()
    got: list[int] = []
    try:
        for number in range(60):
            addresses = card.offer(100)
            card.send(numbered(number))
            card.path.kick()
            while True:
                with card.path.gate:
                    forbid_and_allow(card)
                card.path.wake()
                card.tx.used()
                if done := card.rx.used():
                    got += [int(card.memory.read(addresses[0] + 26, 4)) for _ in done]
                    break
                os.sched_yield()
    finally:
        card.path.stop()
        worker.join(10)
        os.close(fired)
    assert not worker.is_alive()
    assert got == list(range(60))


def test_a_burst_that_waits_is_the_only_one(make: Callable[..., Card]) -> None:
    card = make()
    card.send(numbered(1))
    others = []
    once(card, lambda card: others.append(card.path.service()))
    card.settle()
    assert others == [False]
    assert numbers(sent(card)) == [1]


def test_bursts_by_message_are_bounded_too(make: Callable[..., Card]) -> None:
    card = make()
    for number in range(BURST + 1):
        card.send(numbered(number))
    assert card.path.service()
    assert len(card.tx.used()) == BURST


# --- another card goes on


@pytest.mark.parametrize("direction", ["tx", "rx"])
def test_completions_that_no_ring_has_yet_go_along(make: Callable[..., Card], direction: str) -> None:
    """The card is stopped while it writes the completion of a frame that it has sent, or delivered."""
    card = make()
    ring, queue = (card.tx, card.path.tx) if direction == "tx" else (card.rx, card.path.rx)
    if direction == "tx":
        card.send(numbered(1))
        card.send(numbered(2))
    else:
        card.offer(100, 100)
        card.network.send(numbered(1))
    once(card, forbid, lambda ask: ask[:2] == ("write", ring.device + 4))
    card.settle()
    with card.path.gate:
        saved = card.path.save()
        places = [(each.last_avail, each.used_index) for each in (card.path.rx, card.path.tx)]
    assert queue.owed_list() == ([(0, 0), (2, 0)] if direction == "tx" else [(0, 12 + 18)])
    target = make()
    target.dma.unmap_all()
    target.dma.map(card.memory.iova, card.memory.size, 3)
    target.dma.remote = card.client
    for each, rings, place in zip((target.path.rx, target.path.tx), (card.rx, card.tx), places, strict=True):
        each.reset()
        each.enable(256, *rings.addresses)
        each.restore(*place)
        each.vector = each.index
    apply = target.path.stage(saved)
    with target.path.gate:
        apply()
    card.client.meanwhile = lambda _: None
    target.settle()
    assert len(ring.used()) == (2 if direction == "tx" else 1)
    assert numbers(sent(card)) == ([1, 2] if direction == "tx" else [])
    assert sent(target) == []
    assert target.lines.vector_pending(queue.index)


ONE = struct.pack("<II", 0, 0)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        bytes(3),
        struct.pack("<HH", 1, 0),
        struct.pack("<HH", 0, 1) + ONE[:-1],
        struct.pack("<HH", 513, 0) + 513 * ONE,
        struct.pack("<HH", 0, 513) + 513 * ONE,
        struct.pack("<HH", 1, 1) + 2 * ONE + b"x",
    ],
)
def test_what_no_card_saved_is_refused(make: Callable[..., Card], data: bytes) -> None:
    card = make()
    with pytest.raises(ValueError, match=r"bytes|completions"):
        card.path.stage(data)
    card.path.stage(struct.pack("<HH", 512, 512) + 1024 * ONE)


@settings(max_examples=200)
@given(st.binary(max_size=200))
def test_hostile_bytes_are_refused_or_do_no_harm(data: bytes) -> None:
    card = Card(LOOPBACK)
    try:
        card.offer(100, 100)
        try:
            apply = card.path.stage(data)
        except ValueError:
            return
        with card.path.gate:
            apply()
        for _ in range(100):
            if not card.path.service():
                break
        card.path.stage(card.path.save())
    finally:
        card.close()


# --- a card that may not do DMA


def test_a_stopped_card_sends_what_it_has_accepted(make: Callable[..., Card]) -> None:
    card = make(STREAM)
    card.port.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    for _ in range(3):
        card.send(frame(bytes(60000)))
    card.settle()
    accepted = len(card.tx.used())
    assert accepted
    with card.path.gate:
        card.path.bus_master = False
    received = 0
    while part := b"".join(sent(card)):
        received += len(part)
        card.settle()
    assert received == accepted * (4 + 14 + 60000)
    assert card.path.awaited == 0
