/*
 * What a user of vhost-vdpa does with a card that a vDPA parent of the guest's kernel offers:
 *
 *   vhost_vdpa questions DEVICE   every call, and what it answers
 *   vhost_vdpa frames DEVICE      send and receive, by eventfds and by the doorbells' own pages
 *   vhost_vdpa state DEVICE       stop in the middle of traffic, read ring state, and go on from there
 *   vhost_vdpa pauses DEVICE      the same without a reset
 *   vhost_vdpa hostile DEVICE     ring state that the rings belie
 *
 * The card's peer sends every frame back. DEVICE is a character device. Steps are told as steps.h has it.
 */
#include "vdpa_questions.h"
#include "vdpa_state.h"

/* A step: many frames, by one kind of kicks. */
static void frames_by(const char *name, struct net *net, bool by_doorbell)
{
    enum { FRAMES = 100 };
    bool well;

    net->by_doorbell = by_doorbell;
    well = pass(net, FRAMES);
    step(name, well, "%d of %d frames", net->received, net->sent);
    show_host(name);
}

/* A step: a frame passes; how often it has signalled the eventfds of the queues. */
static void frame_signals(const char *name, struct net *net, bool wanted)
{
    bool well;
    int told;

    for (int index = 0; index < QUEUES; index++)
        signals(net->calls[index], 0);
    well = pass(net, 1);
    told = signals(net->calls[TX], wanted ? PATIENCE_MS : 0);
    step(name, well && (told > 0) >= wanted, "tx %d, control %d", told, (int)signals(net->calls[CONTROL], 0));
}

static void want_interrupts(struct net *net, bool wanted)
{
    net->queues[TX].available->flags = wanted ? 0 : VRING_AVAIL_F_NO_INTERRUPT;
    __sync_synchronize();
}

/* Steps: what a transmission signals where it is not wanted, where it is, and where there is nothing to signal. */
static void calls(struct net *net)
{
    frame_signals("no_interrupt", net, false);
    want_interrupts(net, true);
    frame_signals("interrupt", net, true);
    demand("unbind", !file_of_queue(net->fd, VHOST_SET_VRING_CALL, TX, VHOST_FILE_UNBIND));
    frame_signals("call_unbound", net, false);
    demand("bind", !file_of_queue(net->fd, VHOST_SET_VRING_CALL, TX, net->calls[TX]));
    frame_signals("call_bound_again", net, true);
}

/* A step: the host changes the link, which the program is told of and reads. */
static void link_is(const char *name, struct net *net, uint8_t expected)
{
    uint8_t status[2] = { 0 };
    uint64_t told;

    signals(net->config, 0);
    show_host(name);
    told = signals(net->config, PATIENCE_MS);
    demand("get_config", !configuration(net->fd, VHOST_VDPA_GET_CONFIG, 6, 2, status));
    step(name, told && status[0] == expected, "status %d, told %d times", status[0], (int)told);
}

/* Steps: the memory goes from under the rings while nothing is in them for the card to send, and comes back. */
static void memory_goes(struct net *net)
{
    bool well;

    demand("invalidate", !iotlb(net->fd, VHOST_IOTLB_INVALIDATE, OWN, MEMORY_SIZE, NULL));
    kick(net, TX);
    kick(net, RX);
    show_host("invalidated");
    step("invalidated", get_status(net->fd) == DRIVER_OK, "status %#x", get_status(net->fd));
    demand("update", !map_memory(net));
    well = pass(net, RING);
    step("updated", well && get_status(net->fd) == DRIVER_OK, "%d of %d frames", net->received, net->sent);
}

/* Steps: a queue that is disabled leaves its ring alone, and goes on with it when it is enabled again. */
static void pause_sending(struct net *net)
{
    bool well;
    int put;

    demand("disable", !enable(net, TX, false));
    put = put_frames(net, RING / 2);
    kick(net, TX);
    show_host("disabled");
    step("disabled", net->queues[TX].used->idx == net->queues[TX].seen, "%d frames wait", put);
    demand("enable", !enable(net, TX, true));
    well = all_back(net);
    step("enabled", well, "%d of %d frames", net->received, net->sent);
}

static void frames(const char *path)
{
    static const uint16_t from_zero[QUEUES];
    struct net net;

    net_make(&net, 0);
    want_interrupts(&net, false);
    net_open(&net, path);
    show_host("mapped");
    net_start(&net, from_zero);
    fill_receive_ring(&net);
    frames_by("by_kick_eventfd", &net, false);
    frames_by("by_doorbell_page", &net, true);
    calls(&net);
    put_command(&net, false);
    kick(&net, CONTROL);
    step("command", obeyed(&net), "not promiscuous");
    link_is("link_down", &net, 0);
    link_is("link_up", &net, VIRTIO_NET_S_LINK_UP);
    memory_goes(&net);
    pause_sending(&net);
    running_questions(net.fd);
    frame_signals("frame_after_questions", &net, true);
    show_host("frames");
    net_close(&net);
    show_host("closed");
}

int main(int argc, char **argv)
{
    static const struct {
        const char *name;
        void (*run)(const char *path);
    } parts[] = { { "questions", questions },
                  { "frames", frames },
                  { "state", state },
                  { "pauses", pauses },
                  { "hostile", hostile } };
    char end[64];

    for (unsigned n = 0; n < sizeof parts / sizeof *parts; n++) {
        if (argc == 3 && !strcmp(argv[1], parts[n].name)) {
            parts[n].run(argv[2]);
            snprintf(end, sizeof end, "%s_end", argv[1]);
            step(end, true, "done");
            return 0;
        }
    }
    fprintf(stderr, "usage: vhost_vdpa questions|frames|state|pauses|hostile DEVICE\n");
    return 2;
}
