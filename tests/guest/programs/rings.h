/* Split virtqueues (virtio 1.3, 2.7) in a driver's memory, a descriptor for each chain, and frames for them. */
#ifndef RINGS_H
#define RINGS_H

#include "own.h"

#include <linux/virtio_config.h>
#include <linux/virtio_net.h>
#include <linux/virtio_ring.h>

enum { RX, TX };
enum { RING_PAGES = 3 };
enum { HEADER = sizeof(struct virtio_net_hdr_v1), ETHERNET = 14, BUFFER = 2048, UNTOUCHED = 0xee };
enum { PATIENCE_MS = 10000 };
enum {
    DRIVER_OK = VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER | VIRTIO_CONFIG_S_FEATURES_OK |
                VIRTIO_CONFIG_S_DRIVER_OK
};

struct queue {
    volatile struct vring_desc *descriptors;
    volatile struct vring_avail *available;
    volatile struct vring_used *used;
    volatile uint16_t *doorbell;
    uint16_t index, seen, size;
};

/* A queue with nothing in its rings, which take a page each of `memory`. */
static struct queue empty_queue(int index, int size, uint8_t *memory)
{
    memset(memory, 0, RING_PAGES * PAGE);
    return (struct queue){
        .descriptors = (void *)memory,
        .available = (void *)(memory + PAGE),
        .used = (void *)(memory + 2 * PAGE),
        .index = index,
        .size = size,
    };
}

/* Let the card see a buffer in the next place of the ring. */
static void make_available(struct queue *queue, uint64_t iova, uint32_t length, uint16_t flags)
{
    uint16_t next = queue->available->idx, slot = next % queue->size;

    queue->descriptors[slot].addr = iova;
    queue->descriptors[slot].len = length;
    queue->descriptors[slot].flags = flags;
    queue->available->ring[slot] = slot;
    __sync_synchronize();
    queue->available->idx = next + 1;
    __sync_synchronize();
}

/* Write a frame from the card to itself, of an EtherType that is nobody's, whose payload tells it from others. */
static void write_frame(volatile uint8_t *buffer, const uint8_t *mac, int payload, uint8_t seed)
{
    for (int n = 0; n < HEADER; n++)
        buffer[n] = 0;
    buffer += HEADER;
    for (int n = 0; n < 12; n++)
        buffer[n] = mac[n % 6];
    buffer[12] = 0x88;
    buffer[13] = 0xb5;
    for (int n = 0; n < payload; n++)
        buffer[ETHERNET + n] = seed + 7 * n;
}

/* Whether the frame in a receive buffer is that of a transmit buffer. */
static bool same_frame(const volatile uint8_t *received, const volatile uint8_t *sent, int payload)
{
    for (int n = HEADER; n < HEADER + ETHERNET + payload; n++) {
        if (received[n] != sent[n])
            return false;
    }
    return true;
}

#endif
