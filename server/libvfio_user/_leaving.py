"""What a message takes away, and the pins that are in its way.

The library could be made to wait itself: before every DMA_MAP and DMA_UNMAP, DEVICE_RESET and step of a
migration it asks a device to be quiet (vfu_setup_device_quiesce_cb), and goes on when the device says that it
is. But it does not say what is to go, so a device would have to let go of everything, for windows that come
as well. Whoever holds the client's socket knows better: the message stays there until its own span is free,
and the library sees it then.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from device.errors import DeviceError
from device.function import PciFunction
from protocol import Command
from protocol.messages import DeviceFeature, DmaUnmap, FeatureMigState, Header
from protocol.vfio import DmaUnmapFlags, Feature, FeatureFlags

__all__ = ["check_pins", "may_take"]

_BODY: Final = Header.size
_LAST: Final = (1 << 64) - 1


def may_take(header: Header) -> bool:
    """Whether such a message may take memory away."""
    return header.command in _CHECKS


def check_pins(function: PciFunction, header: Header, look: bytes) -> None:
    """`PinnedError` while something is pinned that the message beginning with ``look`` takes away, if it
    `may_take` anything. Whoever leaves the gate before the library has the message must check again, for the
    library unmaps windows whatever the function says.

    Messages that the library refuses anyhow are of no interest.
    """
    if len(function.dma.pins):
        _CHECKS[header.command](function, look)


def _unmap(function: PciFunction, look: bytes) -> None:
    body = DmaUnmap.decode(look, _BODY)
    if body.flags & DmaUnmapFlags.ALL:
        function.dma.pins.check()
    elif body.length and body.address + body.length - 1 <= _LAST:
        function.dma.pins.check(body.address, body.address + body.length - 1)


def _feature(function: PciFunction, look: bytes) -> None:
    body = DeviceFeature.decode(look, _BODY)
    state = _BODY + DeviceFeature.size
    if function.migration is None or body.feature != Feature.MIG_DEVICE_STATE:
        return
    if not body.flags & FeatureFlags.SET or len(look) < state + FeatureMigState.size:
        return
    try:
        stops = function.migration.would_stop(FeatureMigState.decode(look, state).device_state)
    except DeviceError:
        return
    if stops:
        function.dma.pins.check()


_CHECKS: Final[dict[int, Callable[[PciFunction, bytes], None]]] = {
    Command.DMA_UNMAP: _unmap,
    Command.DEVICE_FEATURE: _feature,
}
