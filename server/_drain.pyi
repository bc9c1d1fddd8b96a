from collections.abc import Callable
from enum import IntEnum

class Outcome(IntEnum):
    EMPTY = 0
    TURN = 1
    OTHER = 2
    BLOCKED = 3
    GONE = 4

class Drain:
    direct: bool
    credit: int
    held: bool
    def __init__(
        self,
        fd: int,
        read: Callable[[int, int, int], bytes],
        write: Callable[[int, int, bytes], None],
        failed: Callable[[int, Exception], int],
        *,
        dma_map: Callable[[int, int, int, int, int | None], None] | None = None,
        dma_unmap: Callable[[int, int], None] | None = None,
        poll_us: int = 0,
    ) -> None: ...
    def run(self) -> int: ...
    def take(self) -> tuple[memoryview, list[int], bool]: ...
    def take_unsent(self) -> bytes: ...
