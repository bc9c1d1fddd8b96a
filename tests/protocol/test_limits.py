from __future__ import annotations

from typing import Any

import pytest

from protocol import Limits
from protocol.limits import DEFAULT_MAX_DMA_MAPS, MAX_DMA_MAPS


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_msg_fds": 17},
        {"max_msg_fds": -1},
        {"max_data_xfer_size": 0},
        {"max_data_xfer_size": (64 << 20) + 1},
        {"max_dma_maps": MAX_DMA_MAPS + 1},
        {"max_dma_maps": 0},
        {"pgsizes": 2048},
        {"pgsizes": 0},
    ],
)
def test_what_a_known_peer_would_refuse_cannot_be_announced(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Limits(**wrong)


def test_the_defaults_are_what_qemu_takes() -> None:
    limits = Limits()
    assert limits.max_msg_fds <= 16
    assert limits.max_data_xfer_size <= 64 << 20
    assert limits.max_dma_maps <= DEFAULT_MAX_DMA_MAPS
