"""Each of the card's personalities, served by each engine."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import client
from client.pci import read_config
from client.virtio import open_net
from device.profiles import LIVE_MIGRATION_BAR as BAR
from device.profiles import LIVE_MIGRATION_SIZE, PROFILES, Vectors, parse_profile
from tests.peers.libvfio_user import LibvfioUser
from tests.trionic.command import serving
from trionic.engines import Engine

FRAME = bytes.fromhex("ffffffffffff 020000000002 0800")
BASE, RING_STATE = 0x10, 0x20
QUEUE_SELECT, QUEUE_ENABLE = 0x16, 0x1C
PATIENCE_S = 20

WITH_A_BLOCK = [name for name, profile in PROFILES.items() if profile.has_live_migration]
with_a_block = pytest.mark.parametrize("name", WITH_A_BLOCK)


Cards = dict[str, Path]


@pytest.fixture(scope="module", params=Engine, ids=lambda engine: engine.value)
def cards(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cards]:
    """The sockets of one server's cards, by their profiles, for the engine that serves."""
    folder = tmp_path_factory.mktemp("cards")
    texts = [f"{name}:vectors={vectors.value}" for name in PROFILES for vectors in Vectors]
    texts += [f"{name}:lm=hidden" for name in WITH_A_BLOCK]
    sockets = {text: folder / f"{number}.sock" for number, text in enumerate(texts)}
    lines = [f'engine = "{request.param.value}"']
    if request.param is Engine.LIBVFIO_USER:
        library: LibvfioUser = request.getfixturevalue("libvfio_user")
        lines.append(f'libvfio_user = "{library.library}"')
    for text, path in sockets.items():
        lines += ["[[card]]", f'socket = "{path}"', f'profile = "{text}"']
    file = folder / "cards.toml"
    file.write_text("\n".join(lines))
    with serving("--config", file, "--log-level", "warning"):
        yield sockets


@pytest.mark.parametrize("vectors", Vectors, ids=lambda vectors: vectors.value)
@pytest.mark.parametrize("name", PROFILES)
async def test_our_driver_drives_each_by_any_vectors(cards: Cards, name: str, vectors: Vectors) -> None:
    text = f"{name}:vectors={vectors.value}"
    chosen = parse_profile(text)
    async with client.connect(cards[text]) as session, open_net(session) as nic:
        config = await read_config(session)
        assert (config.vendor, config.device) == (chosen.identity.vendor, chosen.identity.device)
        assert config.subsystem == (chosen.identity.subsystem_vendor, chosen.identity.subsystem)
        assert [index for index in range(6) if session.regions[index].size] == list(chosen.bars)
        assert session.irqs[2].count == chosen.vectors.count
        for number in range(20):
            frame = FRAME + bytes([number]) + bytes(50)
            await nic.send(frame)
            assert await nic.receive() == frame


@with_a_block
async def test_the_block_is_in_bar_4(cards: Cards, name: str) -> None:
    async with client.connect(cards[f"{name}:vectors=one"]) as session:
        region = session.regions[BAR]
        assert (region.size, region.fd, region.areas) == (LIVE_MIGRATION_SIZE, -1, ())
        for offset, value in ((BASE, bytes(range(1, 9))), (RING_STATE, b"\5\0\4\0")):
            await session.region_write(BAR, offset, value)
            assert await session.region_read(BAR, offset, len(value)) == value
        async with open_net(session) as nic:
            assert await session.region_read(BAR, RING_STATE, 4) == bytes(4), "it was reset"
            for number in range(3):
                frame = FRAME + bytes([number]) + bytes(50)
                await nic.send(frame)
                assert await nic.receive() == frame
            for queue in range(2):
                assert await session.region_read(BAR, RING_STATE + 4 * queue, 4) == b"\3\0\3\0"


@with_a_block
async def test_a_hidden_block_is_no_part_of_what_a_client_sees(cards: Cards, name: str) -> None:
    async with client.connect(cards[f"{name}:lm=hidden"]) as session, open_net(session) as nic:
        region = session.regions[BAR]
        assert (region.size, region.fd, region.areas) == (0, -1, ())
        with pytest.raises(client.ServerError) as refusal:
            await session.region_read(BAR, 0, 4)
        assert refusal.value.errno == errno.EINVAL
        with pytest.raises(client.ServerError):
            await session.region_write(BAR, RING_STATE, bytes(4))
        assert await session.region_read(7, 0x20, 4) == bytes(4)
        await nic.send(FRAME)
        assert await nic.receive() == FRAME


places = st.integers(0, 0x70) | st.integers(0, LIVE_MIGRATION_SIZE - 8)
widths = st.sampled_from([1, 2, 4, 8])
numbers = st.binary(min_size=8, max_size=8) | st.sampled_from(
    [number.to_bytes(8, "little") for number in (0, 1, 3, (1 << 64) - 1, (1 << 64) - 64, 1 << 63)]
)
writes = st.lists(st.tuples(places, widths, numbers), max_size=40)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(writes=writes, stopped=st.integers(0, 2))
def test_no_access_to_the_block_of_a_card_that_runs_can_fail(
    cards: Cards, writes: list[tuple[int, int, bytes]], stopped: int
) -> None:
    """Logs anywhere, ring state of queues that run, one stopped in traffic. A reset puts all right."""

    async def try_it() -> None:
        async with client.connect(cards["c5000x:vectors=shared"]) as session, open_net(session) as nic:
            for number, (offset, width, value) in enumerate(writes):
                await session.region_write(BAR, offset, value[:width])
                await session.region_read(BAR, offset, width)
                if number == len(writes) // 2:
                    await session.region_write(0, QUEUE_SELECT, bytes([stopped, 0]))
                    await session.region_write(0, QUEUE_ENABLE, bytes(2))
                nic.send_burst([FRAME])
            await nic.reset()
            await nic.send(FRAME)
            with trio.fail_after(PATIENCE_S):
                assert await nic.receive() == FRAME

    trio.run(try_it)
