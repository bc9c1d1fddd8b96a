"""Fixtures for guests with DPDK."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import cannot
from tests.guest._dpdk import dpdk_tree
from tests.peers.cache import PeerError


@pytest.fixture(scope="session")
def dpdk() -> Path:
    """The tree that brings DPDK; the first use on a machine downloads it."""
    try:
        return dpdk_tree()
    except PeerError as missing:
        cannot(str(missing))
