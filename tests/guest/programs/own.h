/* What a driver in user space has of its own: memory, and eventfds. */
#ifndef OWN_H
#define OWN_H

#include "steps.h"

#include <poll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>

enum { PAGE = 4096 };

/* Memory that a device may have: whole pages, all there. */
static inline void *allocate(uint64_t size)
{
    void *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);

    demand("allocate", memory != MAP_FAILED);
    return memory;
}

/* How often an eventfd was signalled, as soon as it was; 0 where it was not in time. */
static uint64_t signals(int eventfd, int patience_ms)
{
    struct pollfd waiting = { .fd = eventfd, .events = POLLIN };
    uint64_t count = 0;

    if (poll(&waiting, 1, patience_ms) == 1 && read(eventfd, &count, sizeof count) != sizeof count)
        demand("eventfd", false);
    return count;
}

#endif
