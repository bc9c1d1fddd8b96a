/*
 * Times pairs of DMA_MAP and DMA_UNMAP on any vfio-user server, from the outside, as register_client times reads.
 *
 *   dma_client [options] SOCKET      (options: see usage() below)
 *
 * A round maps some windows of a page, one request after the other as a virtual IOMMU does, and then takes them back in
 * the same way. What is printed is the time of a round divided by its windows, as binary 32-bit nanoseconds.
 */
#include "vfio_user.h"

#include <sys/mman.h>

enum { PAGE = 4096, MAX_WINDOWS = 16, FIRST = 0x100000, KEPT = 0x10000000 };
enum { READABLE = 1, WRITABLE = 2 };

struct dma_map {
    struct header header;
    uint32_t argsz, flags;
    uint64_t offset, iova, size;
};

struct dma_unmap {
    struct header header;
    uint32_t argsz, flags;
    uint64_t iova, size;
};

static struct {
    long rounds, warm_up, windows;
    int cpu;
    bool by_message, keep;
} options = { .rounds = 2000, .warm_up = 100, .windows = 1, .cpu = -1 };

static uint16_t last_id;

static void usage(void)
{
    errx(2, "usage: dma_client [options] SOCKET\n"
            "  -n ROUNDS   timed rounds (2000)\n"
            "  -u ROUNDS   untimed rounds before them (100)\n"
            "  -w WINDOWS  windows that a round maps before it takes them back, at most 16 (1)\n"
            "  -m          send no descriptor: the memory is reached by messages\n"
            "  -k          keep another window of the same file mapped, as a guest's memory is\n"
            "  -c CPU      run on this CPU only");
}

static void parse(int argc, char **argv)
{
    int option;

    while ((option = getopt(argc, argv, "n:u:w:mkc:")) != -1) {
        switch (option) {
        case 'n': options.rounds = number(optarg); break;
        case 'u': options.warm_up = number(optarg); break;
        case 'w': options.windows = number(optarg); break;
        case 'm': options.by_message = true; break;
        case 'k': options.keep = true; break;
        case 'c': options.cpu = (int)number(optarg); break;
        default: usage();
        }
    }
    if (optind + 1 != argc || options.rounds < 1 || options.windows < 1 || options.windows > MAX_WINDOWS)
        usage();
}

/* The descriptor, unless it is negative, goes with the message. */
static void send_with(int connection, const void *data, size_t size, int fd)
{
    union {
        struct cmsghdr align;
        char space[CMSG_SPACE(sizeof fd)];
    } control = { .align = { .cmsg_len = CMSG_LEN(sizeof fd), .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS } };
    struct iovec piece = { (void *)(uintptr_t)data, size };
    struct msghdr message = { .msg_iov = &piece, .msg_iovlen = 1 };

    if (fd < 0) {
        send_all(connection, data, size);
        return;
    }
    memcpy(CMSG_DATA(&control.align), &fd, sizeof fd);
    message.msg_control = &control;
    message.msg_controllen = sizeof control.space;
    if (sendmsg(connection, &message, MSG_NOSIGNAL) != (ssize_t)size)
        err(1, "sendmsg");
}

static void map(int connection, uint64_t iova, uint64_t offset, int fd)
{
    struct dma_map request = {
        .header = { htole16(++last_id), htole16(DMA_MAP), htole32(sizeof request), 0, 0 },
        .argsz = htole32(sizeof request - sizeof request.header), .flags = htole32(READABLE | WRITABLE),
        .offset = htole64(fd < 0 ? 0 : offset), .iova = htole64(iova), .size = htole64(PAGE),
    };
    struct header reply;

    send_with(connection, &request, sizeof request, fd);
    receive_all(connection, &reply, sizeof reply);
    check_reply(&reply, last_id, DMA_MAP);
    if (le32toh(reply.size) != sizeof reply)
        errx(1, "DMA_MAP was answered with %u bytes", le32toh(reply.size));
}

static void unmap(int connection, uint64_t iova)
{
    struct dma_unmap request = {
        .header = { htole16(++last_id), htole16(DMA_UNMAP), htole32(sizeof request), 0, 0 },
        .argsz = htole32(sizeof request - sizeof request.header), .iova = htole64(iova), .size = htole64(PAGE),
    };
    struct dma_unmap reply;

    send_all(connection, &request, sizeof request);
    receive_all(connection, &reply.header, sizeof reply.header);
    check_reply(&reply.header, last_id, DMA_UNMAP);
    if (le32toh(reply.header.size) != sizeof reply)
        errx(1, "DMA_UNMAP was answered with %u bytes", le32toh(reply.header.size));
    receive_all(connection, &reply.argsz, sizeof reply - sizeof reply.header);
}

static uint32_t one_round(int connection, int fd)
{
    uint64_t start = now(), taken;

    for (long i = 0; i < options.windows; i++)
        map(connection, FIRST + (uint64_t)i * 2 * PAGE, (uint64_t)i * PAGE, fd);
    for (long i = 0; i < options.windows; i++)
        unmap(connection, FIRST + (uint64_t)i * 2 * PAGE);
    taken = (now() - start) / (uint64_t)options.windows;
    return taken > UINT32_MAX ? UINT32_MAX : (uint32_t)taken;
}

int main(int argc, char **argv)
{
    uint32_t *samples;
    int connection, fd = -1;

    parse(argc, argv);
    samples = calloc((size_t)options.rounds, sizeof *samples);
    if (samples == NULL)
        err(1, "calloc");
    if (!options.by_message) {
        fd = memfd_create("guest", MFD_CLOEXEC);
        if (fd < 0 || ftruncate(fd, (MAX_WINDOWS + 1) * PAGE) < 0)
            err(1, "memfd");
    }
    if (options.cpu >= 0)
        pin_to(options.cpu);
    connection = connect_to(argv[optind]);
    if (options.keep)
        map(connection, KEPT, MAX_WINDOWS * PAGE, fd);
    for (long round = -options.warm_up; round < options.rounds; round++) {
        uint32_t taken = one_round(connection, fd);

        if (round >= 0)
            samples[round] = taken;
    }
    write_samples(samples, (size_t)options.rounds);
    return 0;
}
