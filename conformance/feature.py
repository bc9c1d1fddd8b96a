"""Checks of device features: what is there, and what their form must be."""

from __future__ import annotations

from typing import Final

from conformance._features import GET, PROBE, SET, get, migration_flags, state
from conformance._messages import split
from conformance._server import Server
from conformance.checks import EXTENSION, MUST, SHOULD, NotApplicable, Section, expect
from protocol import Command
from protocol.messages import DeviceFeature, FeatureMigration
from protocol.vfio import DeviceState, Feature, FeatureFlags, MigrationFlags

section = Section("feature", "VFIO_USER_DEVICE_FEATURE")

FEATURE: Final = Command.DEVICE_FEATURE
NOBODYS: Final = 0xFFFF

METHODS: Final = {
    Feature.MIGRATION: GET,
    Feature.MIG_DEVICE_STATE: GET | SET,
    Feature.DMA_LOGGING_START: SET,
    Feature.DMA_LOGGING_STOP: SET,
    Feature.DMA_LOGGING_REPORT: GET,
    Feature.DMA_BUF: GET,
}


def _probe(feature: int, methods: int = 0) -> DeviceFeature:
    return DeviceFeature(DeviceFeature.size, FeatureFlags(PROBE | methods | feature))


@section.check(MUST)
async def unknown(server: Server) -> None:
    """A feature that does not exist is refused, whatever is asked of it."""
    async with server.session() as peer:
        for flags in (PROBE, PROBE | GET, PROBE | SET, GET, SET):
            asked = DeviceFeature(64, FeatureFlags(flags | NOBODYS))
            await peer.refused(FEATURE, asked, what=f"feature {NOBODYS} with {flags!r}")


@section.check(MUST)
async def probing(server: Server) -> None:
    """Each feature may be probed; a probe that succeeds is answered with its own payload."""
    async with server.session() as peer:
        for feature, methods in METHODS.items():
            asked = _probe(feature, methods)
            reply = await peer.ask(FEATURE, asked)
            if not reply.refused:
                body, rest = split(reply, DeviceFeature)
                good = body.flags == asked.flags and not rest
                expect(good, f"{asked.pretty()} alone", f"{body.pretty()} and {len(rest)} bytes")
        await peer.quiet("what was answered")


@section.check(MUST)
async def all_methods(server: Server) -> None:
    """A probe succeeds only if all the methods given with it are there."""
    async with server.session() as peer:
        for feature, methods in METHODS.items():
            for missing in (GET, SET):
                if not methods & missing:
                    await peer.refused(FEATURE, _probe(feature, missing), what=f"{feature.name}, {missing!r}")
                    both = _probe(feature, GET | SET)
                    await peer.refused(FEATURE, both, what=f"{feature.name}, GET and SET")


@section.check(MUST)
async def probe_tells_the_truth(server: Server) -> None:
    """A feature whose GET can be probed can be got, and the other way round."""
    async with server.session() as peer:
        for feature in (Feature.MIGRATION, Feature.MIG_DEVICE_STATE):
            probed = await peer.ask(FEATURE, _probe(feature, GET))
            got = await peer.ask(FEATURE, DeviceFeature(64, FeatureFlags(GET | feature)))
            wanted = (
                f"that GET of {feature.name} is {'refused' if probed.refused else 'granted'}, as its probe"
            )
            expect(probed.refused == got.refused, wanted, got)


@section.check(MUST)
async def get_and_set(server: Server) -> None:
    """GET and SET exclude each other, but in a probe."""
    async with server.session() as peer:
        flags = FeatureFlags(GET | SET | Feature.MIG_DEVICE_STATE)
        asked = DeviceFeature(16, flags).encode() + bytes(8)
        await peer.refused(FEATURE, asked, what="GET and SET at once")


@section.check(MUST)
async def no_method(server: Server) -> None:
    """Without GET, SET or PROBE there is nothing to do: that is refused."""
    async with server.session() as peer:
        flags = FeatureFlags(Feature.MIGRATION)
        await peer.refused(FEATURE, DeviceFeature(64, flags), what="no method")


@section.check(EXTENSION)
async def undefined_flags(server: Server) -> None:
    """Flags that are not defined are refused, as the kernel does."""
    async with server.session() as peer:
        await migration_flags(peer)
        flags = FeatureFlags(GET | Feature.MIGRATION | 1 << 24)
        await peer.refused(FEATURE, DeviceFeature(64, flags), what="flag 24")


@section.check(SHOULD)
async def little_room(server: Server) -> None:
    """A reply longer than the request allows is not sent: it is refused, or cut and its argsz tells the
    need.
    """
    async with server.session() as peer:
        await migration_flags(peer)
        asked = DeviceFeature(DeviceFeature.size, FeatureFlags(GET | Feature.MIGRATION))
        reply = await peer.ask(FEATURE, asked)
        if not reply.refused:
            body, rest = split(reply, DeviceFeature)
            needed = DeviceFeature.size + FeatureMigration.size
            good = body.argsz == needed and not rest
            expect(good, f"8 bytes with argsz {needed}", f"{body.pretty()} and {len(rest)} bytes")


@section.check(MUST)
async def argsz(server: Server) -> None:
    """argsz of a reply to GET counts the record and the feature's data."""
    async with server.session() as peer:
        await migration_flags(peer)
        reply = await get(peer, Feature.MIGRATION)
        body, _ = split(reply, DeviceFeature)
        size = DeviceFeature.size + FeatureMigration.size
        good = body.argsz == size and len(reply.payload) == size
        expect(good, f"argsz {size} and as many bytes", f"{body.pretty()} of {len(reply.payload)} bytes")


@section.check(MUST)
async def migration(server: Server) -> None:
    """A device that can migrate has STOP_COPY at least, and no flag that is not defined."""
    async with server.session() as peer:
        flags = await migration_flags(peer)
        expect(MigrationFlags.STOP_COPY in flags, "VFIO_MIGRATION_STOP_COPY", repr(flags))
        expect(int(flags) & ~0x7 == 0, "bits 0 to 2 alone", hex(flags))


@section.check(MUST)
async def begins_running(server: Server) -> None:
    """A device runs until it is asked to stop."""
    async with server.session() as peer:
        await migration_flags(peer)
        found = await state(peer)
        expect(found == DeviceState.RUNNING, "RUNNING", repr(found))


@section.check(MUST)
async def set_of_a_feature_to_get(server: Server) -> None:
    """A feature that can only be got cannot be set."""
    async with server.session() as peer:
        await migration_flags(peer)
        asked = DeviceFeature(16, FeatureFlags(SET | Feature.MIGRATION)).encode() + bytes(8)
        await peer.refused(FEATURE, asked, what="SET of MIGRATION")


@section.check(SHOULD)
async def data_too_short(server: Server) -> None:
    """A SET without its data is refused."""
    async with server.session() as peer:
        try:
            await migration_flags(peer)
        except NotApplicable as reason:
            raise NotApplicable(f"{reason}, so nothing can be set") from None
        for size in (0, 4):
            asked = DeviceFeature(16, FeatureFlags(SET | Feature.MIG_DEVICE_STATE)).encode() + bytes(size)
            await peer.refused(FEATURE, asked, what=f"{size} bytes of state")
