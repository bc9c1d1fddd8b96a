"""All that a peer may cost, each limit with its reason: first what the engine takes, then what the two shells
(server and client) bear.

The constants are the protocol's own or this project's defaults. `Limits` holds those that one connection
may change, and is what a side announces in VERSION; `SessionLimits` holds those of one client's stay on a
server.
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

MAX_DMA_MAPS: Final = 1 << 18
"""DMA windows at a time that a server bears: 1 GiB of a guest whose virtual IOMMU maps page by page. A window
takes 40 to 60 bytes there, 16 MiB for all. Never announce more.
"""

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

MAX_WRITE_SIZE: Final = 8
"""Bytes of one write in REGION_WRITE_MULTI (spec, "Single Device Write Format")."""

MAX_WRITES_PER_MESSAGE: Final = 200
"""Writes in one REGION_WRITE_MULTI: what QEMU collects (hw/vfio-user, VFIO_USER_MULTI_MAX). The spec has no
limit; each write may cost the device what a register access costs, and nobody else is served meanwhile.
"""

MAX_IO_FDS: Final = 512
"""Sub-regions in one GET_REGION_IO_FDS reply: the queues of a card that uses every one of 256 pairs."""

MAX_LOGGED_RANGES: Final = 256
"""Ranges in one DMA_LOGGING_START: the kernel's own limit (drivers/vfio/vfio_main.c, LOG_MAX_RANGES)."""

MAX_DMA_BUF_RANGES: Final = 254
"""Ranges in one export of a BAR: so many fit into a SMALL_REPLY, which repeats them. The kernel takes as many
as it has memory for; a receiver would make a DMA window of each.
"""

MAX_MESSAGE_HEAD: Final = 40
"""Bytes that stand before bulk data in the longest case: DMA_UNMAP with the record of its dirty bitmap."""

MAX_OUTSTANDING: Final = 4096
"""Requests without an answer yet. Beyond, the sender is not reading replies, and 16-bit message ids run
short.
"""

ADDRESS_SPACE: Final = 1 << 64
"""IOVAs and region offsets are below; a span that ends beyond would wrap at the other end."""

MAX_ERRNO: Final = 4095
"""The largest errno a Linux system call gives (include/linux/err.h, MAX_ERRNO); a larger one in a reply
means EIO.
"""

# quirks: what some peers can take (see protocol.quirks)

MAX_WHOLE_MESSAGE: Final = 32 << 10
"""Bytes of a message that reach a unix socket's other end in one piece, as one buffer (net/unix/af_unix.c,
UNIX_SKB_FRAGS_SZ); for peers that read a body with one call.
"""

SMALL_REPLY: Final = 4096
"""Bytes after the header that SPDK's client has room for, in every reply (lib/vfio_user/host)."""

# both shells

RECEIVE_SIZE: Final = 64 << 10
"""Bytes taken from the socket at once: several hundred register accesses, or a large transfer in few
pieces.
"""

# the server

MAX_FDS_PER_MESSAGE: Final = 253
"""Descriptors that one sendmsg can carry (SCM_MAX_FD, include/net/scm.h). There is room for all of them:
with less the kernel would drop some silently, and a DMA window without its descriptor means something else
than one with.
"""

DMA_DEADLINE: Final = 5.0
"""Seconds that a client gets to answer DMA_READ or DMA_WRITE, as long as QEMU gives a server. A thread of the
data path waits for it, and a client that is stopped in a debugger must not hold it for ever.
"""

UNPIN_TIMEOUT: Final = 1.0
"""Seconds that those who hold memory of a client get to release it, when it is to be unmapped or the card to
be stopped. The client waits for the answer: QEMU 5 seconds, with its lock held and its guest standing still,
this project's client 2 when it gives up (UNMAP_TIMEOUT). Both should hear a refusal rather than nothing.
"""

MAX_DMA_UNANSWERED: Final = 64
"""DMA messages without an answer, those that are given up included. Every thread of a device has one; more
are owed by a client that answers none.
"""

MAX_KEPT: Final = 4 << 20
"""Bytes of requests kept while the thread that would handle them waits for an answer to a DMA message:
thousands of small ones, or the largest write three times. A client that says more without answering is
dropped.
"""

KEPT_REQUEST: Final = 512
"""Bytes that a kept request counts for beyond its data: about what its object takes."""

KEPT_DESCRIPTOR: Final = 16 << 10
"""Bytes that a descriptor of a kept request counts for: with 256 of them it is enough, lest they use up the
process's descriptors.
"""


@dataclass(frozen=True, slots=True)
class SessionLimits:
    """What one client may cost a server; times in seconds."""

    version_deadline: float = 10.0
    """A client that connects and does not say VERSION blocks the card for others; QEMU says it at once."""

    send_deadline: float = 30.0
    """A client that takes none of its replies for so long is dropped. Only one that sends many requests
    without reading gets here: the replies to one fit into the socket's buffer.
    """

    tellings: int = 20
    """Log entries of refused requests: a client must not fill a disk with them."""

    messages_per_turn: int = 64
    """Messages answered before other cards in the same thread get their turn."""

    dma_deadline: float = DMA_DEADLINE
    """A DMA_READ or DMA_WRITE that is not answered within it has failed."""

    unpin_deadline: float = UNPIN_TIMEOUT
    """A DMA_UNMAP, or an end of running, that has not found its memory released by then is refused: EBUSY."""


# the client

MAX_QUEUED: Final = 1 << 20
"""Bytes that wait for a slow server before callers must wait as well; one request of the largest usual
size.
"""

READS_PER_TURN: Final = 16
"""How often the socket is read before other tasks get their turn, however much the server says."""

MAX_UNREAD_ANSWERS: Final = 64 << 20
"""Bytes of answers to DMA_READ that a server may leave unread before it asks for more: 64 of the largest
usual size at a time, and a further one of any size.
"""

MAX_DMA_PAGE: Final = 1 << 30
"""The largest smallest page size of a server that windows are rounded up to: a huge page of x86."""

MAX_REPORT: Final = 32 << 10
"""Bytes of bitmap asked for at a time: 1 GiB of 4 KiB pages, and half of what a reply that is not bulk data
may have.
"""

PRECOPY_ENOUGH: Final = 64 << 10
"""A pass over a running device that finds fewer bytes is the last: what is left is not worth another."""

PRECOPY_PASSES: Final = 8
"""Passes over a running device; one that changes faster than it is copied is stopped all the same."""

PRECOPY_LIMIT: Final = 1 << 30
"""Bytes taken from a running device before it is stopped all the same: a device that always has more must
not keep a migration from ending.
"""

UNDO_TIMEOUT: Final = 5.0
"""Seconds that either server gets to go back to where it was when a migration fails or is cancelled; also
what the target gets to start, which cannot be cancelled: nobody would know which of the two runs.
"""

FIRST_ARGSZ: Final = 512
"""Bytes allowed in the first question about a region: enough for 29 sparse areas."""

MAX_REGIONS: Final = 100
"""Regions of a device; more is a malign server's (QEMU draws the same line)."""

MAX_IRQS: Final = 50
"""Kinds of interrupts of a device; more is a malign server's (QEMU draws the same line)."""

MAX_QUESTIONS: Final = 4
"""Times a region is asked for with more room; an honest server needs two."""

BUSY_RETRY: Final = 0.01
"""Seconds until a listener with a full backlog is tried again; unix sockets cannot be waited for there."""

UNMAP_TIMEOUT: Final = 2.0
"""Seconds that a server gets to let go of a window when its block ends by an exception or a cancellation."""

REVOKE_TIMEOUT: Final = 2.0
"""Seconds that importers get to let go of an exported BAR when its block ends by an exception or a
cancellation.
"""

DISABLE_TIMEOUT: Final = 2.0
"""Seconds that a server gets to let go of the eventfds when their block ends by an exception or a
cancellation.
"""

INTX_TIMEOUT: Final = 2.0
"""Seconds that a server gets to answer all messages of one change of an INTx line. The machine stands still
meanwhile: its guest waits in the call that changed the irqchip or the route.
"""

INTX_MAPPINGS_OFF: Final = 1.1
"""Seconds after an interrupt for which BARs are not mapped where INTx is ended by trapped accesses (QEMU's
x-intx-mmap-timeout-ms): a device that interrupts more often keeps them off, which is cheaper than to and fro.
"""


@dataclass(frozen=True, slots=True)
class Limits:
    """What this side accepts, announced as capabilities in VERSION.

    `max_msg_fds`: descriptors in one message; `max_data_xfer_size`: bytes of data in one read or write;
    `max_dma_maps`: DMA windows at a time, and no client is told more than it proposed; `pgsizes`: mask of
    page sizes of DMA windows; `write_multiple`: whether REGION_WRITE_MULTI is spoken; `twin_socket`: whether
    the server's commands may have a socket of their own. Raises ValueError where a known peer would refuse
    the value.
    """

    max_msg_fds: int = MAX_MSG_FDS
    max_data_xfer_size: int = DEFAULT_MAX_DATA_XFER_SIZE
    max_dma_maps: int = DEFAULT_MAX_DMA_MAPS
    pgsizes: int = DEFAULT_PGSIZES
    write_multiple: bool = True
    twin_socket: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.max_msg_fds <= MAX_MSG_FDS:
            raise ValueError(f"max_msg_fds is {self.max_msg_fds}, not 0 to {MAX_MSG_FDS}")
        if not 1 <= self.max_data_xfer_size <= MAX_DATA_XFER_SIZE:
            raise ValueError(
                f"max_data_xfer_size is {self.max_data_xfer_size}, not 1 to {MAX_DATA_XFER_SIZE}"
            )
        if not 1 <= self.max_dma_maps <= MAX_DMA_MAPS:
            raise ValueError(f"max_dma_maps is {self.max_dma_maps}, not 1 to {MAX_DMA_MAPS}")
        if self.pgsizes <= 0 or self.pgsizes & (DEFAULT_PGSIZES - 1):
            raise ValueError(f"pgsizes is {self.pgsizes:#x}: no page is smaller than 4 KiB")
