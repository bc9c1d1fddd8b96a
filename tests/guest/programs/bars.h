/* Memory and a BAR mapped for DMA, and the BAR under a memory decoding that goes off. */
#ifndef BARS_H
#define BARS_H

#include "driver.h"

enum { PATTERN = 64 };

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

#endif
