/*
 * A device of libvfio-user with an interrupt pin, which reaches its client's memory by DMA_READ and DMA_WRITE alone, as
 * told by registers.
 *
 *   lvu_device SOCKET
 *
 * BAR0, registers of 4 bytes: 0x00 and 0x04 an address (low, high), 0x08 a length of at most 1 MiB, 0x0c a command
 * (1: read client memory into 0x1000, 2: write it from there), 0x10 the errno that the command ended with; a write to
 * 0x14 triggers INTx so often, 0x18 counts the triggers that the library took, 0x1c the resets of any kind. Writes of 4 bytes
 * at 0x20 may go by an eventfd instead. BAR2 is memory that may be mapped. There are PCI power management at 0x40 and PCI
 * Express with FLR at 0x50. Clients are served one after the other until SIGTERM.
 */
#define _GNU_SOURCE
#include <err.h>
#include <errno.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include "libvfio-user.h"
#include "pci_caps/pm.h"
#include "pci_caps/px.h"

enum { COMMAND = 3, STATUS = 4, TRIGGER = 5, TRIGGERED = 6, RESETS = 7, DOORBELL = 0x20, BUFFER = 0x1000, BAR0_SIZE = BUFFER + (1 << 20) };
enum { BAR2_SIZE = 0x4000 };

static const char *socket_path;
static char *bar2;

static void on_signal(int number)
{
    (void)number;
    unlink(socket_path);
    _exit(0);
}

static int transfer(vfu_ctx_t *ctx, uint32_t *registers, bool to_client)
{
    uint64_t address = registers[0] | (uint64_t)registers[1] << 32;
    size_t length = registers[2];
    char *buffer = (char *)registers + BUFFER;
    dma_sg_t *sg = calloc(1, dma_sg_size());
    int status = 0;

    if (length > BAR0_SIZE - BUFFER)
        status = EINVAL;
    else if (vfu_addr_to_sgl(ctx, (vfu_dma_addr_t)address, length, sg, 1, to_client ? PROT_WRITE : PROT_READ) != 1)
        status = errno ? errno : EIO;
    else if ((to_client ? vfu_sgl_write : vfu_sgl_read)(ctx, sg, 1, buffer) < 0)
        status = errno ? errno : EIO;
    free(sg);
    return status;
}

static ssize_t access_bar0(vfu_ctx_t *ctx, char *buffer, size_t count, loff_t offset, bool is_write)
{
    uint32_t *registers = vfu_get_private(ctx);

    if (offset < 0 || offset > (loff_t)(BAR0_SIZE - count)) {
        errno = EINVAL;
        return -1;
    }
    if (!is_write) {
        memcpy(buffer, (char *)registers + offset, count);
        return count;
    }
    memcpy((char *)registers + offset, buffer, count);
    if (offset == COMMAND * 4)
        registers[STATUS] = transfer(ctx, registers, registers[COMMAND] == 2);
    for (; offset == TRIGGER * 4 && registers[TRIGGER] > 0; registers[TRIGGER]--)
        if (vfu_irq_trigger(ctx, 0) == 0)
            registers[TRIGGERED]++;
    return count;
}

static ssize_t access_bar2(vfu_ctx_t *ctx, char *buffer, size_t count, loff_t offset, bool is_write)
{
    (void)ctx;
    if (offset < 0 || count > BAR2_SIZE || offset > (loff_t)(BAR2_SIZE - count)) {
        errno = EINVAL;
        return -1;
    }
    memcpy(is_write ? bar2 + offset : buffer, is_write ? buffer : bar2 + offset, count);
    return count;
}

static int reset(vfu_ctx_t *ctx, vfu_reset_type_t type)
{
    uint32_t *registers = vfu_get_private(ctx);

    (void)type;
    registers[RESETS]++;
    return 0;
}

static void add_capabilities(vfu_ctx_t *ctx)
{
    struct pmcap pm = { .hdr.id = PCI_CAP_ID_PM, .pmcs.nsfrst = 1 };
    struct pxcap px = { .hdr.id = PCI_CAP_ID_EXP, .pxcaps.ver = 2, .pxdcap.flrc = 1 };

    if (vfu_pci_add_capability(ctx, 0x40, 0, &pm) < 0 || vfu_pci_add_capability(ctx, 0x50, 0, &px) < 0)
        err(1, "vfu_pci_add_capability");
    if (vfu_setup_device_reset_cb(ctx, reset) < 0)
        err(1, "vfu_setup_device_reset_cb");
}

int main(int argc, char **argv)
{
    static uint32_t registers[BAR0_SIZE / 4];
    vfu_ctx_t *ctx;
    int doorbell = eventfd(0, EFD_NONBLOCK), memory = memfd_create("bar2", MFD_CLOEXEC);
    struct iovec all = { .iov_base = NULL, .iov_len = BAR2_SIZE };

    if (argc != 2)
        errx(2, "usage: lvu_device SOCKET");
    if (memory < 0 || ftruncate(memory, BAR2_SIZE) < 0)
        err(1, "memory");
    bar2 = mmap(NULL, BAR2_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, memory, 0);
    if (bar2 == MAP_FAILED)
        err(1, "mmap");
    socket_path = argv[1];
    signal(SIGTERM, on_signal);
    ctx = vfu_create_ctx(VFU_TRANS_SOCK, socket_path, 0, registers, VFU_DEV_TYPE_PCI);
    if (ctx == NULL || vfu_pci_init(ctx, VFU_PCI_TYPE_CONVENTIONAL, PCI_HEADER_TYPE_NORMAL, 0) < 0)
        err(1, "%s", socket_path);
    vfu_pci_set_id(ctx, 0x1af4, 0x10f1, 0x1af4, 0x1100);
    vfu_pci_get_config_space(ctx)->hdr.intr.ipin = 1;
    if (vfu_setup_device_nr_irqs(ctx, VFU_DEV_INTX_IRQ, 1) < 0)
        err(1, "vfu_setup_device_nr_irqs");
    if (vfu_setup_region(ctx, VFU_PCI_DEV_BAR0_REGION_IDX, BAR0_SIZE, access_bar0,
                         VFU_REGION_FLAG_RW | VFU_REGION_FLAG_MEM, NULL, 0, -1, 0) < 0)
        err(1, "vfu_setup_region");
    if (vfu_setup_region(ctx, VFU_PCI_DEV_BAR2_REGION_IDX, BAR2_SIZE, access_bar2,
                         VFU_REGION_FLAG_RW | VFU_REGION_FLAG_MEM, &all, 1, memory, 0) < 0)
        err(1, "vfu_setup_region");
    add_capabilities(ctx);
    if (vfu_setup_device_dma(ctx, NULL, NULL) < 0)
        err(1, "vfu_setup_device_dma");
    if (vfu_realize_ctx(ctx) < 0)
        err(1, "vfu_realize_ctx");
    if (vfu_create_ioeventfd(ctx, VFU_PCI_DEV_BAR0_REGION_IDX, doorbell, DOORBELL, 4, 0, 0) < 0)
        err(1, "vfu_create_ioeventfd");
    for (;;) {
        if (vfu_attach_ctx(ctx) < 0)
            continue;
        while (vfu_run_ctx(ctx) >= 0 || errno == EAGAIN || errno == EINTR)
            ;
        if (errno != ENOTCONN)
            err(1, "vfu_run_ctx");
    }
}
