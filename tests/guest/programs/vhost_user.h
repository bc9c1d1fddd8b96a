/* The frontend's end of vhost-user (QEMU's docs/interop/vhost-user.rst), over numbered.h's queues. */
#ifndef VHOST_USER_H
#define VHOST_USER_H

#include "numbered.h"

#include <linux/vhost_types.h>
#include <stddef.h>
#include <sys/socket.h>
#include <sys/un.h>

enum {
    GET_FEATURES = 1,
    SET_FEATURES = 2,
    SET_OWNER = 3,
    SET_MEM_TABLE = 5,
    SET_LOG_BASE = 6,
    SET_VRING_NUM = 8,
    SET_VRING_ADDR = 9,
    SET_VRING_BASE = 10,
    GET_VRING_BASE = 11,
    SET_VRING_KICK = 12,
    SET_VRING_CALL = 13,
    GET_PROTOCOL_FEATURES = 15,
    SET_PROTOCOL_FEATURES = 16,
    SET_VRING_ENABLE = 18,
    SET_BACKEND_REQ_FD = 21
};
enum { BACKEND_HOST_NOTIFIER = 3 };
enum { VERSION = 1, REPLY = 4, NEED_REPLY = 8 };
enum { NO_FILE = 1 << 8 };
enum { PAIR = 2 };

static const uint64_t LOG_ALL = 1ull << VHOST_F_LOG_ALL;
static const uint64_t PROTOCOL_FEATURES = 1ull << 30;
static const uint64_t WANTED = 1ull << VIRTIO_F_VERSION_1 | PROTOCOL_FEATURES;
/* The log as a file, acknowledgements, questions of the backend's, files with them, doorbells as files. */
static const uint64_t PROTOCOL = 1 << 1 | 1 << 3 | 1 << 5 | 1 << 10 | 1 << 11;

struct region {
    uint64_t guest_address, size, user_address, offset;
};

struct message {
    uint32_t request, flags, size;
    union {
        uint64_t number;
        struct vhost_vring_state state;
        struct vhost_vring_addr address;
        struct {
            uint32_t count, padding;
            struct region only;
        } memory;
        struct {
            uint64_t size, offset;
        } log;
        struct {
            uint64_t queue, size, offset;
        } area;
    };
} __attribute__((packed));

enum { HEAD = offsetof(struct message, number) };

struct frontend {
    struct net net;
    int backend;
};

static void send_message(int channel, const struct message *message, int file)
{
    struct iovec bytes = { .iov_base = (void *)message, .iov_len = HEAD + message->size };
    union {
        struct cmsghdr header;
        char room[CMSG_SPACE(sizeof(int))];
    } control = { .header = { .cmsg_len = CMSG_LEN(sizeof(int)), .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS } };
    struct msghdr call = { .msg_iov = &bytes, .msg_iovlen = 1 };

    if (file >= 0) {
        memcpy(CMSG_DATA(&control.header), &file, sizeof file);
        call.msg_control = &control;
        call.msg_controllen = sizeof control.room;
    }
    demand("send", sendmsg(channel, &call, MSG_NOSIGNAL) == (ssize_t)bytes.iov_len);
}

/* The file that came with it, or -1. */
static int receive_message(int channel, struct message *message)
{
    struct iovec bytes = { .iov_base = message, .iov_len = HEAD };
    union {
        struct cmsghdr header;
        char room[CMSG_SPACE(sizeof(int))];
    } control;
    struct msghdr call = {
        .msg_iov = &bytes,
        .msg_iovlen = 1,
        .msg_control = &control,
        .msg_controllen = sizeof control.room,
    };
    int file = -1;

    demand("receive", recvmsg(channel, &call, MSG_WAITALL) == HEAD);
    demand("reply_size", message->size <= sizeof *message - HEAD);
    demand("receive_rest", !message->size ||  /* else it would wait for more */
                               recv(channel, &message->number, message->size, MSG_WAITALL) == message->size);
    if (call.msg_controllen)
        memcpy(&file, CMSG_DATA(&control.header), sizeof file);
    return file;
}

static void map_doorbell(struct frontend *frontend, const struct message *message, int file)
{
    struct queue *queue = &frontend->net.queues[message->area.queue & 1];

    if (queue->doorbell)
        munmap((void *)queue->doorbell, PAGE);
    queue->doorbell = NULL;
    if (message->area.queue & NO_FILE)
        return;
    queue->doorbell = mmap(NULL, message->area.size, PROT_WRITE, MAP_SHARED, file, message->area.offset);
    demand("map_doorbell", queue->doorbell != MAP_FAILED);
    close(file);
}

static void answer_backend(struct frontend *frontend)
{
    struct message message;
    int file = receive_message(frontend->backend, &message);

    if (message.request == BACKEND_HOST_NOTIFIER)
        map_doorbell(frontend, &message, file);
    if (message.flags & NEED_REPLY) {
        message.flags = VERSION | REPLY;
        message.size = sizeof message.number;
        message.number = 0;
        send_message(frontend->backend, &message, -1);
    }
}

/* Wait for either channel, answering what the backend asks meanwhile; whether the first has something. */
static bool heard(struct frontend *frontend, int patience_ms)
{
    struct pollfd waiting[] = {
        { .fd = frontend->net.fd, .events = POLLIN },
        { .fd = frontend->backend, .events = POLLIN },
    };

    demand("backend_is_silent", poll(waiting, 2, patience_ms) > 0);
    if (waiting[1].revents)
        answer_backend(frontend);
    return waiting[0].revents;
}

/* Say something, and wait for the answer: a number, 0 for what needs none. */
static uint64_t say(struct frontend *frontend, struct message message, int file)
{
    bool asks = message.request == GET_FEATURES || message.request == GET_PROTOCOL_FEATURES ||
                message.request == GET_VRING_BASE || message.request == SET_LOG_BASE;

    message.flags = VERSION | (asks ? 0 : NEED_REPLY);
    send_message(frontend->net.fd, &message, file);
    while (!heard(frontend, PATIENCE_MS))
        ;
    receive_message(frontend->net.fd, &message);
    if (message.request == GET_VRING_BASE)
        return message.state.num;
    return message.size ? message.number : 0;
}

static uint64_t say_number(struct frontend *frontend, uint32_t request, uint64_t number, int file)
{
    return say(frontend, (struct message){ .request = request, .size = sizeof number, .number = number }, file);
}

static uint64_t say_of_queue(struct frontend *frontend, uint32_t request, int index, unsigned number)
{
    struct message message = {
        .request = request,
        .size = sizeof message.state,
        .state = { .index = index, .num = number },
    };

    return say(frontend, message, -1);
}

/* Wait until the backend has done all that it was told to: it answers one after the other. */
static void settle(struct frontend *frontend)
{
    say(frontend, (struct message){ .request = GET_FEATURES }, -1);
}

#endif
