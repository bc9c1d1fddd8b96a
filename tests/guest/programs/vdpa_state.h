/* Ring state: a device stopped in the middle of traffic, and one that is told of rings what is not so. */
#ifndef VDPA_STATE_H
#define VDPA_STATE_H

#include "vdpa_net.h"

/* How the queues are stopped and go on. */
enum { WITHOUT_RESET, SEND_FIRST, RECEIVE_FIRST, REOPENED, WAYS };

/* Before the end of the indices' circle, so that they go round in the middle of it all. */
enum { BEGIN = 0xfe00, ROUNDS = 24, MOVING = 40, WAITING = 8 };

static void disable(const struct net *net, int index)
{
    demand("disable", !enable(net, index, false));
}

static uint16_t get_base(const struct net *net, int index)
{
    unsigned base;

    demand("get_base", !get_of_queue(net->fd, VHOST_GET_VRING_BASE, index, &base));
    return base;
}

/* Wait until the ring shows what the card has told: its write may still be on its way. */
static void shows(const struct queue *queue, uint16_t base)
{
    uint64_t end = now_ns() + PATIENCE_MS * 1000000ull;

    while (queue->used->idx != base && now_ns() < end)
        usleep(100);
}

/*
 * Stop all queues while frames pass, and get where each has got. Those that were sent when nothing was received any
 * more are under way.
 */
static void stop_in_traffic(struct net *net, int way, uint16_t *bases)
{
    uint16_t running;

    if (way == RECEIVE_FIRST)
        disable(net, RX);
    put_frames(net, MOVING);
    kick(net, TX);
    take_frames(net);
    fill_receive_ring(net);
    running = get_base(net, TX);
    disable(net, TX);
    disable(net, RX);
    disable(net, CONTROL);
    for (int index = 0; index < QUEUES; index++) {
        bases[index] = get_base(net, index);
        shows(&net->queues[index], bases[index]);
    }
    net->wrong += (uint16_t)(bases[TX] - running) > MOVING;
}

/* Have all queues go on at these indices, on the rings as they are. */
static void go_on(struct net *net, const char *path, int way, const uint16_t *bases)
{
    if (way == WITHOUT_RESET) {
        for (int index = 0; index < QUEUES; index++)
            demand("enable", !enable(net, index, true));
        return;
    }
    if (way == REOPENED) {
        net_close(net);
        net_open(net, path);
    } else {
        demand("reset", !set_status(net->fd, 0));
    }
    net_start(net, bases);
}

/* Let the host compare: the indices that the card has told, and those that it has shown in the rings. */
static void show_stop(const struct net *net, const uint16_t *bases)
{
    char text[128];

    snprintf(text, sizeof text, "stopped %d %d %d %d %d %d", bases[RX], bases[TX], bases[CONTROL],
             net->queues[RX].used->idx, net->queues[TX].used->idx, net->queues[CONTROL].used->idx);
    show_host(text);
}

static void rounds(const char *path, int ways)
{
    uint16_t bases[QUEUES] = { BEGIN, BEGIN, BEGIN };
    int in_rings = 0, under_way = 0, obeys = 0, receive_first = ways > RECEIVE_FIRST ? ROUNDS / ways : 0;
    bool well = true;
    struct net net;

    net_make(&net, BEGIN);
    net_open(&net, path);
    net_start(&net, bases);
    fill_receive_ring(&net);
    kick(&net, RX);
    for (int round = 0; round < ROUNDS && well; round++) {
        int way = round % ways;

        net.by_doorbell = round / ways % 2;
        stop_in_traffic(&net, way, bases);
        put_frames(&net, WAITING);
        put_command(&net, round % 2);
        kick(&net, TX);
        kick(&net, CONTROL);
        in_rings += (uint16_t)(net.queues[TX].available->idx - bases[TX]);
        under_way += net.sent - net.received - WAITING;
        show_stop(&net, bases);
        go_on(&net, path, way, bases);
        well = all_back(&net);
        obeys += obeyed(&net);
    }
    step("rounds", well && get_status(net.fd) == DRIVER_OK, "%d of %d frames, %d wrong", net.received, net.sent,
         net.wrong);
    step("commands", obeys == ROUNDS, "%d of %d", obeys, ROUNDS);
    step("in_rings_at_stops", in_rings >= ROUNDS * WAITING, "%d frames", in_rings);
    step("under_way_at_stops", under_way >= receive_first * MOVING, "%d frames", under_way);
    step("indices_went_round", net.queues[TX].used->idx < BEGIN && net.queues[RX].used->idx < BEGIN, "%d",
         net.queues[TX].used->idx);
    show_host("rounds");
    net_close(&net);
}

/* With a reset in most rounds, after which the card has nothing but what it is told. */
static void state(const char *path)
{
    rounds(path, WAYS);
}

/* Without one. */
static void pauses(const char *path)
{
    rounds(path, WITHOUT_RESET + 1);
}

/*
 * Steps: a queue that starts at `base` while its ring has `available` breaks as soon as the card has to take a buffer
 * from it, and a reset mends all.
 */
static void belied(const char *name, const char *path, int index, uint16_t base, uint16_t available)
{
    static const uint16_t from_zero[QUEUES];
    uint16_t bases[QUEUES] = { 0 };
    char text[64];
    struct net net;
    uint64_t told;

    net_make(&net, 0);
    net_open(&net, path);
    bases[index] = base;
    net.queues[index].available->idx = available;
    net_start(&net, bases);
    if (index == RX)
        put_frames(&net, 1);
    kick(&net, index == CONTROL ? CONTROL : TX);
    told = signals(net.config, PATIENCE_MS);
    step(name, told && get_status(net.fd) == (DRIVER_OK | NEEDS_RESET), "status %#x", get_status(net.fd));
    snprintf(text, sizeof text, "%s_reset", name);
    demand("reset", !set_status(net.fd, 0));
    for (int queue = 0; queue < QUEUES; queue++) {
        volatile uint16_t *doorbell = net.queues[queue].doorbell;

        net.queues[queue] = empty_queue(queue, RING, net.memory + queue * RING_PAGES * PAGE);
        net.queues[queue].doorbell = doorbell;
    }
    net.received = net.sent;
    net_start(&net, from_zero);
    fill_receive_ring(&net);
    put_command(&net, false);
    kick(&net, CONTROL);
    step(text, pass(&net, 1) && obeyed(&net) && get_status(net.fd) == DRIVER_OK, "done");
    net_close(&net);
    munmap(net.memory, MEMORY_SIZE);
}

static void hostile(const char *path)
{
    belied("tx_ahead", path, TX, 6, 5);
    belied("tx_far_behind", path, TX, 0, RING + 1);
    belied("tx_ffff", path, TX, 0xffff, 0xfff0);
    belied("rx_ahead", path, RX, 1, 0);
    belied("rx_far_behind", path, RX, 0x8000, 0);
    belied("control_ahead", path, CONTROL, 3, 2);
    belied("control_ffff", path, CONTROL, 0xffff, RING);
    show_host("hostile");
}

#endif
