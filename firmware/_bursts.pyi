from device._gate import Gate
from device.dma._windows import DmaWindows
from device.interrupts._lines import Lines
from device.virtio._split import VirtQueue
from firmware._filter import ReceiveFilter

BURST: int

class Bursts:
    mergeable: bool
    checksum_to_driver: bool
    running: bool
    link_up: bool
    @property
    def gate(self) -> Gate: ...
    @property
    def dma(self) -> DmaWindows: ...
    @property
    def lines(self) -> Lines: ...
    @property
    def rx(self) -> VirtQueue: ...
    @property
    def tx(self) -> VirtQueue: ...
    @property
    def filter(self) -> ReceiveFilter: ...
    def __init__(
        self,
        gate: Gate,
        dma: DmaWindows,
        lines: Lines,
        rx: VirtQueue,
        tx: VirtQueue,
        filter: ReceiveFilter,  # noqa: A002
    ) -> None: ...
