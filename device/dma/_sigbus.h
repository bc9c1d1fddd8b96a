/* A peer that truncates memory it shares with us must hurt itself only.
 *
 * Touching a shared mapping beyond the end of its file raises SIGBUS. The handler here finds the mapping among those that were
 * registered, marks it as lost, and puts private zero pages from the faulting address to the mapping's end; the access then
 * completes. Whoever has read such zeros finds that the number of losses has grown. All that is beyond one page without a file has none either, and to replace it at once costs one mapping: page by
 * page, a peer could use up the process's mappings (vm.max_map_count), and the next fault would end it.
 * A fault anywhere else goes to whoever handled SIGBUS before.
 */
#ifndef TRIONIC_SIGBUS_H
#define TRIONIC_SIGBUS_H

#include <signal.h>
#include <stdint.h>
#include <stddef.h>
#include <string.h>
#include <sys/mman.h>

/* One slot per file that peers share with this process; a guest has one or two, tests a few hundred. */
#define TRIONIC_GUARD_SLOTS 4096

struct trionic_guard { uintptr_t start, end, page; int lost; };
static struct trionic_guard trionic_guards[TRIONIC_GUARD_SLOTS];
static struct sigaction trionic_previous_sigbus;
static int trionic_sigbus_installed;
static int32_t trionic_losses;

static void trionic_on_sigbus(int signo, siginfo_t *info, void *context)
{
    uintptr_t at = (uintptr_t)info->si_addr;
    for (size_t i = 0; i < TRIONIC_GUARD_SLOTS; i++) {
        struct trionic_guard *g = &trionic_guards[i];
        uintptr_t start = __atomic_load_n(&g->start, __ATOMIC_ACQUIRE);
        if (start == 0 || at < start || at >= g->end)
            continue;
        uintptr_t page = at & ~(g->page - 1);
        size_t rest = (g->end - page + g->page - 1) & ~(g->page - 1);
        __atomic_store_n(&g->lost, 1, __ATOMIC_RELAXED);
        __atomic_add_fetch(&trionic_losses, 1, __ATOMIC_SEQ_CST);
        if (mmap((void *)page, rest, PROT_READ | PROT_WRITE, MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
            == MAP_FAILED)
            break;
        return;
    }
    if (trionic_previous_sigbus.sa_flags & SA_SIGINFO) {
        if (trionic_previous_sigbus.sa_sigaction) {
            trionic_previous_sigbus.sa_sigaction(signo, info, context);
            return;
        }
    } else if (trionic_previous_sigbus.sa_handler != SIG_DFL && trionic_previous_sigbus.sa_handler != SIG_IGN) {
        trionic_previous_sigbus.sa_handler(signo);
        return;
    }
    signal(SIGBUS, SIG_DFL);    /* the faulting instruction runs again and ends the process */
}

static int trionic_guard_add(void *start, size_t length, size_t page)
{
    if (!trionic_sigbus_installed) {
        struct sigaction action;
        memset(&action, 0, sizeof(action));
        action.sa_sigaction = trionic_on_sigbus;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
        if (sigaction(SIGBUS, &action, &trionic_previous_sigbus) != 0)
            return -1;
        trionic_sigbus_installed = 1;
    }
    for (int i = 0; i < TRIONIC_GUARD_SLOTS; i++) {
        struct trionic_guard *g = &trionic_guards[i];
        if (g->start != 0)
            continue;
        g->end = (uintptr_t)start + length;
        g->page = page;
        g->lost = 0;
        __atomic_store_n(&g->start, (uintptr_t)start, __ATOMIC_RELEASE);
        return i;
    }
    return -1;
}

static void trionic_guard_remove(int slot)
{
    __atomic_store_n(&trionic_guards[slot].start, (uintptr_t)0, __ATOMIC_RELEASE);
}

/* Not zero once the mapping has lost pages. */
static const int *trionic_guard_lost(int slot)
{
    return &trionic_guards[slot].lost;
}

/* How often a mapping has lost pages, so far and in all. */
static const int32_t *trionic_losses_so_far(void)
{
    return &trionic_losses;
}

/* The bytes of a page of the mapping. */
static size_t trionic_guard_page(int slot)
{
    return trionic_guards[slot].page;
}

#endif
