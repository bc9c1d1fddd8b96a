/*
 * The smallest device of libvfio-user that takes DMA windows: what the library does with each is all that is done. It
 * maps those that come with a descriptor, as ours does.
 *
 *   lvu_dma_server SOCKET
 *
 * Clients are served one after the other until SIGTERM.
 */
#include <err.h>
#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <unistd.h>

#include "libvfio-user.h"

static const char *socket_path;

static void on_signal(int number)
{
    (void)number;
    unlink(socket_path);
    _exit(0);
}

static void on_change(vfu_ctx_t *ctx, vfu_dma_info_t *info)
{
    (void)ctx;
    (void)info;
}

int main(int argc, char **argv)
{
    vfu_ctx_t *ctx;

    if (argc != 2)
        errx(2, "usage: lvu_dma_server SOCKET");
    socket_path = argv[1];
    signal(SIGTERM, on_signal);
    signal(SIGINT, on_signal);
    ctx = vfu_create_ctx(VFU_TRANS_SOCK, socket_path, 0, NULL, VFU_DEV_TYPE_PCI);
    if (ctx == NULL || vfu_pci_init(ctx, VFU_PCI_TYPE_CONVENTIONAL, PCI_HEADER_TYPE_NORMAL, 0) < 0)
        err(1, "%s", socket_path);
    vfu_pci_set_id(ctx, 0x1af4, 0x10f2, 0x1af4, 0x1100);
    /* Callbacks that do nothing: without any the library would not map the memory. */
    if (vfu_setup_device_dma(ctx, on_change, on_change) < 0)
        err(1, "vfu_setup_device_dma");
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
