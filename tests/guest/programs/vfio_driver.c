/*
 * What a driver in user space does with cards that its kernel's vfio-pci gives it, behind an IOMMU:
 *
 *   vfio_driver bars FUNCTION          map memory and a BAR for DMA; the BAR under a memory decoding that goes off
 *   vfio_driver interrupts FUNCTION    INTx, MSI and MSI-X by eventfd
 *   vfio_driver frames FUNCTION        send and receive by virtio-net, before and after a reset
 *   vfio_driver peers FUNCTION OTHER   the same with the first card's buffers in the second card's BAR
 *   vfio_driver lines FUNCTION OTHER   the same, and with its own BAR, while INTx is in use
 *   vfio_driver churn FUNCTION         map and unmap for DMA, very often and with nothing there
 *   vfio_driver registers FUNCTION     map a BAR that is no memory
 *   vfio_driver storm FUNCTION OTHER   take memory away from under frames that are on their way
 *
 * The functions are names of PCI functions that vfio-pci has. Steps are told as steps.h has it.
 */
#include "bars.h"
#include "interrupts.h"
#include "peers.h"

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
                  { "churn", churn, 1 },
                  { "registers", registers, 1 },
                  { "storm", storm, 2 } };
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
    fprintf(stderr, "usage: vfio_driver bars|interrupts|frames|peers|lines|churn|registers|storm FUNCTION...\n");
    return 2;
}
