"""What the library cannot do, by name: each limit with its reason and the generations that have it.

`trionic serve --engine libvfio-user --limits` prints them; a test that needs what is missing names the limit
and is left out for the generations that have it. "Upstream" is the library's source, where each was read.
"""

from __future__ import annotations

from enum import Enum
from typing import Final

from server.libvfio_user._abi import Generation

__all__ = ["Limit", "limits_of"]

_OLD: Final = frozenset({Generation.V2022})
_MODERN: Final = frozenset({Generation.V2023, Generation.V2026})
_UNTIL_2026: Final = frozenset({Generation.V2022, Generation.V2023})
_ALL: Final = frozenset(Generation)


class Limit(Enum):
    """A limit: its name, who has it, what cannot be done, and why."""

    def __init__(self, label: str, generations: frozenset[Generation], what: str, why: str) -> None:
        self.label = label
        self.generations = generations
        self.what = what
        self.why = why

    # --- commands and capabilities

    WRITE_MULTI = (
        "write-multi",
        _ALL,
        "REGION_WRITE_MULTI is refused and write_multiple never agreed on",
        "upstream has the command's number and nothing else",
    )
    TWIN_SOCKET = (
        "twin-socket",
        _OLD,
        "twin_socket is never agreed on",
        "it came in September 2023",
    )
    CAPABILITIES = (
        "capabilities",
        _ALL,
        "max_dma_maps and pgsizes are neither read nor told, the others told to every client, and a client"
        " whose max_msg_fds is over 1024 is refused",
        "upstream's tran.c knows max_msg_fds, max_data_xfer_size, migration and twin_socket",
    )
    DEVICE_FEATURE = (
        "device-feature",
        _OLD,
        "DEVICE_FEATURE, MIG_DATA_READ and MIG_DATA_WRITE are refused, so there is no migration",
        "it speaks the migration region that the specification has dropped",
    )
    DMA_LOGGING = (
        "dma-logging",
        _ALL,
        "DMA_LOGGING and the dirty bitmap of DMA_UNMAP are refused",
        "the library logs what it writes itself, and the card writes past it: its bitmap would be clean",
    )
    MIGRATION_STATES = (
        "migration-states",
        _MODERN,
        "there is no P2P state and no ERROR; in STOP and STOP_COPY most requests are refused, even"
        " DEVICE_RESET, which does not lead back to RUNNING from other states either",
        "upstream's migration.c and should_exec_command",
    )
    MIGRATION_PADDING = (
        "migration-padding",
        _MODERN,
        "a reply to MIG_DATA_READ is as long as what was asked for, whatever size it names",
        "handle_mig_data_read shortens the size and not the message",
    )
    IO_EVENTFDS = (
        "ioeventfds",
        _MODERN,
        "GET_REGION_IO_FDS names no eventfd",
        "the library's entries have 48 bytes where the specification has 40",
    )
    ERROR_PAYLOAD = (
        "error-payload",
        _ALL,
        "an error reply may be longer than its header",
        "a refused region access keeps the payload that was made ready for it",
    )
    LARGE_MESSAGES = (
        "large-messages",
        _ALL,
        "a request that does not fit into the sender's socket buffer (about 200 KiB) ends the session",
        "the library takes a body with one recv and misreads the stream when a part is still to come",
    )
    CUT_MESSAGES = (
        "cut-messages",
        _ALL,
        "a message that is cut where its descriptors end is refused",
        "the library takes header and body with one call each",
    )
    MAPPABLE_REGIONS = (
        "mappable-regions",
        _ALL,
        "a client that takes no descriptors cannot ask about a region that can be mapped, or is sent one all"
        " the same",
        "dev_get_caps answers ENOSPC in 2022, and looks no more since",
    )
    UNCHECKED_DESCRIPTORS = (
        "unchecked-descriptors",
        _ALL,
        "a second descriptor of DMA_MAP is dropped, and any descriptor taken for an eventfd",
        "the library neither counts the one nor looks at the other",
    )
    NINE_REGIONS = (
        "nine-regions",
        _OLD,
        "GET_INFO tells ten regions",
        "the tenth was the migration region",
    )

    # --- memory

    DMA_WINDOWS = (
        "dma-windows",
        _UNTIL_2026,
        "a client has 16 DMA windows at most",
        "MAX_DMA_REGIONS",
    )
    UNKNOWN_UNMAPS = (
        "unknown-unmaps",
        _ALL,
        "DMA_UNMAP of a range that is no window is refused, which clients with an IOMMU do not expect",
        "dma_controller_remove_region looks for exactly one window, and answers ENOENT",
    )
    MESSAGE_DMA = (
        "message-dma",
        _OLD,
        "memory that came without a descriptor cannot be reached",
        "vfu_sgl_read and vfu_sgl_write go to the start of the window, whatever address was asked for",
    )
    IN_BAND_DMA = (
        "in-band-dma",
        _MODERN,
        "memory that came without a descriptor can be reached by clients with a twin socket only",
        "a request of the client that crosses the library's own on one socket is lost (issue 279)",
    )
    MESSAGE_DMA_HOLDS = (
        "message-dma-holds",
        _MODERN,
        "while the client is asked for its memory, no card of the process is served; a client that does not"
        " answer in time loses its session",
        "vfu_sgl_read and vfu_sgl_write wait in the thread that handles messages",
    )
    REGION_SIZE = (
        "region-size",
        _UNTIL_2026,
        "a BAR is smaller than 4 GiB",
        "the library keeps sizes in 32 bits",
    )

    # --- interrupts

    IRQ_FLAGS = (
        "irq-flags",
        _ALL,
        "GET_IRQ_INFO says EVENTFD for every index, never MASKABLE, AUTOMASKED or NORESIZE",
        "the flags are a constant in upstream's irq.c",
    )
    SHARED_VECTORS = (
        "shared-vectors",
        _ALL,
        "which of INTx, MSI and MSI-X is meant follows the enable bits in configuration space, which a"
        " client has to set, and wiring two of them is not refused",
        "the three share one array of eventfds, and the library does not tell who wired it",
    )
    UNPLUG_VECTOR = (
        "unplug-vector",
        _ALL,
        "a single vector other than the first cannot be unplugged",
        "the loop of irqs_disable ends at the count instead of start + count",
    )
    PENDING_BITS = (
        "pending-bits",
        _ALL,
        "the pending bit array does not show an interrupt that waits for its eventfd",
        "the library does not tell which eventfds there are; the interrupt itself is delivered late",
    )
    RESAMPLE = (
        "resample",
        _ALL,
        "SET_IRQS UNMASK with an eventfd is refused, so that clients unmask INTx by messages",
        "the library would take the eventfd and forget it",
    )
    ERR_AND_REQ = (
        "err-and-req",
        _ALL,
        "the ERR and REQ interrupts are never raised, and in the interface of 2022 they are absent",
        "vfu_irq_trigger does not reach them, and in 2022 their eventfds took the place of vector 0",
    )
    INTERRUPT_HOP = (
        "interrupt-hop",
        _ALL,
        "each interrupt passes the event loop on its way to the client",
        "vfu_irq_trigger may be called in the thread only that handles messages",
    )
    BLOCKING_EVENTFD = (
        "blocking-eventfd",
        _ALL,
        "a client that fills the counter of its own interrupt's eventfd stops all cards of the process",
        "vfu_irq_trigger writes without asking whether there is room",
    )

    # --- the process

    BLOCKING_REPLY = (
        "blocking-reply",
        _ALL,
        "a client that asks for a large reply and does not read it holds all cards for a second",
        "the library sends each reply whole in a blocking call",
    )


def limits_of(generation: Generation) -> tuple[Limit, ...]:
    """The limits of a library of that generation."""
    return tuple(limit for limit in Limit if generation in limit.generations)
