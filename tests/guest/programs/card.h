/* A card that the guest's own kernel gives to a program: groups, containers, regions and interrupts of VFIO. */
#ifndef CARD_H
#define CARD_H

#include "own.h"

#include <fcntl.h>
#include <linux/pci_regs.h>
#include <linux/vfio.h>
#include <sys/ioctl.h>

enum { MEMORY_BAR = 2, MAX_VECTORS = 8 };

struct card {
    int group, device;
    struct vfio_region_info regions[VFIO_PCI_NUM_REGIONS];
    uint8_t *registers; /* BAR0 */
    uint8_t *memory;    /* BAR2 */
    uint64_t memory_size;
};

static int open_container(void)
{
    int container = open("/dev/vfio/vfio", O_RDWR | O_CLOEXEC);

    demand("container", container >= 0);
    demand("type1v2", ioctl(container, VFIO_CHECK_EXTENSION, VFIO_TYPE1v2_IOMMU) == 1);
    return container;
}

/* The number of the group that the guest's IOMMU has put a PCI function in. */
static int open_group(const char *function)
{
    char path[128], target[256];
    ssize_t length;

    snprintf(path, sizeof path, "/sys/bus/pci/devices/%s/iommu_group", function);
    length = readlink(path, target, sizeof target - 1);
    if (length < 0)
        return -1;
    target[length] = 0;
    snprintf(path, sizeof path, "/dev/vfio/%s", strrchr(target, '/') + 1);
    return open(path, O_RDWR | O_CLOEXEC);
}

static uint8_t *map_region(const struct card *card, int index)
{
    const struct vfio_region_info *region = &card->regions[index];

    return mmap(NULL, region->size, PROT_READ | PROT_WRITE, MAP_SHARED, card->device, region->offset);
}

static uint16_t config_read16(const struct card *card, int offset)
{
    uint16_t value = 0;

    if (pread(card->device, &value, 2, card->regions[VFIO_PCI_CONFIG_REGION_INDEX].offset + offset) != 2)
        demand("config_read", false);
    return value;
}

static void config_write16(const struct card *card, int offset, uint16_t value)
{
    if (pwrite(card->device, &value, 2, card->regions[VFIO_PCI_CONFIG_REGION_INDEX].offset + offset) != 2)
        demand("config_write", false);
}

/* Set or clear bits of COMMAND. */
static void command(const struct card *card, uint16_t bits, bool on)
{
    uint16_t value = config_read16(card, PCI_COMMAND);

    config_write16(card, PCI_COMMAND, on ? value | bits : value & ~bits);
}

/* Open a function's group and device in a container, whose kind is set with its first group. */
static void open_card(struct card *card, int container, const char *function, bool first)
{
    struct vfio_group_status status = { .argsz = sizeof status };

    card->group = open_group(function);
    demand("group", card->group >= 0);
    demand("group_status", !ioctl(card->group, VFIO_GROUP_GET_STATUS, &status));
    demand("viable", status.flags & VFIO_GROUP_FLAGS_VIABLE);
    demand("set_container", !ioctl(card->group, VFIO_GROUP_SET_CONTAINER, &container));
    if (first)
        demand("set_iommu", !ioctl(container, VFIO_SET_IOMMU, VFIO_TYPE1v2_IOMMU));
    card->device = ioctl(card->group, VFIO_GROUP_GET_DEVICE_FD, function);
    demand("device", card->device >= 0);
    for (int index = 0; index < VFIO_PCI_NUM_REGIONS; index++) {
        card->regions[index] = (struct vfio_region_info){ .argsz = sizeof card->regions[0], .index = index };
        /* A card of ours has no VGA region, which this refuses. */
        ioctl(card->device, VFIO_DEVICE_GET_REGION_INFO, &card->regions[index]);
    }
    /* Without a line: QEMU maps no memory of a card that has used it, until MSI-X takes over. */
    command(card, PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER | PCI_COMMAND_INTX_DISABLE, true);
    card->registers = map_region(card, 0);
    demand("mmap_registers", card->registers != MAP_FAILED);
    card->memory = map_region(card, MEMORY_BAR);
    demand("mmap_bar", card->memory != MAP_FAILED);
    card->memory_size = card->regions[MEMORY_BAR].size;
}

static void close_card(struct card *card)
{
    munmap(card->registers, card->regions[0].size);
    munmap(card->memory, card->memory_size);
    close(card->device);
    close(card->group);
}

static int dma_map(int container, void *address, uint64_t iova, uint64_t size)
{
    struct vfio_iommu_type1_dma_map map = {
        .argsz = sizeof map,
        .flags = VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE,
        .vaddr = (uintptr_t)address,
        .iova = iova,
        .size = size,
    };

    return ioctl(container, VFIO_IOMMU_MAP_DMA, &map);
}

/* How many bytes were unmapped, or -1. */
static long dma_unmap(int container, uint64_t iova, uint64_t size)
{
    struct vfio_iommu_type1_dma_unmap unmap = { .argsz = sizeof unmap, .iova = iova, .size = size };

    return ioctl(container, VFIO_IOMMU_UNMAP_DMA, &unmap) ? -1 : (long)unmap.size;
}

static long dma_unmap_all(int container)
{
    struct vfio_iommu_type1_dma_unmap unmap = { .argsz = sizeof unmap, .flags = VFIO_DMA_UNMAP_FLAG_ALL };

    return ioctl(container, VFIO_IOMMU_UNMAP_DMA, &unmap) ? -1 : (long)unmap.size;
}

static int set_irqs(const struct card *card, uint32_t index, uint32_t flags, uint32_t count, const int *eventfds)
{
    struct {
        struct vfio_irq_set set;
        int32_t eventfds[MAX_VECTORS];
    } request = { .set = { .flags = flags, .index = index, .count = count } };
    size_t data = eventfds ? count * sizeof *eventfds : 0;

    request.set.argsz = sizeof request.set + data;
    if (data)
        memcpy(request.eventfds, eventfds, data);
    return ioctl(card->device, VFIO_DEVICE_SET_IRQS, &request);
}

#endif
