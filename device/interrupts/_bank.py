"""What MSI and MSI-X vectors have in common."""

from collections.abc import Sequence

from device.interrupts._eventfd import release
from device.interrupts._lines import Lines


class VectorBank:
    """`count` vectors of one kind.

    A vector is deliverable when it is wired and neither its own mask, nor the function's, nor the client's
    (SET_IRQS MASK) holds it back. Raised while it is not, it becomes pending; whichever way it becomes
    deliverable, a pending vector is signalled once and is pending no more. Only the bank that is `active`
    touches the lines.
    """

    def __init__(self, lines: Lines, count: int) -> None:
        self.count = count
        self.lines = lines
        self.active = False
        self.enabled = False  # the enable bit in the capability, which wiring does not wait for
        self.allocated = 0  # vectors of the set that was wired first: what NORESIZE fixes
        self._fds: list[int | None] = [None] * count
        self._held = bytearray(count)

    def masked(self, vector: int) -> bool:
        """Whether the function's own mask bits hold `vector` back."""
        raise NotImplementedError

    def plugged(self, vector: int) -> None:
        """`vector` got an eventfd."""

    def fd(self, vector: int) -> int | None:
        """The eventfd of `vector`."""
        return self._fds[vector]

    def deliverable(self, vector: int) -> bool:
        """Whether `vector` would be signalled rather than become pending."""
        return self._fds[vector] is not None and not self._held[vector] and not self.masked(vector)

    def pending_bits(self, first: int = 0, bits: int = 64) -> int:
        """The pending bits of `bits` vectors from `first` on, the lowest in bit 0."""
        if not self.active:
            return 0
        pending = self.lines.vector_pending
        return sum(
            1 << index
            for index, vector in enumerate(range(first, min(first + bits, self.count)))
            if pending(vector)
        )

    def wire(self, start: int, fds: Sequence[int | None]) -> None:
        """Give the vectors from `start` on these eventfds, which the bank closes one day; None unplugs."""
        for vector, fd in enumerate(fds, start):
            old, self._fds[vector] = self._fds[vector], fd
            if fd is not None:
                self.plugged(vector)
            self.refresh(vector)
            release(old)

    def unwire(self) -> None:
        """Unplug all vectors and forget the client's masks.

        What is pending stays so while the bank is active.
        """
        self._held = bytearray(self.count)
        self.wire(0, [None] * self.count)
        self.allocated = 0

    def hold(self, start: int, which: Sequence[bool], held: bool) -> None:
        """Mask or unmask, for the client, the vectors from `start` on that are true in `which`."""
        for vector, chosen in enumerate(which, start):
            if chosen:
                self._held[vector] = held
                self.refresh(vector)

    def refresh(self, vector: int) -> None:
        """Arm or disarm `vector` by its state, and deliver it if it was waiting for that."""
        if not self.active:
            return
        fd = self._fds[vector] if self.deliverable(vector) else None
        self.lines.vector_arm(vector, -1 if fd is None else fd)
        if fd is not None and self.lines.vector_pending(vector):
            self.lines.vector_clear_pending(vector)
            self.lines.vector_fire(vector)

    def enter(self) -> None:
        """The lines are this bank's now."""
        self.active = True
        self.refresh_all()

    def leave(self) -> None:
        """The lines serve the other bank: no pending bit of one may become an interrupt of the other."""
        self.active = False
        for vector in range(self.count):
            self.lines.vector_arm(vector, -1)
            self.lines.vector_clear_pending(vector)

    def refresh_all(self) -> None:
        """`refresh` every vector."""
        for vector in range(self.count):
            self.refresh(vector)
