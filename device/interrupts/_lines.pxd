from libc.stdint cimport uint8_t, uint16_t, uint64_t


cdef class Lines:
    cdef readonly int vectors
    cdef int *_fds
    cdef uint8_t *_pending
    cdef public int mode                # Mode.INTX, MSI or MSIX: what a notification becomes
    cdef public uint8_t isr             # virtio ISR status byte
    cdef public bint silent             # the card is stopped
    cdef readonly uint64_t signals      # eventfd writes so far
    cdef int _intx_fd
    cdef readonly bint intx_asserted
    cdef readonly bint intx_masked
    cdef readonly bint intx_disabled
    cdef bint _intx_automasked

    cdef void fire(self, uint16_t vector) noexcept nogil
    cdef void assert_intx(self) noexcept nogil
    cdef void notify(self, uint8_t isr_bit, uint16_t vector) noexcept nogil
    cdef void _signal(self, int fd) noexcept nogil
