"""The ends of the wires themselves; the state machines above them have tests of their own."""

import os

from device.interrupts._lines import Lines


def test_a_full_eventfd_in_blocking_mode_does_not_stop_the_card() -> None:
    lines = Lines(1)
    full = os.eventfd(0, os.EFD_CLOEXEC)
    os.eventfd_write(full, 2**64 - 2)
    lines.vector_arm(0, full)
    lines.vector_fire(0)
    lines.set_intx_fd(full)
    lines.intx_assert()
    assert os.eventfd_read(full) >= 2**64 - 2
    lines.vector_fire(0)
    assert os.eventfd_read(full) == 1
    os.close(full)
