"""The states of a device that can be moved, and the ways between them.

vfio's migration version 2 as vfio-user has it (vfio-user, VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE; linux/vfio.h,
enum vfio_device_mig_state). The peer-to-peer states exist in the numbering only.
"""

import errno
from collections import deque
from enum import IntEnum, IntFlag

from device.errors import DeviceError


class DeviceState(IntEnum):
    """Where a device stands (VFIO_DEVICE_STATE_*)."""

    ERROR = 0
    STOP = 1
    RUNNING = 2
    STOP_COPY = 3
    RESUMING = 4
    RUNNING_P2P = 5
    PRE_COPY = 6
    PRE_COPY_P2P = 7


class MigrationFlags(IntFlag):
    """States that a device offers beyond RUNNING and ERROR (VFIO_MIGRATION_*)."""

    STOP_COPY = 1
    P2P = 2
    PRE_COPY = 4


S = DeviceState

# The direct arcs: what a device does, it does on one of these.
ARCS: dict[DeviceState, tuple[DeviceState, ...]] = {
    S.RUNNING: (S.STOP, S.PRE_COPY),
    S.STOP: (S.RUNNING, S.STOP_COPY, S.RESUMING),
    S.STOP_COPY: (S.STOP,),
    S.RESUMING: (S.STOP,),
    S.PRE_COPY: (S.RUNNING, S.STOP_COPY),
}

# In all others the device is stopped.
RUNNING_STATES = frozenset({S.RUNNING, S.PRE_COPY})

# A data transfer session lasts through these; no combined path leads through one.
SAVING = frozenset({S.PRE_COPY, S.STOP_COPY})

# Reachable by the arcs, and forbidden all the same.
FORBIDDEN = frozenset({(S.STOP_COPY, S.PRE_COPY)})


def path(start: DeviceState, end: int) -> tuple[DeviceState, ...]:
    """The states to enter one after the other to come from `start` to `end`: the shortest way.

    Empty when `start` is `end`. DeviceError(EINVAL) when no way leads there: out of or into ERROR, into a
    state that is not offered, from STOP_COPY back to PRE_COPY.
    """
    ways: deque[tuple[DeviceState, ...]] = deque([()])
    seen = {start}
    while ways and start in ARCS and (start, end) not in FORBIDDEN:
        way = ways.popleft()
        here = way[-1] if way else start
        if here == end:
            return way
        if way and here in SAVING:
            continue
        for following in ARCS[here]:
            if following not in seen:
                seen.add(following)
                ways.append((*way, following))
    names = [state.name for state in DeviceState if state == end]
    raise DeviceError(errno.EINVAL, f"no way leads from {start.name} to {names[0] if names else end}")
