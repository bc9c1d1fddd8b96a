from device.virtio._rings cimport Chain, Rings


cdef class VirtQueue(Rings):
    cdef Chain _chain
    cdef set _pins              # of chains that were popped here and neither pushed nor given back

    cdef void _changed(self) noexcept
    cdef object _hold(self, list spans)
    cdef void _let_go(self) noexcept
