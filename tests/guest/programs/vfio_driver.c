/*
 * What a driver in user space does with cards that its kernel's vfio-pci gives it, behind an IOMMU:
 *
 *   vfio_driver bars FUNCTION          map memory and a BAR for DMA; the BAR under a memory decoding that goes off
 *   vfio_driver interrupts FUNCTION    INTx, MSI and MSI-X by eventfd
 *   vfio_driver frames FUNCTION        send and receive by virtio-net, before and after a reset
 *   vfio_driver peers FUNCTION OTHER   the same with the first card's buffers in the second card's BAR
 *   vfio_driver lines FUNCTION OTHER   the same, and with its own BAR, while INTx is in use
 *   vfio_driver registers FUNCTION     map a BAR that is no memory
 *   vfio_driver churn FUNCTION         map and unmap for DMA, very often and with nothing there
 *
 * The functions are names of PCI functions that vfio-pci has. Steps are told as steps.h has it.
 */
#include "virtio_net.h"

#include <setjmp.h>
#include <signal.h>

enum { MEMORY_SIZE = 4 << 20, PAYLOAD = 1000, PATTERN = 64 };
enum { TRIGGER = VFIO_IRQ_SET_ACTION_TRIGGER };

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

static void fill(volatile uint8_t *memory, int seed)
{
    for (int n = 0; n < PATTERN; n++)
        memory[n] = seed + 3 * n;
}

static bool filled(const volatile uint8_t *memory, int seed)
{
    for (int n = 0; n < PATTERN; n++) {
        if (memory[n] != (uint8_t)(seed + 3 * n))
            return false;
    }
    return true;
}

static bool all_zeros(const volatile uint8_t *memory)
{
    for (int n = 0; n < PATTERN; n++) {
        if (memory[n])
            return false;
    }
    return true;
}

/* A step: map a part of a BAR for DMA, let the host see that, and take it back. */
static void map_bar(const char *name, int container, uint8_t *address, uint64_t iova, uint64_t size)
{
    demand(name, !dma_map(container, address, iova, size));
    show_host(name);
    step(name, dma_unmap(container, iova, size) == (long)size, "%#lx bytes", (long)size);
}

/* Put the function to sleep (3) or wake it up (0), in its power management capability. */
static void power_state(const struct card *card, int state)
{
    int at = config_read16(card, PCI_CAPABILITY_LIST) & 0xff;

    while (at && (config_read16(card, at) & 0xff) != PCI_CAP_ID_PM)
        at = config_read16(card, at) >> 8;
    demand("power_management", at);
    config_write16(card, at + PCI_PM_CTRL, state);
}

static void memory_decoding(const struct card *card, int on)
{
    command(card, PCI_COMMAND_MEMORY, on);
}

static void awake(const struct card *card, int on)
{
    power_state(card, on ? 0 : 3);
}

/* Two steps: what a mapping of the BAR gives while the device answers nobody, and what it gives afterwards. */
static void away_and_back(const char *away, const char *back, const struct card *card,
                          void (*answers)(const struct card *card, int on))
{
    volatile uint8_t *last = card->memory + card->memory_size - PATTERN;
    int first;

    fill(card->memory, 1);
    fill(last, 2);
    answers(card, false);
    first = touch(card->memory);
    step(away, first == -1 && touch(last) == -1, "%s", first == -1 ? "SIGBUS" : "read");
    answers(card, true);
    first = touch(card->memory);
    step(back, first == 1 && filled(card->memory, 1) && filled(last, 2), "%d", first);
}

static void bars(char **functions)
{
    int container = open_container();
    struct card card;
    uint8_t *memory = allocate(MEMORY_SIZE);
    long size;

    open_card(&card, container, functions[0], true);
    size = card.memory_size;

    demand("map_memory", !dma_map(container, memory, OWN, MEMORY_SIZE));
    show_host("map_memory");
    refused("map_memory_twice", dma_map(container, memory, OWN, MEMORY_SIZE), EEXIST);
    refused("unmap_a_part", dma_unmap(container, OWN, PAGE), EINVAL);
    step("map_memory", dma_unmap(container, OWN, MEMORY_SIZE) == MEMORY_SIZE, "%#x bytes", MEMORY_SIZE);

    map_bar("map_full_bar", container, card.memory, BAR, size);
    map_bar("map_partial_bar", container, card.memory, BAR, size / 2);
    map_bar("map_bar_misaligned", container, card.memory + PAGE, BAR + 2 * PAGE, size / 2);

    command(&card, PCI_COMMAND_MEMORY, false);
    refused("map_bar_without_memory", dma_map(container, card.memory, BAR, size), EFAULT);
    command(&card, PCI_COMMAND_MEMORY, true);

    demand("map_bar", !dma_map(container, card.memory, BAR, size));
    away_and_back("memory_off", "memory_on", &card, memory_decoding);
    away_and_back("memory_off_again", "memory_on_again", &card, memory_decoding);
    away_and_back("asleep", "awake", &card, awake);
    step("device_reset", !ioctl(card.device, VFIO_DEVICE_RESET), "done");
    step("bar_after_reset", touch(card.memory) >= 0 && all_zeros(card.memory), "%d", touch(card.memory));
    fill(card.memory, 5);
    step("bar_used_after_reset", filled(card.memory, 5), "%d", touch(card.memory));
    step("unmap_bar", dma_unmap(container, BAR, size) == size, "%#lx bytes", size);
    close_card(&card);
    close(container);
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

static void frames(char **functions)
{
    static const int payloads[] = { 0, 1, 46, PAYLOAD, 1500 };
    int container = open_container();
    struct buffers own;
    struct card card;
    struct net net;
    char name[64];

    open_card(&card, container, functions[0], true);
    own_memory(container, &own);
    start(&net, &card, &own, false);
    for (unsigned n = 0; n < sizeof payloads / sizeof *payloads; n++) {
        snprintf(name, sizeof name, "frame_%d", payloads[n]);
        round_trip(name, &net, &own, payloads[n], n);
    }
    for (int again = 0; again < 2; again++) {
        snprintf(name, sizeof name, "frame_after_reset_%d", again);
        demand("device_reset", !ioctl(card.device, VFIO_DEVICE_RESET));
        demand("reset_ends_the_driver", net.common->device_status == 0);
        command(&card, PCI_COMMAND_MASTER, true);
        start(&net, &card, &own, false);
        round_trip(name, &net, &own, PAYLOAD, again);
    }
    command(&card, PCI_COMMAND_MEMORY, false);
    command(&card, PCI_COMMAND_MEMORY, true);
    round_trip("frame_after_memory_was_off", &net, &own, PAYLOAD, 7);
    net_stop(&net);
    close_card(&card);
    close(container);
}

/* A step: the card cannot have a buffer, says so, and works again once it is reset. */
static void lost(const char *name, struct net *net, const struct card *card, const struct buffers *own, int queue)
{
    int got = taken_back(net, &net->queues[queue]), status = net->common->device_status;

    step(name, got == -1 && status == (DRIVER_OK | VIRTIO_CONFIG_S_NEEDS_RESET), "status %#x", status);
    start(net, card, own, false);
}

static void peers(char **functions)
{
    int container = open_container();
    struct buffers own, there;
    struct card card, other;
    struct net net;

    open_card(&card, container, functions[0], true);
    open_card(&other, container, functions[1], false);
    own_memory(container, &own);
    demand("map_peers_bar", !dma_map(container, other.memory, BAR, other.memory_size));
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

static void registers(char **functions)
{
    int container = open_container();
    struct buffers own, there;
    struct card card;
    struct net net;

    open_card(&card, container, functions[0], true);
    own_memory(container, &own);
    start(&net, &card, &own, false);
    step("map_registers", !dma_map(container, card.registers, BAR, card.regions[0].size), "done");
    there = (struct buffers){ own.tx, own.rx, BAR, own.rx_iova };
    send_frame(&net, &there, PAYLOAD, 1);
    lost("sent_from_registers", &net, &card, &own, TX);
    round_trip("own_memory_after_registers", &net, &own, PAYLOAD, 2);
    net_stop(&net);
    close_card(&card);
    close(container);
}

static int since_ms(uint64_t begun)
{
    return (now_ns() - begun) / 1000000;
}

static void churn(char **functions)
{
    enum { PAIRS = 10000, BULK = 64 << 20, STRAYS = 10000, TIMES = 10 };
    uint8_t *memory = allocate(PAGE), *bulk = allocate(BULK);
    struct buffers own;
    struct card card;
    struct net net;
    int container = open_container(), failed = 0;
    uint64_t begun;

    open_card(&card, container, functions[0], true);
    own_memory(container, &own);
    start(&net, &card, &own, false);

    begun = now_ns();
    for (int n = 0; n < PAIRS; n++) {
        uint64_t iova = BAR + (uint64_t)n % 512 * PAGE;

        failed += dma_map(container, memory, iova, PAGE) || dma_unmap(container, iova, PAGE) != PAGE;
    }
    step("pairs", !failed, "%d in %d ms", PAIRS, since_ms(begun));

    begun = now_ns();
    demand("bulk", !dma_map(container, bulk, BAR, BULK));
    show_host("bulk");
    failed = dma_unmap(container, BAR, BULK) != BULK;
    step("bulk", !failed, "%d pages in %d ms", BULK / PAGE, since_ms(begun));

    begun = now_ns();
    for (int n = 0; n < STRAYS; n++)
        failed += dma_unmap(container, BAR, 1ull << (20 + n % 18)) != 0;
    step("strays", !failed, "%d in %d ms", STRAYS, since_ms(begun));

    round_trip("frame_after_all", &net, &own, PAYLOAD, 1);
    net_stop(&net);
    step("unmap_all", dma_unmap_all(container) == MEMORY_SIZE, "%#x bytes", MEMORY_SIZE);
    close_card(&card);
    close(container);

    begun = now_ns();
    for (int n = 0; n < TIMES; n++) {
        container = open_container();
        open_card(&card, container, functions[0], true);
        close_card(&card);
        close(container);
    }
    step("attached_again", true, "%d times in %d ms", TIMES, since_ms(begun));
}

int main(int argc, char **argv)
{
    static const struct {
        const char *name;
        void (*run)(char **functions);
        int functions;
    } parts[] = { { "bars", bars, 1 },
                  { "interrupts", interrupts, 1 },
                  { "frames", frames, 1 },
                  { "peers", peers, 2 },
                  { "lines", lines, 2 },
                  { "registers", registers, 1 },
                  { "churn", churn, 1 } };
    char end[64];

    sigaction(SIGBUS, &(struct sigaction){ .sa_handler = on_fault }, NULL);
    for (unsigned n = 0; n < sizeof parts / sizeof *parts; n++) {
        if (argc >= 2 && !strcmp(argv[1], parts[n].name) && argc == 2 + parts[n].functions) {
            parts[n].run(argv + 2);
            snprintf(end, sizeof end, "%s_end", argv[1]);
            step(end, true, "done");
            return 0;
        }
    }
    fprintf(stderr, "usage: vfio_driver bars|interrupts|frames|peers|lines|registers|churn FUNCTION...\n");
    return 2;
}
