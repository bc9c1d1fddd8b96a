from __future__ import annotations

import os
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from errno import EINVAL, ENOSPC

import pytest
import trio
import trio.testing

import client
from client.migration import MigrationControl, MigrationError, migrate
from protocol import Command
from protocol.limits import PRECOPY_ENOUGH, PRECOPY_PASSES
from protocol.vfio import DeviceState, Feature, FeatureFlags, MigrationFlags
from tests.client.fake_mover import (
    ERROR,
    PRE_COPY,
    RESUMING,
    RUNNING,
    STOP,
    STOP_COPY,
    FakeMover,
)
from tests.client.peer import FEATURE, MIG_READ, Message, Peer, session_with


@asynccontextmanager
async def served(device: FakeMover) -> AsyncIterator[client.Session]:
    """A session with a device that can be moved."""
    with trio.fail_after(30):
        async with session_with() as (session, peer), trio.open_nursery() as nursery:
            nursery.start_soon(device.serve, peer)
            yield session
            nursery.cancel_scope.cancel()


@asynccontextmanager
async def both(source: FakeMover, target: FakeMover) -> AsyncIterator[tuple[client.Session, client.Session]]:
    """Sessions with the two ends of a migration."""
    async with served(source) as first, served(target) as second:
        yield first, second


# the commands


async def test_flags_and_states_are_asked_and_set() -> None:
    device = FakeMover(flags=5)
    async with served(device) as session:
        control = MigrationControl(session)
        assert await control.flags() == MigrationFlags.STOP_COPY | MigrationFlags.PRE_COPY
        assert await control.state() is DeviceState.RUNNING
        await control.set_state(DeviceState.STOP_COPY)
        assert await control.state() is DeviceState.STOP_COPY
        assert device.states == [STOP, STOP_COPY]


async def test_a_device_that_cannot_be_moved_says_so() -> None:
    async with served(FakeMover(flags=0)) as session:
        assert not await session.feature_probe(Feature.MIGRATION)
        with pytest.raises(client.ServerError, match=r"DEVICE_FEATURE.*ENOTTY"):
            await MigrationControl(session).flags()
    async with served(FakeMover()) as session:
        assert await session.feature_probe(Feature.MIGRATION, FeatureFlags.GET)


async def test_data_goes_in_chunks_both_ways() -> None:
    device = FakeMover(rest=b"0123456789")
    async with served(device) as session:
        control = MigrationControl(session)
        await control.set_state(DeviceState.STOP_COPY)
        assert [await control.read_chunk(6), await control.read_chunk(6)] == [b"012345", b"6789"]
        await control.set_state(DeviceState.RESUMING)
        await control.write_chunk(b"abc")
        await control.write_chunk(b"def")
        assert device.incoming == b"abcdef"
        assert control.chunk_size == 4096, "what the server said it takes"


Reply = Callable[[Peer, Message], None]


@pytest.mark.parametrize(
    "reply",
    [
        lambda peer, to: peer.reply(to, struct.pack("=IIII", 16, 1 << 16 | 2, 99, 0)),
        lambda peer, to: peer.reply(to, struct.pack("=II", 8, 1 << 16 | 2)),
        lambda peer, to: peer.reply(to, struct.pack("=IIIII", 20, 1 << 16 | 2, 1, 0, 0)),
        lambda peer, to: peer.reply(to, struct.pack("=IIII", 16, 1 << 16 | 1, 1, 0)),
    ],
    ids=["no such state", "nothing", "too much", "another feature"],
)
async def test_a_state_that_is_none_is_an_error(reply: Reply) -> None:
    async with session_with() as (session, peer), trio.open_nursery() as nursery:

        async def serve() -> None:
            reply(peer, await peer.expect(FEATURE))

        nursery.start_soon(serve)
        with pytest.raises(client.BadReplyError):
            await MigrationControl(session).state()


async def test_a_server_that_says_it_went_elsewhere_is_an_error() -> None:
    async with session_with() as (session, peer), trio.open_nursery() as nursery:

        async def serve() -> None:
            message = await peer.expect(FEATURE)
            peer.reply(message, message.payload[:8] + struct.pack("=II", STOP, 0))

        nursery.start_soon(serve)
        with pytest.raises(client.BadReplyError, match="STOP, not RUNNING"):
            await MigrationControl(session).set_state(DeviceState.RUNNING)


async def test_more_data_than_was_asked_for_is_an_error() -> None:
    async with session_with() as (session, peer), trio.open_nursery() as nursery:

        async def serve() -> None:
            message = await peer.expect(MIG_READ)
            peer.reply(message, struct.pack("=II", 13, 5) + b"12345")

        nursery.start_soon(serve)
        with pytest.raises(client.BadReplyError) as refusal:
            await MigrationControl(session).read_chunk(4)
        assert refusal.value.command is Command.MIG_DATA_READ


# the whole


async def test_a_device_is_moved_while_it_runs() -> None:
    passes = [os.urandom(PRECOPY_ENOUGH * 3), os.urandom(PRECOPY_ENOUGH), os.urandom(100)]
    rest = os.urandom(10_000)
    source, target = FakeMover(ahead=list(passes), rest=rest), FakeMover()
    async with both(source, target) as (first, second):
        report = await migrate(first, second)
    assert target.incoming == b"".join(passes) + rest
    assert source.states == [PRE_COPY, STOP_COPY, STOP]
    assert target.states == [STOP, RESUMING, STOP, RUNNING]
    assert (source.state, target.state) == (STOP, RUNNING)
    assert (report.bytes_precopy, report.bytes_stopcopy) == (len(b"".join(passes)), len(rest))
    assert report.passes == 3
    assert 0 < report.downtime_seconds < report.total_seconds


@pytest.mark.parametrize(("flags", "precopy"), [(1, True), (5, False)], ids=["it cannot", "not wanted"])
async def test_a_device_is_moved_without_copying_ahead(flags: int, precopy: bool) -> None:
    source, target = FakeMover(ahead=[b"never read"], rest=b"r" * 4096, flags=flags), FakeMover(flags=1)
    async with both(source, target) as (first, second):
        report = await migrate(first, second, precopy=precopy)
    assert source.states == [STOP, STOP_COPY, STOP]
    assert target.incoming == b"r" * 4096
    assert (report.bytes_precopy, report.passes) == (0, 0)


async def test_a_device_that_never_stands_still_is_stopped() -> None:
    source = FakeMover(ahead=[bytes(PRECOPY_ENOUGH)] * (PRECOPY_PASSES + 5))
    async with both(source, FakeMover()) as (first, second):
        report = await migrate(first, second)
    assert report.passes == PRECOPY_PASSES
    assert len(source.ahead) == 5


async def test_a_device_that_always_has_more_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("client.migration.PRECOPY_LIMIT", 100_000)
    source = FakeMover(ahead=[bytes(1_000_000)])
    async with both(source, FakeMover()) as (first, second):
        report = await migrate(first, second)
    assert 100_000 <= report.bytes_precopy < 100_000 + 4096


async def test_a_target_that_refuses_the_first_bytes_leaves_the_source_running() -> None:
    source, target = FakeMover(ahead=[b"identity"], rest=b"rest"), FakeMover(bad_byte=0)
    async with both(source, target) as (first, second):
        with pytest.raises(MigrationError, match=r"copying the running device.*EINVAL") as failure:
            await migrate(first, second)
    assert failure.value.source_running
    assert source.states == [PRE_COPY, RUNNING], "it never stopped"
    assert (target.resets, target.state) == (1, RUNNING)


@pytest.mark.parametrize(
    ("source", "target", "phase"),
    [
        (FakeMover(refuse={PRE_COPY: ENOSPC}), FakeMover(), "copying the running device"),
        (FakeMover(refuse={STOP_COPY: EINVAL}), FakeMover(), "copying the stopped device"),
        (FakeMover(rest=bytes(9000)), FakeMover(bad_byte=5000), "copying the stopped device"),
        (FakeMover(), FakeMover(refuse={RESUMING: EINVAL}), "preparing the target"),
        (FakeMover(), FakeMover(refuse={STOP: EINVAL}), "completing the target"),
        (FakeMover(refuse={STOP: EINVAL}), FakeMover(), "completing the target"),
        (FakeMover(), FakeMover(refuse={RUNNING: EINVAL}), "starting the target"),
    ],
    ids=["pre-copy", "stop", "middle", "resuming", "end of data", "source", "start"],
)
async def test_whatever_fails_the_source_runs_and_the_target_does_nothing(
    source: FakeMover, target: FakeMover, phase: str
) -> None:
    async with both(source, target) as (first, second):
        with pytest.raises(MigrationError, match=phase) as failure:
            await migrate(first, second)
        assert failure.value.phase == phase
        assert failure.value.source_running
        assert source.state == RUNNING
        assert target.resets == 1
        await first.feature_probe(Feature.MIGRATION)


async def test_a_side_that_cannot_be_moved_changes_nothing() -> None:
    for flags in ((0, 5), (5, 0), (4, 5)):
        source, target = FakeMover(flags=flags[0]), FakeMover(flags=flags[1])
        async with both(source, target) as (first, second):
            with pytest.raises(MigrationError, match="asking both sides") as failure:
                await migrate(first, second)
        assert failure.value.source_running
        assert source.states == target.states == []
        assert target.resets == 0


async def test_a_migration_that_is_cancelled_leaves_the_source_running() -> None:
    source, target = FakeMover(rest=bytes(100)), FakeMover(deaf={STOP})
    async with both(source, target) as (first, second):
        with trio.move_on_after(0.05) as scope:
            await migrate(first, second)
        assert scope.cancelled_caught
        assert source.state == RUNNING
        assert target.resets == 1


async def test_a_target_that_leaves_is_an_error_and_the_source_runs() -> None:
    source = FakeMover(rest=bytes(100))
    async with served(source) as first, session_with() as (second, peer), trio.open_nursery() as nursery:

        async def leave() -> None:
            target = FakeMover()
            for _ in range(2):
                target.answer(peer, await peer.next())
            peer.sock.close()

        nursery.start_soon(leave)
        with pytest.raises(MigrationError, match=r"the server is gone|closed the connection"):
            await migrate(first, second)
        assert source.state == RUNNING


async def test_a_target_that_may_run_is_disconnected_before_the_source_runs_again(
    autojump_clock: trio.testing.MockClock,
) -> None:
    source, target = FakeMover(), FakeMover(deaf={RUNNING})
    async with served(source) as first, session_with() as (second, peer), trio.open_nursery() as nursery:
        seen = []

        async def serve() -> None:
            while True:
                try:
                    message = await peer.next()
                except EOFError:
                    seen.append(source.state)
                    return
                if message.command != 13:  # the reset is not answered either
                    target.answer(peer, message)

        nursery.start_soon(serve)
        with pytest.raises(MigrationError, match="no answer within 5 seconds"):
            await migrate(first, second)
        assert source.state == RUNNING
    assert seen == [STOP]


async def test_a_source_that_cannot_run_again_is_told() -> None:
    source = FakeMover(refuse={RUNNING: EINVAL})
    async with both(source, FakeMover(bad_byte=0)) as (first, second):
        source.ahead = [b"x"]
        with pytest.raises(MigrationError) as failure:
            await migrate(first, second)
    assert not failure.value.source_running
    assert "could not be put back" in failure.value.__notes__[0]
    assert source.state == PRE_COPY != ERROR
