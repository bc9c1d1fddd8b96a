/*
 * What every client here needs to speak to a vfio-user server: connect, agree on a version, send, receive, and take the
 * time. A client is one C file beside this header.
 */
#ifndef BENCH_VFIO_USER_H
#define BENCH_VFIO_USER_H

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

enum { VERSION = 1, DMA_MAP = 2, DMA_UNMAP = 3, REGION_READ = 9, REGION_WRITE = 10 };
enum { REPLY = 1, TYPE_MASK = 0xf, ERROR = 0x20 };

struct header {
    uint16_t id, command;
    uint32_t size, flags, error;
};

/* Wait for replies without sleeping. */
static bool spinning;

static inline void send_all(int connection, const void *data, size_t size)
{
    ssize_t sent = send(connection, data, size, MSG_NOSIGNAL);

    if (sent < 0)
        err(1, "send");
    if ((size_t)sent != size)
        errx(1, "the socket took half a message");
}

static inline void receive_all(int connection, void *data, size_t size)
{
    size_t have = 0;

    while (have < size) {
        ssize_t got = recv(connection, (char *)data + have, size - have, spinning ? MSG_DONTWAIT : MSG_WAITALL);

        if (got == 0)
            errx(1, "the server hung up");
        if (got > 0)
            have += (size_t)got;
        else if (errno != EAGAIN && errno != EINTR)
            err(1, "recv");
    }
}

/* A reply that is not the one asked for ends the measurement: its latency would be of something else. */
static inline void check_reply(const struct header *reply, uint16_t id, uint16_t command)
{
    if (le16toh(reply->id) != id || le16toh(reply->command) != command || (le32toh(reply->flags) & TYPE_MASK) != REPLY)
        errx(1, "the reply to command %u is not one", command);
    if (le32toh(reply->flags) & ERROR)
        errx(1, "command %u failed: %s", command, strerror((int)le32toh(reply->error)));
}

static inline void negotiate(int connection)
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

static inline int connect_to(const char *path)
{
    struct sockaddr_un address = { .sun_family = AF_UNIX };
    int connection = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

    if (strlen(path) >= sizeof address.sun_path)
        errx(2, "the socket's path is too long");
    strcpy(address.sun_path, path);
    if (connection < 0 || connect(connection, (struct sockaddr *)&address, sizeof address) < 0)
        err(1, "%s", path);
    negotiate(connection);
    return connection;
}

static inline uint64_t now(void)
{
    struct timespec time;

    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}

static inline long number(const char *text)
{
    char *end;
    long value = strtol(text, &end, 0);

    if (*text == '\0' || *end != '\0' || value < 0)
        errx(2, "%s is not a number", text);
    return value;
}

static inline void pin_to(int cpu)
{
    cpu_set_t cpus;

    CPU_ZERO(&cpus);
    CPU_SET((size_t)cpu, &cpus);
    if (sched_setaffinity(0, sizeof cpus, &cpus) < 0)
        err(1, "CPU %d", cpu);
}

static inline void write_samples(const uint32_t *samples, size_t count)
{
    if (fwrite(samples, sizeof *samples, count, stdout) != count || fflush(stdout))
        err(1, "standard output");
}

#endif
