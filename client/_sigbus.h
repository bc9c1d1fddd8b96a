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

/* Private pages of ones; zeros where the process may have no more maps, since they take only one. Takes no map more than there
 * were if it replaces whole mappings, so that it cannot fail then. */
static int bar_ones(uintptr_t start, uintptr_t end, int ones, size_t chunk)
{
    const int protection = PROT_READ | PROT_WRITE, flags = MAP_FIXED | MAP_PRIVATE | MAP_NORESERVE;
    for (uintptr_t at = start; at < end; at += chunk) {
        size_t length = end - at < chunk ? end - at : chunk;
        if (mmap((void *)at, length, protection, flags, ones, 0) == MAP_FAILED)
            return mmap((void *)start, end - start, protection, flags | MAP_ANONYMOUS, -1, 0) == MAP_FAILED ? -1 : 0;
    }
    return 0;
}

static int bar_lose(struct bar_slot *slot, uintptr_t at)
{
    uintptr_t from = at & ~(slot->page - 1), known = __atomic_load_n(&slot->lost, __ATOMIC_RELAXED);
    if (bar_ones(from, slot->end, slot->ones, slot->chunk) != 0) {
        from = slot->start;
        if (bar_ones(from, slot->end, slot->ones, slot->chunk) != 0)
            return -1;
    }
    while (from < known && !__atomic_compare_exchange_n(&slot->lost, &known, from, 0, __ATOMIC_RELEASE, __ATOMIC_RELAXED))
        ;
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
