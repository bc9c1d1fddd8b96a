/*
 * What device.dma is measured against: the least that C can do. One array of windows in order, searched by halving, and
 * memcpy. Neither is inlined, as the device's are not.
 */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

struct twin_window {
    uint64_t iova, last;
    uint8_t *memory;
    uint32_t prot;
};

/* Where the bytes at iova are, or NULL: as DmaWindows.span, without its memory of the window that was found last. */
static __attribute__((noinline)) uint8_t *twin_find(const struct twin_window *windows, size_t count, uint64_t iova,
                                                    uint64_t length, uint32_t prot)
{
    size_t low = 0, high = count;

    while (low < high) {
        size_t middle = (low + high) / 2;

        if (windows[middle].last < iova)
            low = middle + 1;
        else
            high = middle;
    }
    if (low == count || iova < windows[low].iova || (windows[low].prot & prot) != prot ||
        (length > 0 && length - 1 > windows[low].last - iova))
        return NULL;
    return windows[low].memory + (iova - windows[low].iova);
}

static __attribute__((noinline)) void twin_copy(uint8_t *target, const uint8_t *source, size_t size)
{
    memcpy(target, source, size);
}
