/*
 * What a virtual machine monitor does with a vDPA device behind vhost-user, vdpa_backend's for one:
 *
 *   vhost_frontend frames SOCKET MAC   send and receive, by eventfds and by the doorbells' own pages
 *   vhost_frontend state SOCKET MAC    stop in the middle of traffic, and go on from where the device has got
 *   vhost_frontend queues SOCKET MAC   one queue off and on again while the other goes on
 *   vhost_frontend log SOCKET MAC      have the pages logged that the device writes
 *   vhost_frontend vanish SOCKET MAC   end in the middle of traffic
 *
 * The card's peer sends every frame back. Steps are told as steps.h has it.
 */
#include "vhost_user.h"

enum { MEMORY_SIZE = COMMANDS_AT, PAGES = MEMORY_SIZE / PAGE };
enum { BEGIN = 0xfe00, ROUNDS = 12, MOVING = 40, WAITING = 8, LOGGED = 10 };

/* One bit for each page from address 0. */
enum { LOG_SIZE = 1 << 18 };

static void *make_file(const char *name, uint64_t size, int *file)
{
    void *memory;

    *file = memfd_create(name, MFD_CLOEXEC);
    demand("memfd", *file >= 0 && !ftruncate(*file, size));
    memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, *file, 0);
    demand("map_memfd", memory != MAP_FAILED);
    return memory;
}

static void set_ring(struct frontend *frontend, int index, uint16_t base)
{
    struct net *net = &frontend->net;
    uint64_t at = index * RING_PAGES * PAGE, here = (uintptr_t)net->memory + at;
    struct message address = {
        .request = SET_VRING_ADDR,
        .size = sizeof address.address,
        .address = {
            .index = index,
            .flags = 1 << VHOST_VRING_F_LOG,
            .desc_user_addr = here,
            .avail_user_addr = here + PAGE,
            .used_user_addr = here + 2 * PAGE,
            .log_guest_addr = OWN + at + 2 * PAGE,
        },
    };

    demand("vring_num", !say_of_queue(frontend, SET_VRING_NUM, index, RING));
    demand("vring_base", !say_of_queue(frontend, SET_VRING_BASE, index, base));
    demand("vring_addr", !say(frontend, address, -1));
    demand("vring_call", !say_number(frontend, SET_VRING_CALL, index, net->calls[index]));
    demand("vring_kick", !say_number(frontend, SET_VRING_KICK, index, net->kicks[index]));
}

static void enable(struct frontend *frontend, int index, bool on)
{
    demand("vring_enable", !say_of_queue(frontend, SET_VRING_ENABLE, index, on));
}

/* Start the device where it stopped; it is told of nothing that is in the rings. */
static void start(struct frontend *frontend, const uint16_t *bases)
{
    for (int index = 0; index < PAIR; index++)
        set_ring(frontend, index, bases[index]);
    for (int index = 0; index < PAIR; index++)
        enable(frontend, index, true);
    settle(frontend);
}

/* The first of these stops the device. */
static void stop(struct frontend *frontend, uint16_t *bases)
{
    for (int index = 0; index < PAIR; index++)
        bases[index] = say_of_queue(frontend, GET_VRING_BASE, index, 0);
}

static void set_features(struct frontend *frontend, uint64_t features)
{
    demand("set_features", !say_number(frontend, SET_FEATURES, features, -1));
    settle(frontend);
}

static int connected(const char *path)
{
    struct sockaddr_un address = { .sun_family = AF_UNIX };
    int channel = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

    strncpy(address.sun_path, path, sizeof address.sun_path - 1);
    demand("connect", !connect(channel, (void *)&address, sizeof address));
    return channel;
}

static void set_memory(struct frontend *frontend, int file)
{
    struct message table = {
        .request = SET_MEM_TABLE,
        .size = sizeof table.memory,
        .memory = {
            .count = 1,
            .only = {
                .guest_address = OWN,
                .size = MEMORY_SIZE,
                .user_address = (uintptr_t)frontend->net.memory,
            },
        },
    };

    demand("mem_table", !say(frontend, table, file));
}

/* A step: many frames are sent and come back. */
static void passed(const char *name, struct net *net, int count)
{
    bool well = pass(net, count);

    step(name, well, "%d of %d frames", net->received, net->sent);
}

/* A step: those that were sent come back. */
static void came_back(const char *name, struct net *net)
{
    bool well = all_back(net);

    step(name, well, "%d of %d frames, %d wrong", net->received, net->sent, net->wrong);
}

/* A device that runs on rings from an index on, all its receive buffers given to it. */
static void begin(struct frontend *frontend, const char *path, const char *mac, uint16_t from)
{
    uint16_t bases[PAIR] = { from, from };
    struct net *net = &frontend->net;
    uint64_t offered;
    int memory, pair[2];

    *frontend = (struct frontend){ .backend = -1 };
    demand("mac", sscanf(mac, "%hhx:%hhx:%hhx:%hhx:%hhx:%hhx", &net->mac[0], &net->mac[1], &net->mac[2],
                         &net->mac[3], &net->mac[4], &net->mac[5]) == 6);
    net->memory = make_file("memory", MEMORY_SIZE, &memory);
    for (int index = 0; index < PAIR; index++) {
        struct queue *queue = &net->queues[index];

        *queue = empty_queue(index, RING, net->memory + index * RING_PAGES * PAGE);
        queue->available->idx = queue->used->idx = queue->seen = from;
        net->kicks[index] = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
        net->calls[index] = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    }
    net->fd = connected(path);
    offered = say(frontend, (struct message){ .request = GET_FEATURES }, -1);
    demand("features", (offered & (WANTED | LOG_ALL)) == (WANTED | LOG_ALL));
    step("status", true, "%s", offered & 1ull << VIRTIO_NET_F_STATUS ? "offered" : "not offered");
    offered = say(frontend, (struct message){ .request = GET_PROTOCOL_FEATURES }, -1);
    demand("protocol", (offered & PROTOCOL) == PROTOCOL);
    demand("set_protocol", !say_number(frontend, SET_PROTOCOL_FEATURES, PROTOCOL, -1));
    demand("socketpair", !socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair));
    demand("backend_channel", !say(frontend, (struct message){ .request = SET_BACKEND_REQ_FD }, pair[1]));
    close(pair[1]);
    frontend->backend = pair[0];
    demand("owner", !say(frontend, (struct message){ .request = SET_OWNER }, -1));
    set_features(frontend, WANTED);
    set_memory(frontend, memory);
    fill_receive_ring(net);
    start(frontend, bases);
}

static void end(struct frontend *frontend)
{
    uint16_t bases[PAIR];

    stop(frontend, bases);
    close(frontend->net.fd);
    close(frontend->backend);
}

static void frames(struct frontend *frontend)
{
    struct net *net = &frontend->net;

    passed("by_eventfd", net, 3 * RING);
    show_host("by_eventfd");
    demand("doorbells", net->queues[RX].doorbell && net->queues[TX].doorbell);
    net->by_doorbell = true;
    passed("by_doorbell", net, 3 * RING);
    show_host("by_doorbell");
}

static void state(struct frontend *frontend)
{
    struct net *net = &frontend->net;
    int under_way = 0, agree = 0;
    bool well = true;

    for (int round = 0; round < ROUNDS && well; round++) {
        uint16_t bases[PAIR];
        char text[64];

        net->by_doorbell = round % 2;
        if (round / 2 % 2) {  /* what comes back has to wait for the next start */
            enable(frontend, RX, false);
            settle(frontend);
        }
        put_frames(net, MOVING);
        kick(net, TX);
        stop(frontend, bases);
        agree += bases[RX] == net->queues[RX].used->idx && bases[TX] == net->queues[TX].used->idx;
        snprintf(text, sizeof text, "stopped %d %d", (uint16_t)(bases[RX] - BEGIN), (uint16_t)(bases[TX] - BEGIN));
        show_host(text);
        take_frames(net);
        fill_receive_ring(net);
        under_way += net->sent - net->received;
        put_frames(net, WAITING);
        start(frontend, bases);
        well = all_back(net);
    }
    step("rounds", well, "%d of %d frames, %d wrong", net->received, net->sent, net->wrong);
    step("bases_are_what_the_rings_show", agree == ROUNDS, "%d of %d", agree, ROUNDS);
    step("under_way_at_stops", under_way >= ROUNDS / 2 * MOVING, "%d frames", under_way);
    step("indices_went_round", net->queues[RX].used->idx < BEGIN && net->queues[TX].used->idx < BEGIN, "%d %d",
         net->queues[RX].used->idx, net->queues[TX].used->idx);
}

static void queues(struct frontend *frontend)
{
    struct net *net = &frontend->net;

    for (int index = 0; index < PAIR; index++) {
        enable(frontend, index, false);
        settle(frontend);
        put_frames(net, WAITING);
        kick(net, TX);
        show_host(index == RX ? "receive_off" : "transmit_off");
        step(index == RX ? "receive_off" : "transmit_off", !take_frames(net), "%d frames", net->received);
        enable(frontend, index, true);
        settle(frontend);
        came_back(index == RX ? "receive_on" : "transmit_on", net);
    }
}

/* How many pages are logged that should not be, or are not that should. */
static int wrong_pages(const uint8_t *log, const bool *expected)
{
    int wrong = 0;

    for (uint64_t page = 0; page < 8 * LOG_SIZE; page++) {
        uint64_t own = page - OWN / PAGE;

        wrong += (log[page / 8] >> page % 8 & 1) != (own < PAGES && expected[own]);
    }
    return wrong;
}

static void log_pages(struct frontend *frontend)
{
    struct net *net = &frontend->net;
    bool expected[PAGES] = { false };
    struct message base = { .request = SET_LOG_BASE, .size = sizeof base.log, .log = { .size = LOG_SIZE } };
    uint16_t bases[PAIR], slot = net->queues[RX].used->idx;
    uint8_t *log;
    int file;

    passed("before_the_log", net, RING);
    log = make_file("log", LOG_SIZE, &file);
    say(frontend, base, file);
    set_features(frontend, WANTED | LOG_ALL);
    show_host("logging");
    passed("while_logging", net, LOGGED);
    for (int index = 0; index < PAIR; index++)
        expected[index * RING_PAGES + 2] = true;
    for (int n = 0; n < LOGGED; n++, slot++)
        expected[(buffer_at(net, RX, slot % RING) - net->memory) / PAGE] = true;
    stop(frontend, bases);
    step("logged", !wrong_pages(log, expected), "%d pages wrong", wrong_pages(log, expected));
    show_host("logged");
    memset(log, 0, LOG_SIZE);
    memset(expected, 0, sizeof expected);
    set_features(frontend, WANTED);
    start(frontend, bases);
    passed("after_the_log", net, RING);
    step("not_logged", !wrong_pages(log, expected), "%d pages wrong", wrong_pages(log, expected));
}

int main(int count, char **arguments)
{
    static struct frontend frontend;
    const char *part = count == 4 ? arguments[1] : "";

    if (count != 4) {
        fprintf(stderr, "usage: vhost_frontend frames|state|queues|log|vanish SOCKET MAC\n");
        return 2;
    }
    /* Frames may pass through a card without ring state, which cannot begin anywhere else. */
    begin(&frontend, arguments[2], arguments[3], strcmp(part, "frames") ? BEGIN : 0);
    if (!strcmp(part, "frames"))
        frames(&frontend);
    else if (!strcmp(part, "state"))
        state(&frontend);
    else if (!strcmp(part, "queues"))
        queues(&frontend);
    else if (!strcmp(part, "log"))
        log_pages(&frontend);
    else {
        put_frames(&frontend.net, MOVING);
        kick(&frontend.net, TX);
        return 0;
    }
    end(&frontend);
    step(part, true, "done");
    return 0;
}
