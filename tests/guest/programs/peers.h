/* A card's rings and buffers in BARs, that of another card and its own. */
#ifndef PEERS_H
#define PEERS_H

#include "interrupts.h"

/* The first card, which does DMA, and the second, whose BAR is mapped for it beside memory of our own. */
static void open_peers(int container, char **functions, struct card *card, struct card *other, struct buffers *own)
{
    open_card(card, container, functions[0], true);
    open_card(other, container, functions[1], false);
    own_memory(container, own);
    demand("map_peers_bar", !dma_map(container, other->memory, BAR, other->memory_size));
}

static void peers(char **functions)
{
    int container = open_container();
    struct buffers own, there;
    struct card card, other;
    struct net net;

    open_peers(container, functions, &card, &other, &own);
    show_host("map_peers_bar");
    start(&net, &card, &own, false);

    there = (struct buffers){ other.memory, own.rx, BAR, own.rx_iova };
    round_trip("sent_from_the_bar", &net, &there, PAYLOAD, 1);
    there = (struct buffers){ own.tx, other.memory + 2 * PAGE, own.tx_iova, BAR + 2 * PAGE };
    round_trip("received_in_the_bar", &net, &there, PAYLOAD, 2);
    /* The end of the BAR, and a frame that goes on in the next page. */
    there.rx = other.memory + other.memory_size - BUFFER;
    there.rx_iova = BAR + other.memory_size - BUFFER;
    there.tx = other.memory + 5 * PAGE - 100;
    there.tx_iova = BAR + 5 * PAGE - 100;
    round_trip("from_bar_to_bar", &net, &there, PAYLOAD, 3);
    net_start(&net, &card, other.memory + 16 * PAGE, BAR + 16 * PAGE, false);
    round_trip("rings_and_buffers_in_the_bar", &net, &there, PAYLOAD, 4);
    start(&net, &card, &own, false);

    command(&other, PCI_COMMAND_MEMORY, false);
    step("peer_is_away", touch(other.memory) == -1, "SIGBUS");
    round_trip("own_memory_meanwhile", &net, &own, PAYLOAD, 5);
    there = (struct buffers){ own.tx, own.rx, BAR, own.rx_iova };
    send_frame(&net, &there, PAYLOAD, 6);
    lost("sent_from_an_absent_bar", &net, &card, &own, TX);
    there = (struct buffers){ own.tx, own.rx, own.tx_iova, BAR };
    send_frame(&net, &there, PAYLOAD, 7);
    lost("received_in_an_absent_bar", &net, &card, &own, RX);
    round_trip("own_memory_after_the_reset", &net, &own, PAYLOAD, 8);
    command(&other, PCI_COMMAND_MEMORY, true);
    there = (struct buffers){ other.memory, other.memory + BUFFER, BAR, BAR + BUFFER };
    round_trip("peer_is_back", &net, &there, PAYLOAD, 9);

    step("unmap_peers_bar", dma_unmap(container, BAR, other.memory_size) == (long)other.memory_size, "done");
    send_frame(&net, &there, PAYLOAD, 10);
    lost("sent_from_an_unmapped_bar", &net, &card, &own, TX);
    round_trip("own_memory_afterwards", &net, &own, PAYLOAD, 11);
    net_stop(&net);
    close_card(&other);
    close_card(&card);
    close(container);
}

static void lines(char **functions)
{
    int container = open_container(), line = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    struct buffers own, mine, theirs;
    struct card card, other;
    struct net net;

    open_card(&card, container, functions[0], true);
    open_card(&other, container, functions[1], false);
    own_memory(container, &own);
    mine = (struct buffers){ card.memory, card.memory + BUFFER, BAR, BAR + BUFFER };
    theirs = (struct buffers){ other.memory, other.memory + BUFFER, 2 * BAR, 2 * BAR + BUFFER };
    demand("map_own_bar", !dma_map(container, card.memory, BAR, card.memory_size));
    demand("map_peers_bar", !dma_map(container, other.memory, 2 * BAR, other.memory_size));
    start(&net, &card, &own, false);
    round_trip("own_bar", &net, &mine, PAYLOAD, 1);
    command(&card, PCI_COMMAND_INTX_DISABLE, false);
    demand("line", !set_irqs(&card, VFIO_PCI_INTX_IRQ_INDEX, TRIGGER | VFIO_IRQ_SET_DATA_EVENTFD, 1, &line));
    round_trip("own_memory_by_line", &net, &own, PAYLOAD, 2);
    step("line", signals(line, PATIENCE_MS) == 1 && *net.isr == 1, "signalled");
    round_trip("own_bar_by_line", &net, &mine, PAYLOAD, 3);
    round_trip("peers_bar_by_line", &net, &theirs, PAYLOAD, 4);
    net_stop(&net);
    close_card(&other);
    close_card(&card);
    close(container);
}

/* Steps: the first card's frames are in the second one's BAR while something happens to either, in turn. */
static void storm(char **functions)
{
    enum { FRAMES = 200 };
    int container = open_container(), moved = 0, failed = 0, wrong = 0;
    struct buffers own, there;
    struct card card, other;
    struct net net;

    open_peers(container, functions, &card, &other, &own);
    start(&net, &card, &own, false);
    there = (struct buffers){ other.memory, other.memory + BUFFER, BAR, BAR + BUFFER };
    for (int n = 0; n < FRAMES; n++) {
        int length = send_frame(&net, &there, PAYLOAD, n), got;

        switch (n % 4) {
        case 0:
            command(&other, PCI_COMMAND_MEMORY, false);
            command(&other, PCI_COMMAND_MEMORY, true);
            break;
        case 1:
            command(&card, PCI_COMMAND_MEMORY, false);
            command(&card, PCI_COMMAND_MEMORY, true);
            break;
        case 2:
            demand("unmap", dma_unmap(container, BAR, other.memory_size) == (long)other.memory_size);
            demand("map", !dma_map(container, other.memory, BAR, other.memory_size));
            break;
        case 3:
            command(&card, PCI_COMMAND_MASTER, false);
            command(&card, PCI_COMMAND_MASTER, true);
            break;
        }
        got = taken_back(&net, &net.queues[RX]);
        if (got == length && taken_back(&net, &net.queues[TX]) == 0) {
            moved++;
            wrong += !same_frame(there.rx, there.tx, PAYLOAD);
        } else if (net.common->device_status & VIRTIO_CONFIG_S_NEEDS_RESET) {
            failed++;
            start(&net, &card, &own, false);
        } else {
            break;
        }
    }
    step("storm", moved + failed == FRAMES && !wrong, "%d moved, %d wrong, %d failed the card", moved, wrong, failed);
    round_trip("after_the_storm", &net, &there, PAYLOAD, 1);
    net_stop(&net);
    close_card(&other);
    close_card(&card);
    close(container);
}

#endif
