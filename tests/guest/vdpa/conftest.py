"""Fixtures for vDPA in a guest: each parent in turn, and kernels that must have nothing to say."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Protocol

import pytest

from tests.guest import Card, Guest
from tests.guest.conftest import BootGuest, Booting
from tests.guest.vdpa.kernel_log import KERNEL_ARGS, complaints
from tests.guest.vdpa.parents import PARENTS, Parent


@pytest.fixture(scope="module", params=PARENTS, ids=str)
def parent(request: pytest.FixtureRequest) -> Parent:
    """Each parent in turn."""
    found: Parent = request.param
    return found


class BootVdpa(Protocol):
    """The type of the fixture `boot_vdpa`; further keywords are those of `tests.guest.boot`."""

    def __call__(
        self,
        script: str,
        sockets: Sequence[Path | str | Card] = (),
        *,
        expected_complaints: Sequence[str] = (),
        **options: Any,
    ) -> Booting: ...


@pytest.fixture
def boot_vdpa(boot_guest: BootGuest) -> BootVdpa:
    """`boot_guest` for guests that must not complain of anything but of `expected_complaints`, all of which
    they must.
    """

    @asynccontextmanager
    async def quiet(booting: Booting, expected: Sequence[str]) -> AsyncIterator[Guest]:
        async with booting as guest:
            yield guest
        assert complaints(guest.console, expected) == []
        assert [words for words in expected if words not in guest.console] == []

    def start(
        script: str,
        sockets: Sequence[Path | str | Card] = (),
        *,
        expected_complaints: Sequence[str] = (),
        **options: Any,
    ) -> Booting:
        booting = boot_guest(script, sockets, kernel_args=KERNEL_ARGS, **options)
        return Booting(quiet(booting, expected_complaints), check=True, clean_stderr=True)

    return start
