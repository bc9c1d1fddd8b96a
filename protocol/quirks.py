"""Where known peers differ from the specification, each by name, and what this end does about it.

Most differences are borne from everybody, because no sound peer can be mistaken for one that has them. The
others change what goes over the wire: they are switched on by what a peer says of itself in VERSION, and
`Overrides` switches them on or off by hand. Effects on the wire are the engine's, so that no shell knows
of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final

from protocol.capabilities import Capabilities
from protocol.commands import Role
from protocol.messages import Version


class Peer(Enum):
    """Programs at the other end that are known by what they announce."""

    QEMU_CLIENT = "QEMU's vfio-user-pci"
    RUST_VMM_CLIENT = "rust-vmm's client (Cloud Hypervisor)"
    SPDK_CLIENT = "SPDK's host client"
    LIBVFIO_USER_SERVER = "a server on libvfio-user"
    RUST_VMM_SERVER = "a server on rust-vmm's crate"


class Quirk(Enum):
    """The differences by name; the value is a number without meaning."""

    SHIFTED_DMA = 1
    BARE_DMA_WRITE_REPLY = 2
    WHOLE_HEADERS = 3
    SIXTEEN_FDS = 4
    POSTS_UNLESS_MAPPED = 5
    WHOLE_BODIES = 6
    PADDED_ERRORS = 7
    INVERTED_RESET_FLAG = 8
    UNMAP_FLAGS_ONE_UP = 9
    ERRNO_ZERO = 10
    UNREAD_PAYLOADS = 11
    ANSWERED_POSTS = 12
    ERROR_COMMANDS = 13
    SMALL_REPLIES = 14
    EOI_BY_ACCESS = 15
    NO_MASK_FLAGS = 16
    REPEATED_IDS = 17
    LONG_IO_FDS = 18
    LONG_MIGRATION_DATA = 19
    BASE_ONLY_DMA = 20
    UNCOUNTED_WINDOWS = 21


@dataclass(frozen=True, slots=True)
class About:
    """One difference. `peer` is who is known by his announcement to have it; None: it is borne from everybody
    and never switched.
    """

    peer: Peer | None
    does: str
    ours: str


QUIRKS: Final[dict[Quirk, About]] = {
    Quirk.SHIFTED_DMA: About(
        Peer.QEMU_CLIENT,
        "has a count of 4 bytes in DMA_READ and DMA_WRITE, and so the data 4 bytes early, at 28 from the "
        "message's start, but lengths as if they were at 32",
        "the engine writes and reads the data there and fills up with 4 bytes. A DMA_READ reply may prove "
        "the one or the other layout; then that is believed",
    ),
    Quirk.BARE_DMA_WRITE_REPLY: About(
        Peer.QEMU_CLIENT,
        "answers DMA_WRITE with a header alone; the spec's own table leaves 4 bytes of the count out",
        "the engine takes replies of 0, 12 and 16 bytes from everybody, and itself sends 16",
    ),
    Quirk.WHOLE_HEADERS: About(
        Peer.QEMU_CLIENT,
        "gives up when its first read of a message has fewer than 16 bytes",
        "both shells send a message and its descriptors in one call",
    ),
    Quirk.SIXTEEN_FDS: About(
        Peer.QEMU_CLIENT,
        "refuses a server that announces a max_msg_fds of more than 16",
        "`Limits` cannot be made with more",
    ),
    Quirk.POSTS_UNLESS_MAPPED: About(
        Peer.QEMU_CLIENT,
        "sends writes with No_reply until it meets a region that can be mapped, and never after",
        "writes are done in order whether they want an answer or not",
    ),
    Quirk.UNCOUNTED_WINDOWS: About(
        Peer.QEMU_CLIENT,
        "says a max_dma_maps of 65535, refuses a server that says more, and does not count: with a virtual "
        "IOMMU it maps as many windows as its guest makes",
        "it is told what it said, and may have as many windows as the server bears",
    ),
    Quirk.WHOLE_BODIES: About(
        Peer.LIBVFIO_USER_SERVER,
        "reads a body with one call, which need not give all of what is on the way",
        "the engine does not let a client send longer messages than a socket hands over whole",
    ),
    Quirk.PADDED_ERRORS: About(
        Peer.RUST_VMM_CLIENT,
        "does not look at the error flag and waits for the payload of a refusal",
        "the engine fills up refusals to the length of the answer; what was to be read is all ones, as of a "
        "PCI device that is not there",
    ),
    Quirk.INVERTED_RESET_FLAG: About(
        Peer.RUST_VMM_CLIENT,
        "takes a device that can be reset for one that cannot",
        "it is told the truth, and does not reset; the card does that itself when a client leaves",
    ),
    Quirk.UNMAP_FLAGS_ONE_UP: About(
        Peer.RUST_VMM_CLIENT,
        "has the flags of DMA_UNMAP one bit higher than everybody else",
        "the engine moves them there and back; the crate's server (as which it is known, too) the same",
    ),
    Quirk.ERRNO_ZERO: About(
        Peer.RUST_VMM_SERVER,
        "refuses with errno 0",
        "the engine makes EIO of everybody's errnos that Linux does not know",
    ),
    Quirk.UNREAD_PAYLOADS: About(
        Peer.RUST_VMM_SERVER,
        "leaves the payload of what it refused in the stream, and takes it for the next header",
        "nothing can mend that stream: the engine breaks with the first reply that nobody asked for",
    ),
    Quirk.ANSWERED_POSTS: About(
        Peer.RUST_VMM_SERVER,
        "answers requests with No_reply (until 2026)",
        "the engine reports such an answer as Stray, from everybody",
    ),
    Quirk.ERROR_COMMANDS: About(
        Peer.RUST_VMM_SERVER,
        "refuses in messages of the type 'command' (until 2026)",
        "the engine takes a bare command with the error flag for a refusal if a request of ours with that id "
        "and command waits for an answer",
    ),
    Quirk.SMALL_REPLIES: About(
        Peer.SPDK_CLIENT,
        "has 4096 bytes for the payload of any reply and does not check",
        "the engine lowers what its requests allow, and refuses reads of more",
    ),
    Quirk.EOI_BY_ACCESS: About(
        Peer.QEMU_CLIENT,
        "without KVM's help takes any access to a BAR for the end of an INTx, and sends UNMASK; with it, "
        "MASK, UNMASK with an eventfd that it writes to, UNMASK",
        "device.interrupts has levels, masks and that eventfd as the kernel's vfio-pci",
    ),
    Quirk.NO_MASK_FLAGS: About(
        Peer.LIBVFIO_USER_SERVER,
        "never says MASKABLE or AUTOMASKED, takes MASK and UNMASK without effect and drops an UNMASK eventfd",
        "client.interrupts does not depend on the flags and unmasks by message; client.irqchip hears such a"
        " device itself, for behind an irqchip it would lose what comes before the end of an interrupt",
    ),
    Quirk.REPEATED_IDS: About(
        None,
        "uses a message id twice at a time (QEMU counts them for all its devices, SPDK does not count)",
        "the engine knows a reply by id and command, and echoes what it is given",
    ),
    Quirk.LONG_IO_FDS: About(
        Peer.LIBVFIO_USER_SERVER,
        "has entries of 48 bytes in GET_REGION_IO_FDS, with the datamatch at 40",
        "protocol.io_fds goes by the entries' length",
    ),
    Quirk.LONG_MIGRATION_DATA: About(
        Peer.LIBVFIO_USER_SERVER,
        "sends as many bytes of migration data as were asked for, even when fewer of them count",
        "the engine cuts the data of MIG_DATA_READ to its length",
    ),
    Quirk.BASE_ONLY_DMA: About(
        Peer.LIBVFIO_USER_SERVER,
        "asks by DMA_READ and DMA_WRITE for the beginning of a window, wherever in it its device wants to be "
        "(until 2023; QEMU's own tree has it)",
        "nothing can mend it: what it asks for is answered. Memory that is shared does not need messages",
    ),
}

ALSO: Final[dict[Peer, frozenset[Quirk]]] = {
    Peer.RUST_VMM_SERVER: frozenset({Quirk.UNMAP_FLAGS_ONE_UP}),
}
"""Quirks that a peer has beyond those that are told under its name."""


@dataclass(frozen=True, slots=True)
class Overrides:
    """Quirks that a peer has (`force`) or has not (`never`), whatever it looks like."""

    force: frozenset[Quirk] = frozenset()
    never: frozenset[Quirk] = frozenset()

    def apply(self, found: frozenset[Quirk]) -> frozenset[Quirk]:
        """What to believe of a peer that looks as if it had those `found`."""
        return (found | self.force) - self.never


def recognise(role: Role, peer: Capabilities, version: Version) -> Peer | None:
    """Who the peer of a `role` is, by what it announced and the version it proposed or agreed to; None for
    strangers.
    """
    said = peer.mentioned
    if role is Role.SERVER:
        if version.minor == 0 and said >= {"max_dma_maps", "pgsizes", "write_multiple", "migration"}:
            return Peer.QEMU_CLIENT
        if version.minor == 1 and not said:
            return Peer.SPDK_CLIENT
        if version.minor == 1 and said == _RUST_VMM and peer.max_msg_fds == 1:
            return Peer.RUST_VMM_CLIENT
        return None
    if said == _RUST_VMM and peer.max_msg_fds == 1 and version.minor == 0:
        return Peer.RUST_VMM_SERVER
    if _LIBVFIO_USER <= said <= _LIBVFIO_USER | {"migration", "twin_socket"} and peer.max_msg_fds == 8:
        return Peer.LIBVFIO_USER_SERVER
    return None


def detect(role: Role, peer: Capabilities, version: Version) -> frozenset[Quirk]:
    """The quirks of the peer of a `role`; see `recognise`."""
    who = recognise(role, peer, version)
    if who is None:
        return frozenset()
    return frozenset(quirk for quirk, about in QUIRKS.items() if about.peer is who) | ALSO.get(
        who, frozenset()
    )


_RUST_VMM: Final = frozenset({"max_msg_fds", "max_data_xfer_size", "migration"})
_LIBVFIO_USER: Final = frozenset({"max_msg_fds", "max_data_xfer_size"})
