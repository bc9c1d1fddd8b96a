"""The statements about clients, which the watching server observes."""

from __future__ import annotations

from typing import Final

from conformance.checks import EXTENSION, MUST, SHOULD, Check, Section

_VERSION = Section("client-version", "VFIO_USER_VERSION")
_VERSION.observe("first", MUST, "VERSION is the client's first message.")
_VERSION.observe("once", SHOULD, "VERSION comes once.")
_VERSION.observe("payload", MUST, "VERSION has its numbers, and then JSON with a NUL or nothing.")
_VERSION.observe("kinds", MUST, "Capabilities are of the kinds that the specification gives them.")

_HEADER = Section("client-header", "Header")
_HEADER.observe("type", MUST, "A message is a command or a reply.")
_HEADER.observe("size", MUST, "A command is as long as its record and data.")
_HEADER.observe("reserved", SHOULD, "The error field and undefined flags of a command are 0.")
_HEADER.observe("own-commands", MUST, "A client sends the commands of clients, and no others.")
_HEADER.observe("descriptors", MUST, "No more descriptors come than the server's max_msg_fds.")
_HEADER.observe("replies", MUST, "A client answers what it was asked, and nothing else.")

_INFO = Section("client-info", "VFIO_USER_DEVICE_GET_INFO, GET_REGION_INFO, GET_REGION_IO_FDS, GET_IRQ_INFO")
_INFO.observe("argsz", MUST, "argsz allows the fixed part of the reply at least.")
_INFO.observe("zero", MUST, "All fields but argsz and index are 0.")
_INFO.observe("index", SHOULD, "Only regions and interrupts are asked for that the device has.")
_INFO.observe("more-room", SHOULD, "A description that did not fit is asked for again with more room.")
_INFO.observe("refusal", SHOULD, "The client goes on when a description is refused.")

_MAP = Section("client-dma-map", "VFIO_USER_DMA_MAP")
_MAP.observe("argsz", MUST, "argsz is the size of the record.")
_MAP.observe("flags", MUST, "flags are readable, writeable, or both.")
_MAP.observe("range", MUST, "A window has bytes, and ends within the address space.")
_MAP.observe("aligned", MUST, "Address and size are multiples of one of the server's pgsizes.")
_MAP.observe("overlap", MUST, "No window is mapped over another.")
_MAP.observe("count", MUST, "No more windows are mapped than the server's max_dma_maps.")
_MAP.observe("descriptor", MUST, "A window has one descriptor, or none.")
_MAP.observe("offset", MUST, "The offset is 0 without a descriptor.")
_MAP.observe("covered", MUST, "The descriptor's file holds all of the window.")

_UNMAP = Section("client-dma-unmap", "VFIO_USER_DMA_UNMAP")
_UNMAP.observe("argsz", MUST, "argsz allows the reply.")
_UNMAP.observe("flags", EXTENSION, "flags are 0, or one that the kernel and QEMU know.")
_UNMAP.observe("exact", MUST, "Address and size are those of one window.")
_UNMAP.observe("all", EXTENSION, "All windows are taken back before the client leaves.")

_IRQS = Section("client-set-irqs", "VFIO_USER_DEVICE_SET_IRQS")
_IRQS.observe("argsz", MUST, "argsz is the size of the record with its data.")
_IRQS.observe("flags", MUST, "Exactly one DATA flag and one ACTION flag are set.")
_IRQS.observe("range", MUST, "Only interrupts are named that the device has.")
_IRQS.observe("descriptors", MUST, "As many descriptors come as interrupts are named, or none.")
_IRQS.observe("booleans", MUST, "As many booleans come as interrupts are named.")
_IRQS.observe("maskable", SHOULD, "Only what says MASKABLE is masked and unmasked.")

_ACCESS = Section("client-region", "VFIO_USER_REGION_READ, REGION_WRITE, REGION_WRITE_MULTI")
_ACCESS.observe("bounds", MUST, "Accesses stay within their region.")
_ACCESS.observe("size", MUST, "No access is larger than the server's max_data_xfer_size.")
_ACCESS.observe("data", MUST, "A write carries as many bytes as it says.")
_ACCESS.observe(
    "multiple-agreed", MUST, "Many writes in a message come only where write_multiple was agreed."
)
_ACCESS.observe("multiple-form", MUST, "Such a message has as many writes as it says, of 8 bytes at most.")

_DMA = Section("client-dma", "VFIO_USER_DMA_READ, VFIO_USER_DMA_WRITE")
_DMA.observe("read", MUST, "DMA_READ of a window is answered with its address, its count and the data.")
_DMA.observe("read-data", MUST, "The data are those behind the window's descriptor.")
_DMA.observe("without-descriptor", MUST, "Windows without descriptors are reached by DMA_READ.")
_DMA.observe("write", MUST, "DMA_WRITE to a window is answered with its address and its count.")
_DMA.observe("write-data", MUST, "The data are behind the window's descriptor when DMA_WRITE is answered.")
_DMA.observe("unmapped", SHOULD, "DMA_READ of what was not mapped is refused.")
_DMA.observe("twin", MUST, "What was asked over the twin socket is answered there.")

_ASKED = Section("client-asked", "Command Concurrency")
_ASKED.observe("answered", MUST, "What the server asks for is answered.")
_ASKED.observe("unknown", MUST, "A command that does not exist is answered with an error.")
_ASKED.observe("header-only", MUST, "An error reply is the header alone.")
_ASKED.observe("interleaved", MUST, "The client takes its own reply though the server's question came first.")

CLIENT_SECTIONS: Final = (_VERSION, _HEADER, _INFO, _MAP, _UNMAP, _IRQS, _ACCESS, _DMA, _ASKED)

CLIENT_CHECKS: Final[tuple[Check, ...]] = tuple(check for each in CLIENT_SECTIONS for check in each.checks)
