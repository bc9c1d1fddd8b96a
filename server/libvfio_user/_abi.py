"""libvfio-user's C interface as data: structures, callbacks and functions, one row each.

The library promises no stable interface: five functions changed their arguments without a new name, soname
or symbol version. `Generation` names the interfaces that exist, and a row that differs has one entry for
each of them. Facts from include/libvfio-user.h of upstream commits 0b28d20 (2022-06-09, what Debian's QEMU
carries) and efd091b (2026-06-25), and from the history between them.
"""

from __future__ import annotations

import ctypes
from ctypes import c_bool, c_char_p, c_int, c_int64, c_size_t, c_ssize_t, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass
from enum import Enum, IntEnum, IntFlag
from typing import Any, Final

__all__ = [
    "ATTACH_NONBLOCKING",
    "CALLBACKS",
    "DEVICE_PCI",
    "FUNCTIONS",
    "MIGRATION_CALLBACKS_VERSION",
    "PCI_EXPRESS",
    "SGL_DIRECT_ACCESS",
    "TRANSPORT_SOCKET",
    "DmaInfo",
    "Failure",
    "Function",
    "Generation",
    "IoVec",
    "MigrationCallbacks",
    "MigrationState",
    "RegionFlag",
    "ResetReason",
]


class Generation(Enum):
    """The interface of a library, called after the year in which it came."""

    V2022 = "2022"
    """Upstream 0b28d20 of June 2022 and its neighbours: migration v1, 32-bit region sizes."""
    V2023 = "2023"
    """September 2023 to March 2026: migration v2, twin socket."""
    V2026 = "2026"
    """Since f3742ed of March 2026: `vfu_setup_device_dma` takes the number of windows."""


TRANSPORT_SOCKET: Final = 0  # vfu_trans_t, VFU_TRANS_SOCK
DEVICE_PCI: Final = 0  # vfu_dev_type_t, VFU_DEV_TYPE_PCI
ATTACH_NONBLOCKING: Final = 1  # LIBVFIO_USER_FLAG_ATTACH_NB
PCI_EXPRESS: Final = 3  # vfu_pci_type_t, VFU_PCI_TYPE_EXPRESS
MIGRATION_CALLBACKS_VERSION: Final = 2  # VFU_MIGR_CALLBACKS_VERS since 2023
SGL_DIRECT_ACCESS: Final = 1  # VFU_SGL_DIRECT_ACCESS: no message for memory that can be reached without


class RegionFlag(IntFlag):
    """VFU_REGION_FLAG_*; the last two since March 2024."""

    READ = 1
    WRITE = 2
    MEMORY = 4
    ALWAYS_CALLBACK = 8
    ADDRESS_64 = 16
    PREFETCHABLE = 32


class ResetReason(IntEnum):
    """vfu_reset_type_t."""

    DEVICE = 0
    LOST_CONNECTION = 1
    FUNCTION_LEVEL = 2


class MigrationState(IntEnum):
    """vfu_migr_state_t: what the transition callback is told to go to."""

    STOP = 0
    RUNNING = 1
    STOP_COPY = 2
    PRE_COPY = 3
    RESUMING = 4


# --- structures


class IoVec(ctypes.Structure):
    """struct iovec; in a region's mmap areas `base` is an offset."""

    _fields_ = (("base", c_void_p), ("length", c_size_t))


class DmaInfo(ctypes.Structure):
    """vfu_dma_info_t: a window of the client. `address` is None when it came without memory to map."""

    _fields_ = (
        ("iova", IoVec),
        ("address", c_void_p),
        ("mapping", IoVec),
        ("page_size", c_size_t),
        ("prot", c_uint32),
    )


# --- callbacks: result, then arguments. The first argument of each is the context.

_CALLBACKS: Final[dict[str, tuple[Any, ...]]] = {
    "log": (None, c_void_p, c_int, c_char_p),
    "region_access": (c_ssize_t, c_void_p, c_void_p, c_size_t, c_int64, c_bool),
    "reset": (c_int, c_void_p, c_int),
    "dma": (None, c_void_p, ctypes.POINTER(DmaInfo)),
    "irq_state": (None, c_void_p, c_uint32, c_uint32, c_bool),
    "migration_transition": (c_int, c_void_p, c_int),
    "migration_data": (c_ssize_t, c_void_p, c_void_p, c_uint64),
}

CALLBACKS: Final[dict[str, Any]] = {
    # use_errno: what a callback leaves with ctypes.set_errno is the errno that the library finds.
    name: ctypes.CFUNCTYPE(result, *arguments, use_errno=True)
    for name, (result, *arguments) in _CALLBACKS.items()
}


class MigrationCallbacks(ctypes.Structure):
    """vfu_migration_callbacks_t, version 2."""

    _fields_ = (
        ("version", c_int),
        ("transition", CALLBACKS["migration_transition"]),
        ("read_data", CALLBACKS["migration_data"]),
        ("write_data", CALLBACKS["migration_data"]),
    )


# --- functions


class Failure(Enum):
    """How a function says that errno holds a reason."""

    NEGATIVE = "a negative result"
    NULL = "a null pointer"
    NEVER = "it does not fail"


@dataclass(frozen=True, slots=True)
class Function:
    """Result and argument types of one C function."""

    result: Any
    arguments: tuple[Any, ...]
    failure: Failure = Failure.NEGATIVE


_CONTEXT: Final = c_void_p

_EVERYWHERE: Final = tuple(Generation)

_SETUP_DMA_3: Final = Function(c_int, (_CONTEXT, CALLBACKS["dma"], CALLBACKS["dma"]))
_SETUP_DMA_4: Final = Function(c_int, (_CONTEXT, c_size_t, CALLBACKS["dma"], CALLBACKS["dma"]))

_SGL_4: Final = Function(c_int, (_CONTEXT, c_void_p, c_size_t, c_void_p))
# `flags` came in April 2026, three weeks after the generation's mark. To hand an argument to a function that
# does not look at it is safe in the C calling conventions of Linux; to leave out one that it takes is not.
_SGL_5: Final = Function(c_int, (*_SGL_4.arguments, c_int))

_MODERN: Final = (Generation.V2023, Generation.V2026)

FUNCTIONS: Final[dict[str, dict[Generation, Function]]] = {
    name: dict.fromkeys(generations, function)
    for name, generations, function in (
        ("dma_sg_size", _EVERYWHERE, Function(c_size_t, (), Failure.NEVER)),
        (
            "vfu_create_ctx",
            _EVERYWHERE,
            Function(_CONTEXT, (c_int, c_char_p, c_int, c_void_p, c_int), Failure.NULL),
        ),
        ("vfu_realize_ctx", _EVERYWHERE, Function(c_int, (_CONTEXT,))),
        ("vfu_attach_ctx", _EVERYWHERE, Function(c_int, (_CONTEXT,))),
        ("vfu_get_poll_fd", _EVERYWHERE, Function(c_int, (_CONTEXT,))),
        ("vfu_run_ctx", _EVERYWHERE, Function(c_int, (_CONTEXT,))),
        ("vfu_destroy_ctx", _EVERYWHERE, Function(None, (_CONTEXT,), Failure.NEVER)),
        ("vfu_setup_log", _EVERYWHERE, Function(c_int, (_CONTEXT, CALLBACKS["log"], c_int))),
        (
            "vfu_setup_region",
            _EVERYWHERE,
            Function(
                c_int,
                (
                    *(_CONTEXT, c_int, c_size_t, CALLBACKS["region_access"], c_int),
                    *(ctypes.POINTER(IoVec), c_uint32, c_int, c_uint64),
                ),
            ),
        ),
        ("vfu_pci_init", _EVERYWHERE, Function(c_int, (_CONTEXT, c_int, c_int, c_int))),
        ("vfu_setup_device_reset_cb", _EVERYWHERE, Function(c_int, (_CONTEXT, CALLBACKS["reset"]))),
        ("vfu_setup_device_nr_irqs", _EVERYWHERE, Function(c_int, (_CONTEXT, c_int, c_uint32))),
        (
            "vfu_setup_irq_state_callback",
            _EVERYWHERE,
            Function(c_int, (_CONTEXT, c_int, CALLBACKS["irq_state"])),
        ),
        ("vfu_irq_trigger", _EVERYWHERE, Function(c_int, (_CONTEXT, c_uint32))),
        (
            "vfu_create_ioeventfd",
            (Generation.V2022,),
            Function(c_int, (_CONTEXT, c_uint32, c_int, c_size_t, c_uint32, c_uint32, c_uint64)),
        ),
        (
            "vfu_setup_device_migration_callbacks",
            _MODERN,
            Function(c_int, (_CONTEXT, ctypes.POINTER(MigrationCallbacks))),
        ),
        (
            "vfu_addr_to_sgl",
            _MODERN,
            Function(c_int, (_CONTEXT, c_void_p, c_size_t, c_void_p, c_size_t, c_int)),
        ),
    )
} | {
    "vfu_setup_device_dma": {
        Generation.V2022: _SETUP_DMA_3,
        Generation.V2023: _SETUP_DMA_3,
        Generation.V2026: _SETUP_DMA_4,
    },
    "vfu_sgl_read": {Generation.V2023: _SGL_4, Generation.V2026: _SGL_5},
    "vfu_sgl_write": {Generation.V2023: _SGL_4, Generation.V2026: _SGL_5},
}
