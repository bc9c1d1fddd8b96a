from device.virtio._rings cimport Chain, Rings


cdef class VirtQueue(Rings):
    cdef Chain _chain

    cdef void _changed(self) noexcept
