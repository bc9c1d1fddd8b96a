"""How much the engine takes from a peer, each limit with its reason.

The constants are the protocol's own or this project's defaults; `Limits` holds those that one connection
may change, and is what a side announces in VERSION.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

HEADER_SIZE: Final = 16
"""Every message begins with this many bytes (spec, "Header")."""

DEFAULT_MAX_MSG_FDS: Final = 1
"""What a peer takes in one message when it does not say (spec, "VFIO_USER_VERSION")."""

MAX_MSG_FDS: Final = 16
"""Never announce more: QEMU refuses a server whose max_msg_fds exceeds its own, which is 16
(hw/vfio-user/proxy).
"""

DEFAULT_MAX_DATA_XFER_SIZE: Final = 1 << 20
"""Bytes of data in one read or write when the peer does not say (spec, "VFIO_USER_VERSION")."""

MAX_DATA_XFER_SIZE: Final = 64 << 20
"""Never announce more bytes: QEMU refuses a server that does."""

DEFAULT_MAX_DMA_MAPS: Final = 65535
"""DMA windows at a time when the peer does not say (spec, "VFIO_USER_VERSION")."""

DEFAULT_PGSIZES: Final = 4096
"""A mask of DMA page sizes: 4 KiB alone when the peer does not say (spec, "VFIO_USER_VERSION")."""

MAX_VERSION_DATA: Final = 4096
"""Bytes of JSON in VERSION. The longest known peer (QEMU) sends under 300; nobody has been negotiated with
yet, so nothing larger is buffered for him.
"""

MAX_JSON_NUMBER: Final = (1 << 64) - 1
"""Capabilities are C integers at the other end; what does not fit in 64 bits is malformed."""

MAX_INFO_SIZE: Final = 64 << 10
"""Bytes of the longest reply that is not bulk data: a region's information with some 4000 sparse areas."""

MAX_CAPABILITIES: Final = 32
"""Links followed in a region's capability chain; linux/vfio.h defines five kinds, and a chain may be a
loop.
"""

MAX_IRQS_PER_SET: Final = 2048
"""Sub-indices in one SET_IRQS: the most vectors an MSI-X table has (PCI, Table Size is 11 bits). A larger
count would make the receiver build a list as long as the peer likes.
"""

MAX_OUTSTANDING: Final = 4096
"""Requests without an answer yet. Beyond, the sender is not reading replies, and 16-bit message ids run
short.
"""

MAX_ERRNO: Final = 4095
"""The largest errno a Linux system call gives (include/linux/err.h, MAX_ERRNO); a larger one in a reply
means EIO.
"""


@dataclass(frozen=True, slots=True)
class Limits:
    """What this side accepts, announced as capabilities in VERSION.

    `max_msg_fds`: descriptors in one message; `max_data_xfer_size`: bytes of data in one read or write;
    `max_dma_maps`: DMA windows at a time; `pgsizes`: mask of page sizes of DMA windows. Raises ValueError
    where a known peer would refuse the value.
    """

    max_msg_fds: int = MAX_MSG_FDS
    max_data_xfer_size: int = DEFAULT_MAX_DATA_XFER_SIZE
    max_dma_maps: int = DEFAULT_MAX_DMA_MAPS
    pgsizes: int = DEFAULT_PGSIZES

    def __post_init__(self) -> None:
        if not 0 <= self.max_msg_fds <= MAX_MSG_FDS:
            raise ValueError(f"max_msg_fds is {self.max_msg_fds}, not 0 to {MAX_MSG_FDS}")
        if not 1 <= self.max_data_xfer_size <= MAX_DATA_XFER_SIZE:
            raise ValueError(
                f"max_data_xfer_size is {self.max_data_xfer_size}, not 1 to {MAX_DATA_XFER_SIZE}"
            )
        if not 1 <= self.max_dma_maps <= DEFAULT_MAX_DMA_MAPS:
            raise ValueError(f"max_dma_maps is {self.max_dma_maps}, not 1 to {DEFAULT_MAX_DMA_MAPS}")
        if self.pgsizes <= 0 or self.pgsizes & (DEFAULT_PGSIZES - 1):
            raise ValueError(f"pgsizes is {self.pgsizes:#x}: no page is smaller than 4 KiB")
