"""An exported BAR mapped in this process: what a plain client makes of an export that it was given."""

from __future__ import annotations

from contextlib import suppress
from typing import Self

from client._pages import Pages
from client.dmabuf import BarExport, DmaBufError


class ExportView:
    """An importer that maps all ranges of an export, one after the other, in `view`. A context manager.

    While the export is revoked, or its server has taken the memory away, the view reads as ones and what is
    written to it reaches nobody; it stays valid, and has the BAR's bytes again when the export is restored.

    Raises DmaBufError: what `BarExport.attach` and `Attachment.map` say, EINVAL for ranges that begin within
    a page of the file, ENOMEM or ENOSPC for too much or too many of them.
    """

    def __init__(self, export: BarExport) -> None:
        self.export = export
        self._attachment = export.attach(self)
        try:
            self._pages = _reserve(export)
        except BaseException:
            self._attachment.detach()
            raise
        self._closing = False
        self.view = memoryview(self._pages)
        try:
            self.fault()
        except BaseException:
            self.close()
            raise

    def fault(self) -> None:
        """Map what is not mapped, or was lost because the server took it away. Raises as the constructor
        does.
        """
        pages = self._pages
        mapped = self._attachment.maps > 0
        if mapped and not pages.lost(0, pages.size):
            return
        ranges = self._attachment.map()
        if mapped:
            self._attachment.unmap()
        at = 0
        try:
            for one in ranges:
                pages.map(at, self.export.fd, one.paddr, one.len, writable=True)
                at += one.len
        except OSError as error:
            self._let_go()
            raise _refused(error) from None

    async def invalidate(self) -> None:
        """See `Importer`."""
        self._let_go()

    async def moved(self) -> None:
        """See `Importer`; what cannot be mapped now is left to `fault`."""
        with suppress(DmaBufError):
            self.fault()

    def _let_go(self) -> None:
        self._pages.zap(0, self._pages.size)
        while self._attachment.maps:
            self._attachment.unmap()

    def close(self) -> None:
        """Unmap and detach. Raises BufferError while somebody holds a view of `view`, and is to be called
        again then; nothing reaches the BAR by it any more either way.
        """
        if not self._closing:
            self._let_go()
            self._attachment.detach()
            self._closing = True
        self.view.release()
        self._pages.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _reserve(export: BarExport) -> Pages:
    try:
        return Pages(sum(one.len for one in export.ranges))
    except OSError as error:
        raise _refused(error) from None


def _refused(error: OSError) -> DmaBufError:
    return DmaBufError(error.errno or 0, f"an export cannot be mapped: {error.strerror}")
