"""What takes a BAR's mappings away from a client when the function stops to answer at its BARs."""

from enum import Enum


class Revocation(Enum):
    """Who sees to it that nobody uses a mapped BAR while its memory is not decoded: COMMAND.MEMORY is clear,
    the function is in D3hot, or it was reset. By itself vfio-user cannot take a mapping back.
    """

    COOPERATIVE = "cooperative"
    """The client. The file that is mapped is sealed, so nobody can shorten it: no access of the client's can
    fault, and neither can one of a hypervisor that is in the middle of a guest's. A client that does not let
    go goes on reading and writing the card's memory, through resets too, until it disconnects. By message
    every BAR answers as ever.
    """

    ENFORCED = "enforced"
    """The device, as a host's kernel would (drivers/vfio/pci/vfio_pci_core.c). The file is cut to nothing, so
    every access through any mapping, in whatever process, is SIGBUS until the memory is decoded again; by
    message every BAR answers EIO. What this asks of the client: it must let go first or live with SIGBUS.
    QEMU does neither: it writes COMMAND before it takes the BAR out of its guest's address space, and dies if
    another processor of the guest touches the BAR in between, as no driver does that owns it. A client could
    cut or grow the file itself, which makes its own accesses fault or read all ones and nobody else's. It
    costs a copy of what was written, both ways. The file's lock is shared with the client, so one that has
    the kernel fill much of the file delays the server for as long. Pages that the client pinned stay with it,
    and are no longer the card's.
    """
