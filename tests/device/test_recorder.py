"""What a recording says of the accesses to a card's registers."""

from __future__ import annotations

import errno
import fcntl
import io
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from device.card import NetworkCard
from device.errors import DeviceError
from device.function import RegionIndex, ResetKind
from device.pci.capabilities.virtio import VirtioPciCfgAccess
from device.profiles import COMMON, DEVICE_CONFIG, DOORBELLS, ISR, MSIX_TABLE, parse_profile
from device.recorder import Recorder, recording
from tests.device.test_card import Quiet
from tests.traces.registers import REGISTERS

STEP = re.compile(r"[rw](\d) (common\.[a-z_]+|isr|(?:device|notify|lm|bar\d)(?=\+))(?:\+(\w+))?( =)? (\w+)")


@dataclass
class Recorded:
    card: NetworkCard
    out: io.BytesIO

    def read(self, bar: int, offset: int, count: int) -> bytes:
        return self.card.function.region_read(bar, offset, count)

    def write(self, bar: int, offset: int, count: int, value: int) -> None:
        self.card.function.region_write(bar, offset, value.to_bytes(count, "little"))

    @property
    def lines(self) -> list[str]:
        """Those after the first."""
        return self.out.getvalue().decode().splitlines()[1:]


def make(profile: str = "n3000") -> Recorded:
    card = NetworkCard(Quiet(), profile=parse_profile(profile), bar2_size=4096)
    out = io.BytesIO()
    Recorder(card, out.write)
    return Recorded(card, out)


@pytest.fixture
def recorded() -> Iterator[Recorded]:
    made = make()
    yield made
    made.card.function.close()


def test_each_access_is_a_line_with_the_register_and_its_value(recorded: Recorded) -> None:
    recorded.read(0, COMMON + 0x12, 2)
    recorded.write(0, COMMON + 0x14, 1, 0)
    recorded.write(0, COMMON + 0x16, 2, 1)
    recorded.write(0, COMMON + 0x20, 4, 0xDEADB000)
    recorded.write(0, COMMON + 0x24, 4, 1)
    recorded.read(0, COMMON + 0x20, 8)
    recorded.read(0, ISR, 1)
    recorded.read(0, DEVICE_CONFIG + 6, 1)
    recorded.write(0, DOORBELLS + 0x2000, 2, 2)
    recorded.read(0, MSIX_TABLE, 4)
    recorded.write(4, 0x22, 2, 0xFF)
    recorded.read(4, 0x20, 4)
    assert recorded.lines == [
        "r2 common.num_queues = 3",
        "w1 common.device_status 0",
        "w2 common.queue_select 1",
        "w4 common.queue_desc 0xdeadb000",
        "w4 common.queue_desc+4 1",
        "r8 common.queue_desc = 0x1deadb000",
        "r1 isr = 0",
        "r1 device+0x6 = 0",
        "w2 notify+0x2000 2",
        "r4 bar0+0x6000 = 0",
        "w2 lm+0x22 0xff",
        "r4 lm+0x20 = 0xff0000",
    ]


@pytest.mark.parametrize("profile", ["n3000", "c5000x:vectors=one,queue-size=64", "virtio"])
def test_the_first_line_says_which_card_it_is(profile: str) -> None:
    made = make(profile)
    assert made.out.getvalue().decode() == f"# {profile}\n"
    made.card.function.close()


def test_configuration_space_and_memory_are_left_out(recorded: Recorded) -> None:
    recorded.read(RegionIndex.CONFIG, 0, 4)
    recorded.write(2, 0, 4, 1)
    recorded.read(2, 0, 4)
    assert recorded.lines == []


def test_what_is_no_access_of_a_driver_is_a_comment(recorded: Recorded) -> None:
    recorded.read(0, COMMON, 3)
    recorded.write(0, COMMON, 12, 1)
    with pytest.raises(DeviceError):
        recorded.read(0, 0x7FFF, 2)
    with pytest.raises(DeviceError):
        recorded.write(4, 0x1000, 4, 0)
    recorded.card.function.reset(ResetKind.FLR)
    assert recorded.lines == [
        "# r3 common.device_feature_select",
        "# w12 common.device_feature_select",
        "# r2 bar0+0x7fff: [Errno 22] BAR 0: 2 bytes at 0x7fff lie outside 0x8000 bytes",
        "# w4 bar4+0x1000: [Errno 22] BAR 4: 4 bytes at 0x1000 lie outside 0x1000 bytes",
        f"# reset: {ResetKind.FLR.value}",
    ]


def test_a_recorded_card_is_reset_as_any_other(recorded: Recorded) -> None:
    recorded.write(0, COMMON + 0x14, 1, 1)
    recorded.card.function.reset(ResetKind.DEVICE)
    assert recorded.read(0, COMMON + 0x14, 1) == b"\0"


def test_doorbells_are_rung_where_they_can_be_seen() -> None:
    card = NetworkCard(Quiet(), bar2_size=4096)
    card.connect_doorbells([7])
    assert card.function.io_eventfds(0)
    Recorder(card, io.BytesIO().write)
    assert not card.function.io_eventfds(0)
    card.function.close()


FULL = "# full: what was done after this is not here"
ONE = "r2 common.num_queues = 3"


def test_a_recording_has_an_end_and_the_card_lives_on() -> None:
    card, out = NetworkCard(Quiet(), bar2_size=4096), io.BytesIO()
    limit = len(f"# n3000\n{ONE}\n{ONE}\n{FULL}\n")
    Recorder(card, out.write, limit=limit)
    for _ in range(5):
        assert card.function.region_read(0, COMMON + 0x12, 2) == b"\3\0"
    assert out.getvalue().decode().splitlines() == ["# n3000", ONE, ONE, FULL]
    assert len(out.getvalue()) == limit
    card.function.close()


@pytest.mark.parametrize("over", range(1, 30))
def test_no_limit_is_passed_by_a_byte(over: int) -> None:
    card, out = NetworkCard(Quiet(), bar2_size=4096), io.BytesIO()
    limit = len(f"# n3000\n{ONE}\n{FULL}\n") - over
    Recorder(card, out.write, limit=limit)
    for _ in range(3):
        card.function.region_read(0, COMMON + 0x12, 2)
    assert out.getvalue().decode() == f"# n3000\n{FULL}\n" if over <= len(ONE) + 1 else f"{FULL}\n"
    card.function.close()


def test_a_full_disk_ends_the_recording_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    card, kept = NetworkCard(Quiet(), bar2_size=4096), list[bytes]()

    def put(line: bytes) -> None:
        if len(kept) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        kept.append(line)

    Recorder(card, put)
    for _ in range(3):
        assert card.function.region_read(0, COMMON + 0x12, 2) == b"\3\0"
    assert kept == [b"# n3000\n", b"r2 common.num_queues = 3\n"]
    assert caplog.messages == ["the recording ends here: No space left on device"]
    card.function.close()


def test_nobody_waits_for_who_reads_a_recording(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    card = NetworkCard(Quiet(), bar2_size=4096)
    with pytest.raises(OSError, match="No such device"), recording(card, fifo):
        pass  # for nobody has it open to read
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    with recording(card, fifo):
        for _ in range(fcntl.fcntl(reader, fcntl.F_GETPIPE_SZ) // len(ONE)):
            card.function.region_read(0, COMMON + 0x12, 2)
    assert os.read(reader, 100).startswith(f"# n3000\n{ONE}\n".encode())
    assert caplog.messages == ["the recording ends here: its file takes no more for now"]
    os.close(reader)
    card.function.close()


def test_what_comes_by_the_window_in_configuration_space_is_recorded(recorded: Recorded) -> None:
    function = recorded.card.function
    window = next(part for part in function.capabilities if isinstance(part, VirtioPciCfgAccess))
    for name, value in (("OFFSET", COMMON + 0x12), ("LENGTH", 2)):
        function.region_write(RegionIndex.CONFIG, window.at(name), value.to_bytes(4, "little"))
    assert function.region_read(RegionIndex.CONFIG, window.at("DATA"), 2) == b"\3\0"
    function.region_write(RegionIndex.CONFIG, window.at("OFFSET"), (COMMON + 0x16).to_bytes(4, "little"))
    function.region_write(RegionIndex.CONFIG, window.at("DATA"), b"\1\0\0\0")
    assert recorded.lines == [ONE, "w2 common.queue_select 1"]


def test_a_recording_is_made_anew_and_grows_line_by_line(tmp_path: Path) -> None:
    file = tmp_path / "card.trace"
    file.write_text("what was there before\n" * 10)
    card = NetworkCard(Quiet(), bar2_size=4096)
    with recording(card, file):
        card.function.region_read(0, COMMON + 0x12, 2)
        assert file.read_text() == "# n3000\nr2 common.num_queues = 3\n"
    card.function.region_read(0, COMMON + 0x12, 2)
    card.function.reset(ResetKind.LOST_CLIENT)
    card.function.close()
    assert file.read_text() == "# n3000\nr2 common.num_queues = 3\n"


@given(
    bar=st.sampled_from([0, 4]),
    offset=st.integers(0, 0x8000),
    count=st.sampled_from([1, 2, 4, 8]),
    value=st.integers(0),
    write=st.booleans(),
)
def test_any_access_can_be_found_again_by_its_line(
    bar: int, offset: int, count: int, value: int, write: bool
) -> None:
    made = make()
    offset %= made.card.function.bars[bar].size - 7
    value %= 1 << 8 * count
    if write:
        made.write(bar, offset, count, value)
    else:
        value = int.from_bytes(made.read(bar, offset, count), "little")
    (line,) = made.lines
    found = STEP.fullmatch(line)
    assert found is not None, line
    assert (line[0] == "w", int(found[1]), int(found[5], 0)) == (write, count, value)
    assert bool(found[4]) != write
    assert where(found[2]) == (bar, offset - int(found[3] or "0", 0))
    made.card.function.close()


def where(name: str) -> tuple[int, int]:
    """Where the registers of that name begin (virtio 1.3, 4.1.4.3, in the card of device.profiles)."""
    structures = {"isr": (0, ISR), "device": (0, DEVICE_CONFIG), "notify": (0, DOORBELLS), "lm": (4, 0)}
    if name.startswith("common."):
        return 0, COMMON + REGISTERS[name.removeprefix("common.")]
    return structures.get(name) or (int(name.removeprefix("bar")), 0)
