"""Real drivers' recordings, done again by our client against a card of the same personality."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import trio

from device.profiles import parse_profile
from device.virtio.features import Feature
from firmware import Nic
from tests.firmware.test_nic import EVERYTHING, MAC, NOTHING, Cable
from tests.peers.libvfio_user import LibvfioUser
from tests.traces.again import CONTROL, RX, TX, Again, again
from tests.traces.recordings import RECORDED, normalised, read_recording, steps_of
from tests.traces.registers import Lines
from tests.traces.test_traces import flat
from trionic.engines import NATIVE, Engine, EngineConfig

PATIENCE_S = 60

NAMES = sorted(file.stem for file in RECORDED.glob("*.trace"))


def mac_of(steps: Lines) -> bytes:
    """The address of the card that was recorded, if its driver asked for it, byte by byte."""
    octets = {step[1]: int(step[3], 0) for step in steps if step[1].startswith("device+")}
    return bytes(octets.get(f"device+{at:#x}", MAC[at]) for at in range(6))


async def do_again(lines: list[str], path: Path, engine: EngineConfig = NATIVE) -> Again:
    steps = steps_of(lines)
    mac = mac_of(steps)
    offered = next(int(step[3], 0) for step in steps if step[1] == "common.device_feature")
    cable = Cable(offloads=EVERYTHING if offered & Feature.NET_HOST_TSO4 else NOTHING)
    profile = parse_profile(lines[0].removeprefix("# "))
    nic = Nic(cable, mac=mac, profile=profile, bar2_size=4096)
    with trio.fail_after(PATIENCE_S):
        async with again(nic, cable, mac, path, engine) as driver:
            # Who was there before it left the card like that: ACKNOWLEDGE, no driver.
            await driver.write("common.device_status", 1, 1)
            await driver.run(steps)
    return driver


@pytest.mark.parametrize("kind", Engine)
@pytest.mark.parametrize("name", NAMES)
async def test_what_a_real_driver_did_is_answered_the_same(
    name: str, kind: Engine, tmp_path: Path, libvfio_user: LibvfioUser
) -> None:
    lines = read_recording(name)
    engine = NATIVE if kind is Engine.NATIVE else EngineConfig(kind, libvfio_user.library)
    driver = await do_again(lines, tmp_path / "card.sock", engine)
    doorbells = Counter(line.split()[2] for line in lines if line.startswith("w2 notify+"))
    assert driver.rung == [doorbells[str(queue)] for queue in (RX, TX, CONTROL)]
    assert min(driver.rung[:CONTROL]) > 0
    assert not driver.coming


def test_there_are_recordings() -> None:
    assert set(NAMES) >= {
        *("ifcvf", "ifcvf-c5000x", "ifcvf-one", "ifcvf-shared", "ifcvf-vhost"),
        *("virtio_pci", "vp_vdpa", "dpdk-ifc", "dpdk-virtio"),
    }


async def test_another_answer_is_noticed(tmp_path: Path) -> None:
    lines = read_recording("ifcvf")
    lines[lines.index("r2 common.num_queues = 3")] = "r2 common.num_queues = 5"
    with pytest.raises((AssertionError, ExceptionGroup)) as failure:
        await do_again(lines, tmp_path / "card.sock")
    assert "num_queues = 5: 0x3" in "".join(map(str, flat(failure.value)))


def test_recordings_of_one_driver_have_all_in_common_but_addresses_and_moments() -> None:
    one = ["# --- up", "w4 common.queue_desc 0x1000", "r1 isr = 1", "w2 notify+0x0 0", "r1 device+0x6 = 1"]
    other = ["w4 common.queue_desc 0", "r1 device+0x6 = 1", *["w2 notify+0x0 0"] * 2, "r1 isr = 0"]
    assert normalised(one) == normalised(other)


@pytest.mark.parametrize(
    "change",
    ["w2 common.queue_size 1", "r1 device+0x6 = 0", "w2 notify+0x1000 0", "w2 common.queue_desc+4 0", ""],
)
def test_recordings_that_differ_in_anything_else_are_told_apart(change: str) -> None:
    lines = read_recording("ifcvf")
    place = change.split()[1] if change else "common.num_queues"
    at = next(at for at, line in enumerate(lines) if f" {place}" in line)
    assert normalised([*lines[:at], change or "#", *lines[at + 1 :]]) != normalised(lines)
