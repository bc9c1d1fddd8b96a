"""DEVICE_FEATURE and the data of a migration. Errnos are those of the kernel's ioctl
(drivers/vfio/vfio_main.c, vfio_ioctl_device_feature).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from errno import EINVAL, ENOTTY, EOPNOTSUPP
from typing import Final

from device.errors import DeviceError
from device.function import PciFunction
from device.migration.migration import Migration
from protocol import Request
from protocol.messages import DeviceFeature, FeatureMigration, FeatureMigState, MigData
from protocol.vfio import Feature, FeatureFlags, MigrationFlags
from server._answer import Answer, Terms
from server._dma import report_logging, start_logging, stop_logging
from server._export import export_bar

__all__ = ["device_feature", "mig_data_read", "mig_data_write"]

_Method = Callable[[PciFunction, bytes], bytes]


@dataclass(frozen=True, slots=True)
class _Row:
    """How a feature is got and set, data of the request to data of the reply; None: it cannot be.

    A feature with `export` is got by sending the descriptor that this gives; the reply repeats the data.
    """

    get: _Method | None = None
    set: _Method | None = None
    of_migration: bool = False
    export: Callable[[PciFunction, bytes], int] | None = None


def device_feature(function: PciFunction, request: Request, body: DeviceFeature, terms: Terms) -> Answer:
    """Probe, get or set one of `_FEATURES`; the engine has checked that flags, data and argsz agree."""
    row = _FEATURES.get(body.feature)
    if row is None or (row.of_migration and function.migration is None):
        raise DeviceError(ENOTTY, f"there is no feature {body.feature}")
    if row.export is not None and terms.fds == 0:
        raise DeviceError(EOPNOTSUPP, "the client takes no descriptors")
    for flag, method in ((FeatureFlags.GET, row.get or row.export), (FeatureFlags.SET, row.set)):
        if body.flags & flag and method is None:
            raise DeviceError(EINVAL, f"feature {body.feature} has no {flag.name}")
    if body.flags & FeatureFlags.PROBE:
        return Answer(body, request.data)
    if body.flags & FeatureFlags.SET and row.set is not None:
        return Answer(body, row.set(function, request.data))
    if row.export is not None:
        return _got(body, request.data, row.export(function, request.data))
    assert row.get is not None
    return _got(body, row.get(function, request.data))


def _got(body: DeviceFeature, data: bytes, *fds: int) -> Answer:
    return Answer(replace(body, argsz=DeviceFeature.size + len(data)), data, fds)


def _migration(function: PciFunction) -> Migration:
    if function.migration is None:
        raise DeviceError(ENOTTY, f"{function.name} cannot be migrated")
    return function.migration


def _get_migration(function: PciFunction, data: bytes) -> bytes:
    return FeatureMigration(MigrationFlags(int(_migration(function).flags))).encode()


def _get_state(function: PciFunction, data: bytes) -> bytes:
    return FeatureMigState(int(_migration(function).state)).encode()


def _set_state(function: PciFunction, data: bytes) -> bytes:
    _migration(function).set_state(FeatureMigState.decode(data).device_state)
    return data


_FEATURES: Final[dict[int, _Row]] = {
    Feature.MIGRATION: _Row(get=_get_migration, of_migration=True),
    Feature.MIG_DEVICE_STATE: _Row(get=_get_state, set=_set_state, of_migration=True),
    Feature.DMA_LOGGING_START: _Row(set=start_logging),
    Feature.DMA_LOGGING_STOP: _Row(set=stop_logging),
    Feature.DMA_LOGGING_REPORT: _Row(get=report_logging),
    Feature.DMA_BUF: _Row(export=export_bar),
}


def mig_data_read(function: PciFunction, request: Request, body: MigData, terms: Terms) -> Answer:
    """Give away the device's state, piece by piece; less than was asked for is the end."""
    data = _migration(function).read(body.length)
    return Answer(MigData(MigData.size + len(data), len(data)), data)


def mig_data_write(function: PciFunction, request: Request, body: MigData, terms: Terms) -> Answer:
    """Take in the state of another device, piece by piece."""
    _migration(function).write(request.data)
    return Answer()
