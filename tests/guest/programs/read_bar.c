/*
 * Reads a card's memory BAR without end on one processor while another switches its memory decoding off and on:
 *
 *   read_bar FUNCTION TIMES
 *
 * The kernel knows nothing of that and takes no mapping away, as with any program that has sysfs.
 */
#include "steps.h"

#include <fcntl.h>
#include <linux/pci_regs.h>
#include <sched.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>

enum { PAGE = 4096, MARK = 0x5a17c0de };

static int open_file(const char *function, const char *name)
{
    char path[128];
    int fd;

    snprintf(path, sizeof path, "/sys/bus/pci/devices/%s/%s", function, name);
    fd = open(path, O_RDWR | O_CLOEXEC);
    demand(name, fd >= 0);
    return fd;
}

static void run_on(int processor)
{
    cpu_set_t one;

    CPU_ZERO(&one);
    CPU_SET(processor, &one);
    demand("processor", !sched_setaffinity(0, sizeof one, &one));
}

int main(int argc, char **argv)
{
    volatile uint32_t *memory;
    uint16_t command;
    int config, times;
    pid_t reader;

    if (argc != 3) {
        fprintf(stderr, "usage: read_bar FUNCTION TIMES\n");
        return 2;
    }
    times = atoi(argv[2]);
    config = open_file(argv[1], "config");
    memory = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, open_file(argv[1], "resource2"), 0);
    demand("mmap", memory != MAP_FAILED);
    demand("command", pread(config, &command, sizeof command, PCI_COMMAND) == sizeof command);
    *memory = MARK;
    reader = fork();
    if (!reader) {
        run_on(1);
        for (;;)
            (void)*memory;
    }
    run_on(0);
    for (int n = 0; n < times; n++) {
        uint16_t off = command & ~PCI_COMMAND_MEMORY, on = command | PCI_COMMAND_MEMORY;

        demand("off", pwrite(config, &off, sizeof off, PCI_COMMAND) == sizeof off);
        demand("on", pwrite(config, &on, sizeof on, PCI_COMMAND) == sizeof on);
    }
    kill(reader, SIGKILL);
    waitpid(reader, NULL, 0);
    step("read_bar", *memory == MARK, "%#x after %d times", *memory, times);
    return 0;
}
