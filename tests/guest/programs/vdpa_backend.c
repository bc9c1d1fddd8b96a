/*
 * A vhost-user backend whose data path is a vDPA device: DPDK's own library and driver, and no more than what
 * these leave to an application. It serves the device at a socket until its standard input ends.
 *
 *   vdpa_backend [options of DPDK] -- DEVICE SOCKET
 */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include <rte_eal.h>
#include <rte_vdpa.h>
#include <rte_vhost.h>

static int serve(int vid)
{
    uint64_t features = 0;

    rte_vhost_get_negotiated_features(vid, &features);
    printf("serves %#" PRIx64 "\n", features);
    return 0;
}

/* By now the device has stopped, and the library has the rings' indices. */
static void leave(int vid)
{
    printf("left");
    for (uint16_t queue = 0; queue < rte_vhost_get_vring_num(vid); queue++) {
        uint16_t next = 0, used = 0;

        rte_vhost_get_vring_base(vid, queue, &next, &used);
        printf(" %u:%u", next, used);
    }
    printf("\n");
}

static const struct rte_vhost_device_ops EVENTS = { .new_device = serve, .destroy_device = leave };

int main(int argc, char **argv)
{
    setlinebuf(stdout);
    int taken = rte_eal_init(argc, argv);
    if (taken < 0 || argc - taken != 3) {
        printf("usage: vdpa_backend [options of DPDK] -- DEVICE SOCKET\n");
        return EXIT_FAILURE;
    }
    const char *name = argv[taken + 1], *path = argv[taken + 2];
    struct rte_vdpa_device *device = rte_vdpa_find_device_by_name(name);
    if (!device) {
        printf("no vDPA device %s\n", name);
        return EXIT_FAILURE;
    }
    uint32_t pairs = 0;
    uint64_t features = 0;
    if (rte_vdpa_get_queue_num(device, &pairs) || rte_vdpa_get_features(device, &features)) {
        printf("the device does not say what it is\n");
        return EXIT_FAILURE;
    }
    printf("device pairs=%" PRIu32 " features=%#" PRIx64 "\n", pairs, features);
    if (rte_vhost_driver_register(path, 0) || rte_vhost_driver_callback_register(path, &EVENTS) ||
        rte_vhost_driver_attach_vdpa_device(path, device) || rte_vhost_driver_start(path)) {
        printf("it cannot be served at %s\n", path);
        return EXIT_FAILURE;
    }
    printf("ready\n");
    char ignored;
    while (read(STDIN_FILENO, &ignored, 1) > 0)
        ;
    rte_vhost_driver_detach_vdpa_device(path);
    rte_vhost_driver_unregister(path);
    rte_eal_cleanup();
    printf("done\n");
    return EXIT_SUCCESS;
}
