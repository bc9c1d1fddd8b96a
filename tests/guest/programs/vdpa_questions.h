/* Every call of vhost-vdpa, told with its answer: what it should be the test knows, for each parent. */
#ifndef VDPA_QUESTIONS_H
#define VDPA_QUESTIONS_H

#include "vdpa_net.h"

/* A number that a call gives. */
#define NUMBER(fd, name, request, type)                                                                               \
    do {                                                                                                              \
        type number = 0;                                                                                              \
        int result = ioctl(fd, request, &number);                                                                     \
                                                                                                                      \
        answer_number(name, result, number);                                                                          \
    } while (0)

static void each_queue(int fd, const char *name, unsigned long request)
{
    char text[64];

    for (int index = 0; index <= QUEUES; index++) {
        unsigned number;
        int result = get_of_queue(fd, request, index, &number);

        snprintf(text, sizeof text, "%s_%d", name, index);
        answer_number(text, result, number);
    }
}

static void configuration_questions(int fd)
{
    uint8_t bytes[MAX_CONFIG] = { 0 }, other[6] = { 2, 2, 2, 2, 2, 2 };
    char text[2 * MAX_CONFIG + 1] = "";
    uint32_t size = 0;

    demand("config_size", !ioctl(fd, VHOST_VDPA_GET_CONFIG_SIZE, &size) && size <= MAX_CONFIG);
    answer_number("config_size", 0, size);
    demand("config", !configuration(fd, VHOST_VDPA_GET_CONFIG, 0, size, bytes));
    for (uint32_t n = 0; n < size; n++)
        sprintf(text + 2 * n, "%02x", bytes[n]);
    step("config", true, "%s", text);
    answer("config_of_nothing", configuration(fd, VHOST_VDPA_GET_CONFIG, 0, 0, bytes));
    answer("config_too_long", configuration(fd, VHOST_VDPA_GET_CONFIG, 1, size, bytes));
    answer("config_beyond", configuration(fd, VHOST_VDPA_GET_CONFIG, size + 1, 1, bytes));
    answer("set_config", configuration(fd, VHOST_VDPA_SET_CONFIG, 0, sizeof other, other));
    demand("config_again", !configuration(fd, VHOST_VDPA_GET_CONFIG, 0, sizeof other, other));
    step("mac_is_read_only", !memcmp(other, bytes, sizeof other), "%02x", other[0]);
}

static void memory_questions(int fd)
{
    struct vhost_vdpa_iova_range range = { 0 };
    uint8_t *memory = allocate(4 * PAGE);

    demand("iova_range", !ioctl(fd, VHOST_VDPA_GET_IOVA_RANGE, &range));
    step("iova_range", true, "%#llx to %#llx", range.first, range.last);
    answer("map", iotlb(fd, VHOST_IOTLB_UPDATE, OWN, 4 * PAGE, memory));
    show_host("map");
    answer("map_twice", iotlb(fd, VHOST_IOTLB_UPDATE, OWN + PAGE, PAGE, memory));
    answer("map_nothing", iotlb(fd, VHOST_IOTLB_UPDATE, 2 * OWN, 0, memory));
    answer("map_beyond", iotlb(fd, VHOST_IOTLB_UPDATE, range.last, 2 * PAGE, memory));
    answer("map_no_memory", iotlb(fd, VHOST_IOTLB_UPDATE, 2 * OWN, PAGE, NULL));
    answer("unmap", iotlb(fd, VHOST_IOTLB_INVALIDATE, OWN, 4 * PAGE, NULL));
    answer("unmap_nothing", iotlb(fd, VHOST_IOTLB_INVALIDATE, OWN, 4 * PAGE, NULL));
    answer("batch_begin", iotlb(fd, VHOST_IOTLB_BATCH_BEGIN, 0, 0, NULL));
    answer("batch_map", iotlb(fd, VHOST_IOTLB_UPDATE, OWN, PAGE, memory));
    answer("batch_end", iotlb(fd, VHOST_IOTLB_BATCH_END, 0, 0, NULL));
    answer("batch_unmap", iotlb(fd, VHOST_IOTLB_INVALIDATE, OWN, PAGE, NULL));
    show_host("unmap");
    munmap(memory, 4 * PAGE);
}

static void doorbell_questions(int fd)
{
    answer("doorbell_to_read", map_doorbell(fd, 0, PROT_READ | PROT_WRITE) == MAP_FAILED ? -1 : 0);
    answer("doorbell_of_no_queue", map_doorbell(fd, QUEUES, PROT_WRITE) == MAP_FAILED ? -1 : 0);
    answer("doorbells_together", mmap(NULL, 2 * PAGE, PROT_WRITE, MAP_SHARED, fd, 0) == MAP_FAILED ? -1 : 0);
}

static void negotiation_questions(int fd)
{
    enum { DRIVER = VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER };
    const uint8_t features_ok = DRIVER | VIRTIO_CONFIG_S_FEATURES_OK;

    answer_number("status", 0, get_status(fd));
    answer("base_before_features", of_queue(fd, VHOST_SET_VRING_BASE, RX, 0));
    demand("driver", !set_status(fd, DRIVER));
    answer("no_access_platform", set_features(fd, FEATURES & ~(1ull << VIRTIO_F_ACCESS_PLATFORM)));
    answer("unknown_feature", set_features(fd, FEATURES | 1ull << 62));
    demand("features_ok", !set_status(fd, features_ok));
    answer_number("unknown_feature_ok", 0, get_status(fd));
    demand("reset", !set_status(fd, 0));
    demand("driver", !set_status(fd, DRIVER));
    answer("set_features", set_features(fd, FEATURES));
    demand("features_ok", !set_status(fd, features_ok));
    answer_number("features_ok", 0, get_status(fd));
    answer("features_again", set_features(fd, FEATURES));
    answer("status_taken_back", set_status(fd, VIRTIO_CONFIG_S_ACKNOWLEDGE));
    each_queue(fd, "get_base", VHOST_GET_VRING_BASE);
    answer("base_0", of_queue(fd, VHOST_SET_VRING_BASE, RX, 0));
    answer("base_5", of_queue(fd, VHOST_SET_VRING_BASE, RX, 5));
    answer("base_ffff", of_queue(fd, VHOST_SET_VRING_BASE, RX, 0xffff));
    answer("base_10000", of_queue(fd, VHOST_SET_VRING_BASE, RX, 0x10000));
    each_queue(fd, "base_of", VHOST_GET_VRING_BASE);
    answer("num_0", of_queue(fd, VHOST_SET_VRING_NUM, RX, 0));
    answer("num_3", of_queue(fd, VHOST_SET_VRING_NUM, RX, 3));
    answer("suspend_at_rest", ioctl(fd, VHOST_VDPA_SUSPEND));
    demand("reset", !set_status(fd, 0));
    each_queue(fd, "base_after_reset", VHOST_GET_VRING_BASE);
}

/* What has to be asked of a device that runs. */
static void running_questions(int fd)
{
    struct vhost_vring_addr address = { .index = RX };

    answer("suspend", ioctl(fd, VHOST_VDPA_SUSPEND));
    answer("resume", ioctl(fd, VHOST_VDPA_RESUME));
    answer("base_while_running", of_queue(fd, VHOST_SET_VRING_BASE, RX, 0));
    answer("addr_while_running", ioctl(fd, VHOST_SET_VRING_ADDR, &address));
    answer("features_while_running", set_features(fd, FEATURES));
}

static void questions(const char *path)
{
    const uint64_t suspend = 1ull << VHOST_BACKEND_F_SUSPEND, unknown = 1ull << 40, base = 0;
    int fd = open_vdpa(path);

    refused("open_twice", open(path, O_RDWR | O_CLOEXEC), EBUSY);
    NUMBER(fd, "device_id", VHOST_VDPA_GET_DEVICE_ID, uint32_t);
    NUMBER(fd, "queues", VHOST_VDPA_GET_VQS_COUNT, uint32_t);
    NUMBER(fd, "groups", VHOST_VDPA_GET_GROUP_NUM, uint32_t);
    NUMBER(fd, "address_spaces", VHOST_VDPA_GET_AS_NUM, unsigned);
    NUMBER(fd, "vring_num", VHOST_VDPA_GET_VRING_NUM, uint16_t);
    NUMBER(fd, "features", VHOST_GET_FEATURES, uint64_t);
    NUMBER(fd, "backend_features", VHOST_GET_BACKEND_FEATURES, uint64_t);
    answer("ask_for_suspend", ioctl(fd, VHOST_SET_BACKEND_FEATURES, &suspend));
    answer("ask_for_unknown", ioctl(fd, VHOST_SET_BACKEND_FEATURES, &unknown));
    answer("log", ioctl(fd, VHOST_SET_LOG_BASE, &base));
    answer("ring_without_owner", of_queue(fd, VHOST_SET_VRING_NUM, RX, RING));
    answer("owner", ioctl(fd, VHOST_SET_OWNER));
    answer("owner_twice", ioctl(fd, VHOST_SET_OWNER));
    each_queue(fd, "group", VHOST_VDPA_GET_VRING_GROUP);
    each_queue(fd, "descriptor_group", VHOST_VDPA_GET_VRING_DESC_GROUP);
    each_queue(fd, "size", VHOST_VDPA_GET_VRING_SIZE);
    answer("group_to_space_0", of_queue(fd, VHOST_VDPA_SET_GROUP_ASID, 0, 0));
    answer("group_to_space_1", of_queue(fd, VHOST_VDPA_SET_GROUP_ASID, 0, 1));
    demand("backend_features", !ioctl(fd, VHOST_SET_BACKEND_FEATURES, &BACKEND_FEATURES));
    configuration_questions(fd);
    memory_questions(fd);
    doorbell_questions(fd);
    negotiation_questions(fd);
    close(fd);
}

#endif
