"""What of a kernel's console counts as a complaint; without a guest."""

from __future__ import annotations

import pytest

from tests.guest.vdpa.kernel_log import complaints

HEALTHY = """\
[    1.884614] ACPI: IRQ 4 override to edge(!), high(!)
[    5.303070] ifcvf: loading out-of-tree module taints kernel.
[    6.794147] reboot: Power down
"""

TRACE = """\
[    9.451999] ------------[ cut here ]------------
[    9.455730] WARNING: CPU: 3 PID: 225 at vp_vdpa.c:230 vp_vdpa_set_status.cold+0x1b/0x72 [vp_vdpa]
[    9.473949] Call Trace:
[    9.479205]  virtio_vdpa_probe+0xbc/0x110 [virtio_vdpa]
[    9.508835] ---[ end trace 0000000000000000 ]---
"""


def test_a_healthy_boot_has_none() -> None:
    assert complaints(HEALTHY) == []


@pytest.mark.parametrize(
    "line",
    [
        "[    7.059866] ifcvf 0000:00:01.0: Failed to request MMIO region",
        "[    6.305631] virtio_net virtio0: probe with driver virtio_net failed with error -22",
        "[    9.1] BUG: kernel NULL pointer dereference, address: 0000000000000000",
        "[    9.1] virtio_net virtio0 eth0: NETDEV WATCHDOG: CPU: 0: transmit queue 0 timed out 5000 ms",
        "[    9.1] irq 24: nobody cared (try booting with the 'irqpoll' option)",
        "[    9.1] DMAR: [DMA Write NO_PASID] Request device [00:01.0] fault addr 0x0",
        "[    9.1] watchdog: BUG: soft lockup - CPU#0 stuck for 44s! [vdpa:172]",
    ],
)
def test_drivers_and_kernels_in_trouble_are_heard(line: str) -> None:
    assert complaints(HEALTHY + line + "\n") == [line]


def test_a_trace_is_one_complaint_and_expected_as_a_whole_or_not_at_all() -> None:
    assert complaints(HEALTHY + TRACE) == [TRACE.rstrip("\n")]
    assert complaints(TRACE + HEALTHY, ["vp_vdpa_set_status"]) == []
    assert complaints(TRACE, ["of something else"]) != []


def test_a_trace_that_the_console_cuts_short_is_heard_too() -> None:
    assert complaints(TRACE.partition("---[ end")[0]) != []
