/*
 * A user of DPDK that sleeps until the card interrupts it, and sends every frame back with its addresses swapped:
 *
 *   dpdk_sleeper [options of DPDK]
 *
 * It tells when it sleeps and what woke it, and ends after a frame that says so.
 */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <rte_eal.h>
#include <rte_epoll.h>
#include <rte_ethdev.h>
#include <rte_interrupts.h>

enum { PORT = 0, QUEUE = 0, DESCRIPTORS = 64, BUFFERS = 1023, BURST = 32, LAST_AT = 14 };

static void demand(int good, const char *what)
{
    if (good)
        return;
    printf("no %s: %s\n", what, rte_strerror(rte_errno));
    exit(EXIT_FAILURE);
}

static void start(void)
{
    static const struct rte_eth_conf WITH_INTERRUPTS = { .intr_conf = { .rxq = 1 } };
    struct rte_mempool *pool =
        rte_pktmbuf_pool_create("frames", BUFFERS, 0, 0, RTE_MBUF_DEFAULT_BUF_SIZE, SOCKET_ID_ANY);

    demand(pool != NULL, "memory");
    demand(!rte_eth_dev_configure(PORT, 1, 1, &WITH_INTERRUPTS), "configuration");
    demand(!rte_eth_rx_queue_setup(PORT, QUEUE, DESCRIPTORS, SOCKET_ID_ANY, NULL, pool), "receive queue");
    demand(!rte_eth_tx_queue_setup(PORT, QUEUE, DESCRIPTORS, SOCKET_ID_ANY, NULL), "transmit queue");
    demand(!rte_eth_dev_start(PORT), "start");
    demand(!rte_eth_dev_rx_intr_ctl_q(PORT, QUEUE, RTE_EPOLL_PER_THREAD, RTE_INTR_EVENT_ADD, NULL), "interrupt");
}

/* Send back all that has come; whether one of them was the last. */
static int answer(struct rte_mbuf **frames, uint16_t count)
{
    int last = 0;

    for (uint16_t n = 0; n < count; n++) {
        uint8_t *bytes = rte_pktmbuf_mtod(frames[n], uint8_t *), sender[6];

        last |= bytes[LAST_AT];
        memcpy(sender, bytes + 6, 6);
        memcpy(bytes + 6, bytes, 6);
        memcpy(bytes, sender, 6);
    }
    for (uint16_t sent = 0; sent < count;)
        sent += rte_eth_tx_burst(PORT, QUEUE, frames + sent, count - sent);
    return last;
}

int main(int argc, char **argv)
{
    struct rte_mbuf *frames[BURST];
    struct rte_epoll_event event;
    int last = 0;

    setlinebuf(stdout);
    demand(rte_eal_init(argc, argv) >= 0, "DPDK");
    start();
    while (!last) {
        uint16_t count;

        demand(!rte_eth_dev_rx_intr_enable(PORT, QUEUE), "enabling");
        count = rte_eth_rx_burst(PORT, QUEUE, frames, BURST);
        if (!count) {
            printf("sleeps\n");
            demand(rte_epoll_wait(RTE_EPOLL_PER_THREAD, &event, 1, -1) == 1, "event");
            printf("woken\n");
            demand(!rte_eth_dev_rx_intr_disable(PORT, QUEUE), "disabling");
            count = rte_eth_rx_burst(PORT, QUEUE, frames, BURST);
        }
        last = answer(frames, count);
    }
    demand(!rte_eth_dev_stop(PORT), "stop");
    demand(!rte_eth_dev_close(PORT), "close");
    rte_eal_cleanup();
    printf("done\n");
    return EXIT_SUCCESS;
}
