"""Three drivers' register accesses, in their order, against a card that is served; frames pass meanwhile."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import trio

from device.profiles import Vectors, parse_profile
from device.recorder import Recorder
from firmware import Nic
from tests.firmware.test_nic import MAC, Cable
from tests.traces.recordings import read_recording, steps_of
from tests.traces.replay import Replay, read_trace, replaying

HERE = Path(__file__).parent
PATIENCE_S = 60

# Linux's choice: (vectors of the queues, vector of the configuration) by how many there are.
LINUX_VECTORS = {
    Vectors.PER_QUEUE: ((0, 1, 2), 3),
    Vectors.SHARED: ((0, 0, 0), 1),
    Vectors.ONE: ((0, 0, 0), 0),
}


def linux_vectors(vectors: Vectors) -> dict[str, int]:
    """The names that its trace has for what it takes."""
    queues, configuration = LINUX_VECTORS[vectors]
    return {"cv": configuration} | {f"qv{queue}": vector for queue, vector in enumerate(queues)}


async def replay(
    tmp_path: Path,
    trace: str,
    profile: str,
    names: Mapping[str, int] = {},
    record: Callable[[bytes], object] | None = None,
) -> None:
    cable = Cable()
    nic = Nic(cable, mac=MAC, profile=parse_profile(profile), bar2_size=4096)
    if record is not None:
        Recorder(nic.card, record)
    with trio.fail_after(PATIENCE_S):
        async with replaying(nic, cable, tmp_path / "card.sock") as driver:
            driver.names.update(names)
            await driver.run(read_trace(HERE / trace))
            assert driver.passed >= 30
            await check_each_came_once(driver)


async def check_each_came_once(driver: Replay) -> None:
    """What was put into the ring last went out or stayed there, as the ring says.

    A card may look once more when it is done with a doorbell.
    """
    await trio.testing.wait_all_tasks_blocked()
    used = int.from_bytes(driver.memory.read(driver.tx.device + 2, 2), "little")
    early = used - (driver.passed - len(driver.held))
    assert 0 <= early <= len(driver.held)
    assert [driver.cable.network.recv(4000) for _ in range(early)] == list(driver.held)[:early]
    with pytest.raises(BlockingIOError):
        driver.cable.network.recv(4000)


@pytest.mark.parametrize("layout", ["auto", "pairs"])
@pytest.mark.parametrize("trace", ["ifcvf-2019.trace", "dpdk-ifc.trace"])
@pytest.mark.parametrize("profile", ["n3000", "c5000x"])
async def test_drivers_of_pairs_start_and_stop_the_card(
    tmp_path: Path, trace: str, profile: str, layout: str
) -> None:
    await replay(tmp_path, trace, f"{profile}:ring-state={layout}")


@pytest.mark.parametrize("layout", ["auto", "words"])
@pytest.mark.parametrize("vectors", Vectors)
@pytest.mark.parametrize("profile", ["n3000", "c5000x"])
async def test_linux_starts_and_stops_the_card_by_any_vectors(
    tmp_path: Path, profile: str, vectors: Vectors, layout: str
) -> None:
    chosen = f"{profile}:vectors={vectors.value},ring-state={layout}"
    await replay(tmp_path, "linux-ifcvf.trace", chosen, linux_vectors(vectors))


def shape(lines: Sequence[str], first: str, last: str) -> list[str]:
    """Which registers a driver reads and writes, in its order, from a step to another.

    How often it asks for the same one is the card's matter; of device configuration the drivers above it ask.
    """
    begin = lines.index(first)
    part = lines[begin : lines.index(last, begin) + 1]
    steps = [" ".join(step[:2]) for step in steps_of(part)]
    kept = [step for step in steps if not re.search(r"device\+|config_generation|notify", step)]
    return [step for step, _ in itertools.groupby(kept)]


async def recorded_replay(
    tmp_path: Path, trace: str, profile: str, names: Mapping[str, int] = {}
) -> list[str]:
    """The trace, as the card records it."""
    lines: list[bytes] = []
    await replay(tmp_path, trace, profile, names, lines.append)
    return b"".join(lines).decode().splitlines()


START = ("r2 common.num_queues = 3", "w1 common.device_status 0xf")


@pytest.mark.parametrize(
    ("vectors", "name"),
    [(Vectors.PER_QUEUE, "ifcvf"), (Vectors.SHARED, "ifcvf-shared"), (Vectors.ONE, "ifcvf-one")],
)
async def test_linux_starts_the_card_as_the_real_driver_was_seen_to(
    tmp_path: Path, vectors: Vectors, name: str
) -> None:
    real = read_recording(name)
    profile = f"n3000:vectors={vectors.value}"
    again = await recorded_replay(tmp_path, "linux-ifcvf.trace", profile, linux_vectors(vectors))
    assert shape(again, *START) == shape(real, *START)


async def test_dpdk_starts_and_stops_the_card_as_the_real_driver_was_seen_to(tmp_path: Path) -> None:
    real = read_recording("dpdk-ifc")
    again = await recorded_replay(tmp_path, "dpdk-ifc.trace", "n3000")
    stop = ("w2 common.config_msix_vector 0xffff", "w1 common.device_status 0")
    assert shape(again, *START) == shape(real, *START)
    assert shape(again, *stop) == shape(real, *stop)


async def test_drivers_of_pairs_get_no_vector_that_there_is_not_and_can_tell(tmp_path: Path) -> None:
    with pytest.raises((AssertionError, ExceptionGroup)) as failure:
        await replay(tmp_path, "dpdk-ifc.trace", "n3000:vectors=shared")
    text = "".join(str(each) for each in flat(failure.value))
    assert "r2 common.queue_msix_vector = 1 + 1: 0xffff" in text


def flat(error: BaseException) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        return [one for each in error.exceptions for one in flat(each)]
    return [error]


async def test_selectors_out_of_range_read_zero_and_harm_nothing(tmp_path: Path) -> None:
    """Kernels read feature words 2 and 3; a driver may name queues that no card has."""
    cable = Cable()
    async with replaying(Nic(cable, mac=MAC, bar2_size=4096), cable, tmp_path / "card.sock") as driver:
        for word in (2, 3, 31, 0xFFFFFFFF):
            for which in ("device", "driver"):
                await driver.write(f"common.{which}_feature_select", 4, word)
                await driver.write(f"common.{which}_feature", 4, 0xFFFFFFFF)
                assert await driver.read(f"common.{which}_feature_select", 4) == word
                assert await driver.read(f"common.{which}_feature", 4) == 0
        for queue in (3, 17, 0xFFFF):
            await driver.write("common.queue_select", 2, queue)
            for name in ("queue_size", "queue_enable", "queue_desc", "queue_driver", "queue_device"):
                await driver.write(f"common.{name}", 2, 1)
                assert await driver.read(f"common.{name}", 2) == 0
            await driver.write("common.queue_msix_vector", 2, 0)
            assert await driver.read("common.queue_msix_vector", 2) == 0xFFFF
        await driver.run(read_trace(HERE / "dpdk-ifc.trace"))
