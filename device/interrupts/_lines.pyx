# cython: language_level=3
"""The ends of the card's interrupt wires: what the data path may pull without the GIL.

A vector is *armed* with an eventfd while the state machines beside this module find it deliverable; fired
while it is not, it becomes pending. INTx is a level with automask, equal to the kernel's vfio_pci_intrs.c:
asserting an unmasked line masks it and signals once; unmasking a line that is still high signals again and
leaves it masked. While the lines are `silent` nothing is signalled: vectors become pending, INTx keeps its level.

Nothing here locks: callers hold the card's gate.
"""

from libc.stdint cimport uint8_t, uint16_t, uint64_t
from libc.stdlib cimport calloc, free


cdef extern from "_eventfd.h" nogil:
    int trionic_eventfd_setup()
    void trionic_eventfd_signal(int fd)

MODE_INTX = 0
MODE_MSI = 1
MODE_MSIX = 2

NO_VECTOR = 0xFFFF          # VIRTIO_MSI_NO_VECTOR

KERNEL_SIGNALS = bool(trionic_eventfd_setup())      # whether signal() cannot wait, whatever a peer does meanwhile


def signal(int fd):
    """Add one to the eventfd `fd`; a counter that is full stays so, for its owner has not read what is there."""
    with nogil:
        trionic_eventfd_signal(fd)


cdef class Lines:
    """`vectors` message-signalled vectors and one INTx line."""

    def __cinit__(self, int vectors):
        cdef int i
        if vectors < 0 or vectors > 2048:
            raise ValueError(f"{vectors} vectors: a function has 0 to 2048 (PCI Local Bus 3.0, 6.8.2)")
        self.vectors = vectors
        self._fds = <int *> calloc(vectors + 1, sizeof(int))
        self._pending = <uint8_t *> calloc(vectors + 1, 1)
        if self._fds == NULL or self._pending == NULL:
            raise MemoryError
        for i in range(vectors):
            self._fds[i] = -1
        self._intx_fd = -1

    def __dealloc__(self):
        free(self._fds)
        free(self._pending)

    cdef void _signal(self, int fd) noexcept nogil:
        """Add one to the eventfd, unless its counter is full: then the peer has a wake-up it has not read."""
        self.signals += 1
        trionic_eventfd_signal(fd)

    # --- message-signalled vectors

    cdef void fire(self, uint16_t vector) noexcept nogil:
        if vector >= self.vectors:
            return
        if self._fds[vector] >= 0 and not self.silent:
            self._signal(self._fds[vector])
        else:
            self._pending[vector] = 1

    def _check(self, int vector):
        if not 0 <= vector < self.vectors:
            raise IndexError(f"vector {vector} of {self.vectors}")

    def vector_arm(self, int vector, int fd):
        """Make `vector` signal eventfd `fd` (borrowed), or become pending when `fd` is -1."""
        self._check(vector)
        self._fds[vector] = fd

    def vector_fire(self, int vector):
        """Signal `vector`, or latch it as pending."""
        self._check(vector)
        self.fire(vector)

    def vector_pending(self, int vector):
        """The vector's bit in the pending bit array."""
        self._check(vector)
        return bool(self._pending[vector])

    def vector_latch(self, int vector):
        """Make `vector` pending."""
        self._check(vector)
        self._pending[vector] = 1

    def vector_clear_pending(self, int vector):
        """Clear the vector's pending bit."""
        self._check(vector)
        self._pending[vector] = 0

    # --- INTx

    cdef void assert_intx(self) noexcept nogil:
        self.intx_asserted = True
        if self._intx_fd >= 0 and not (self.silent or self.intx_masked or self.intx_disabled):
            self.intx_masked = True
            self._intx_automasked = True
            self._signal(self._intx_fd)

    def intx_assert(self):
        """Drive the line high; an unmasked line is masked and signalled."""
        self.assert_intx()

    def intx_deassert(self):
        """Let the line go low; the mask stays until the host unmasks."""
        self.intx_asserted = False

    def intx_mask(self):
        """Mask by the host's word (SET_IRQS MASK)."""
        self.intx_masked = True
        self._intx_automasked = False

    def intx_unmask(self):
        """Unmask; a line that is still high is signalled again and stays masked."""
        if not self.intx_masked or self.intx_disabled:
            return
        self.intx_masked = False
        self._intx_automasked = False
        if self.intx_asserted:
            self.assert_intx()

    def intx_disable(self, bint disabled):
        """Follow COMMAND.INTX_DISABLE: setting it masks, clearing it unmasks."""
        if disabled == self.intx_disabled:
            return
        if disabled:
            self.intx_mask()
            self.intx_disabled = True
        else:
            self.intx_disabled = False
            self.intx_unmask()

    def intx_enable(self):
        """The index becomes active: its line is unmasked, unless INTx is disabled (vfio_intx_enable)."""
        self.intx_masked = self.intx_disabled
        self._intx_automasked = False

    def intx_reopen(self):
        """Unmask a line that masked itself, without a signal yet; what the host masked stays so."""
        if self._intx_automasked:
            self.intx_masked = False
            self._intx_automasked = False

    def set_intx_fd(self, int fd):
        """Signal eventfd `fd` (borrowed), or nobody when -1. A line that is high and unmasked does so at once."""
        self._intx_fd = fd
        if self.intx_asserted:
            self.assert_intx()

    def reset(self):
        """Drop levels, pending bits and the ISR; wiring and masks stay: the host may await a trigger."""
        cdef int i
        for i in range(self.vectors):
            self._pending[i] = 0
        self.isr = 0
        self.intx_asserted = False

    # --- what a virtio device says: "queue used" or "configuration changed"

    cdef void notify(self, uint8_t isr_bit, uint16_t vector) noexcept nogil:
        self.isr |= isr_bit
        if self.mode == 2:
            self.fire(vector)
        elif self.mode == 1:
            self.fire(0)
        else:
            self.assert_intx()

    def signal(self, uint8_t isr_bit, uint16_t vector):
        """Notify the driver: set `isr_bit`, and fire `vector` (MSI-X) or vector 0 (MSI) or assert INTx."""
        self.notify(isr_bit, vector)

    def read_isr(self):
        """Read the ISR status: returns the byte, clears it and lets INTx go low (virtio 1.3, 4.1.4.5)."""
        value = self.isr
        self.isr = 0
        self.intx_deassert()
        return value
