/* A server that truncates memory it lent us takes its bytes away, and nothing else.
 *
 * Touching a shared mapping beyond the end of its file raises SIGBUS. The handler here finds the mapping among those that were
 * registered and puts private pages full of ones from the faulting page to the mapping's end: what a PCI master reads where
 * nobody answers. The access then completes, and how far the mapping still is the device's is told by `lost`.
 * A fault anywhere else goes to whoever handled SIGBUS before. Others may do the same on top of this one, before or after.
 *
 * No lock: a mapping is put back as "nothing is lost, then the file's pages", and lost as "ones, then lost". If both happen at
 * once, a mapping may be called lost that is not; never the other way round.
 */
#ifndef TRIONIC_CLIENT_SIGBUS_H
#define TRIONIC_CLIENT_SIGBUS_H

#include <errno.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/vfs.h>
#include <unistd.h>

/* One slot per area of a region that is mapped: six BARs of a few areas each, for a hundred devices. All are looked at per fault. */
#define BAR_SLOTS 4096

#define BAR_NOTHING_LOST UINTPTR_MAX
#define BAR_HUGETLBFS 0x958458f6ul  /* linux/magic.h */

struct bar_slot {
    uintptr_t start, end;   /* start is 0 while the slot is free */
    uintptr_t lost;         /* from here to the end */
    size_t page;            /* what the file is mapped in */
    int ones;               /* a file of ones, as long as `chunk` */
    size_t chunk;
};

static struct bar_slot bar_slots[BAR_SLOTS];
static struct sigaction bar_previous;
static int bar_installed;

/* A map that is given up when a process has more than it may have (vm.max_map_count): it could not replace one by another then. */
static void *bar_spare;

static void bar_keep_spare(void)
{
    if (bar_spare == NULL) {
        void *spare = mmap(NULL, 1, PROT_NONE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);  /* shared: never part of a neighbour */
        bar_spare = spare == MAP_FAILED ? NULL : spare;
    }
}

enum { BAR_PROTECTION = PROT_READ | PROT_WRITE, BAR_IN_PLACE = MAP_FIXED | MAP_PRIVATE | MAP_NORESERVE };

/* Private pages of ones. Fails if the process may not have the maps for it. */
static int bar_ones(uintptr_t start, uintptr_t end, int ones, size_t chunk)
{
    for (uintptr_t at = start; at < end; at += chunk) {
        size_t length = end - at < chunk ? end - at : chunk;
        if (mmap((void *)at, length, BAR_PROTECTION, BAR_IN_PLACE, ones, 0) == MAP_FAILED)
            return -1;
    }
    return 0;
}

/* Private pages of zeros, which take one map only: if they replace whole mappings there are no more than before, so that this
 * works whatever the process has used up. */
static int bar_zeros(uintptr_t start, uintptr_t end)
{
    void *spare = __atomic_exchange_n(&bar_spare, NULL, __ATOMIC_RELAXED);
    if (spare != NULL)
        munmap(spare, 1);
    return mmap((void *)start, end - start, BAR_PROTECTION, BAR_IN_PLACE | MAP_ANONYMOUS, -1, 0) == MAP_FAILED ? -1 : 0;
}

static int bar_zap(uintptr_t start, uintptr_t end, int ones, size_t chunk)
{
    return bar_ones(start, end, ones, chunk) == 0 ? 0 : bar_zeros(start, end);
}

static void bar_tell_lost(struct bar_slot *slot, uintptr_t from)
{
    uintptr_t known = __atomic_load_n(&slot->lost, __ATOMIC_RELAXED);
    while (from < known && !__atomic_compare_exchange_n(&slot->lost, &known, from, 0, __ATOMIC_RELEASE, __ATOMIC_RELAXED))
        ;
}

static int bar_lose(struct bar_slot *slot, uintptr_t at)
{
    uintptr_t from = at & ~(slot->page - 1);
    if (bar_ones(from, slot->end, slot->ones, slot->chunk) != 0) {
        from = slot->start;
        if (bar_zeros(from, slot->end) != 0)
            return -1;
    }
    bar_tell_lost(slot, from);
    return 0;
}

static void bar_on_sigbus(int signo, siginfo_t *info, void *context)
{
    const int saved = errno;
    /* Whoever comes before us may pass a fault on by raising the signal again, without its address (Python's faulthandler does):
     * the access is repeated when we return, and its own fault comes here. */
    if (info->si_code == SI_TKILL && info->si_pid == getpid())
        return;
    if (info->si_code > 0) {
        uintptr_t at = (uintptr_t)info->si_addr;
        for (size_t i = 0; i < BAR_SLOTS; i++) {
            uintptr_t start = __atomic_load_n(&bar_slots[i].start, __ATOMIC_ACQUIRE);
            if (start == 0 || at < start || at >= bar_slots[i].end)
                continue;
            if (bar_lose(&bar_slots[i], at) != 0)
                break;
            errno = saved;
            return;
        }
    }
    if (bar_previous.sa_flags & SA_SIGINFO) {
        if (bar_previous.sa_sigaction) {
            bar_previous.sa_sigaction(signo, info, context);
            return;
        }
    } else if (bar_previous.sa_handler != SIG_DFL && bar_previous.sa_handler != SIG_IGN) {
        bar_previous.sa_handler(signo);
        return;
    } else if (bar_previous.sa_handler == SIG_IGN && info->si_code <= 0) {
        return;                 /* a fault cannot be ignored */
    }
    signal(SIGBUS, SIG_DFL);    /* a fault happens again and ends the process */
    if (info->si_code <= 0)
        raise(SIGBUS);          /* somebody's signal does not */
}

/* A slot for one mapping, which is not there yet; -1 if there is none left. */
static int bar_watch(uintptr_t start, size_t length, size_t page, int ones, size_t chunk)
{
    if (!bar_installed) {
        struct sigaction action;
        memset(&action, 0, sizeof(action));
        action.sa_sigaction = bar_on_sigbus;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
        if (sigaction(SIGBUS, &action, &bar_previous) != 0)
            return -1;
        bar_installed = 1;
    }
    bar_keep_spare();
    for (int i = 0; i < BAR_SLOTS; i++) {
        struct bar_slot *slot = &bar_slots[i];
        if (slot->start != 0)
            continue;
        slot->end = start + length;
        slot->lost = BAR_NOTHING_LOST;
        slot->page = page;
        slot->ones = ones;
        slot->chunk = chunk;
        __atomic_store_n(&slot->start, start, __ATOMIC_RELEASE);
        return i;
    }
    return -1;
}

static void bar_unwatch(int slot)
{
    __atomic_store_n(&bar_slots[slot].start, (uintptr_t)0, __ATOMIC_RELEASE);
}

/* What is about to be mapped anew has lost nothing. */
static void bar_found(int slot)
{
    __atomic_store_n(&bar_slots[slot].lost, BAR_NOTHING_LOST, __ATOMIC_SEQ_CST);
}

/* What could not be mapped anew, for which the kernel may have unmapped what was there: address space stays reserved. */
static void bar_not_found(int slot)
{
    struct bar_slot *s = &bar_slots[slot];
    bar_zap(s->start, s->end, s->ones, s->chunk);
    bar_tell_lost(s, s->start);
}

static uintptr_t bar_lost(int slot)
{
    return __atomic_load_n(&bar_slots[slot].lost, __ATOMIC_ACQUIRE);
}

/* What a file is mapped in: huge pages on hugetlbfs, where the kernel would round a shorter mapping up over its neighbours. */
static size_t bar_page_of(int fd)
{
    struct statfs fs;
    if (fstatfs(fd, &fs) == 0 && (unsigned long)fs.f_type == BAR_HUGETLBFS)
        return (size_t)fs.f_bsize;
    return (size_t)sysconf(_SC_PAGESIZE);
}

#endif
