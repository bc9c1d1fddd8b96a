"""Callbacks, called as the library calls them: no exception may come back through C."""

import ctypes
import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from device.errors import DeviceError
from server.libvfio_user import Library
from server.libvfio_user._context import Context
from server.libvfio_user._told import Told
from tests.server.world import Card


@pytest.fixture
def card() -> Iterator[Card]:
    made = Card()
    yield made
    made.function.close()


@pytest.fixture
def context(library: Library, card: Card, tmp_path: Path) -> Iterator[Context]:
    made = Context(library, card.function, tmp_path / "context", Told("card", 2))
    yield made
    made.close()


def raising(error: BaseException) -> Any:
    def function(*_arguments: object) -> int:
        raise error

    return function


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (DeviceError(errno.ENODEV, "gone"), errno.ENODEV),
        (DeviceError("without a number"), errno.EIO),
        (ValueError("a mistake"), errno.EIO),
        (MemoryError(), errno.EIO),
    ],
)
def test_an_exception_becomes_an_errno(context: Context, error: Exception, number: int) -> None:
    callback = context._callback("reset", raising(error), -1)
    ctypes.set_errno(0)
    assert callback(None, 0) == -1
    assert ctypes.get_errno() == number


def test_a_mistake_is_told_and_a_refusal_is_not(context: Context, caplog: pytest.LogCaptureFixture) -> None:
    context._callback("reset", raising(DeviceError(errno.EINVAL, "no")), -1)(None, 0)
    assert not caplog.records
    context._callback("dma", raising(ValueError("a mistake")), None)(None, None)
    assert "dma callback failed" in caplog.text
    assert "ValueError: a mistake" in caplog.text


def test_what_stops_the_program_is_raised_when_the_library_has_returned(context: Context) -> None:
    callback = context._callback("reset", raising(KeyboardInterrupt()), -1)

    def library_function(_handle: int) -> None:
        assert callback(None, 0) == -1

    with pytest.raises(KeyboardInterrupt):
        context._call(library_function)
    context._call(lambda _handle: None)  # once


def test_the_function_hears_nothing_of_a_context_that_is_closed(context: Context, card: Card) -> None:
    context.close()
    context.close()
    assert card.resets == []


def test_a_lost_client_is_told_once(context: Context, card: Card) -> None:
    context.lost()
    context.lost()
    context.close()
    assert len(card.resets) == 1


def test_a_context_that_nobody_used_leaves_no_file(context: Context, tmp_path: Path) -> None:
    assert (tmp_path / "context").is_socket()
    context.close()
    assert not list(tmp_path.iterdir())
