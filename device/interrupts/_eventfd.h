/* Adding one to an eventfd without ever waiting.
 *
 * write(2) waits while the counter is full, unless the file is in non-blocking mode; both are in the hands of whoever shares the
 * file, and between asking for room and writing he can take it away. The kernel itself signals eventfds without waiting: the
 * counter stays full then (fs/eventfd.c, eventfd_signal). It does so when an asynchronous read completes that names an eventfd
 * (io_submit(2), IOCB_FLAG_RESFD), and a read of nothing from /dev/null completes at once.
 *
 * Where there is no asynchronous I/O (a seccomp filter, a kernel without it) room is asked for first, and the gap remains.
 */
#ifndef TRIONIC_EVENTFD_H
#define TRIONIC_EVENTFD_H

#include <fcntl.h>
#include <linux/aio_abi.h>
#include <poll.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

/* The start of the completion ring, which the kernel maps into the process (fs/aio.c, struct aio_ring). */
struct trionic_aio_ring { uint32_t id, nr, head, tail, magic, compat_features, incompat_features, header_length; };
#define TRIONIC_AIO_MAGIC 0xa10a10a1u

/* Each is complete when io_submit returns, so one for every thread that signals at the same moment is plenty. */
#define TRIONIC_AIO_REQUESTS 64

static aio_context_t trionic_aio;
static int trionic_aio_null = -1;

/* Once, before any thread signals; whether the kernel does the signalling. It costs the system 64 of fs.aio-max-nr, 65536 by
 * default, for each process that uses it. A process forked from this one has no part in it, and does as if there were none.
 */
static int trionic_eventfd_setup(void)
{
    aio_context_t made = 0;
    if (syscall(SYS_io_setup, TRIONIC_AIO_REQUESTS, &made) != 0)
        return 0;
    trionic_aio_null = open("/dev/null", O_RDONLY | O_CLOEXEC);
    if (trionic_aio_null < 0 || ((struct trionic_aio_ring *)made)->magic != TRIONIC_AIO_MAGIC) {
        syscall(SYS_io_destroy, made);
        if (trionic_aio_null >= 0)
            close(trionic_aio_null);
        return 0;
    }
    trionic_aio = made;
    return 1;
}

static void trionic_eventfd_signal(int fd)
{
    static const uint64_t one = 1;
    struct pollfd room = { .fd = fd, .events = POLLOUT };
    if (trionic_aio) {
        struct iocb request, *requests = &request;
        memset(&request, 0, sizeof(request));
        request.aio_lio_opcode = IOCB_CMD_PREAD;
        request.aio_fildes = (uint32_t)trionic_aio_null;
        request.aio_flags = IOCB_FLAG_RESFD;
        request.aio_resfd = (uint32_t)fd;
        if (syscall(SYS_io_submit, trionic_aio, 1, &requests) == 1) {
            /* Nobody asks how it went. Whatever order threads do this in, no completion is counted twice: the kernel only ever
             * takes back as many as it has handed out. */
            struct trionic_aio_ring *ring = (struct trionic_aio_ring *)trionic_aio;
            __atomic_store_n(&ring->head, __atomic_load_n(&ring->tail, __ATOMIC_ACQUIRE), __ATOMIC_RELEASE);
            return;
        }
    }
    if (poll(&room, 1, 0) == 1 && room.revents & POLLOUT)
        if (write(fd, &one, sizeof(one)) < 0)
            return;     /* it was closed by a mistake of ours, or is no eventfd: nobody is there to be told */
}

#endif
