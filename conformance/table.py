"""All checks, by the sections of the specification and in its order."""

from __future__ import annotations

from typing import Final

from conformance import (
    dma_access,
    dma_buf,
    dma_logging,
    dma_map,
    dma_unmap,
    feature,
    header,
    info,
    io_fds,
    irq_kinds,
    migration,
    order,
    region_info,
    region_read,
    region_write,
    reset,
    set_irqs,
    version,
    write_multi,
)
from conformance.checks import Check, Section

SECTIONS: Final[tuple[Section, ...]] = (
    order.stream,
    order.section,
    order.disconnect,
    header.commands,
    header.section,
    header.descriptors,
    version.section,
    version.twin,
    dma_map.section,
    dma_unmap.section,
    info.device,
    region_info.section,
    io_fds.section,
    info.irq,
    set_irqs.section,
    irq_kinds.section,
    region_read.section,
    region_write.section,
    dma_access.section,
    reset.section,
    write_multi.section,
    feature.section,
    migration.section,
    dma_logging.section,
    dma_buf.section,
)

SERVER_CHECKS: Final[tuple[Check, ...]] = tuple(check for section in SECTIONS for check in section.checks)
