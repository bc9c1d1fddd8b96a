/*
 * A driver of virtio-net in user space (virtio 1.3, 2.7 and 5.1): a receive and a transmit queue in memory of the
 * program's own, and one buffer at a time in each, at whatever address the IOMMU has for it.
 */
#ifndef VIRTIO_NET_H
#define VIRTIO_NET_H

#include "card.h"
#include "rings.h"

#include <linux/virtio_pci.h>

/* Where the card has its virtio structures in BAR0, as its capabilities say. */
enum { ISR = 0x1000, DEVICE_CONFIG = 0x2000, DOORBELLS = 0x3000, DOORBELL_STRIDE = 0x1000 };

enum { QUEUES = 2, QUEUE_SIZE = 8, NO_VECTOR = 0xffff };

static const uint64_t FEATURES =
    1ull << VIRTIO_F_VERSION_1 | 1ull << VIRTIO_F_ACCESS_PLATFORM | 1ull << VIRTIO_NET_F_MAC;

struct net {
    volatile struct virtio_pci_common_cfg *common;
    volatile uint8_t *isr;
    uint8_t mac[6];
    struct queue queues[QUEUES];
};

static void start_queue(struct net *net, const struct card *card, int index, uint8_t *rings, uint64_t iova,
                        uint16_t vector)
{
    volatile struct virtio_pci_common_cfg *common = net->common;
    struct queue *queue = &net->queues[index];
    uint64_t offset = index * RING_PAGES * PAGE;

    *queue = empty_queue(index, QUEUE_SIZE, rings + offset);
    queue->doorbell = (void *)(card->registers + DOORBELLS + index * DOORBELL_STRIDE);
    common->queue_select = index;
    common->queue_size = QUEUE_SIZE;
    common->queue_msix_vector = vector;
    common->queue_desc_lo = iova + offset;
    common->queue_desc_hi = (iova + offset) >> 32;
    common->queue_avail_lo = iova + offset + PAGE;
    common->queue_avail_hi = (iova + offset + PAGE) >> 32;
    common->queue_used_lo = iova + offset + 2 * PAGE;
    common->queue_used_hi = (iova + offset + 2 * PAGE) >> 32;
    common->queue_enable = 1;
}

/* Bring the card up on rings that it finds at `iova`; without `vectors` its queues interrupt as MSI or INTx do. */
static void net_start(struct net *net, const struct card *card, uint8_t *rings, uint64_t iova, bool vectors)
{
    volatile struct virtio_pci_common_cfg *common = (void *)card->registers;

    net->common = common;
    net->isr = card->registers + ISR;
    common->device_status = 0;
    while (common->device_status)
        ;
    common->device_status = VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER;
    for (int half = 0; half < 2; half++) {
        common->guest_feature_select = half;
        common->guest_feature = FEATURES >> 32 * half;
    }
    common->device_status |= VIRTIO_CONFIG_S_FEATURES_OK;
    for (int octet = 0; octet < 6; octet++)
        net->mac[octet] = ((volatile uint8_t *)card->registers)[DEVICE_CONFIG + octet];
    for (int index = 0; index < QUEUES; index++)
        start_queue(net, card, index, rings, iova, vectors ? index : NO_VECTOR);
    net->queues[TX].available->flags = VRING_AVAIL_F_NO_INTERRUPT;
    common->device_status |= VIRTIO_CONFIG_S_DRIVER_OK;
    demand("driver_ok", common->device_status == DRIVER_OK);
}

static void net_stop(struct net *net)
{
    net->common->device_status = 0;
}

/* Give the card a buffer, and ring. */
static void offer(struct queue *queue, uint64_t iova, uint32_t length)
{
    make_available(queue, iova, length, queue->index == RX ? VRING_DESC_F_WRITE : 0);
    *queue->doorbell = queue->index;
}

/* The bytes that the card put into its oldest buffer, or -1 if it keeps that or needs a reset. */
static int taken_back(const struct net *net, struct queue *queue)
{
    uint64_t end = now_ns() + PATIENCE_MS * 1000000ull;

    while (queue->used->idx == queue->seen) {
        if (net->common->device_status & VIRTIO_CONFIG_S_NEEDS_RESET || now_ns() > end)
            return -1;
        usleep(100);
    }
    __sync_synchronize();
    return queue->used->ring[queue->seen++ % queue->size].len;
}

/* Two buffers, each at the program's address and at the card's. */
struct buffers {
    volatile uint8_t *tx, *rx;
    uint64_t tx_iova, rx_iova;
};

/* Give the card an empty buffer and a frame, which the port's loopback brings back; the frame's whole length. */
static int send_frame(struct net *net, const struct buffers *at, int payload, uint8_t seed)
{
    int length = HEADER + ETHERNET + payload;

    for (int n = 0; n < BUFFER; n++)
        at->rx[n] = UNTOUCHED;
    write_frame(at->tx, net->mac, payload, seed);
    offer(&net->queues[RX], at->rx_iova, BUFFER);
    offer(&net->queues[TX], at->tx_iova, length);
    return length;
}

/* A step: a frame is sent and comes back, byte by byte. */
static void round_trip(const char *name, struct net *net, const struct buffers *at, int payload, uint8_t seed)
{
    int length = send_frame(net, at, payload, seed);
    int got = taken_back(net, &net->queues[RX]), gone = taken_back(net, &net->queues[TX]);

    step(name, got == length && gone == 0 && same_frame(at->rx, at->tx, payload) && at->rx[length] == UNTOUCHED,
         "%d of %d bytes", got, length);
}

#endif
