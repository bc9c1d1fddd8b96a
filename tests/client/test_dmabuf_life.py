"""The life of an export in any order of events, with several importers, against a model that only counts."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from enum import Enum, auto
from errno import EBUSY, EINVAL, ENODEV
from types import SimpleNamespace
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import example, given, settings
from hypothesis import strategies as st

from client.decoding import MemoryDecoding
from client.dmabuf import Attachment, BarExport, DmaBufError
from client.phys_vec import PhysVec

SIZE = 4096


class Kind(Enum):
    """How an importer lets go: at once, when it may, or by unmapping some time after it was told."""

    QUICK = auto()
    SLOW = auto()
    LATE = auto()


class Do(Enum):
    """What can happen; a number says to which importer."""

    ATTACH = auto()
    MAP = auto()
    UNMAP = auto()
    DETACH = auto()
    LET_GO = auto()
    OFF = auto()
    ON = auto()
    REVOKE = auto()
    RESTORE = auto()
    GIVE_UP = auto()
    CLOSE = auto()


OFTEN = (Do.ATTACH, Do.MAP, Do.MAP, Do.LET_GO, Do.UNMAP) * 2
STEPS = st.lists(
    st.tuples(st.sampled_from([*OFTEN, *Do]), st.integers(0, 3), st.sampled_from(Kind)), max_size=40
)


@dataclass(eq=False)
class Party:
    """An importer, and how often the model has it mapped."""

    kind: Kind
    maps: int = 0
    attachment: Attachment | None = None
    told: int = 0
    """Times it heard all of it since the export could be mapped last."""
    deaf: trio.Event = field(default_factory=trio.Event)

    async def invalidate(self) -> None:
        assert self.attachment is not None
        assert self.attachment.export.revoked
        if self.kind is Kind.SLOW:
            await self.deaf.wait()
        if self.kind is not Kind.LATE:
            self.let_go()
        self.told += 1

    def let_go(self) -> None:
        assert self.attachment is not None
        while self.maps:
            self.attachment.unmap()
            self.maps -= 1


def errno_of(call: Callable[[], object]) -> int:
    """0, or the errno of a refusal."""
    try:
        call()
    except DmaBufError as error:
        return error.errno
    return 0


class Life:
    """One example."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.nursery = nursery
        owner: Any = SimpleNamespace()
        owner.decoding = MemoryDecoding(owner)
        self.decoding: MemoryDecoding = owner.decoding
        self.file = os.memfd_create("bar", os.MFD_CLOEXEC)
        os.ftruncate(self.file, SIZE)
        self.export = BarExport(owner, 0, os.dup(self.file), (PhysVec(0, SIZE),))
        self.parties: list[Party] = []
        self.under_way: list[trio.CancelScope] = []
        self.revoking = 0
        self.closed = False

    @property
    def maps(self) -> int:
        return sum(party.maps for party in self.parties)

    async def write_command(self, command: bytes) -> None:
        async def write() -> None:
            if command == b"\0":
                assert self.closed or self.maps == 0, "the device stops to answer while somebody uses it"

        await self.decoding.around_write(4, command, write)

    async def revoke(self) -> None:
        self.revoking += 1
        try:
            await self.export.revoke()
        finally:
            self.revoking -= 1
        assert self.maps == 0, "it was not waited for the last map"

    async def close(self) -> None:
        self.closed = True
        await self.export.aclose()
        assert self.maps == 0

    async def change(self, scope: trio.CancelScope, do: Callable[[], Awaitable[None]]) -> None:
        self.under_way.append(scope)
        with scope:
            await do()
        self.under_way.remove(scope)

    def start(self, do: Callable[[], Awaitable[None]]) -> None:
        """Do something that may wait; one thing at a time, but for `revoke`."""
        if not self.under_way or do == self.revoke:
            self.nursery.start_soon(self.change, trio.CancelScope(), do)

    def step(self, do: Do, number: int, kind: Kind) -> None:
        match do:
            case Do.ATTACH:
                party = Party(kind)
                revoked = self.export.revoked
                if len(self.parties) < 4:
                    assert errno_of(lambda: self.attach(party)) == (ENODEV if revoked else 0)
            case Do.OFF:
                self.start(lambda: self.write_command(b"\0"))
            case Do.ON:
                self.start(lambda: self.write_command(b"\2"))
            case Do.REVOKE:
                self.start(self.revoke)
            case Do.RESTORE:
                self.start(self.export.restore)
            case Do.CLOSE:
                self.start(self.close)
            case Do.GIVE_UP:
                for scope in self.under_way:
                    scope.cancel()
            case _ if number < len(self.parties):
                self.step_of(do, self.parties[number])

    def attach(self, party: Party) -> None:
        party.attachment = self.export.attach(party)
        self.parties.append(party)

    def step_of(self, do: Do, party: Party) -> None:
        attachment = party.attachment
        assert attachment is not None
        if do is Do.MAP:
            revoked = self.export.revoked
            assert errno_of(attachment.map) == (ENODEV if revoked else 0), "mapped while revoked"
            party.maps += not revoked
        elif do is Do.UNMAP:
            assert errno_of(attachment.unmap) == (0 if party.maps else EINVAL), "fewer maps than none"
            party.maps -= party.maps > 0
        elif do is Do.DETACH:
            assert errno_of(attachment.detach) == (EBUSY if party.maps else 0)
            if not party.maps:
                self.parties.remove(party)
                party.deaf.set()  # he is still waited for if he was just being told
        else:
            party.deaf.set()
            if party.kind is Kind.LATE:
                party.let_go()

    def check(self) -> None:
        """What is always true once all is quiet."""
        export = self.export
        assert export.maps == self.maps
        assert [party.attachment for party in self.parties] == export._attachments
        if self.revoking or self.closed or not self.decoding.enabled:
            assert export.revoked
        if not export.revoked:
            for party in self.parties:
                party.told = 0
        assert all(party.told <= 1 for party in self.parties), "told twice"
        waits_for = [party for party in self.parties if party.maps or not party.deaf.is_set()]
        if not waits_for:
            assert not self.under_way, "waiting for nobody"

    async def end(self) -> None:
        """Everybody lets go: whatever waits comes to an end, and so does the export."""
        for party in self.parties:
            party.deaf.set()
            party.let_go()
        await trio.testing.wait_all_tasks_blocked()
        assert not self.under_way
        if not self.closed:
            await self.write_command(b"\2")
            await self.export.restore()
            assert not self.export.revoked
        await self.close()
        os.close(self.file)


GIVEN_UP = [(do, 0, Kind.LATE) for do in (Do.ATTACH, Do.MAP, Do.OFF, Do.GIVE_UP)]


@settings(max_examples=300)
@given(STEPS)
@example([*GIVEN_UP, (Do.ON, 0, Kind.LATE), (Do.MAP, 0, Kind.LATE)])
@example([*GIVEN_UP, (Do.OFF, 0, Kind.LATE), (Do.LET_GO, 0, Kind.LATE), (Do.ON, 0, Kind.LATE)])
@example([(Do.ATTACH, 0, Kind.SLOW), (Do.CLOSE, 0, Kind.SLOW), (Do.DETACH, 0, Kind.SLOW)])
async def test_nobody_maps_what_is_revoked_and_nobody_is_forgotten(
    steps: list[tuple[Do, int, Kind]],
) -> None:
    async with trio.open_nursery() as nursery:
        life = Life(nursery)
        for step in steps:
            life.step(*step)
            await trio.testing.wait_all_tasks_blocked()
            life.check()
        await life.end()


async def test_the_model_sees_a_map_that_nobody_counted() -> None:
    async with trio.open_nursery() as nursery:
        life = Life(nursery)
        life.step(Do.ATTACH, 0, Kind.QUICK)
        life.step(Do.MAP, 0, Kind.QUICK)
        life.parties[0].maps -= 1
        with pytest.raises(AssertionError):
            life.check()
        life.parties[0].maps += 1
        await life.end()
