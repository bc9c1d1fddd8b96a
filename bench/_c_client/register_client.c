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
#define _GNU_SOURCE
#include <endian.h>
#include <err.h>
#include <errno.h>
#include <getopt.h>
#include <sched.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

enum { VERSION = 1, REGION_READ = 9, REGION_WRITE = 10 };
enum { REPLY = 1, TYPE_MASK = 0xf, ERROR = 0x20 };
enum { CONFIG_REGION = 7, PCI_COMMAND = 4, PCI_COMMAND_MEMORY = 2 };

struct header {
    uint16_t id, command;
    uint32_t size, flags, error;
};

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
    bool spin, raw;
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

static void send_all(int connection, const void *data, size_t size)
{
    ssize_t sent = send(connection, data, size, MSG_NOSIGNAL);

    if (sent < 0)
        err(1, "send");
    if ((size_t)sent != size)
        errx(1, "the socket took half a message");
}

static void receive_all(int connection, void *data, size_t size)
{
    size_t have = 0;

    while (have < size) {
        ssize_t got = recv(connection, (char *)data + have, size - have, options.spin ? MSG_DONTWAIT : MSG_WAITALL);

        if (got == 0)
            errx(1, "the server hung up");
        if (got > 0)
            have += (size_t)got;
        else if (errno != EAGAIN && errno != EINTR)
            err(1, "recv");
    }
}

/* A reply that is not the one asked for ends the measurement: its latency would be of something else. */
static void check_reply(const struct header *reply, uint16_t id, uint16_t command)
{
    if (le16toh(reply->id) != id || le16toh(reply->command) != command || (le32toh(reply->flags) & TYPE_MASK) != REPLY)
        errx(1, "the reply to command %u is not one", command);
    if (le32toh(reply->flags) & ERROR)
        errx(1, "command %u failed: %s", command, strerror((int)le32toh(reply->error)));
}

static void negotiate(int connection)
{
    static const char capabilities[] = "{\"capabilities\":{\"max_msg_fds\":8}}";
    struct {
        struct header header;
        uint16_t major, minor;
        char json[sizeof capabilities];
    } __attribute__((packed)) offer = { .header = { .command = htole16(VERSION), .size = htole32(sizeof offer) } };
    struct header reply;
    char rest[4096];
    size_t size;

    memcpy(offer.json, capabilities, sizeof capabilities);
    send_all(connection, &offer, sizeof offer);
    receive_all(connection, &reply, sizeof reply);
    check_reply(&reply, 0, VERSION);
    size = le32toh(reply.size);
    if (size < sizeof reply + 4 || size - sizeof reply > sizeof rest)
        errx(1, "the reply to VERSION is %zu bytes long", size);
    receive_all(connection, rest, size - sizeof reply);
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

static uint64_t now(void)
{
    struct timespec time;

    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
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

static long number(const char *text)
{
    char *end;
    long value = strtol(text, &end, 0);

    if (*text == '\0' || *end != '\0' || value < 0)
        errx(2, "%s is not a number", text);
    return value;
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
        case 's': options.spin = true; break;
        case 'b': options.raw = true; break;
        default: usage();
        }
    }
    if (optind >= argc || argc - optind > MAX_SERVERS || options.reads < 1 || options.width < 1 || options.width > 4)
        usage();
}

static int connect_to(const char *path)
{
    struct sockaddr_un address = { .sun_family = AF_UNIX };
    int connection = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

    if (strlen(path) >= sizeof address.sun_path)
        errx(2, "the socket's path is too long");
    strcpy(address.sun_path, path);
    if (connection < 0 || connect(connection, (struct sockaddr *)&address, sizeof address) < 0)
        err(1, "%s", path);
    negotiate(connection);
    enable_memory(connection);
    return connection;
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
    if (options.cpu >= 0) {
        cpu_set_t cpus;

        CPU_ZERO(&cpus);
        CPU_SET((size_t)options.cpu, &cpus);
        if (sched_setaffinity(0, sizeof cpus, &cpus) < 0)
            err(1, "CPU %d", options.cpu);
    }
    for (long server = 0; server < servers; server++)
        connections[server] = connect_to(argv[optind + server]);

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
        size_t count = reads * (size_t)servers;

        if (fwrite(latency, sizeof *latency, count, stdout) != count || fflush(stdout))
            err(1, "standard output");
        return 0;
    }
    for (long server = 0; server < servers; server++)
        print_percentiles(latency + server * options.reads, reads);
    return 0;
}
