"""I/O addresses that any number of devices share, as behind one IOMMU.

    async with open_container() as container:
        await container.attach(session)
        async with container.mapped(None, PageMemory.allocate(1 << 20)) as entry:
            ...  # the device reaches the memory at entry.iova

It does what the kernel's containers do (drivers/vfio/vfio_iommu_type1.c, drivers/iommu/iommufd), with their
errnos: what one device refuses is taken back from the others, and nothing is left half done by whoever gives
up waiting. A server that cannot map a descriptor reaches the memory by message.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, suppress
from errno import EBUSY, ENODEV, ENOSPC
from functools import partial
from typing import Final

import trio

from client._nursery import background
from client._spans import Spans
from client.container._checks import Place, check_permissions, check_place, check_range, selected
from client.container._device import Device
from client.container._following import Following
from client.container._jobs import Jobs
from client.container._placing import Placing
from client.container._sources import ExportListener, source_of
from client.container.backing import Backing, PageRef
from client.container.dirty import DirtyTracking
from client.container.entry import Entry
from client.container.errors import ContainerError
from client.container.limits import (
    DMA_ENTRY_LIMIT,
    FIRST_FREE,
    PAGE,
    RLIMIT,
    UNPIN_ROUNDS,
    LockedMemory,
    process_limit,
)
from client.container.modes import Mode
from client.container.pinning import DmaUnmapCallback, Pinning, PinUser
from client.errors import ClientError
from client.iova import IovaSpace
from client.session import READ_WRITE, Session
from protocol.limits import UNMAP_TIMEOUT
from protocol.vfio import DmaMapFlags


class Container:
    """Made by `open_container`. What waits here may be cancelled: a mapping that is given up is taken back,
    everything else goes on by itself.
    """

    def __init__(self, mode: Mode, entry_limit: int, locked_limit: int | None, nursery: trio.Nursery) -> None:
        self.mode: Final = mode
        self._entry_limit = entry_limit
        self._nursery = nursery
        self._jobs = Jobs(nursery)
        self._lock = trio.Lock()
        self._entries: Spans[Entry] = Spans()
        self._addresses = IovaSpace(FIRST_FREE)
        self._locked = LockedMemory(locked_limit)
        self._placing = Placing(self._locked, self._jobs)
        self._devices = self._placing.devices
        self._pinning = Pinning(mode.rules, self._entries, self._locked)
        self._following = Following(self._zapped, self._revoke, self._restore)
        self.dirty = DirtyTracking(self._entries, self._pinning, self._devices.values)
        """Which pages may have been written to."""

    @property
    def entries(self) -> tuple[Entry, ...]:
        """What is mapped, in the order of its addresses."""
        return tuple(entry for entry in self._entries if entry.mapped)

    @property
    def sessions(self) -> tuple[Session, ...]:
        """Which are attached."""
        return tuple(self._devices)

    @property
    def locked_pages(self) -> int:
        """Pages that count against the limit of locked memory."""
        return self._locked.pages

    # devices

    async def attach(self, session: Session) -> None:
        """Let a device reach all that is mapped, now and from now on, until it is detached or its session
        ends.

        Raises ContainerError, and it reaches nothing: EBUSY if it is attached, EINVAL if its server's pages
        are larger than what is mapped, ENOMEM if it is the first and there is more memory than may be locked,
        EEXIST if the session uses one of the addresses, or what the server says of a mapping.
        """
        await self._jobs.carry_through(partial(self._attach, session), revocable=True)

    async def _attach(self, session: Session) -> None:
        async with self._lock:
            if session in self._devices:
                raise ContainerError(EBUSY, "the device is attached already")
            device = Device(session)
            device.check_page(*(number for entry in self._entries for number in (entry.iova, entry.size)))
            if not self._devices:
                self._locked.attach()
            self._devices[session] = device
            try:
                for entry in self._entries:
                    if entry.reach is not None and entry.source.current(entry.reach):
                        await device.take(entry.iova, entry.size, entry.reach, entry.flags)
            except BaseException:
                with self._jobs.shielded(), suppress(ContainerError):
                    await self._placing.part(device)
                raise
            self._nursery.start_soon(self._watch, device)

    async def detach(self, session: Session) -> None:
        """The device reaches nothing of this any more when it returns. Raises ContainerError(ENODEV) if it is
        not attached; or what the server says, which keeps a mapping then, though it is detached. One that
        keeps a BAR loses its session.
        """
        await self._jobs.carry_through(partial(self._detach, session))

    async def _detach(self, session: Session) -> None:
        async with self._lock:
            if session not in self._devices:
                raise ContainerError(ENODEV, "the device is not attached")
            device = self._devices[session]
            device.watching.cancel()
            await self._placing.part(device)

    async def _watch(self, device: Device) -> None:
        """A session that ended is not attached any more."""
        with device.watching:
            await device.session.wait_end()
            self._jobs.start(partial(self._forget, device))

    async def _forget(self, device: Device) -> None:
        async with self._lock:
            if self._devices.get(device.session) is device:
                await self._placing.part(device)

    # mappings

    async def map(self, iova: int, backing: Backing, flags: DmaMapFlags = READ_WRITE) -> Entry:
        """Let every attached device reach the backing at `iova`, and those that are attached later.

        Raises ContainerError, and no device has anything of it. In the order of type1: EINVAL for nothing,
        EOVERFLOW beyond the last address, EINVAL without permissions or for what is not whole pages, EEXIST
        where something is mapped, ENOSPC for one mapping too many, EINVAL where no memory can be, ENOMEM
        beyond the limit of locked memory, EFAULT for a BAR that cannot be faulted in or memory without that
        permission, EAGAIN for a BAR that comes and goes all the time, ENODEV for an export that is revoked.
        IOMMUFD has its own order, and refuses a BarRange (EFAULT) and an export of several ranges
        (EOPNOTSUPP). Then what a server says.
        """
        return await self._jobs.carry_through(partial(self._map, iova, backing, flags), revocable=True)

    @asynccontextmanager
    async def mapped(
        self, iova: int | None, backing: Backing, flags: DmaMapFlags = READ_WRITE
    ) -> AsyncIterator[Entry]:
        """`map` until the block ends; at a free address if `iova` is None, or ContainerError(ENOSPC)."""
        entry = await self._jobs.carry_through(partial(self._map, iova, backing, flags), revocable=True)
        try:
            yield entry
        except BaseException:
            with trio.move_on_after(UNMAP_TIMEOUT, shield=True), suppress(ContainerError):
                await self._unmap_entry(entry)
            raise
        await self._unmap_entry(entry)

    async def _unmap_entry(self, entry: Entry) -> None:
        if entry.mapped:
            await self.unmap(entry.iova, entry.size)

    async def _map(self, iova: int | None, backing: Backing, flags: DmaMapFlags) -> Entry:
        async with self._lock:
            source = source_of(backing, self.mode.rules)
            if iova is None:
                iova = self._free_address(source.size) if source.size > 0 else FIRST_FREE
            full = self.mode.rules.limits_entries and len(self._entries) >= self._entry_limit
            overlaps = source.size > 0 and self._entries.overlap(iova, iova + source.size)
            check_place(self.mode, Place(iova, source.size, source.offset, flags, PAGE, overlaps, full))
            for device in self._devices.values():
                device.check_page(iova, source.size)
            if self._locked.attached:
                self._locked.check(source.pages)
            entry = Entry(iova, flags, backing, source)
            source.open(ExportListener(partial(self._revoke, (entry,)), partial(self._moved, entry)))
            self._add(entry)
            try:
                await self._placing.place(entry)
            except BaseException:
                self._remove(entry)
                raise
            entry.change(mapped=True)
            return entry

    def _free_address(self, size: int) -> int:
        """An address that nobody uses here, nor in any of the sessions."""
        page = max([PAGE, *(device.session.dma_page_size for device in self._devices.values())])
        refused = []
        try:
            while True:
                try:
                    iova = self._addresses.take(size, align=page)
                except ClientError as error:
                    raise ContainerError(ENOSPC, str(error)) from None
                refused.append(iova)
                if not any(session.iovas.in_use(iova, size) for session in self._devices):
                    return iova
        finally:
            for iova in refused:
                self._addresses.give(iova, size)

    def _add(self, entry: Entry) -> None:
        self._entries.add(entry.iova, entry.end, entry)
        self._addresses.take(entry.size, at=entry.iova)
        self._locked.mapped += entry.source.pages
        if entry.source.decoding is not None:
            self._following.add(entry.source.decoding, entry)

    def _remove(self, entry: Entry) -> None:
        """Forget a mapping, which no device has any more; nothing happens if it is forgotten."""
        if self._entries.get(entry.iova) is not entry:
            return
        if entry.source.decoding is not None:
            self._following.remove(entry.source.decoding, entry)
        self._locked.mapped -= entry.source.pages
        self._addresses.give(entry.iova, entry.size)
        self._entries.remove(entry.iova)
        entry.source.leave()
        entry.source.close()
        entry.change(present=False, mapped=False)

    async def unmap(self, iova: int, size: int) -> int:
        """Take back what is mapped in a range; how many bytes of it there were. No device uses any of it when
        this returns.

        Whoever has pinned pages there is asked to let go, as often as UNPIN_ROUNDS; ContainerError(EBUSY) if
        that does not help. TYPE1 unmaps what begins in the range, and nothing if the first begins before it;
        TYPE1V2 raises ContainerError(EINVAL) for a range that cuts a mapping, and IOMMUFD
        ContainerError(ENOENT) for that and where nothing is mapped. EINVAL for a range that is empty or, but
        for IOMMUFD, not made of pages; EOVERFLOW beyond the last address. If a server refuses, its errno, and
        everything is there again.
        """
        return await self._unpinned(iova, size, self._unmap)

    async def _unmap(self, entries: Sequence[Entry]) -> int:
        there = [entry for entry in entries if entry.present]
        refusals = await self._placing.displace_all(there)
        if refusals:
            await self._placing.bring_all_back(there)
            raise refusals[0]
        for entry in entries:
            self._remove(entry)
        return sum(entry.size for entry in entries)

    async def protect(self, iova: int, size: int, flags: DmaMapFlags) -> int:
        """Change the permissions of what is mapped in a range; how many bytes of it there are. Devices do not
        reach it in between.

        Raises ContainerError as `map` and `unmap` do, EINVAL or in IOMMUFD ENOENT where nothing is mapped; if
        a device refuses, everything is as it was.
        """
        return await self._unpinned(iova, size, partial(self._protect, flags))

    async def _protect(self, flags: DmaMapFlags, entries: Sequence[Entry]) -> int:
        if not entries:
            raise ContainerError(self.mode.rules.not_mapped, "nothing is mapped there")
        check_permissions(flags)
        before = [(entry, entry.flags) for entry in entries]
        try:
            for entry in entries:
                await self._change_flags(entry, flags)
        except ContainerError:
            for entry, old in before:
                with suppress(ContainerError):  # it has been logged
                    await self._change_flags(entry, old)
            raise
        return sum(entry.size for entry in entries)

    async def _change_flags(self, entry: Entry, flags: DmaMapFlags) -> None:
        if entry.flags == flags:
            return
        entry.source.check(flags)  # what is away now would not come back
        old, there = entry.flags, entry.present
        if there and (refusal := await self._placing.displace(entry)) is not None:
            await self._placing.bring_back(entry)
            raise refusal
        entry.flags = flags
        if not there:
            return
        try:
            await self._placing.place(entry)
        except ContainerError:
            entry.flags = old
            await self._placing.bring_back(entry)
            raise

    async def _unpinned(self, iova: int, size: int, do: Callable[[Sequence[Entry]], Awaitable[int]]) -> int:
        """Do something to the mappings of a range when nobody has pins there."""
        check_range(self.mode, iova, size, PAGE)
        pinned: list[Entry] = []

        async def attempt() -> int:
            nonlocal pinned
            async with self._lock:
                found = [entry for _, _, entry in self._entries.overlapping(iova, iova + size)]
                entries = selected(self.mode, iova, size, found)
                pinned = [entry for entry in entries if entry.pins]
                with self._pinning.hold_off():
                    return 0 if pinned else await do(entries)

        for _ in range(UNPIN_ROUNDS):
            done = await self._jobs.carry_through(attempt)
            if not pinned:
                return done
            await self._pinning.call_off(pinned)
        done = await self._jobs.carry_through(attempt)
        if pinned:
            raise ContainerError(EBUSY, f"pages at {pinned[0].iova:#x} stay pinned")
        return done

    # BARs that vanish and come back

    def _zapped(self, entries: Collection[Entry]) -> None:
        """Nobody calls `_revoke` when it is the end of the session."""
        self._jobs.start(partial(self._take_back, entries))

    async def _revoke(self, entries: Collection[Entry]) -> None:
        await self._jobs.carry_through(partial(self._take_back, entries))

    async def _take_back(self, entries: Collection[Entry]) -> None:
        async with self._lock:
            gone = [
                entry
                for entry in entries
                if entry.reach is not None and not entry.source.current(entry.reach)
            ]
            await self._placing.displace_all(gone, must=True)

    async def _restore(self, entries: Collection[Entry]) -> None:
        await self._jobs.carry_through(partial(self._bring_back, entries))

    async def _bring_back(self, entries: Collection[Entry]) -> None:
        async with self._lock:
            away = [entry for entry in entries if entry.mapped and not entry.present]
            await self._placing.bring_all_back(away)

    async def _moved(self, entry: Entry) -> None:
        """The export of a BAR may be mapped again."""
        if self.mode.rules.restores:
            await self._restore((entry,))

    # pins

    def pin_user(
        self, dma_unmap: DmaUnmapCallback, *, session: Session | None = None
    ) -> AbstractContextManager[PinUser]:
        """Somebody who pins pages until the block ends. All of them are called, with address and size, when a
        mapping is to go in which any has pages: `dma_unmap` may be a function or an async one.

        With `session` he says that this device writes to pages only which he has pinned, see `dirty`. Raises
        ContainerError(ENODEV) if that is not attached.
        """
        if session is not None and session not in self._devices:
            raise ContainerError(ENODEV, "the device is not attached")
        return self._pinning.user(dma_unmap, None if session is None else self._devices[session])

    def pin(self, iova: int, npages: int, flags: DmaMapFlags, *, user: PinUser) -> list[PageRef]:
        """The pages at `iova`, which stay as they are until they are unpinned as often.

        Raises ContainerError, in the kernel's order, and pins none: EINVAL for no pages, EACCES in TYPE1,
        EOVERFLOW beyond the last address, EBUSY while mappings are changed, EINVAL if `user` is none any
        more; then for each page EINVAL (in IOMMUFD ENOENT) if it is not mapped, EBUSY while it is about to
        be, EPERM if it is not mapped for `flags`, EINVAL if it is a BAR's, ENOMEM beyond the limit of locked
        memory.
        """
        return self._pinning.pin(iova, npages, flags, user)

    def unpin(self, iova: int, npages: int, *, user: PinUser) -> int:
        """Let go of pages once; how many of them `user` had pinned. Raises ContainerError: EINVAL for no
        pages, EACCES in TYPE1.
        """
        return self._pinning.unpin(iova, npages, user)

    # the end

    async def close(self) -> None:
        """Detach all devices, forget all pins and unmap everything. Servers get UNMAP_TIMEOUT seconds to
        answer; what they do not let go of stays taken in their sessions.
        """
        with trio.move_on_after(UNMAP_TIMEOUT, shield=True):
            async with self._lock:
                for device in tuple(self._devices.values()):
                    with suppress(ContainerError):
                        await self._placing.part(device)
        self._jobs.give_up()
        self._pinning.forget()
        for entry in self._entries:
            self._remove(entry)


@asynccontextmanager
async def open_container(
    mode: Mode = Mode.TYPE1V2, *, entry_limit: int = DMA_ENTRY_LIMIT, locked_limit: int | None = RLIMIT
) -> AsyncIterator[Container]:
    """A container until the block ends, which detaches all devices. `locked_limit` are bytes of memory that
    may be locked, None for any number; by default what this process may lock (RLIMIT_MEMLOCK, or any number
    with CAP_IPC_LOCK).
    """
    async with background() as nursery:
        limit = process_limit() if locked_limit == RLIMIT else locked_limit
        container = Container(mode, entry_limit, limit, nursery)
        try:
            yield container
        finally:
            await container.close()
