"""What `trionic probe` says of configuration spaces, beside what pciutils says of the same bytes."""

import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client import DeviceError
from client.pci import ConfigSpace
from firmware import Nic
from firmware.ports import open_port
from trionic.lspci import describe_config, size_name

SIZES = [0x8000, 0, 16 << 20, 0, 0x1000, 0]

needs_lspci = pytest.mark.skipif(shutil.which("lspci") is None, reason="pciutils is not installed")


@pytest.fixture(scope="module")
def card_config() -> Iterator[bytes]:
    nic = Nic(open_port("loopback"))
    yield nic.function.region_read(7, 0, 4096)
    nic.close()


def witness(config: bytes, folder: Path) -> str:
    """What pciutils makes of it."""
    rows = [f"{at:02x}: {config[at : at + 16].hex(' ')}" for at in range(0, len(config), 16)]
    dump = folder / "dump"
    dump.write_text("00:00.0 device\n" + "\n".join(rows) + "\n")
    command = ["lspci", "-n", "-vvv", "-F", str(dump)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def words(text: str) -> set[str]:
    return {word.strip(",;") for word in text.split()}


def lines_by_first_word(text: str) -> dict[str, set[str]]:
    """Lines with their continuations, by what they begin with."""
    found: dict[str, set[str]] = {}
    current = ""
    for line in text.splitlines():
        start = line.strip().split(" ")[0].split("\t")[0]
        if start.endswith(":") or start == "Region":
            current = start
            found.setdefault(current, set())
        found.setdefault(current, set()).update(words(line))
    return found


def own(config: bytes) -> str:
    return "\n".join(describe_config(ConfigSpace(config), SIZES))


def test_the_card_is_told_as_expected(card_config: bytes) -> None:
    told = own(card_config)
    for line in (
        "Ethernet controller [0200]: 1af4:1041 (rev 01)",
        "\tSubsystem: 8086:001a",
        "\tInterrupt: pin A routed to IRQ 0",
        "\tRegion 0: Memory at <unassigned> (32-bit, non-prefetchable) [size=32K]",
        "\tRegion 2: Memory at <unassigned> (64-bit, prefetchable) [size=16M]",
        "\tCapabilities: [60] MSI-X: Enable- Count=4 Masked-",
        "\t\tVector table: BAR=0 offset=00006000",
        "\t\tBAR=0 offset=00003000 size=00003000 multiplier=00001000",
    ):
        assert line in told.splitlines(), told


@needs_lspci
def test_pciutils_says_all_that_we_say_of_the_card(card_config: bytes, tmp_path: Path) -> None:
    theirs = lines_by_first_word(witness(card_config, tmp_path))
    for first, ours in lines_by_first_word(own(card_config)).items():
        if first in (
            "Control:",
            "Status:",
            "Interrupt:",
            "DevCap:",
            "DevCtl:",
            "DevSta:",
            "LnkCap:",
            "LnkSta:",
        ):
            assert ours <= theirs[first], first
    plain = witness(card_config, tmp_path).replace("Virtio: PciCfgAccess", "<unknown>")
    for line in own(card_config).splitlines():
        if line.strip().startswith(
            ("Capabilities: [", "BAR=", "Vector", "PBA", "Address", "Masking", "Flags")
        ):
            assert line.strip() in plain or "PciCfgAccess" in line


@needs_lspci
@pytest.mark.parametrize("seed", range(20))
def test_pciutils_reads_flipped_bits_as_we_do(card_config: bytes, tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    config = bytearray(card_config)
    space = ConfigSpace(card_config)
    for entry in space.capabilities:
        if entry.id in (0x01, 0x05, 0x11):
            for at in range(entry.offset + 2, entry.offset + 8):
                config[at] ^= chance.getrandbits(8)
    config[4:8] = bytes([chance.getrandbits(8), chance.getrandbits(3), config[6], chance.getrandbits(8)])
    theirs = witness(bytes(config), tmp_path)
    for line in own(bytes(config)).splitlines():
        stripped = line.strip()
        if stripped.startswith(
            ("Control", "Status", "Flags", "Capabilities: [4", "Capabilities: [60", "Vector")
        ):
            assert stripped in theirs, theirs


@given(st.binary(min_size=256, max_size=256))
def test_no_configuration_space_is_too_odd_to_be_told(raw: bytes) -> None:
    try:
        told = describe_config(ConfigSpace(raw), SIZES)
    except DeviceError:
        return
    assert told


@pytest.mark.parametrize(
    ("size", "name"),
    [(0, "0"), (1, "1"), (1023, "1023"), (1024, "1K"), (1536, "1536"), (3 << 20, "3M"), (1 << 40, "1T")],
)
def test_sizes_are_told_in_the_largest_unit_that_divides_them(size: int, name: str) -> None:
    assert size_name(size) == name
