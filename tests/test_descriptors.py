"""The helper that tests find lost descriptors with."""

from __future__ import annotations

import gc
import os

import pytest

from tests.descriptors import no_fd_leaks, open_fds, settled_fds


class Owner:
    """Closes its descriptor when it goes, and lies in a cycle, as a card's data path does."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC)
        self.itself = self

    def __del__(self) -> None:
        os.close(self.fd)


def test_what_others_left_in_a_cycle_is_not_there_to_begin_with() -> None:
    before = settled_fds()
    gc.disable()
    try:
        Owner()
        assert open_fds() != before
        assert settled_fds() == before
    finally:
        gc.enable()


def test_what_a_test_leaves_in_a_cycle_is_a_leak() -> None:
    gc.disable()
    try:
        with pytest.raises(AssertionError), no_fd_leaks():
            Owner()
    finally:
        gc.enable()
