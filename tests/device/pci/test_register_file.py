"""A run of bytes with the masks of the registers placed in it, against a model that knows single bits."""

import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st

from device.errors import DeviceError
from device.pci.register_file import RegisterFile
from device.pci.registers import Dword, Register, ScratchByte, ScratchDword, ScratchWord, ro, rw, w1c


class Mixed(Register, width=32):
    """Every kind of bit, side by side."""

    STORED = rw(3, 0, reset=0x6)
    CLEARED = w1c(11, 4, reset=0xA5)
    CONSTANT = ro(19, 12, reset=0x3C)
    HIGH = rw(31, 28, reset=0x9)


SIZE = 24
PLACED = ((0, Mixed), (5, ScratchByte), (8, ScratchWord), (12, Dword), (16, Mixed), (20, ScratchDword))


def a_file() -> RegisterFile:
    file = RegisterFile(SIZE)
    for offset, register in PLACED:
        file.place(offset, register)
    return file


class BitModel:
    """What every single bit does: a dict from bit number to (kind, value)."""

    def __init__(self) -> None:
        self.bits: dict[int, int] = dict.fromkeys(range(SIZE * 8), 0)
        self.kinds: dict[int, str] = dict.fromkeys(range(SIZE * 8), "reserved")
        for offset, register in PLACED:
            for field in register.FIELDS:
                for bit in range(field.low, field.high + 1):
                    self.kinds[offset * 8 + bit] = field.access.value
                    self.bits[offset * 8 + bit] = field.reset >> (bit - field.low) & 1

    def write(self, offset: int, data: bytes) -> None:
        for index in range(len(data) * 8):
            bit = offset * 8 + index
            written = data[index // 8] >> index % 8 & 1
            if self.kinds[bit] == "rw":
                self.bits[bit] = written
            elif self.kinds[bit] == "w1c" and written:
                self.bits[bit] = 0

    def read(self, offset: int, count: int) -> bytes:
        value = sum(self.bits[offset * 8 + index] << index for index in range(count * 8))
        return value.to_bytes(count, "little")


spans = st.integers(0, SIZE).flatmap(lambda start: st.tuples(st.just(start), st.integers(0, SIZE - start)))
writes = spans.flatmap(
    lambda span: st.tuples(st.just(span[0]), st.binary(min_size=span[1], max_size=span[1]))
)


@given(st.lists(writes, max_size=20), spans)
def test_every_access_behaves_as_its_single_bits_would(
    accesses: list[tuple[int, bytes]], look: tuple[int, int]
) -> None:
    file, model = a_file(), BitModel()
    for offset, data in accesses:
        file.write(offset, data)
        model.write(offset, data)
    assert file.read(0, SIZE) == model.read(0, SIZE)
    assert file.read(*look) == model.read(*look)


@given(st.lists(writes, max_size=5))
def test_reset_brings_every_bit_back(accesses: list[tuple[int, bytes]]) -> None:
    file = a_file()
    for offset, data in accesses:
        file.write(offset, data)
    file.reset()
    assert file.read(0, SIZE) == BitModel().read(0, SIZE)


@pytest.mark.parametrize(("offset", "count"), [(-1, 1), (0, SIZE + 1), (SIZE, 1), (1 << 64, 4), (0, -1)])
def test_a_read_outside_is_refused_with_einval(offset: int, count: int) -> None:
    with pytest.raises(DeviceError) as refusal:
        a_file().read(offset, count)
    assert refusal.value.errno == errno.EINVAL


@pytest.mark.parametrize(("offset", "count"), [(-1, 1), (0, SIZE + 1), (SIZE, 1), (1 << 64, 4)])
def test_a_write_outside_is_refused_with_einval_and_changes_nothing(offset: int, count: int) -> None:
    file = a_file()
    with pytest.raises(DeviceError) as refusal:
        file.write(offset, b"\xff" * count)
    assert refusal.value.errno == errno.EINVAL
    assert file.read(0, SIZE) == a_file().read(0, SIZE)


def test_the_device_stores_past_the_masks() -> None:
    file = a_file()
    file.store(12, 4, 0xCAFE)
    assert file.load(12, 4) == 0xCAFE
    assert file.read(12, 2) == b"\xfe\xca"


def test_a_hook_hears_of_any_touched_byte_with_the_whole_register() -> None:
    file = a_file()
    heard: list[tuple[int, int]] = []
    file.after_write(20, 4, lambda old, new: heard.append((old, new)))
    file.write(20, b"\x01\x02\x03\x04")
    file.write(23, b"\x09")
    file.write(19, b"\x00\x05")
    file.write(16, b"\x00\x00\x00\x00")
    assert heard == [(0, 0x04030201), (0x04030201, 0x09030201), (0x09030201, 0x09030205)]


def test_a_hook_hears_of_a_write_that_changes_nothing() -> None:
    file = a_file()
    heard: list[int] = []
    file.after_write(20, 4, lambda _old, new: heard.append(new))
    file.write(20, bytes(4))
    assert heard == [0]


def test_a_later_hook_sees_what_an_earlier_one_left() -> None:
    file = a_file()
    heard: list[int] = []
    file.after_write(8, 2, lambda _old, _new: file.reset())
    file.after_write(20, 4, lambda _old, new: heard.append(new))
    file.write(8, b"\xff" * 16)
    assert heard == [0]


@pytest.mark.parametrize(
    ("offset", "count"), [(12, 4), (12, 1), (15, 1), (13, 2), (11, 2), (0, SIZE), (15, 4)]
)
def test_a_live_register_is_refreshed_before_any_read_that_touches_it(offset: int, count: int) -> None:
    file, refreshed = a_file(), a_file()
    file.before_read(12, 4, lambda: file.store(12, 4, 0x11223344))
    refreshed.store(12, 4, 0x11223344)
    assert file.read(offset, count) == refreshed.read(offset, count)


def test_a_read_beside_a_live_register_does_not_run_its_hook() -> None:
    file = a_file()
    file.before_read(12, 4, lambda: pytest.fail("nobody asked"))
    file.read(8, 4)
    file.read(16, 8)


@pytest.mark.parametrize("offset", [-1, 21, 22, 3, 24])
def test_a_register_is_placed_inside_and_beside_the_others(offset: int) -> None:
    with pytest.raises(ValueError, match="ScratchDword"):
        a_file().place(offset, ScratchDword)


def test_an_instance_can_differ_in_reset_value_and_writable_bits() -> None:
    file = RegisterFile(4)
    file.place(0, ScratchDword, reset=0x0000_0004, writable=0xFFFF_0000)
    file.write(0, b"\xff" * 4)
    assert file.load(0, 4) == 0xFFFF_0004


@given(st.lists(writes, max_size=10))
def test_what_software_set_can_be_taken_over(accesses: list[tuple[int, bytes]]) -> None:
    file, other = a_file(), a_file()
    for offset, data in accesses:
        file.write(offset, data)
    other.write(0, b"\xff" * SIZE)
    other.stage(file.save())()
    assert other.read(0, SIZE) == file.read(0, SIZE)


@given(st.binary(max_size=SIZE + 2))
def test_any_bytes_are_what_software_set_or_refused(data: bytes) -> None:
    file = a_file()
    try:
        apply = file.stage(data)
    except ValueError:
        return
    apply()
    assert file.save() == data.rstrip(b"\0")


@pytest.mark.parametrize("data", [bytes(SIZE + 1), b"\0\x10", b"\0" * 4 + b"\1"])
def test_bits_that_software_cannot_set_are_not_taken_over(data: bytes) -> None:
    with pytest.raises(ValueError, match="software cannot set"):
        a_file().stage(data)


def test_files_with_other_registers_declare_themselves_otherwise() -> None:
    other = RegisterFile(SIZE)
    other.place(0, Mixed, reset=0)
    assert a_file().declared() == a_file().declared()
    assert other.declared() != a_file().declared()
