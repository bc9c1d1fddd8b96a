/*
 * What a program does is told a line a step, for the test that reads it: "step NAME ok DETAIL" or "step NAME fail
 * DETAIL".
 */
#ifndef STEPS_H
#define STEPS_H

#define _GNU_SOURCE

#include <errno.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

/* The channel to the host's test, which the guest's first process opened for all. */
enum { CHANNEL = 8 };

static inline void __attribute__((format(printf, 3, 4))) step(const char *name, bool good, const char *format, ...)
{
    va_list arguments;

    printf("step %s %s ", name, good ? "ok" : "fail");
    va_start(arguments, format);
    vprintf(format, arguments);
    va_end(arguments);
    printf("\n");
    fflush(stdout);
}

/* Something without which the rest makes no sense: it is told, as a step, only where it fails. */
static inline void demand(const char *name, bool good)
{
    if (good)
        return;
    step(name, false, "%s", strerrorname_np(errno));
    exit(1);
}

/* A call that has to be refused with one error. */
static inline void refused(const char *name, long got, int expected)
{
    step(name, got < 0 && errno == expected, "%s", got < 0 ? strerrorname_np(errno) : "not refused");
}

/* Let the host look while things are as they are. */
static inline void show_host(const char *what)
{
    char answer;

    fflush(stdout);
    dprintf(CHANNEL, "@%s\n?await\n", what);
    while (read(CHANNEL, &answer, 1) == 1 && answer != '\n')
        ;
}

static inline uint64_t now_ns(void)
{
    struct timespec time;

    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000000000ull + time.tv_nsec;
}

#endif
