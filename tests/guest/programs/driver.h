/* What all parts of vfio_driver begin with: memory of the program's own, and the card brought up on it. */
#ifndef DRIVER_H
#define DRIVER_H

#include "virtio_net.h"

#include <setjmp.h>
#include <signal.h>

enum { MEMORY_SIZE = 4 << 20, PAYLOAD = 1000 };

/* Where things are in the IOMMU's address space: memory of our own, for two buffers and the rings, and a BAR. */
static const uint64_t OWN = 0x100000000, BAR = 0x200000000;

static sigjmp_buf faulted;

static void on_fault(int number)
{
    siglongjmp(faulted, number);
}

/* The byte at an address, or -1 where touching it is a bus error. */
static int touch(const volatile uint8_t *address)
{
    if (sigsetjmp(faulted, 1))
        return -1;
    return *address;
}

/* Memory for rings and buffers, at OWN for all cards of a container. */
static void own_memory(int container, struct buffers *at)
{
    at->tx = allocate(MEMORY_SIZE);
    at->rx = at->tx + BUFFER;
    at->tx_iova = OWN;
    at->rx_iova = OWN + BUFFER;
    demand("map_own_memory", !dma_map(container, (void *)at->tx, OWN, MEMORY_SIZE));
}

/* The rings stand behind the two buffers in the same memory. */
static void start(struct net *net, const struct card *card, const struct buffers *own, bool vectors)
{
    net_start(net, card, (uint8_t *)own->tx + PAGE, OWN + PAGE, vectors);
}

/* A step: the card cannot have a buffer, says so, and works again once it is reset. */
static void lost(const char *name, struct net *net, const struct card *card, const struct buffers *own, int queue)
{
    int got = taken_back(net, &net->queues[queue]), status = net->common->device_status;

    step(name, got == -1 && status == (DRIVER_OK | VIRTIO_CONFIG_S_NEEDS_RESET), "status %#x", status);
    start(net, card, own, false);
}

#endif
