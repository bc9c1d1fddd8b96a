"""What a client does to move a device: from one function to another, in pieces of a size."""

from device.function import PciFunction
from device.migration.migration import Migration
from device.migration.states import DeviceState


def migration_of(function: PciFunction) -> Migration:
    assert function.migration is not None
    return function.migration


def everything(migration: Migration, size: int = 1 << 16) -> bytes:
    """All that there is to read now."""
    taken = b""
    while True:
        piece = migration.read(size)
        taken += piece
        if len(piece) < size:
            return taken


def saved(function: PciFunction, *, ahead: bool = True) -> bytes:
    """The state of `function`, which stays in STOP_COPY; `ahead`: by way of PRE_COPY."""
    migration = migration_of(function)
    stream = b""
    if ahead:
        migration.set_state(DeviceState.PRE_COPY)
        stream = everything(migration)
    migration.set_state(DeviceState.STOP_COPY)
    return stream + everything(migration)


def load(function: PciFunction, stream: bytes, size: int = 1 << 16) -> None:
    """Make `function` what `stream` says, and let it run."""
    migration = migration_of(function)
    migration.set_state(DeviceState.RESUMING)
    for at in range(0, len(stream), size):
        migration.write(stream[at : at + size])
    migration.set_state(DeviceState.RUNNING)


def move(source: PciFunction, target: PciFunction, *, ahead: bool = True) -> None:
    """`target` goes on where `source` stops."""
    load(target, saved(source, ahead=ahead))
