/* A vDPA device that the guest's kernel gives to a program (drivers/vhost/vdpa.c), and what it answers. */
#ifndef VDPA_H
#define VDPA_H

#include "rings.h"

#include <fcntl.h>
#include <linux/vhost.h>
#include <sys/ioctl.h>

/* Newer than the headers of Linux 6.1: include/uapi/linux/vhost.h and vhost_types.h. */
#ifndef VHOST_VDPA_RESUME
#define VHOST_VDPA_RESUME _IO(VHOST_VIRTIO, 0x7E)
#endif
#ifndef VHOST_VDPA_GET_VRING_DESC_GROUP
#define VHOST_VDPA_GET_VRING_DESC_GROUP _IOWR(VHOST_VIRTIO, 0x7F, struct vhost_vring_state)
#endif
#ifndef VHOST_VDPA_GET_VRING_SIZE
#define VHOST_VDPA_GET_VRING_SIZE _IOWR(VHOST_VIRTIO, 0x82, struct vhost_vring_state)
#endif
#ifndef VHOST_BACKEND_F_SUSPEND
#define VHOST_BACKEND_F_SUSPEND 0x4
#endif

enum { MAX_CONFIG = 256 };

static const uint64_t BACKEND_FEATURES = 1ull << VHOST_BACKEND_F_IOTLB_MSG_V2 | 1ull << VHOST_BACKEND_F_IOTLB_BATCH;
static const uint64_t FEATURES = 1ull << VIRTIO_F_VERSION_1 | 1ull << VIRTIO_F_ACCESS_PLATFORM |
                                 1ull << VIRTIO_NET_F_MAC | 1ull << VIRTIO_NET_F_STATUS |
                                 1ull << VIRTIO_NET_F_CTRL_VQ | 1ull << VIRTIO_NET_F_CTRL_RX;

static int open_vdpa(const char *path)
{
    int fd = open(path, O_RDWR | O_CLOEXEC);

    demand("open", fd >= 0);
    return fd;
}

/* A step, good in itself: how a call ended, for the test to judge. */
static void answer(const char *name, int result)
{
    step(name, true, "%s", result < 0 ? strerrorname_np(errno) : "done");
}

/* The same of a call that gives a number. */
static void answer_number(const char *name, int result, uint64_t number)
{
    if (result < 0)
        answer(name, result);
    else
        step(name, true, "%#lx", number);
}

/* A call that takes a queue and a number, or gives a number for a queue. */
static int of_queue(int fd, unsigned long request, int queue, unsigned number)
{
    struct vhost_vring_state state = { .index = queue, .num = number };

    return ioctl(fd, request, &state);
}

static int get_of_queue(int fd, unsigned long request, int queue, unsigned *number)
{
    struct vhost_vring_state state = { .index = queue };
    int result = ioctl(fd, request, &state);

    *number = state.num;
    return result;
}

static int file_of_queue(int fd, unsigned long request, int queue, int file)
{
    struct vhost_vring_file given = { .index = queue, .fd = file };

    return ioctl(fd, request, &given);
}

static int set_status(int fd, uint8_t status)
{
    return ioctl(fd, VHOST_VDPA_SET_STATUS, &status);
}

static uint8_t get_status(int fd)
{
    uint8_t status = 0;

    demand("get_status", !ioctl(fd, VHOST_VDPA_GET_STATUS, &status));
    return status;
}

static int set_features(int fd, uint64_t features)
{
    return ioctl(fd, VHOST_SET_FEATURES, &features);
}

/* Bytes of the device's configuration, read or written. */
static int configuration(int fd, unsigned long request, uint32_t offset, uint32_t length, uint8_t *bytes)
{
    struct {
        struct vhost_vdpa_config config;
        uint8_t bytes[MAX_CONFIG];
    } call = { .config = { .off = offset, .len = length } };
    int result;

    memcpy(call.config.buf, bytes, length <= MAX_CONFIG ? length : 0);
    result = ioctl(fd, request, &call);
    if (!result)
        memcpy(bytes, call.config.buf, length);
    return result;
}

/* A message to the IOTLB: its type, and for an update and an invalidation of what. */
static int iotlb(int fd, uint8_t type, uint64_t iova, uint64_t size, const void *memory)
{
    struct vhost_msg_v2 message = {
        .type = VHOST_IOTLB_MSG_V2,
        .iotlb = {
            .iova = iova,
            .size = size,
            .uaddr = (uintptr_t)memory,
            .perm = VHOST_ACCESS_RW,
            .type = type,
        },
    };

    return write(fd, &message, sizeof message) == sizeof message ? 0 : -1;
}

#endif
