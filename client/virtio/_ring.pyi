from collections.abc import Sequence

from _typeshed import ReadableBuffer, WriteableBuffer

MAX_SIZE: int
"""Most descriptors in a queue (virtio 1.3, 2.7)."""

def ring_layout(size: int) -> tuple[int, int, int]:
    """(bytes, offset of the avail ring, offset of the used ring) for `size` descriptors.

    The table begins there, 16-aligned. Raises ClientError if the size is not a power of two up to MAX_SIZE.
    """

class Ring:
    """A queue whose buffers are the caller's; the device has `memory`, which is zeroed, at `iova`."""

    descriptor_iova: int
    driver_iova: int
    device_iova: int

    def __init__(self, memory: WriteableBuffer, iova: int, size: int, *, event_index: bool = False) -> None:
        """Raises ClientError if the memory is too small or not aligned."""
    @property
    def size(self) -> int:
        """Descriptors."""
    @property
    def free(self) -> int:
        """Descriptors that the device does not have."""
    @property
    def outstanding(self) -> int:
        """Chains that the device has, or has given back uncollected."""
    @property
    def pending(self) -> bool:
        """Whether the device gave something back that was not collected."""
    def add(
        self, readable: Sequence[tuple[int, int]], writable: Sequence[tuple[int, int]], token: object
    ) -> bool:
        """Offer a chain of (iova, bytes) buffers, to be seen at `publish`; False if it does not fit."""
    def publish(self) -> bool:
        """Let the device see what was offered since the last time; True if it wants to be notified."""
    def collect(self) -> list[tuple[object, int]]:
        """(token, bytes written) of each chain that came back.

        Raises DeviceError for one that the device never had.
        """
    def enable_interrupts(self, after: int = 1) -> bool:
        """Ask for an interrupt once `after` more chains came back.

        True if they did meanwhile: no interrupt may come then. Without event index it comes with the first.
        """
    def disable_interrupts(self) -> None:
        """Ask for none; one may come all the same."""
    def release(self) -> None:
        """Let go of the memory; every later call raises ClientError."""

class _Slots(Ring):
    def __init__(
        self,
        memory: WriteableBuffer,
        iova: int,
        size: int,
        *,
        slots: WriteableBuffer,
        slots_iova: int,
        slot_size: int,
        event_index: bool = False,
    ) -> None: ...

class TransmitRing(_Slots):
    """A queue of frames to the device. A frame and its 12-byte header lie in as many slots as they need."""

    def push(self, frames: Sequence[ReadableBuffer], start: int = 0, header: bytes | None = None) -> int:
        """Offer frames[start:] until slots run out; how many were. All get the same header, zeros by default.

        Raises ClientError for a frame that could never fit.
        """
    def repeat(self, frame: ReadableBuffer, count: int, header: bytes | None = None) -> int:
        """Offer the same frame up to `count` times; how many were."""
    def reap(self) -> int:
        """Take back the slots of frames that the device has sent; how many frames."""
    def slots_for(self, length: int) -> int:
        """Slots that a frame of so many bytes needs."""

class ReceiveRing(_Slots):
    """A queue of frames from the device; a slot is offered anew when its frame was taken.

    What came out of pop or drain must be followed by publish.
    """

    def __init__(
        self,
        memory: WriteableBuffer,
        iova: int,
        size: int,
        *,
        slots: WriteableBuffer,
        slots_iova: int,
        slot_size: int,
        event_index: bool = False,
        mergeable: bool = False,
    ) -> None: ...
    def pop(self, limit: int = 64) -> list[bytes]:
        """Up to `limit` frames; raises DeviceError for lengths that cannot be."""
    def pop_with_headers(self, limit: int = 64) -> list[tuple[bytes, bytes]]:
        """Up to `limit` frames as (12-byte header, frame)."""
    def drain(self) -> tuple[int, int]:
        """Throw away all frames that are there: how many, and their bytes."""
