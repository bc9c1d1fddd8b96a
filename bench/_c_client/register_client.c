/*
 * Times register reads on any vfio-user server, from the outside: the same program measures every server, so what two
 * servers' numbers have in common is this client and what differs is theirs.
 *
 *   register_client [options] SOCKET...      (options: see usage() below)
 *
 * It negotiates, switches memory decoding on as a driver would, reads one register untimed until both sides are warm,
 * then measures: the clock is read just before the request leaves and just after the whole reply has arrived. Given
 * several sockets it reads from them in turn, so that one moment's noise meets all servers alike.
 */
#include "vfio_user.h"

enum { CONFIG_REGION = 7, PCI_COMMAND = 4, PCI_COMMAND_MEMORY = 2 };

struct access {
    struct header header;
    uint64_t offset;
    uint32_t region, count;
    uint8_t data[4];
};

/* The fields are aligned as the wire has them; only what the compiler pads after the data is not of the message. */
enum { ACCESS_SIZE = offsetof(struct access, data) };

static struct {
    uint32_t region, width;
    uint64_t offset;
    long reads, warm_up, pause_us;
    int cpu;
    bool raw;
} options = { .width = 4, .reads = 20000, .warm_up = 500, .cpu = -1 };

enum { MAX_SERVERS = 4 };

static void usage(void)
{
    errx(2, "usage: register_client [options] SOCKET...\n"
            "  -r REGION   region to read, 0 is BAR0 (0)\n"
            "  -o OFFSET   offset in the region (0)\n"
            "  -w WIDTH    bytes to read, 1, 2 or 4 (4)\n"
            "  -n READS    timed reads from each server (20000)\n"
            "  -u READS    untimed reads before them (500)\n"
            "  -p USEC     sleep this long before each read, for both sides to fall asleep (0: none)\n"
            "  -c CPU      run on this CPU only\n"
            "  -s          wait for replies without sleeping\n"
            "  -b          print latencies as binary 32-bit nanoseconds, server by server, not percentiles");
}

/* Drivers read BARs after the bus switched decoding on; a faithful server may answer nothing useful before. */
static void enable_memory(int connection)
{
    struct access write = {
        .header = { htole16(1), htole16(REGION_WRITE), htole32(ACCESS_SIZE + 2), 0, 0 },
        .offset = htole64(PCI_COMMAND), .region = htole32(CONFIG_REGION), .count = htole32(2),
        .data = { PCI_COMMAND_MEMORY, 0 },
    };
    struct access reply;

    send_all(connection, &write, ACCESS_SIZE + 2);
    receive_all(connection, &reply, ACCESS_SIZE);
    check_reply(&reply.header, 1, REGION_WRITE);
}

/* One register read; the answer is its latency in nanoseconds. */
static uint32_t read_register(int connection, uint16_t id)
{
    size_t reply_size = ACCESS_SIZE + options.width;
    struct access request = {
        .header = { htole16(id), htole16(REGION_READ), htole32(ACCESS_SIZE), 0, 0 },
        .offset = htole64(options.offset), .region = htole32(options.region), .count = htole32(options.width),
    };
    struct access reply;
    uint64_t start, end;

    start = now();
    send_all(connection, &request, ACCESS_SIZE);
    receive_all(connection, &reply, reply_size);
    end = now();
    check_reply(&reply.header, id, REGION_READ);
    if (le32toh(reply.header.size) != reply_size)
        errx(1, "a register read was answered with %u bytes", le32toh(reply.header.size));
    return end - start > UINT32_MAX ? UINT32_MAX : (uint32_t)(end - start);
}

static int by_value(const void *left, const void *right)
{
    uint32_t a = *(const uint32_t *)left, b = *(const uint32_t *)right;

    return (a > b) - (a < b);
}

static void parse(int argc, char **argv)
{
    int option;

    while ((option = getopt(argc, argv, "r:o:w:n:u:p:c:sb")) != -1) {
        switch (option) {
        case 'r': options.region = (uint32_t)number(optarg); break;
        case 'o': options.offset = (uint64_t)number(optarg); break;
        case 'w': options.width = (uint32_t)number(optarg); break;
        case 'n': options.reads = number(optarg); break;
        case 'u': options.warm_up = number(optarg); break;
        case 'p': options.pause_us = number(optarg); break;
        case 'c': options.cpu = (int)number(optarg); break;
        case 's': spinning = true; break;
        case 'b': options.raw = true; break;
        default: usage();
        }
    }
    if (optind >= argc || argc - optind > MAX_SERVERS || options.reads < 1 || options.width < 1 || options.width > 4)
        usage();
}

static void print_percentiles(uint32_t *latency, size_t count)
{
    qsort(latency, count, sizeof *latency, by_value);
    printf("p50 %.2f us  p90 %.2f us  p99 %.2f us\n", latency[count / 2] / 1e3, latency[count * 9 / 10] / 1e3,
           latency[count * 99 / 100] / 1e3);
}

int main(int argc, char **argv)
{
    int connections[MAX_SERVERS];
    uint32_t *latency;
    long servers;
    size_t reads;

    parse(argc, argv);
    servers = argc - optind;
    reads = (size_t)options.reads;
    latency = calloc(reads * (size_t)servers, sizeof *latency);
    if (latency == NULL)
        err(1, "calloc");
    if (options.cpu >= 0)
        pin_to(options.cpu);
    for (long server = 0; server < servers; server++) {
        connections[server] = connect_to(argv[optind + server]);
        enable_memory(connections[server]);
    }

    for (long i = 0; i < servers * (options.warm_up + options.reads); i++) {
        long server = i % servers, round = i / servers - options.warm_up;
        uint32_t taken;

        if (options.pause_us > 0) {
            struct timespec pause = { options.pause_us / 1000000, options.pause_us % 1000000 * 1000 };

            clock_nanosleep(CLOCK_MONOTONIC, 0, &pause, NULL);
        }
        taken = read_register(connections[server], (uint16_t)i);
        if (round >= 0)
            latency[server * options.reads + round] = taken;
    }
    if (options.raw) {
        write_samples(latency, reads * (size_t)servers);
        return 0;
    }
    for (long server = 0; server < servers; server++)
        print_percentiles(latency + server * options.reads, reads);
    return 0;
}
