"""A BAR, or parts of one, for others to use: another device's DMA, or a mapping elsewhere.

    async with exported_bar(session, 4, ((0x1000, 0x1000),)) as export:
        attachment = export.attach(importer)
        ranges = attachment.map()  # of the file `export.fd`

The life of an export is that of the kernel's (drivers/vfio/pci/vfio_pci_dmabuf.c): whoever imports it must
let go of it before the device stops to answer at its BARs, may map it again when the device answers, and has
a descriptor that outlives the session.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, asynccontextmanager
from errno import EBUSY, EINVAL, ENODEV, EOPNOTSUPP
from typing import TYPE_CHECKING, Final, Protocol

import trio

from client._nursery import background
from client._socket import close_all
from client.errors import BadReplyError, ClientError
from client.phys_vec import PhysVec
from protocol import Command
from protocol.dma_buf import pack_dma_buf
from protocol.limits import REVOKE_TIMEOUT
from protocol.messages import DeviceFeature
from protocol.vfio import Feature, FeatureFlags

if TYPE_CHECKING:
    from client.session import Session

LARGEST_FILE: Final = (1 << 63) - 1
"""Bytes: file offsets are signed (off_t)."""


class DmaBufError(ClientError):
    """An export that cannot be used so; `errno` is the kernel's."""

    def __init__(self, errno: int, reason: str) -> None:
        super().__init__(reason)
        self.errno = errno


class Importer(Protocol):
    """Somebody who uses an export. One that is to hear when he may map it again has `moved` besides, an async
    method without arguments that raises nothing.
    """

    async def invalidate(self) -> None:
        """Let go: unmap all maps of the attachment, now or soon. Told again if it was cancelled or raised."""


class Attachment:
    """An importer's share in an export; made by `BarExport.attach`."""

    def __init__(self, export: BarExport, importer: Importer) -> None:
        self.export = export
        self.importer = importer
        self.maps = 0
        """How often it is mapped."""

    def map(self) -> tuple[PhysVec, ...]:
        """Where the exported bytes are in `export.fd`; each call has to be undone by `unmap`.

        Raises DmaBufError: ENODEV while the export is revoked, or its server has taken the memory away;
        EINVAL after `detach`.
        """
        self._check()
        self.export._check_memory()
        self.maps += 1
        return self.export.ranges

    def unmap(self) -> None:
        """Undo one `map`: nothing is accessed through it any more. Raises DmaBufError(EINVAL) if there is
        none.
        """
        if not self.maps:
            raise DmaBufError(EINVAL, "the attachment is not mapped")
        self.maps -= 1
        self.export._unmapped()

    def detach(self) -> None:
        """Be told of nothing any more. Raises DmaBufError: EBUSY while it is mapped, EINVAL if it is detached
        already.
        """
        self._check()
        if self.maps:
            raise DmaBufError(EBUSY, f"the attachment is mapped {self.maps} times")
        self.export._attachments.remove(self)
        self.export._told.discard(self)
        self.export._to_move.discard(self)

    def _check(self) -> None:
        if self not in self.export._attachments:
            raise DmaBufError(EINVAL, "the attachment is detached")


class BarExport:
    """Parts of a BAR that others may use; follows the session's `decoding` until it is closed."""

    def __init__(self, session: Session, index: int, fd: int, ranges: tuple[PhysVec, ...]) -> None:
        self.session = session
        self.index = index
        self.fd = fd
        """The BAR's file, open until `aclose`: longer than the session if need be."""
        self.ranges = ranges
        """The exported bytes, in the order in which they were asked for."""
        self.revoked = not session.decoding.enabled
        """Nobody may map it. A BAR that is exported while the device does not answer begins so."""
        self._attachments: list[Attachment] = []
        self._told: set[Attachment] = set()
        """Who has let go since it was revoked, or will."""
        self._to_move: set[Attachment] = set()
        """Who has not heard yet that it is restored."""
        self._closing = False
        self._changing = trio.Lock()
        self._idle = trio.lowlevel.ParkingLot()
        self._following = ExitStack()
        self._following.enter_context(session.decoding.followed_by(self))

    @property
    def importers(self) -> tuple[Importer, ...]:
        """Who is attached, in that order."""
        return tuple(attachment.importer for attachment in self._attachments)

    @property
    def maps(self) -> int:
        """How often it is mapped, by all together."""
        return sum(attachment.maps for attachment in self._attachments)

    def attach(self, importer: Importer) -> Attachment:
        """Let somebody use it. Raises DmaBufError: EOPNOTSUPP for one who cannot be told to let go, ENODEV
        while it is revoked.
        """
        if not callable(getattr(importer, "invalidate", None)):
            raise DmaBufError(EOPNOTSUPP, "the importer cannot be told to let go")
        self._check_revoked()
        attachment = Attachment(self, importer)
        self._attachments.append(attachment)
        return attachment

    def _check_revoked(self) -> None:
        if self.revoked:
            raise DmaBufError(ENODEV, f"the export of BAR {self.index} is revoked")

    def _check_memory(self) -> None:
        self._check_revoked()
        if os.fstat(self.fd).st_size < _end(self.ranges):
            raise DmaBufError(ENODEV, f"the server has taken the memory of BAR {self.index} away")

    def _unmapped(self) -> None:
        if self.maps:
            return
        self._idle.unpark_all()
        if self.fd < 0:
            self._following.close()

    # a follower of the session's decoding

    def zap(self) -> None:
        """Nobody may attach or map from now on."""
        self.revoked = True

    async def revoke(self) -> None:
        """Return when nobody has it mapped any more, and nobody may map it: every importer is told at the
        same time to let go, whatever others do.

        May be cancelled, and called again then: it goes on where it was. Told once, nobody is told twice.
        Raises an ExceptionGroup of what importers raised; it does not wait for those.
        """
        self.zap()
        async with self._changing:
            self.zap()  # `restore` may have come first
            failed = await self._invalidate()
            if not any(attachment.maps for attachment in failed):
                self._told.update(failed)
                while self.maps:
                    await self._idle.park()
            if failed:
                raise ExceptionGroup(f"importers of BAR {self.index} failed", list(failed.values()))

    async def _invalidate(self) -> dict[Attachment, Exception]:
        """Tell all who do not know yet; what came of those who failed."""
        failed: dict[Attachment, Exception] = {}

        async def tell(attachment: Attachment) -> None:
            try:
                await attachment.importer.invalidate()
            except Exception as error:
                failed[attachment] = error
            else:
                self._told.add(attachment)

        async with trio.open_nursery() as nursery:
            for attachment in self._attachments:
                if attachment not in self._told:
                    nursery.start_soon(tell, attachment)
        return failed

    async def restore(self) -> None:
        """Let importers map it again, and tell those who want to know. Nothing happens while the device does
        not answer, or after `aclose`.
        """
        async with self._changing:
            if self._closing or not self.session.decoding.enabled:
                return
            if self.revoked:
                self.revoked = False
                self._told.clear()
                self._to_move.update(self._attachments)
            async with trio.open_nursery() as nursery:
                for attachment in self._to_move:
                    nursery.start_soon(self._move, attachment)

    async def _move(self, attachment: Attachment) -> None:
        moved = getattr(attachment.importer, "moved", None)
        if moved is not None:
            await moved()
        self._to_move.discard(attachment)

    # the end

    async def aclose(self) -> None:
        """Revoke it for good and close the descriptor, which is closed even if that is cancelled; raises as
        `revoke` does. Until nobody has it mapped the device is kept from being switched off, even then.
        """
        self._closing = True
        try:
            await self.revoke()
        finally:
            fd, self.fd = self.fd, -1
            if fd >= 0:
                os.close(fd)
            self._unmapped()


async def export_bar(
    session: Session, index: int, ranges: Sequence[tuple[int, int]] | None = None
) -> BarExport:
    """Ask for an export of the (offset, length) of `ranges`, bytes of a BAR, or of all of it; the caller has
    to call `aclose`, and `revoke` when the session ends (see `exported_bar`).

    Raises ServerError if the server refuses it: EOPNOTSUPP or ENOTTY if it exports nothing, ENODEV if there
    is no such BAR, EINVAL or EOVERFLOW for ranges that are not pages of it. Raises ClientError for more
    ranges than a server takes, and BadReplyError for an answer without exactly one descriptor, or with one
    that is too short. Only an empty file may be: a server that takes the memory away leaves one.
    """
    if not 0 <= index < len(session.regions):
        raise ClientError(f"the device has no region {index}")
    region = session.regions[index]
    spans = ((0, region.size),) if ranges is None else tuple(ranges)
    try:
        data = pack_dma_buf(index, spans, os.O_RDWR | os.O_CLOEXEC)
    except ValueError as error:
        raise ClientError(str(error)) from None
    flags = FeatureFlags(FeatureFlags.GET | Feature.DMA_BUF)
    reply = await session.request(
        Command.DEVICE_FEATURE, DeviceFeature(DeviceFeature.size + len(data), flags), data
    )
    vectors = tuple(PhysVec(region.mmap_offset + offset, length) for offset, length in spans)
    try:
        return BarExport(session, index, _checked(reply.fds, _end(vectors)), vectors)
    except BaseException:
        close_all(reply.fds)
        raise


def _checked(fds: tuple[int, ...], end: int) -> int:
    command = Command.DEVICE_FEATURE
    if len(fds) != 1:
        raise BadReplyError(command, f"{len(fds)} descriptors for one export")
    size = os.fstat(fds[0]).st_size
    if end > LARGEST_FILE or 0 < size < end:
        raise BadReplyError(command, f"an export of {size:#x} bytes that ends at {end:#x}")
    return fds[0]


def _end(ranges: tuple[PhysVec, ...]) -> int:
    return max(one.paddr + one.len for one in ranges)


@asynccontextmanager
async def exported_bar(
    session: Session, index: int, ranges: Sequence[tuple[int, int]] | None = None
) -> AsyncIterator[BarExport]:
    """`export_bar` until the block ends, which waits until nobody has it mapped any more; if it ends by an
    exception or a cancellation, for REVOKE_TIMEOUT seconds at most. When the session ends before, the export
    is revoked; what importers raise then comes out of the block.
    """
    export = await export_bar(session, index, ranges)

    async def end_with_session() -> None:
        await session.wait_end()
        await export.revoke()

    try:
        async with background() as nursery:
            nursery.start_soon(end_with_session)
            yield export
    except BaseException:
        with trio.move_on_after(REVOKE_TIMEOUT, shield=True):
            await export.aclose()
        raise
    await export.aclose()
