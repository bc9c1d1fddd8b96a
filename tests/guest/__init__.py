"""Real Linux in real QEMU, with the card plugged in: the rig for tests, benchmarks and ``trionic guest``.

`boot` starts a guest and gives a `Guest` to steer; `guest_root` makes what it is started from; `Network` is a
network of the test's own for the host's end of a TAP. Importing this package costs nothing: QEMU, kernel and
tools are fetched from Debian on first use and kept in the cache directory. ``python -m tests.guest --help``
is the same rig by hand.
"""

from tests.guest._arch import PPC64, X86_64, Arch
from tests.guest._arguments import Card
from tests.guest._errors import GuestError, RigError
from tests.guest._machine import Guest, GuestResult, boot
from tests.guest._network import Network
from tests.guest._qmp import Event, QmpError
from tests.guest._root import Root, guest_root

__all__ = [
    "PPC64",
    "X86_64",
    "Arch",
    "Card",
    "Event",
    "Guest",
    "GuestError",
    "GuestResult",
    "Network",
    "QmpError",
    "RigError",
    "Root",
    "boot",
    "guest_root",
]
