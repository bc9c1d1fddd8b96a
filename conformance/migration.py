"""Checks of migration. All but the probing ones stop the device, and let it run again."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from conformance._device import resettable
from conformance._features import ask_state, change, migration_flags, state
from conformance._messages import Message, message, split
from conformance._peer import Peer
from conformance._server import Server
from conformance.checks import EXTENSION, MUST, SHOULD, Failed, NotApplicable, Section, expect
from protocol import Command
from protocol.limits import DEFAULT_MAX_DATA_XFER_SIZE
from protocol.messages import HeaderFlags, MigData
from protocol.vfio import DeviceState, MigrationFlags

section = Section("migration", "VFIO_USER_DEVICE_FEATURE, migration; VFIO_USER_MIG_DATA_READ, MIG_DATA_WRITE")

RUNNING: Final = DeviceState.RUNNING
STOP: Final = DeviceState.STOP
STOP_COPY: Final = DeviceState.STOP_COPY
PRE_COPY: Final = DeviceState.PRE_COPY
RESUMING: Final = DeviceState.RESUMING

PIECE: Final = 64 << 10
LARGEST_STREAM: Final = 1 << 30
"""Bytes of a device's state that are read: a server that goes on beyond never ends."""


@asynccontextmanager
async def _migratable(
    server: Server, needs: MigrationFlags = MigrationFlags.STOP_COPY
) -> AsyncIterator[Peer]:
    """A session with a device that can migrate; afterwards it runs again, by a reset if it must."""
    async with server.session() as peer:
        flags = await migration_flags(peer)
        if needs not in flags:
            raise NotApplicable(f"the device does not have {needs!r}")
        try:
            yield peer
        finally:
            if await state(peer) != RUNNING and (await ask_state(peer, RUNNING)).refused:
                await peer.ask(Command.DEVICE_RESET)


async def _read(peer: Peer, size: int) -> Message:
    asked = MigData(MigData.size + size, size)
    return await peer.ask(Command.MIG_DATA_READ, asked)


async def _piece(peer: Peer, size: int) -> bytes:
    """Up to `size` bytes of the stream."""
    reply = await _read(peer, size)
    expect(not reply.refused, "that MIG_DATA_READ is granted", reply)
    body, data = split(reply, MigData)
    good = body.length == len(data) <= size and body.argsz == MigData.size + len(data)
    expect(good, f"at most {size} bytes, counted in argsz and size", f"{body.pretty()} of {len(data)} bytes")
    return data


async def _stream(peer: Peer) -> bytes:
    """Everything up to the piece that is shorter than what was asked for."""
    size = min(PIECE, peer.limit("max_data_xfer_size", DEFAULT_MAX_DATA_XFER_SIZE))
    stream = bytearray()
    while len(stream) < LARGEST_STREAM:
        piece = await _piece(peer, size)
        stream += piece
        if len(piece) < size:
            return bytes(stream)
    raise Failed("an end of the stream", f"{len(stream)} bytes and more")


async def _write(peer: Peer, data: bytes, told: int | None = None) -> Message:
    size = len(data) if told is None else told
    asked = MigData(MigData.size + size, size)
    return await peer.ask(Command.MIG_DATA_WRITE, asked.encode() + data)


async def _load(peer: Peer, stream: bytes) -> None:
    """Write a stream that must be taken."""
    size = min(PIECE, peer.limit("max_data_xfer_size", DEFAULT_MAX_DATA_XFER_SIZE))
    for at in range(0, len(stream), size):
        reply = await _write(peer, stream[at : at + size])
        expect(
            not reply.refused and not reply.payload, "that MIG_DATA_WRITE is granted, with no payload", reply
        )


@section.check(MUST)
async def no_data_while_running(server: Server) -> None:
    """There are no migration data outside of the states that move them."""
    async with server.session() as peer:
        reply = await _read(peer, 16)
        expect(reply.refused, "a refusal of MIG_DATA_READ while RUNNING", reply)
        reply = await _write(peer, bytes(16))
        expect(reply.refused, "a refusal of MIG_DATA_WRITE while RUNNING", reply)


@section.check(MUST, destructive=True)
async def stop_and_run(server: Server) -> None:
    """RUNNING to STOP and back; a state that is there already is granted."""
    async with _migratable(server) as peer:
        await change(peer, STOP, RUNNING, STOP, STOP, RUNNING, RUNNING)


@section.check(MUST, destructive=True)
async def saving(server: Server) -> None:
    """STOP to STOP_COPY and back; a stream of migration data comes meanwhile."""
    async with _migratable(server) as peer:
        await change(peer, STOP, STOP_COPY)
        await _stream(peer)
        await change(peer, STOP)
        reply = await _read(peer, 16)
        expect(reply.refused, "a refusal of MIG_DATA_READ in STOP", reply)


@section.check(MUST, destructive=True)
async def saving_at_once(server: Server) -> None:
    """RUNNING to STOP_COPY, and from there to RUNNING: by the shortest way, without a state to stop at."""
    async with _migratable(server) as peer:
        await change(peer, STOP_COPY, RUNNING)


@section.check(MUST, destructive=True)
async def resuming_at_once(server: Server) -> None:
    """RUNNING to RESUMING, by way of STOP."""
    async with _migratable(server) as peer:
        await change(peer, RESUMING)


@section.check(MUST, destructive=True)
async def pre_copy(server: Server) -> None:
    """RUNNING to PRE_COPY and back, and on to STOP_COPY in the same stream."""
    async with _migratable(server, MigrationFlags.PRE_COPY) as peer:
        await change(peer, PRE_COPY)
        await _piece(peer, 4096)
        await change(peer, RUNNING, PRE_COPY)
        first = await _stream(peer)
        await change(peer, STOP_COPY)
        second = await _stream(peer)
        expect(first or second, "some migration data", "none")


@section.check(MUST, destructive=True)
async def without_pre_copy(server: Server) -> None:
    """Without PRE_COPY its arcs are not there."""
    async with _migratable(server) as peer:
        if MigrationFlags.PRE_COPY in await migration_flags(peer):
            raise NotApplicable("the device has PRE_COPY")
        await _refused(peer, PRE_COPY)


async def _refused(peer: Peer, wanted: int) -> None:
    """A change that is refused, and after which the device is where it was."""
    before = await state(peer)
    reply = await ask_state(peer, wanted)
    expect(reply.refused, f"a refusal of the change from {before.name} to state {wanted}", reply)
    after = await state(peer)
    expect(after == before, f"{before.name}, as before the refusal", after.name)


@section.check(MUST, destructive=True)
async def no_way_back_to_pre_copy(server: Server) -> None:
    """STOP_COPY to PRE_COPY is an error."""
    async with _migratable(server) as peer:
        await change(peer, STOP_COPY)
        await _refused(peer, PRE_COPY)


@section.check(MUST)
async def error_cannot_be_asked_for(server: Server) -> None:
    """ERROR cannot be asked for."""
    async with _migratable(server) as peer:
        await _refused(peer, DeviceState.ERROR)


@section.check(MUST)
async def undefined_states(server: Server) -> None:
    """States that are not defined, or not used in vfio-user, are refused."""
    async with _migratable(server) as peer:
        for number in (DeviceState.RUNNING_P2P, DeviceState.PRE_COPY_P2P, 8, 0xFFFFFFFF):
            await _refused(peer, number)


@section.check(MUST, destructive=True)
async def round_trip(server: Server) -> None:
    """A device takes back the state that it gave, and runs."""
    async with _migratable(server) as peer:
        await change(peer, STOP_COPY)
        stream = await _stream(peer)
        await change(peer, STOP, RESUMING)
        await _load(peer, stream)
        await change(peer, STOP, RUNNING)
        await peer.quiet("a migration")


@section.check(MUST, destructive=True)
async def small_pieces(server: Server) -> None:
    """Migration data are a stream: they may be taken and given in pieces of any size."""
    async with _migratable(server) as peer:
        await change(peer, STOP_COPY)
        whole = await _stream(peer)
        await change(peer, STOP, STOP_COPY)
        head = b"".join([await _piece(peer, size) for size in (1, 2, 3, 5, 8, 13)])
        expect(len(head) == min(32, len(whole)), "32 bytes in six pieces", len(head))
        await change(peer, STOP, RESUMING)
        for at in range(0, min(64, len(whole)), 7):
            await _load(peer, whole[at : min(at + 7, 64)])
        await _load(peer, whole[64:])
        await change(peer, STOP)


async def _not_taken(peer: Peer, stream: bytes, what: str) -> None:
    """A stream that is refused: at once, or when it is to be used. A reset makes the device run again."""
    await resettable(peer)
    await change(peer, STOP, RESUMING)
    refused = bool(stream) and (await _write(peer, stream)).refused
    reply = await ask_state(peer, STOP)
    expect(refused or reply.refused, f"a refusal of {what}", reply)
    found = await state(peer)
    expect(found in (RESUMING, STOP, DeviceState.ERROR), "RESUMING, STOP or ERROR", found.name)
    await peer.granted(Command.DEVICE_RESET)
    found = await state(peer)
    expect(found == RUNNING, "RUNNING after a reset", found.name)


@section.check(MUST, destructive=True)
async def nonsense(server: Server) -> None:
    """Migration data that are none make the change to STOP fail."""
    async with _migratable(server) as peer:
        await _not_taken(peer, bytes(range(256)), "256 bytes that are no state")


@section.check(MUST, destructive=True)
async def incomplete(server: Server) -> None:
    """Migration data that end early make the change to STOP fail."""
    async with _migratable(server) as peer:
        await change(peer, STOP_COPY)
        stream = await _stream(peer)
        if len(stream) < 2:
            raise NotApplicable(f"the device's state has {len(stream)} bytes")
        await change(peer, STOP)
        await _not_taken(peer, stream[: min(len(stream) // 2, PIECE)], "half of a state")


@section.check(EXTENSION, destructive=True)
async def altered(server: Server) -> None:
    """Migration data in which a bit was turned make the change to STOP fail."""
    async with _migratable(server) as peer:
        await change(peer, STOP_COPY)
        stream = bytearray(await _stream(peer))
        if not stream or len(stream) > PIECE:
            raise NotApplicable(f"the device's state has {len(stream)} bytes")
        stream[-1] ^= 1
        await change(peer, STOP)
        await _not_taken(peer, bytes(stream), "a state whose last bit was turned")


@section.check(MUST, destructive=True)
async def reset_runs(server: Server) -> None:
    """DEVICE_RESET leads to RUNNING from wherever the device is."""
    async with _migratable(server) as peer:
        await resettable(peer)
        for path in ((STOP,), (STOP, STOP_COPY), (STOP, RESUMING)):
            await change(peer, *path)
            await peer.granted(Command.DEVICE_RESET)
            found = await state(peer)
            expect(found == RUNNING, f"RUNNING after a reset in {path[-1].name}", found.name)


@section.check(EXTENSION, destructive=True)
async def next_client_finds_it_running(server: Server) -> None:
    """A client that leaves a stopped device does not leave it stopped for the next one."""
    async with server.session() as peer:
        await migration_flags(peer)
        await change(peer, STOP)
    async with server.session() as peer:
        found = await state(peer)
        if found != RUNNING:
            await ask_state(peer, RUNNING)
        expect(found == RUNNING, "RUNNING", found.name)


@section.check(SHOULD, destructive=True)
async def too_much_at_once(server: Server) -> None:
    """A piece of more than max_data_xfer_size is refused, or cut."""
    async with _migratable(server) as peer:
        await change(peer, STOP_COPY)
        most = peer.limit("max_data_xfer_size", DEFAULT_MAX_DATA_XFER_SIZE)
        reply = await _read(peer, 0xFFFFFF00)
        good = reply.refused or len(reply.payload) <= MigData.size + most
        expect(good, f"a refusal, or at most {most} bytes", reply)


@section.check(SHOULD, destructive=True)
async def length_of_others(server: Server) -> None:
    """A piece that is shorter than it says is refused."""
    async with _migratable(server) as peer:
        await change(peer, STOP, RESUMING)
        reply = await _write(peer, bytes(16), told=17)
        expect(reply.refused, "a refusal of 16 bytes for 17", reply)


@section.check(MUST, destructive=True)
async def posted(server: Server) -> None:
    """A piece that wants no reply is taken before later commands."""
    async with _migratable(server) as peer:
        await change(peer, STOP_COPY)
        stream = await _stream(peer)
        if len(stream) > PIECE:
            raise NotApplicable(f"the device's state has {len(stream)} bytes")
        await change(peer, STOP, RESUMING)
        body = MigData(MigData.size + len(stream), len(stream)).encode() + stream
        await peer.send(message(Command.MIG_DATA_WRITE, body, flags=HeaderFlags.NO_REPLY))
        await change(peer, STOP)


@section.check(EXTENSION, destructive=True)
async def registers_answer_while_stopped(server: Server) -> None:
    """A stopped device still answers its client."""
    async with _migratable(server) as peer:
        await change(peer, STOP)
        await peer.quiet("the change to STOP")
