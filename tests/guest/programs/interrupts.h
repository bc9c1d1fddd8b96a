/* INTx, MSI and MSI-X by eventfd. */
#ifndef INTERRUPTS_H
#define INTERRUPTS_H

#include "driver.h"

enum { TRIGGER = VFIO_IRQ_SET_ACTION_TRIGGER };

/* A step: the kernel signals each eventfd of an interrupt itself. */
static void loop_back(const char *name, const struct card *card, int index, int count, const int *eventfds)
{
    int heard = 0;

    for (int n = 0; n < count; n++) {
        struct vfio_irq_set set = {
            .argsz = sizeof set,
            .flags = VFIO_IRQ_SET_DATA_NONE | VFIO_IRQ_SET_ACTION_TRIGGER,
            .index = index,
            .start = n,
            .count = 1,
        };
        demand(name, !ioctl(card->device, VFIO_DEVICE_SET_IRQS, &set));
        heard += signals(eventfds[n], 0) == 1;
    }
    step(name, heard == count, "%d of %d", heard, count);
}

/* Steps of one kind of interrupt: by the kernel's own hand, and from each of two frames that the card receives. */
static void interrupt(const char *kind, const struct card *card, const struct buffers *own, int index, int vector)
{
    struct vfio_irq_info info = { .argsz = sizeof info, .index = index };
    int eventfds[MAX_VECTORS], strays = 0;
    bool line = index == VFIO_PCI_INTX_IRQ_INDEX;
    char name[64];
    struct net net;

    demand(kind, !ioctl(card->device, VFIO_DEVICE_GET_IRQ_INFO, &info) && info.count <= MAX_VECTORS);
    command(card, PCI_COMMAND_INTX_DISABLE, !line);
    for (unsigned n = 0; n < info.count; n++)
        eventfds[n] = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    demand(kind, !set_irqs(card, index, TRIGGER | VFIO_IRQ_SET_DATA_EVENTFD, info.count, eventfds));
    snprintf(name, sizeof name, "%s_by_hand", kind);
    loop_back(name, card, index, info.count, eventfds);
    start(&net, card, own, index == VFIO_PCI_MSIX_IRQ_INDEX);
    for (int frame = 0; frame < 2; frame++) {
        int heard;

        snprintf(name, sizeof name, "%s_frame_%d", kind, frame);
        round_trip(name, &net, own, PAYLOAD, frame);
        heard = signals(eventfds[vector], PATIENCE_MS);
        snprintf(name, sizeof name, "%s_signal_%d", kind, frame);
        step(name, heard == 1 && (!line || *net.isr == 1), "%d signals", heard);
        /* A line is masked when it was signalled. */
        demand(name, !line || !set_irqs(card, index, VFIO_IRQ_SET_ACTION_UNMASK | VFIO_IRQ_SET_DATA_NONE, 1, NULL));
    }
    net_stop(&net);
    for (unsigned n = 0; n < info.count; n++)
        strays += signals(eventfds[n], 0);
    snprintf(name, sizeof name, "%s_no_more", kind);
    step(name, strays == 0, "%d on %d vectors", strays, info.count);
    demand(kind, !set_irqs(card, index, TRIGGER | VFIO_IRQ_SET_DATA_NONE, 0, NULL));
    for (unsigned n = 0; n < info.count; n++)
        close(eventfds[n]);
}

static void interrupts(char **functions)
{
    int container = open_container();
    struct buffers own;
    struct card card;

    open_card(&card, container, functions[0], true);
    own_memory(container, &own);
    interrupt("msix", &card, &own, VFIO_PCI_MSIX_IRQ_INDEX, RX);
    interrupt("msi", &card, &own, VFIO_PCI_MSI_IRQ_INDEX, 0);
    interrupt("intx", &card, &own, VFIO_PCI_INTX_IRQ_INDEX, 0);
    interrupt("msix_again", &card, &own, VFIO_PCI_MSIX_IRQ_INDEX, RX);
    close_card(&card);
    close(container);
}

#endif
