/*
 * The data path of a driver of virtio-net in user space: frames with numbers that a peer of the card sends back. Each
 * has to come back once and in its order.
 */
#ifndef NUMBERED_H
#define NUMBERED_H

#include "rings.h"

enum { CONTROL = 2, QUEUES };
enum { RING = 64, PAYLOAD = 200, FRAME = HEADER + ETHERNET + PAYLOAD, NUMBER_AT = HEADER + ETHERNET };
enum { BUFFERS_AT = QUEUES * RING_PAGES * PAGE, COMMANDS_AT = BUFFERS_AT + 2 * RING * BUFFER };

/* Where all of the memory is in the IOMMU's address space. */
static const uint64_t OWN = 0x100000000;

struct net {
    int fd;
    uint8_t mac[6];
    uint8_t *memory;
    struct queue queues[QUEUES];
    int kicks[QUEUES], calls[QUEUES], config;
    bool by_doorbell;
    uint32_t sent, received, wrong;
};

static void kick(const struct net *net, int index)
{
    if (net->by_doorbell)
        *net->queues[index].doorbell = index;
    else
        demand("kick", !eventfd_write(net->kicks[index], 1));
}

static uint8_t *buffer_at(const struct net *net, int index, uint16_t slot)
{
    return net->memory + BUFFERS_AT + (index * RING + slot) * BUFFER;
}

static uint64_t iova_of(const struct net *net, const uint8_t *place)
{
    return OWN + (place - net->memory);
}

/* Give the card the buffer that is next in the ring. */
static void give(struct net *net, int index, uint32_t length)
{
    struct queue *queue = &net->queues[index];
    uint8_t *buffer = buffer_at(net, index, queue->available->idx % RING);

    make_available(queue, iova_of(net, buffer), length, index == RX ? VRING_DESC_F_WRITE : 0);
}

/* How many buffers the card has. */
static uint16_t outstanding(const struct queue *queue)
{
    return queue->available->idx - queue->seen;
}

/* Whether the card has done with the next chain; it must be the oldest, with so many bytes written. */
static bool done(struct net *net, int index, uint32_t written)
{
    struct queue *queue = &net->queues[index];
    volatile struct vring_used_elem *entry = &queue->used->ring[queue->seen % RING];

    if (queue->used->idx == queue->seen)
        return false;
    __sync_synchronize();
    net->wrong += entry->id != queue->seen % RING || entry->len != written;
    queue->seen++;
    return true;
}

/* The next frame, with its number. */
static void write_numbered(const struct net *net, uint8_t *buffer, uint32_t number)
{
    write_frame(buffer, net->mac, PAYLOAD, number);
    memcpy(buffer + NUMBER_AT, &number, sizeof number);
}

/* Put frames into the transmit ring, as many as have room; how many. */
static int put_frames(struct net *net, int count)
{
    struct queue *queue = &net->queues[TX];
    int put = 0;

    while (done(net, TX, 0))
        ;
    for (; put < count && outstanding(queue) < RING; put++) {
        write_numbered(net, buffer_at(net, TX, queue->available->idx % RING), net->sent++);
        give(net, TX, FRAME);
    }
    return put;
}

/* Give the card every receive buffer that it has not. */
static void fill_receive_ring(struct net *net)
{
    while (outstanding(&net->queues[RX]) < RING) {
        memset(buffer_at(net, RX, net->queues[RX].available->idx % RING), UNTOUCHED, BUFFER);
        give(net, RX, BUFFER);
    }
}

/* Take what has come, which must be the frames that were sent, in their order; whether there was any. */
static bool take_frames(struct net *net)
{
    uint8_t expected[BUFFER];
    uint16_t first = net->queues[RX].seen;

    for (uint16_t slot = first; done(net, RX, FRAME); slot++) {
        const uint8_t *got = buffer_at(net, RX, slot % RING);

        write_numbered(net, expected, net->received++);
        net->wrong += !same_frame(got, expected, PAYLOAD) || got[FRAME] != UNTOUCHED;
    }
    return net->queues[RX].seen != first;
}

/* Wait until every frame that was sent has come back, giving buffers back meanwhile; whether they did. */
static bool all_back(struct net *net)
{
    for (;;) {
        if (take_frames(net)) {
            fill_receive_ring(net);
            kick(net, RX);
        }
        if (net->received == net->sent)
            return !net->wrong;
        if (!signals(net->calls[RX], PATIENCE_MS))
            return false;
    }
}

/* Send frames, by kicks for as many as the ring takes at once; whether all of them came back. */
static bool pass(struct net *net, int count)
{
    while (count > 0) {
        count -= put_frames(net, count);
        kick(net, TX);
        if (!all_back(net))
            return false;
    }
    return true;
}

#endif
