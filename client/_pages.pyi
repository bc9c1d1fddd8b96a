from typing import Final

PAGE: Final[int]
"""Bytes of a page of this machine."""

MAX_SIZE: Final[int]
"""Most bytes that are reserved at a time: 1 TiB, what a region has at most in the kernel's device file. A
server says how large its regions are, and what stands for them when they are zapped takes memory.
"""

ONES_CHUNK: Final[int]
"""Bytes of the file of ones that stands for zapped memory: 2 MiB, what one entry of a page table covers."""

MAX_ONES_MAPS: Final[int]
"""Maps that zapped pages may consist of: a sixteenth of what Linux gives a process (vm.max_map_count,
65,530). Beyond 8 GiB the file of ones is as long as that takes: for 64 GiB, 16 MiB, and 256 MiB at most.
"""

SLOTS: Final[int]
"""Ranges that may be mapped at a time by all of a process; `_sigbus.h` has the reason."""

def place(base: int, align: int, offset: int) -> int:
    """The first address from `base` that is `offset` modulo `align`, a power of two: where `mmap_reserve` of
    the kernel's tools/testing/selftests/vfio puts memory, having reserved `align` bytes more than it needs.
    """

def chunk_for(size: int) -> int:
    """Bytes of the file of ones for pages of so many bytes: a power of two."""

class Pages:
    """`size` bytes of address space, whole pages, that begin at `offset` modulo `align`.

    Has the buffer protocol, of the whole. Touching what was neither mapped nor zapped is a SIGSEGV. What a
    file turns out not to have, when it is touched, is lost: private ones instead, to the end of its range.
    """

    size: int
    def __init__(self, size: int, align: int = ..., offset: int = 0) -> None:
        """Raises OSError: EINVAL for what cannot be, ENOMEM for more than there is."""
    @property
    def address(self) -> int:
        """Where they begin; 0 if they are closed."""
    def map(self, at: int, fd: int, fd_offset: int, length: int, *, writable: bool) -> None:
        """Map a file there, in place; nothing of this range is lost then. The descriptor may be closed.

        The same range may be mapped any number of times, and no other that overlaps with it. Raises OSError:
        EINVAL for what are not whole pages of that file, ENOSPC for too many ranges, or what mmap says: all
        of the range is lost then.
        """
    def zap(self, at: int, length: int) -> None:
        """Put private pages there that read as ones, in place. What is written to them stays there, until
        they are mapped or zapped again. If the process has no maps left, they read as zeros.

        Raises OSError: EINVAL for what are not whole pages of these; ENOMEM, but never for a range that was
        mapped.
        """
    def lost(self, at: int, length: int) -> bool:
        """Whether any of these bytes are known to be lost."""
    def load(self, at: int, width: int) -> int | None:
        """A number of 1, 2, 4 or 8 bytes, by one load; None if it is lost. Raises ValueError outside."""
    def store(self, at: int, width: int, value: int) -> bool:
        """Store a number by one store; False if it is lost with its place. Raises ValueError outside,
        OverflowError for a number that is too large.
        """
    def close(self) -> None:
        """Give the address space back; raises BufferError while somebody holds a view."""
    def __buffer__(self, flags: int, /) -> memoryview: ...
