import struct
from errno import EEXIST, EINVAL, ENOTTY, EOPNOTSUPP

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import Command
from protocol.errors import RemoteProtocolError
from server.libvfio_user._screen import LONGEST_LOOK, MAX_MESSAGE_SIZE, Screen, parse_header, refusal
from server.libvfio_user._windows import Windows
from tests.server.raw import (
    DMA_MAP,
    DMA_UNMAP,
    EVENTFD,
    INTX,
    MASK,
    MSIX,
    NO_REPLY,
    NONE,
    REGION_READ,
    REPLY,
    SET_IRQS,
    TRIGGER,
    UNMASK,
    access,
    dma,
    irqs,
    message,
)

MAPPED = (0x10000, 0x4000)
FEATURE = 16


def verdict(request: bytes) -> int:
    look = request[:LONGEST_LOOK]
    windows = Windows()
    windows.add(*MAPPED)
    return Screen(windows).verdict(parse_header(look), look)


def unmap(flags: int) -> bytes:
    return struct.pack("=IIQQ", 24, flags, *MAPPED)


def test_what_the_library_does_right_is_let_through() -> None:
    for request in (
        message(REGION_READ, access(0, 7, 4)),
        message(DMA_MAP, dma(0x20000, 0x4000)),
        message(DMA_UNMAP, unmap(0)),
        message(DMA_UNMAP, unmap(2)),
        message(SET_IRQS, irqs(EVENTFD | TRIGGER, MSIX, 0, 4)),
        message(SET_IRQS, irqs(NONE | UNMASK, INTX, 0, 1)),
        message(FEATURE, struct.pack("=II", 8, 1 << 16 | 1)),
        message(77),
    ):
        assert verdict(request) == 0


@pytest.mark.parametrize("start", [0xF000, 0x10000, 0x11000, 0x13000])
def test_a_window_over_another_is_refused(start: int) -> None:
    assert verdict(message(DMA_MAP, dma(start, 0x2000))) == EEXIST
    assert verdict(message(DMA_MAP, dma(*MAPPED))) == EEXIST


@pytest.mark.parametrize(
    "window",
    [
        dma(0x20000, 0),
        dma((1 << 64) - 0x1000, 0x2000),
        dma(0x20800, 0x1000),
        dma(0x20000, 0x800),
        dma(0x20000, 0x1000, offset=0x800),
        dma(0x20000, 0x1000, flags=0),
    ],
)
def test_a_window_that_no_card_takes_is_refused(window: bytes) -> None:
    assert verdict(message(DMA_MAP, window)) == EINVAL


def test_the_last_page_of_all_is_let_through() -> None:
    assert verdict(message(DMA_MAP, dma((1 << 64) - 0x1000, 0x1000))) == 0


def test_flags_that_nobody_has_defined_are_refused() -> None:
    assert verdict(message(SET_IRQS, irqs(EVENTFD | TRIGGER | 0x40, MSIX, 0, 1))) == EINVAL


def test_a_dirty_bitmap_is_refused() -> None:
    assert verdict(message(DMA_UNMAP, unmap(1))) == EOPNOTSUPP


@pytest.mark.parametrize("feature", [6, 7, 8])
@pytest.mark.parametrize("how", [1 << 16, 1 << 17, 1 << 18])
def test_a_log_of_dirty_pages_is_refused(feature: int, how: int) -> None:
    assert verdict(message(FEATURE, struct.pack("=II", 8, how | feature))) == EOPNOTSUPP


def test_interrupts_whose_range_wraps_are_refused() -> None:
    assert verdict(message(SET_IRQS, irqs(NONE | TRIGGER, MSIX, 1, 0xFFFF_FFFF))) == EINVAL
    assert verdict(message(SET_IRQS, irqs(NONE | TRIGGER, MSIX, 0, 0xFFFF_FFFF))) == 0


@pytest.mark.parametrize("action", [MASK, UNMASK])
def test_eventfds_that_mask_or_unmask_are_refused(action: int) -> None:
    assert verdict(message(SET_IRQS, irqs(EVENTFD | action, INTX, 0, 1))) == ENOTTY


@given(command=st.sampled_from([int(command) for command in Command]), body=st.binary(max_size=LONGEST_LOOK))
def test_no_body_is_too_short_to_be_judged(command: int, body: bytes) -> None:
    assert verdict(message(command, body)) in {0, EINVAL, EEXIST, ENOTTY, EOPNOTSUPP}


@pytest.mark.parametrize("size", [0, 15, MAX_MESSAGE_SIZE + 1])
def test_sizes_that_the_library_stumbles_over(size: int) -> None:
    request = struct.pack("=HHIII", 1, REGION_READ, size, 0, 0)
    with pytest.raises(RemoteProtocolError, match=f"a message of {size} bytes"):
        parse_header(request)
    assert parse_header(struct.pack("=HHIII", 1, 9, MAX_MESSAGE_SIZE, 0, 0)).command == REGION_READ


@pytest.mark.parametrize("kind", [REPLY, 2, 15])
def test_only_requests_pass(kind: int) -> None:
    with pytest.raises(RemoteProtocolError, match=f"message type {kind}"):
        parse_header(message(REGION_READ, flags=kind))


def test_a_refusal_is_an_error_reply_of_a_header() -> None:
    request = message(SET_IRQS, message_id=7)
    assert refusal(parse_header(request), EINVAL) == struct.pack("=HHIII", 7, SET_IRQS, 16, 0x21, EINVAL)
    assert refusal(parse_header(message(SET_IRQS, flags=NO_REPLY)), EINVAL) == b""
