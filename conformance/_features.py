"""How checks get and set device features."""

from __future__ import annotations

from typing import Final

from conformance._messages import Message, split
from conformance._peer import Peer
from conformance.checks import NotApplicable, expect
from protocol import Command
from protocol.messages import DeviceFeature, FeatureMigration, FeatureMigState, Record
from protocol.vfio import DeviceState, Feature, FeatureFlags, MigrationFlags

GET: Final = FeatureFlags.GET
SET: Final = FeatureFlags.SET
PROBE: Final = FeatureFlags.PROBE

ROOM: Final = 64 << 10
"""`argsz` of a GET: the bits of 2 GiB in small pages."""


async def get(peer: Peer, feature: int, data: bytes | Record = b"", *, room: int = ROOM) -> Message:
    """The answer to GET, granted or refused."""
    content = data.encode() if isinstance(data, Record) else data
    asked = DeviceFeature(room, FeatureFlags(GET | feature))
    return await peer.ask(Command.DEVICE_FEATURE, asked.encode() + content)


async def put(peer: Peer, feature: int, data: bytes | Record = b"") -> Message:
    """The answer to SET, granted or refused."""
    content = data.encode() if isinstance(data, Record) else data
    asked = DeviceFeature(DeviceFeature.size + len(content), FeatureFlags(SET | feature))
    return await peer.ask(Command.DEVICE_FEATURE, asked.encode() + content)


async def migration_flags(peer: Peer) -> MigrationFlags:
    """How the device can migrate; `NotApplicable` if it cannot."""
    reply = await get(peer, Feature.MIGRATION)
    if reply.refused:
        raise NotApplicable("the device cannot migrate")
    _, data = split(reply, DeviceFeature)
    expect(len(data) >= FeatureMigration.size, "8 bytes of flags", f"{len(data)} bytes")
    return FeatureMigration.decode(data).flags


async def state(peer: Peer) -> DeviceState:
    """The device's migration state."""
    reply = await get(peer, Feature.MIG_DEVICE_STATE)
    expect(not reply.refused, "that GET of MIG_DEVICE_STATE is granted", reply)
    _, data = split(reply, DeviceFeature)
    expect(len(data) >= 4, "8 bytes of state", f"{len(data)} bytes")
    number = int(FeatureMigState.decode(data.ljust(FeatureMigState.size, b"\0")).device_state)
    expect(number in tuple(DeviceState), "a state that is defined", number)
    return DeviceState(number)


async def ask_state(peer: Peer, wanted: int) -> Message:
    """The answer to a change of state, granted or refused."""
    return await put(peer, Feature.MIG_DEVICE_STATE, FeatureMigState(wanted))


async def change(peer: Peer, *path: DeviceState) -> None:
    """Changes of state that must be granted, each seen to be complete."""
    for wanted in path:
        reply = await ask_state(peer, wanted)
        expect(not reply.refused, f"that the change to {wanted.name} is granted", reply)
        found = await state(peer)
        expect(found == wanted, f"{wanted.name}, as the reply promised", found.name)
