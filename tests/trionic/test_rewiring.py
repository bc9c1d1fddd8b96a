from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

import client
from client.irqchip import Intx, IrqchipError
from client.irqchip.userspace import Ioapic, Pic
from tests.trionic.command import serving
from trionic import _traffic
from trionic.rewiring import BETWEEN, Rewiring, rewire


@asynccontextmanager
async def card(folder: Path, *options: str) -> AsyncIterator[Path]:
    with serving("--socket", folder / "card.sock", *options):
        yield folder / "card.sock"


async def test_every_interrupt_and_every_frame_is_accounted_for(tmp_path: Path) -> None:
    async with card(tmp_path) as path:
        tally = await rewire(path, 50)
    assert tally.changes == len(tally.dark) == 50
    assert tally.sound
    assert tally.sent == tally.received > 50 * BETWEEN
    assert (tally.interrupts_lost, tally.interrupts_doubled) == (0, 0)
    assert tally.delivered > 50
    middle, longest = tally.dark_ms
    assert 0 < middle <= longest


def test_what_is_not_accounted_for_is_told() -> None:
    assert Rewiring(signalled=10, delivered=6, repeated=3).interrupts_lost == 1
    assert Rewiring(signalled=10, delivered=6, repeated=3).interrupts_doubled == 0
    assert Rewiring(signalled=10, delivered=8, repeated=3).interrupts_doubled == 1


async def test_a_card_that_falls_silent_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_traffic, "GRACE_S", 0.2)
    monkeypatch.setattr(Ioapic, "activate", lambda chip: None)  # it becomes active and asks no CPU
    async with card(tmp_path) as path:
        with pytest.raises(client.ClientError, match="fell silent after change 1"):
            await rewire(path, 1)


async def test_a_card_without_its_fast_path_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(chip: Pic, gsi: int, trigger_fd: int, resample_fd: int) -> None:
        raise IrqchipError("attaching", 22)

    monkeypatch.setattr(Pic, "attach", refuse)
    async with card(tmp_path) as path:
        with pytest.raises(client.ClientError, match="attaching: Invalid argument"):
            await rewire(path, 2)


async def test_a_card_that_never_had_a_fast_path_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Intx, "_masks_itself", False)
    async with card(tmp_path) as path:
        with pytest.raises(client.ClientError, match="does not mask itself"):
            await rewire(path, 2)
