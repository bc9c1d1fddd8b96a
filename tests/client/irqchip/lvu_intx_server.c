/*
 * A device of libvfio-user with an interrupt pin.
 *
 *   lvu_intx_server SOCKET
 *
 * BAR0, registers of 4 bytes: a write to 0x00 triggers INTx so often, 0x04 counts the triggers that the library took.
 * Clients are served one after the other until SIGTERM.
 */
#include <err.h>
#include <errno.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <unistd.h>

#include "libvfio-user.h"

enum { BAR0_SIZE = 4096 };

static const char *socket_path;

static void on_signal(int number)
{
    (void)number;
    unlink(socket_path);
    _exit(0);
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
    for (; offset == 0 && registers[0] > 0; registers[0]--)
        if (vfu_irq_trigger(ctx, 0) == 0)
            registers[1]++;
    return count;
}

int main(int argc, char **argv)
{
    static uint32_t registers[BAR0_SIZE / 4];
    vfu_ctx_t *ctx;

    if (argc != 2)
        errx(2, "usage: lvu_intx_server SOCKET");
    socket_path = argv[1];
    signal(SIGTERM, on_signal);
    ctx = vfu_create_ctx(VFU_TRANS_SOCK, socket_path, 0, registers, VFU_DEV_TYPE_PCI);
    if (ctx == NULL || vfu_pci_init(ctx, VFU_PCI_TYPE_CONVENTIONAL, PCI_HEADER_TYPE_NORMAL, 0) < 0)
        err(1, "%s", socket_path);
    vfu_pci_set_id(ctx, 0x1af4, 0x10f2, 0x1af4, 0x1100);
    vfu_pci_get_config_space(ctx)->hdr.intr.ipin = 1;
    if (vfu_setup_device_nr_irqs(ctx, VFU_DEV_INTX_IRQ, 1) < 0)
        err(1, "vfu_setup_device_nr_irqs");
    if (vfu_setup_region(ctx, VFU_PCI_DEV_BAR0_REGION_IDX, BAR0_SIZE, access_bar0,
                         VFU_REGION_FLAG_RW | VFU_REGION_FLAG_MEM, NULL, 0, -1, 0) < 0)
        err(1, "vfu_setup_region");
    if (vfu_realize_ctx(ctx) < 0)
        err(1, "vfu_realize_ctx");
    for (;;) {
        if (vfu_attach_ctx(ctx) < 0)
            continue;
        while (vfu_run_ctx(ctx) >= 0 || errno == EAGAIN || errno == EINTR)
            ;
        if (errno != ENOTCONN)
            err(1, "vfu_run_ctx");
    }
}
