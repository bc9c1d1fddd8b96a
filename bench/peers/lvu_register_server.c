/*
 * The smallest device that libvfio-user can serve: a PCI function whose BAR0 is 4 KiB of registers behind a callback.
 * It stands in the benchmarks for "what a C server costs", so nothing here does more than a register needs.
 *
 *   lvu_register_server [--poll] SOCKET
 *
 * Clients are served one after the other until SIGTERM. With --poll the server never sleeps while a client is
 * attached; with nobody attached it sleeps in either mode, so that an idle server disturbs no other measurement.
 */
#include <err.h>
#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
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

/* BAR0: registers of 4 bytes, naturally aligned; any other access is refused as hardware behind a narrow bus would. */
static ssize_t access_bar0(vfu_ctx_t *ctx, char *buffer, size_t count, loff_t offset, bool is_write)
{
    uint32_t *registers = vfu_get_private(ctx);

    if (count != 4 || offset % 4 != 0 || offset < 0 || offset > BAR0_SIZE - 4) {
        errno = EINVAL;
        return -1;
    }
    if (is_write)
        memcpy(&registers[offset / 4], buffer, 4);
    else
        memcpy(buffer, &registers[offset / 4], 4);
    return 4;
}

static vfu_ctx_t *make_device(const char *path, int flags, uint32_t *registers)
{
    vfu_ctx_t *ctx = vfu_create_ctx(VFU_TRANS_SOCK, path, flags, registers, VFU_DEV_TYPE_PCI);

    if (ctx == NULL)
        err(1, "%s", path);
    if (vfu_pci_init(ctx, VFU_PCI_TYPE_CONVENTIONAL, PCI_HEADER_TYPE_NORMAL, 0) < 0)
        err(1, "vfu_pci_init");
    vfu_pci_set_id(ctx, 0x1af4, 0x10f0, 0x1af4, 0x1100);
    if (vfu_setup_region(ctx, VFU_PCI_DEV_BAR0_REGION_IDX, BAR0_SIZE, access_bar0,
                         VFU_REGION_FLAG_RW | VFU_REGION_FLAG_MEM, NULL, 0, -1, 0) < 0)
        err(1, "vfu_setup_region");
    if (vfu_realize_ctx(ctx) < 0)
        err(1, "vfu_realize_ctx");
    return ctx;
}

/* Wait asleep for a client and finish the negotiation; false when this client went away before that. */
static bool attach(vfu_ctx_t *ctx)
{
    struct pollfd listening = { .fd = vfu_get_poll_fd(ctx), .events = POLLIN };

    if (poll(&listening, 1, -1) < 0 && errno != EINTR)
        err(1, "poll");
    return vfu_attach_ctx(ctx) == 0;
}

int main(int argc, char **argv)
{
    static uint32_t registers[BAR0_SIZE / 4] = { 0x74726e63 };
    bool spin = argc == 3 && strcmp(argv[1], "--poll") == 0;
    vfu_ctx_t *ctx;

    if (argc != (spin ? 3 : 2))
        errx(2, "usage: lvu_register_server [--poll] SOCKET");
    socket_path = argv[argc - 1];
    signal(SIGTERM, on_signal);
    signal(SIGINT, on_signal);
    ctx = make_device(socket_path, spin ? LIBVFIO_USER_FLAG_ATTACH_NB : 0, registers);
    for (;;) {
        if (!attach(ctx))
            continue;
        /* Blocking, the call returns when the client leaves; non-blocking, after each message and each look. */
        while (vfu_run_ctx(ctx) >= 0 || errno == EAGAIN || errno == EINTR)
            ;
        if (errno != ENOTCONN)
            err(1, "vfu_run_ctx");
    }
}
