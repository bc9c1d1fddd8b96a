/* A driver of virtio-net on a vDPA device: three queues, frames with numbers that a peer of the card sends back. */
#ifndef VDPA_NET_H
#define VDPA_NET_H

#include "numbered.h"
#include "vdpa.h"

enum { COMMAND_SIZE = 16, COMMAND_LENGTH = 3, MEMORY_SIZE = COMMANDS_AT + PAGE };
enum { NEEDS_RESET = VIRTIO_CONFIG_S_NEEDS_RESET };

static int map_memory(const struct net *net)
{
    return iotlb(net->fd, VHOST_IOTLB_UPDATE, OWN, MEMORY_SIZE, net->memory);
}

static void *map_doorbell(int fd, int queue, int access)
{
    return mmap(NULL, PAGE, access, MAP_SHARED, fd, (off_t)queue * PAGE);
}

/* Open the device, with all of the memory mapped, and the doorbells; the rings stay as they are. */
static void net_open(struct net *net, const char *path)
{
    net->fd = open_vdpa(path);
    demand("owner", !ioctl(net->fd, VHOST_SET_OWNER));
    demand("backend_features", !ioctl(net->fd, VHOST_SET_BACKEND_FEATURES, &BACKEND_FEATURES));
    demand("map_memory", !map_memory(net));
    demand("mac", !configuration(net->fd, VHOST_VDPA_GET_CONFIG, 0, 6, net->mac));
    for (int index = 0; index < QUEUES; index++) {
        net->queues[index].doorbell = map_doorbell(net->fd, index, PROT_WRITE);
        demand("map_doorbell", net->queues[index].doorbell != MAP_FAILED);
    }
}

static void net_close(struct net *net)
{
    for (int index = 0; index < QUEUES; index++)
        munmap((void *)net->queues[index].doorbell, PAGE);
    close(net->fd);
}

/* Memory, eventfds, and rings that begin at the index `begin`. */
static void net_make(struct net *net, uint16_t begin)
{
    *net = (struct net){ .memory = allocate(MEMORY_SIZE), .config = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK) };
    for (int index = 0; index < QUEUES; index++) {
        struct queue *queue = &net->queues[index];

        *queue = empty_queue(index, RING, net->memory + index * RING_PAGES * PAGE);
        queue->available->idx = queue->used->idx = queue->seen = begin;
        net->kicks[index] = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
        net->calls[index] = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    }
}

static void set_ring(const struct net *net, int index, uint16_t base)
{
    uint64_t at = OWN + (uint64_t)index * RING_PAGES * PAGE;
    struct vhost_vring_addr address = {
        .index = index,
        .desc_user_addr = at,
        .avail_user_addr = at + PAGE,
        .used_user_addr = at + 2 * PAGE,
    };

    demand("vring_num", !of_queue(net->fd, VHOST_SET_VRING_NUM, index, RING));
    demand("vring_addr", !ioctl(net->fd, VHOST_SET_VRING_ADDR, &address));
    demand("vring_base", !of_queue(net->fd, VHOST_SET_VRING_BASE, index, base));
    demand("vring_call", !file_of_queue(net->fd, VHOST_SET_VRING_CALL, index, net->calls[index]));
    demand("vring_kick", !file_of_queue(net->fd, VHOST_SET_VRING_KICK, index, net->kicks[index]));
}

static int enable(const struct net *net, int index, bool on)
{
    return of_queue(net->fd, VHOST_VDPA_SET_VRING_ENABLE, index, on);
}

/* Bring the device up, each queue at its index of `bases`, in memory that it has already. */
static void net_start(struct net *net, const uint16_t *bases)
{
    uint8_t status = VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER;

    demand("config_call", !ioctl(net->fd, VHOST_VDPA_SET_CONFIG_CALL, &net->config));
    demand("driver", !set_status(net->fd, status));
    demand("features", !set_features(net->fd, FEATURES));
    status |= VIRTIO_CONFIG_S_FEATURES_OK;
    demand("features_ok", !set_status(net->fd, status) && get_status(net->fd) == status);
    for (int index = 0; index < QUEUES; index++)
        set_ring(net, index, bases[index]);
    for (int index = 0; index < QUEUES; index++)
        demand("vring_enable", !enable(net, index, true));
    demand("driver_ok", !set_status(net->fd, DRIVER_OK) && (get_status(net->fd) & DRIVER_OK) == DRIVER_OK);
}

/* Put a command into the control queue: be promiscuous, or not (virtio 1.3, 5.1.6.5.1). */
static void put_command(struct net *net, bool promiscuous)
{
    struct queue *queue = &net->queues[CONTROL];
    uint16_t next = queue->available->idx, head = next % (RING / 2) * 2;
    uint8_t *command = net->memory + COMMANDS_AT + head / 2 * COMMAND_SIZE;

    command[0] = VIRTIO_NET_CTRL_RX;
    command[1] = VIRTIO_NET_CTRL_RX_PROMISC;
    command[2] = promiscuous;
    command[COMMAND_LENGTH] = UNTOUCHED;
    queue->descriptors[head].addr = iova_of(net, command);
    queue->descriptors[head].len = COMMAND_LENGTH;
    queue->descriptors[head].flags = VRING_DESC_F_NEXT;
    queue->descriptors[head].next = head + 1;
    queue->descriptors[head + 1].addr = iova_of(net, command) + COMMAND_LENGTH;
    queue->descriptors[head + 1].len = 1;
    queue->descriptors[head + 1].flags = VRING_DESC_F_WRITE;
    queue->available->ring[next % RING] = head;
    __sync_synchronize();
    queue->available->idx = next + 1;
    __sync_synchronize();
}

/* Wait for the answer to the oldest command; whether it is OK. */
static bool obeyed(struct net *net)
{
    struct queue *queue = &net->queues[CONTROL];
    uint16_t head = queue->seen % (RING / 2) * 2;
    const volatile struct vring_used_elem *entry = &queue->used->ring[queue->seen % RING];

    while (queue->used->idx == queue->seen) {
        if (!signals(net->calls[CONTROL], PATIENCE_MS))
            return false;
    }
    __sync_synchronize();
    queue->seen++;
    return entry->id == head && entry->len == 1 &&
           net->memory[COMMANDS_AT + head / 2 * COMMAND_SIZE + COMMAND_LENGTH] == VIRTIO_NET_OK;
}

#endif
