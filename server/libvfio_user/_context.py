"""A PCI function in a context of the library, for one client.

The library's callbacks are bound to the function here. Guarantees:

- No exception crosses into C: a refusal becomes its errno, a mistake EIO and a log entry, and what must
  stop the program (Ctrl-C) is raised when the library has returned.
- Whatever the library may still call lives as long as the context.
- The function is reset with `ResetKind.LOST_CLIENT` once, before the library takes its windows away.
"""

from __future__ import annotations

import ctypes
import errno
import os
import syslog
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from device.errors import DeviceError
from device.function import BarKind, IrqKind, PciFunction, Region, RegionIndex, ResetKind
from device.migration.states import DeviceState
from protocol.vfio import IoEventFdFlags
from server.libvfio_user._abi import (
    ATTACH_NONBLOCKING,
    CALLBACKS,
    DEVICE_PCI,
    MIGRATION_CALLBACKS_VERSION,
    PCI_EXPRESS,
    SGL_DIRECT_ACCESS,
    TRANSPORT_SOCKET,
    DmaInfo,
    Generation,
    IoVec,
    MigrationCallbacks,
    MigrationState,
    RegionFlag,
    ResetReason,
)
from server.libvfio_user._told import Told, log
from server.libvfio_user._windows import Windows
from server.libvfio_user.library import Library, LibraryError
from server.libvfio_user.limits import Limit

__all__ = ["Context", "check"]

# LIBVFIO_USER_MAX_DMA_REGIONS of upstream's libvfio-user.h since 2026.
_MAX_WINDOWS: Final = 1_000_000

# What a size_t kept in 32 bits can say (`Limit.REGION_SIZE`).
_MAX_REGION_2022: Final = (1 << 32) - 1

_PROT_READ, _PROT_WRITE = 1, 2  # sys/mman.h

_MASKABLE: Final = (IrqKind.INTX, IrqKind.MSI, IrqKind.MSIX)


def check(library: Library, function: PciFunction) -> None:
    """`LibraryError` if the library cannot serve the function at all."""
    for index, region in zip(RegionIndex, function.regions(), strict=True):
        if Limit.REGION_SIZE.generations & {library.generation} and region.size > _MAX_REGION_2022:
            raise LibraryError(
                f"{function.name}: {index.name} has {region.size:#x} bytes; with this libvfio-user"
                f" {Limit.REGION_SIZE.what}"
            )


class Context:
    """``function`` at the socket that the library makes at ``path``; `LibraryError` if it refuses."""

    def __init__(self, library: Library, function: PciFunction, path: Path, told: Told) -> None:
        self.library = library
        self.windows = Windows()
        """What the client has mapped."""
        self._function = function
        self._told = told
        self._kept: list[Any] = []
        self._raised: BaseException | None = None
        self._lost = False
        self._path = path
        self.handle: int = library.vfu_create_ctx(
            TRANSPORT_SOCKET, os.fsencode(path), ATTACH_NONBLOCKING, None, DEVICE_PCI
        )
        try:
            self._set_up()
        except BaseException:
            self.close()
            raise

    # --- what the library is told of the function

    def _set_up(self) -> None:
        library, handle = self.library, self.handle
        level = syslog.LOG_DEBUG if log.isEnabledFor(10) else syslog.LOG_WARNING
        library.vfu_setup_log(handle, self._callback("log", self._log, None), level)
        library.vfu_pci_init(handle, PCI_EXPRESS, 0, 0)
        for index, region in zip(RegionIndex, self._function.regions(), strict=True):
            if region.size:
                self._set_up_region(index, region)
        for kind, irq in zip(IrqKind, self._function.irqs(), strict=True):
            if kind in _MASKABLE:
                library.vfu_setup_device_nr_irqs(handle, kind, irq.count)
                state = self._callback("irq_state", self._irq_state(kind), None)
                library.vfu_setup_irq_state_callback(handle, kind, state)
            elif library.generation is Generation.V2022:
                library.vfu_setup_device_nr_irqs(handle, kind, 0)  # Limit.ERR_AND_REQ
        library.vfu_setup_device_reset_cb(handle, self._callback("reset", self._reset, -1))
        register = self._callback("dma", self._dma_register, None)
        unregister = self._callback("dma", self._dma_unregister, None)
        count = (_MAX_WINDOWS,) if library.generation is Generation.V2026 else ()
        library.vfu_setup_device_dma(handle, *count, register, unregister)
        self._set_up_migration()
        library.vfu_realize_ctx(handle)

    def _set_up_region(self, index: RegionIndex, region: Region) -> None:
        flags = RegionFlag.READ | RegionFlag.WRITE
        bar = self._function.bars.get(index)
        if index is RegionIndex.CONFIG:
            flags |= RegionFlag.ALWAYS_CALLBACK
        elif bar is not None:
            flags |= RegionFlag.MEMORY
            if self.library.generation is Generation.V2026 and bar.kind is BarKind.MEM64:
                flags |= RegionFlag.ADDRESS_64
        access = self._callback("region_access", self._region_access(index), -1)
        areas = (IoVec * len(region.mmap_areas))(*(IoVec(*area) for area in region.mmap_areas))
        fd = -1 if region.fd is None else region.fd
        arguments = (areas, len(areas), fd) if len(areas) else (None, 0, -1)
        self.library.vfu_setup_region(self.handle, index, region.size, access, flags, *arguments, 0)
        if self.library.generation not in Limit.IO_EVENTFDS.generations:
            for area in self._function.io_eventfds(index):
                match = IoEventFdFlags(0) if area.datamatch is None else IoEventFdFlags.DATAMATCH
                self.library.vfu_create_ioeventfd(
                    self.handle, index, area.fd, area.offset, area.size, match, area.datamatch or 0
                )

    def _set_up_migration(self) -> None:
        migration = self._function.migration
        if migration is None or self.library.generation in Limit.DEVICE_FEATURE.generations:
            return

        def go_to(state: int) -> int:
            migration.set_state(DeviceState[MigrationState(state).name])
            return 0

        def read(buffer: int, size: int) -> int:
            data = migration.read(size)
            ctypes.memmove(buffer, data, len(data))
            return len(data)

        def write(buffer: int, size: int) -> int:
            migration.write(ctypes.string_at(buffer, size))
            return size

        callbacks = MigrationCallbacks(
            MIGRATION_CALLBACKS_VERSION,
            self._callback("migration_transition", go_to, -1),
            self._callback("migration_data", read, -1),
            self._callback("migration_data", write, -1),
        )
        self.library.vfu_setup_device_migration_callbacks(self.handle, callbacks)

    # --- what the library does with it

    @property
    def fd(self) -> int:
        """The connection, or what listens for it."""
        number: int = self.library.vfu_get_poll_fd(self.handle)
        return number

    def attach(self) -> None:
        """Take the connection that waits, and answer the VERSION that is there already."""
        self._call(self.library.vfu_attach_ctx)

    def run(self) -> None:
        """Handle one message; `LibraryError` when the connection is of no use any more."""
        self._call(self.library.vfu_run_ctx)

    def trigger(self, number: int) -> None:
        """Signal the client's eventfd; `LibraryError` with ENOENT when there is none."""
        self.library.vfu_irq_trigger(self.handle, number)

    def read_memory(self, iova: int, length: int) -> bytes:
        """The client's bytes, by message if need be; `LibraryError`."""
        data = ctypes.create_string_buffer(length)
        self._access(self.library.vfu_sgl_read, iova, data, _PROT_READ)
        return data.raw

    def write_memory(self, iova: int, data: bytes) -> bytes:
        """Write to the client's memory, by message if need be; `LibraryError`. Returns nothing."""
        self._access(
            self.library.vfu_sgl_write, iova, ctypes.create_string_buffer(data, len(data)), _PROT_WRITE
        )
        return b""

    def _access(self, access: Callable[..., object], iova: int, data: Any, prot: int) -> None:
        library = self.library
        place = ctypes.create_string_buffer(library.dma_sg_size())
        library.vfu_addr_to_sgl(self.handle, iova, len(data), place, 1, prot)
        flags = (SGL_DIRECT_ACCESS,) if library.generation is Generation.V2026 else ()
        access(self.handle, place, 1, data, *flags)

    def _call(self, function: Callable[[int], object]) -> None:
        try:
            function(self.handle)
        finally:
            if self._raised is not None:
                raised, self._raised = self._raised, None
                raise raised

    def lost(self) -> None:
        """The client is gone: reset the function, once. OSError as `PciFunction.reset`: try it again."""
        if not self._lost:
            self._function.reset(ResetKind.LOST_CLIENT)
            self._lost = True

    def close(self) -> None:
        """Give everything back. The function hears no more of the library; idempotent."""
        if self.handle:
            handle, self.handle = self.handle, 0
            self._lost = True
            self.library.vfu_destroy_ctx(handle)
            self._path.unlink(missing_ok=True)  # only where nobody connected

    # --- callbacks

    def _callback(self, kind: str, function: Callable[..., Any], failed: int | None) -> Any:
        """A C callback that returns `failed`, with errno, when ``function`` raises; the first argument, the
        context, is left out.
        """

        def contained(_context: int, *arguments: Any) -> Any:
            try:
                return function(*arguments)
            except DeviceError as error:
                log.debug("%s: refused: %s", self._function.name, error)
                ctypes.set_errno(error.errno or errno.EIO)
            except Exception as error:
                self._told(f"{kind} callback failed", error)
                ctypes.set_errno(errno.EIO)
            except BaseException as error:
                self._raised = error
                ctypes.set_errno(errno.EINTR)
            return failed

        made = CALLBACKS[kind](contained)
        self._kept.append(made)
        return made

    def _log(self, level: int, message: bytes) -> None:
        text = message.decode(errors="replace").rstrip()
        if level > syslog.LOG_WARNING or text.startswith("no fd for interrupt"):
            log.debug("%s: libvfio-user: %s", self._function.name, text)
        else:
            self._told(f"libvfio-user: {text}")

    def _region_access(self, index: RegionIndex) -> Callable[[int, int, int, bool], int]:
        read, write = self._function.region_read, self._function.region_write

        def access(buffer: int, count: int, offset: int, is_write: bool) -> int:
            if is_write:
                write(index, offset, ctypes.string_at(buffer, count))
            else:
                ctypes.memmove(buffer, read(index, offset, count), count)
            return count

        return access

    def _irq_state(self, kind: IrqKind) -> Callable[[int, int, bool], None]:
        def change(start: int, count: int, mask: bool) -> None:
            hold = self._function.irq_mask if mask else self._function.irq_unmask
            hold(kind, start, [True] * count)

        return change

    def _reset(self, reason: int) -> int:
        if reason == ResetReason.LOST_CONNECTION:
            self.lost()
        else:
            self._function.reset(ResetKind.FLR if reason == ResetReason.FUNCTION_LEVEL else ResetKind.DEVICE)
        return 0

    def _dma_register(self, info: Any) -> None:
        window: DmaInfo = info.contents
        iova, size = window.iova.base or 0, window.iova.length
        self.windows.add(iova, size)
        dma = self._function.dma
        with self._function.gate:
            if window.address is None:
                dma.map(iova, size, window.prot)
            else:
                dma.map_memory(iova, size, window.prot, window.address, window.page_size)

    def _dma_unregister(self, info: Any) -> None:
        window: DmaInfo = info.contents
        iova, size = window.iova.base or 0, window.iova.length
        self.windows.discard(iova)
        if not self._lost:
            with self._function.gate:
                self._function.dma.unmap(iova, size)
