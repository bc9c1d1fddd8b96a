"""What can be wrong with a virtqueue."""

# Why a queue is broken, by the number the walker returns.
FAULTS = {
    1: "avail.idx is more than the queue size ahead",
    2: "a descriptor index is beyond the table",
    3: "a chain is longer than its table: it loops",
    4: "a device-readable descriptor follows a device-writable one",
    5: "an indirect descriptor was not negotiated, has a successor, or is nested",
    6: "an indirect table is empty, too long, or not a multiple of 16 bytes",
    7: "an indirect table is not in a readable DMA window",
    8: "a buffer is not in a DMA window that allows the access",
    9: "a chain of buffers is empty or holds more than 4 GiB",
    10: "the client, asked for the rings, refused or did not answer",
}
