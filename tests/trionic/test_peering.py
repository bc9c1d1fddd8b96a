from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import client
from client.virtio.net import MEMORY_GONE, NetDriver
from tests.trionic.command import serving
from trionic import _traffic
from trionic.peering import BETWEEN, Peering, peer


@contextmanager
def two_cards(folder: Path, *options: str) -> Iterator[tuple[Path, Path]]:
    first, second = folder / "first.sock", folder / "second.sock"
    with serving("--socket", first), serving("--socket", second, *options):
        yield first, second


@pytest.mark.parametrize("revocation", ["cooperative", "enforced"])
async def test_a_reset_of_the_lender_is_told_and_survived(tmp_path: Path, revocation: str) -> None:
    with two_cards(tmp_path, "--revocation", revocation) as (card, lender):
        tally = await peer(card, lender, 5)
    assert tally.errors == [MEMORY_GONE] * 5
    assert tally.received > 6 * BETWEEN
    assert tally.sound


def test_frames_that_no_reset_took_are_missed() -> None:
    assert Peering(sent=64, received=0, errors=[MEMORY_GONE]).sound
    assert not Peering(sent=65, received=0, errors=[MEMORY_GONE]).sound
    assert not Peering(sent=1, received=2, doubled=1).sound


async def test_a_card_that_falls_silent_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_traffic, "GRACE_S", 0.2)
    monkeypatch.setattr(NetDriver, "_kick", lambda driver, queue: None)
    with (
        two_cards(tmp_path) as (card, lender),
        pytest.raises(client.ClientError, match="no frame comes back"),
    ):
        await peer(card, lender, 1)


async def test_a_card_without_enough_memory_lends_none(tmp_path: Path) -> None:
    with (
        two_cards(tmp_path, "--bar2-size", "1M") as cards,
        pytest.raises(client.ClientError, match="0x200000"),
    ):
        await peer(*cards, 1)
