"""The memory of a BAR whose mappings can be taken away, and given back."""

import errno
import fcntl
import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from device.errors import DeviceError
from device.pci._memfd import BLOCK
from device.pci.memory_bar import MemoryBar
from device.revocation import Revocation
from tests.descriptors import no_fd_leaks
from tests.device.pci.mapped import Mapping, mapped

PAGE = mmap.PAGESIZE
SIZE = 4 * BLOCK

# Maps the file, says so, and touches it when told to.
TOUCH = "import mmap, sys; m = mmap.mmap({fd}, {size}); print(flush=True); input(); print(m[{offset}])"


@pytest.fixture
def bar() -> Iterator[MemoryBar]:
    made = MemoryBar(2, SIZE, revocation=Revocation.ENFORCED)
    yield made
    made.close()


@pytest.fixture
def client(bar: MemoryBar) -> Iterator[Mapping]:
    """A mapping of the whole BAR, which is decoded now."""
    bar.decode(True)
    with mapped(bar.fd, SIZE) as mapping:
        yield mapping


def memory_of(fd: int) -> int:
    return os.fstat(fd).st_blocks * 512


def touched_by_a_child(bar: MemoryBar, offset: int, *, decoded: bool) -> int:
    """The exit status of a process that mapped the BAR and touches it afterwards."""
    bar.decode(True)
    code = TOUCH.format(fd=bar.fd, size=SIZE, offset=offset)
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=[bar.fd]
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        bar.decode(decoded)
        child.communicate(b"\n")
        return child.returncode


# --- decoded or not


def test_at_power_on_nothing_of_it_is_mapped(bar: MemoryBar) -> None:
    assert os.fstat(bar.fd).st_size == 0
    assert bar.mmap_areas == ((0, SIZE),)


def test_access_after_disable_is_sigbus_in_a_process_that_has_it_mapped(bar: MemoryBar) -> None:
    assert touched_by_a_child(bar, 5 * PAGE, decoded=False) == -signal.SIGBUS
    assert touched_by_a_child(bar, 5 * PAGE, decoded=True) == 0


def test_re_enabled_the_same_pages_are_there_in_the_same_mapping(bar: MemoryBar, client: Mapping) -> None:
    for offset in (0, PAGE - 1, BLOCK, SIZE - 1):
        assert client.store(offset, b"x")
    bar.decode(False)
    assert [client.load(offset) for offset in (0, BLOCK, SIZE - 1)] == [None] * 3
    assert not client.store(0, b"y")
    bar.decode(True)
    assert [client.load(offset) for offset in (0, 1, PAGE - 1, BLOCK, SIZE - 1)] == [
        *(b"x", b"\0", b"x", b"x", b"x")
    ]


def test_the_device_reads_and_writes_while_nothing_is_mapped(bar: MemoryBar, client: Mapping) -> None:
    client.store(10, b"before")
    bar.decode(False)
    assert bar.read(10, 6) == b"before"
    bar.write(SIZE - 5, b"after")
    bar.decode(True)
    assert client.load(SIZE - 5, 5) == b"after"


def test_only_pages_with_something_in_them_are_kept_aside(bar: MemoryBar, client: Mapping) -> None:
    for page in (1, 3, SIZE // PAGE - 1):
        client.store(page * PAGE, b"x")
    bar.decode(False)
    assert memory_of(bar.fd) == 0
    kept = [page for start, end in bar.extents() for page in range(start // PAGE, end // PAGE)]
    assert kept == [1, 3, SIZE // PAGE - 1]
    bar.decode(True)
    assert memory_of(bar.fd) == 3 * PAGE


def test_a_huge_bar_with_little_in_it_is_switched_in_no_time() -> None:
    bar = MemoryBar(2, 1 << 40, revocation=Revocation.ENFORCED)
    places = (0, 1 << 33, (1 << 40) - 4)
    for toggle in range(10):
        bar.decode(True)
        for place in places:
            bar.write(place, bytes([toggle]))
        bar.decode(False)
        assert [bar.read(place, 1) for place in places] == [bytes([toggle])] * 3
    assert sum(end - start for start, end in bar.extents()) == 3 * PAGE
    bar.close()


def test_a_bar_smaller_than_a_page_keeps_what_is_mapped_beyond_it() -> None:
    bar = MemoryBar(2, 0x100, revocation=Revocation.ENFORCED)
    bar.decode(True)
    with mapped(bar.fd, PAGE) as client:
        client.store(0x80, b"in")
        client.store(0x800, b"beyond")
        bar.decode(False)
        assert client.load(0x80) is None
        bar.decode(True)
        assert (client.load(0x80, 2), client.load(0x800, 6)) == (b"in", b"beyond")
    bar.close()


def test_memory_that_backs_a_part_of_the_bar_is_taken_back_and_given() -> None:
    bar = MemoryBar(2, SIZE, revocation=Revocation.ENFORCED, backing=3 * PAGE)
    bar.decode(True)
    bar.write(3 * PAGE - 1, b"xy")
    assert os.fstat(bar.fd).st_size == 3 * PAGE
    bar.decode(False)
    assert bar.read(3 * PAGE - 1, 3) == b"x\xff\xff"
    bar.close()


# --- resets


def test_a_reset_takes_it_away_and_brings_back_zeros(bar: MemoryBar, client: Mapping) -> None:
    client.store(PAGE, b"x")
    bar.clear()
    assert client.load(PAGE) is None
    assert bar.read(PAGE, 1) == b"\0"
    bar.decode(True)
    assert client.load(PAGE) == b"\0"


def test_what_was_kept_aside_does_not_outlive_a_reset(bar: MemoryBar, client: Mapping) -> None:
    client.store(PAGE, b"x")
    bar.decode(False)
    bar.clear()
    assert list(bar.extents()) == []
    bar.decode(True)
    assert client.load(PAGE) == b"\0"


def test_a_lost_clients_mapping_faults_for_ever(bar: MemoryBar, client: Mapping) -> None:
    client.store(PAGE, b"secret")
    bar.renew()
    bar.decode(True)
    assert client.load(PAGE) is None
    assert bar.read(PAGE, 6) == bytes(6)


def test_a_mapping_that_outlives_the_card_faults(bar: MemoryBar, client: Mapping) -> None:
    shared = os.dup(bar.fd)
    bar.renew()
    assert os.fstat(shared).st_size == 0
    os.close(shared)
    assert client.load(0) is None


# --- what clients do to the file


@pytest.mark.parametrize("seal", [fcntl.F_SEAL_SHRINK, fcntl.F_SEAL_GROW, fcntl.F_SEAL_WRITE, 0x10])
def test_a_client_cannot_seal_it_against_being_taken_back(bar: MemoryBar, client: Mapping, seal: int) -> None:
    with pytest.raises(PermissionError):
        fcntl.fcntl(bar.fd, fcntl.F_ADD_SEALS, seal)
    client.store(0, b"x")
    bar.decode(False)
    assert client.load(0) is None
    bar.decode(True)
    assert client.load(0) == b"x"


def test_a_client_that_cuts_the_file_harms_itself_alone(bar: MemoryBar, client: Mapping) -> None:
    client.store(0, b"x")
    client.store(2 * PAGE, b"y")
    os.ftruncate(bar.fd, PAGE)
    assert bar.read(0, 1) == b"x"
    assert bar.read(2 * PAGE, 3) == b"\xff" * 3
    bar.write(2 * PAGE, b"dropped")
    assert os.fstat(bar.fd).st_size == PAGE
    assert list(bar.extents()) == [(0, PAGE)]
    bar.decode(False)
    bar.decode(True)
    assert (client.load(0), client.load(2 * PAGE)) == (b"x", b"\0")


def test_what_was_kept_aside_once_does_not_come_back_for_what_a_client_took_away(
    bar: MemoryBar, client: Mapping
) -> None:
    client.store(PAGE, b"old")
    bar.decode(False)
    bar.decode(True)
    os.ftruncate(bar.fd, 0)
    bar.decode(False)
    bar.decode(True)
    assert client.load(PAGE, 3) == bytes(3)


def test_a_client_that_makes_the_file_longer_gains_nothing(bar: MemoryBar, client: Mapping) -> None:
    os.ftruncate(bar.fd, 4 * SIZE)
    os.pwrite(bar.fd, b"x" * PAGE, 3 * SIZE)
    bar.decode(False)
    assert (os.fstat(bar.fd).st_size, memory_of(bar.fd)) == (0, 0)
    assert list(bar.extents()) == []
    bar.decode(True)
    assert os.fstat(bar.fd).st_size == SIZE
    assert client.load(0) == b"\0"


def test_what_a_client_writes_into_a_file_that_it_grew_itself_is_never_the_cards(
    bar: MemoryBar, client: Mapping
) -> None:
    client.store(0, b"card")
    bar.decode(False)
    os.ftruncate(bar.fd, SIZE)
    assert client.store(0, b"fake")
    assert client.store(PAGE, b"fake")
    assert bar.read(0, 4) == b"card"
    bar.decode(True)
    assert (client.load(0, 4), client.load(PAGE, 4)) == (b"card", bytes(4))


def test_flags_that_a_client_sets_do_not_move_what_is_given_back(bar: MemoryBar, client: Mapping) -> None:
    fcntl.fcntl(bar.fd, fcntl.F_SETFL, os.O_APPEND)
    for place in (0, BLOCK + PAGE, SIZE - 1):
        bar.write(place, b"x")
    bar.decode(False)
    bar.decode(True)
    assert [client.load(place) for place in (0, BLOCK + PAGE, SIZE - 1)] == [b"x"] * 3
    assert os.fstat(bar.fd).st_size == SIZE


def test_a_client_that_cuts_the_file_while_it_is_kept_aside_holds_nobody_up(
    bar: MemoryBar, client: Mapping, monkeypatch: pytest.MonkeyPatch
) -> None:
    bar.write(0, b"x" * SIZE)
    read = os.pread

    def raced(fd: int, count: int, offset: int) -> bytes:
        os.ftruncate(bar.fd, 2 * PAGE)
        return read(fd, count, offset)

    with monkeypatch.context() as racing:
        racing.setattr(os, "pread", raced)
        bar.decode(False)
    assert client.load(0) is None
    assert bar.read(0, 2 * PAGE) == b"x" * 2 * PAGE


# --- when memory is short


class Short:
    """No memory for anything after a while."""

    def __init__(self, writes: int) -> None:
        self.left = writes
        self._write = os.pwrite

    def __call__(self, fd: int, data: bytes, offset: int) -> int:
        self.left -= 1
        if self.left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self._write(fd, data, offset)


@pytest.mark.parametrize("writes", [0, 1, 3])
def test_without_memory_to_keep_it_aside_it_is_taken_back_all_the_same(
    bar: MemoryBar, client: Mapping, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    bar.write(0, b"x" * SIZE)
    with monkeypatch.context() as short:
        short.setattr(os, "pwrite", Short(writes))
        with pytest.raises(DeviceError) as refusal:
            bar.decode(False)
    assert refusal.value.errno == errno.EIO
    assert [client.load(offset) for offset in (0, SIZE - 1)] == [None, None]
    kept = SIZE - writes * BLOCK
    assert bar.read(0, SIZE) == bytes(kept) + b"x" * (SIZE - kept)
    bar.decode(True)
    assert client.load(SIZE - 1) == (b"x" if writes else b"\0")


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("writes", [0, 1, 3])
def test_without_memory_to_give_it_back_nothing_is_lost_and_the_next_time_it_is_there(
    bar: MemoryBar, client: Mapping, monkeypatch: pytest.MonkeyPatch, writes: int, dense: bool
) -> None:
    """Blocks are full, or hold a page each."""
    for start in range(0, SIZE, BLOCK):
        bar.write(start, bytes([1 + start // BLOCK]) * (BLOCK if dense else PAGE))
    content = bar.read(0, SIZE)
    bar.decode(False)
    with monkeypatch.context() as short:
        short.setattr(os, "pwrite", Short(writes))
        with pytest.raises(DeviceError) as refusal:
            bar.decode(True)
    assert refusal.value.errno == errno.EIO
    assert client.load(SIZE - 1) is None
    assert bar.read(0, SIZE) == content
    bar.decode(True)
    assert bar.read(0, SIZE) == content
    assert client.load(SIZE - 1) == content[-1:]


def test_a_bar_that_cannot_be_made_leaves_no_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(path: str, flags: int) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    for revocation in Revocation:
        with no_fd_leaks(), monkeypatch.context() as full:
            full.setattr(os, "open", fails)
            with pytest.raises(OSError, match="Too many open files"):
                MemoryBar(2, SIZE, revocation=revocation)


def test_a_bar_that_cannot_be_renewed_keeps_what_it_has(
    bar: MemoryBar, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(name: str, flags: int) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with no_fd_leaks(), monkeypatch.context() as full:
        full.setattr(os, "memfd_create", fails)
        with pytest.raises(OSError, match="Too many open files"):
            bar.renew()
    bar.decode(True)
    bar.write(0, b"x")
    assert bar.read(0, 1) == b"x"


# --- poison


def test_a_poisoned_page_answers_eio_and_its_neighbours_do_not(bar: MemoryBar) -> None:
    bar.write(PAGE - 4, b"x" * (PAGE + 8))
    bar.poison(PAGE + 17)
    for offset, count in ((PAGE, 1), (2 * PAGE - 1, 1), (PAGE - 1, 2), (2 * PAGE - 1, 2), (0, SIZE)):
        with pytest.raises(DeviceError) as refusal:
            bar.read(offset, count)
        assert refusal.value.errno == errno.EIO
        with pytest.raises(DeviceError) as refusal:
            bar.write(offset, bytes(count))
        assert refusal.value.errno == errno.EIO
    assert bar.read(PAGE - 4, 4) == bar.read(2 * PAGE, 4) == b"x" * 4


def test_no_mapping_reaches_a_poisoned_page_or_what_follows_it(bar: MemoryBar, client: Mapping) -> None:
    for page in range(4):
        client.store(page * PAGE, b"%d" % page)
    bar.poison(2 * PAGE)
    assert [client.load(page * PAGE) for page in range(4)] == [b"0", b"1", None, None]
    assert bar.read(3 * PAGE, 1) == b"3"
    bar.write(3 * PAGE, b"t")
    bar.poison(PAGE)
    assert [client.load(page * PAGE) for page in range(4)] == [b"0", None, None, None]
    bar.repair()
    assert [client.load(page * PAGE) for page in range(4)] == [b"0", b"\0", b"\0", b"t"]


def test_poison_stays_through_every_reset_and_goes_with_repair(bar: MemoryBar) -> None:
    bar.decode(True)
    bar.poison(PAGE)
    for reset in (bar.clear, bar.renew):
        reset()
        bar.decode(True)
        assert os.fstat(bar.fd).st_size == PAGE
        with pytest.raises(DeviceError):
            bar.read(PAGE, 1)
    bar.repair()
    assert bar.read(PAGE, 1) == b"\0"
    assert os.fstat(bar.fd).st_size == SIZE


def test_poison_while_nothing_is_mapped_counts_when_it_is_again(bar: MemoryBar, client: Mapping) -> None:
    bar.decode(False)
    bar.poison(PAGE)
    bar.repair()
    bar.poison(2 * PAGE)
    assert os.fstat(bar.fd).st_size == 0
    bar.decode(True)
    assert [client.load(page * PAGE) for page in range(3)] == [b"\0", b"\0", None]


@pytest.mark.parametrize("offset", [-1, 3 * PAGE, SIZE, 1 << 63])
def test_where_there_is_no_memory_nothing_is_poisoned(offset: int) -> None:
    bar = MemoryBar(2, SIZE, revocation=Revocation.ENFORCED, backing=3 * PAGE)
    with pytest.raises(DeviceError) as refusal:
        bar.poison(offset)
    assert refusal.value.errno == errno.EINVAL
    bar.close()
