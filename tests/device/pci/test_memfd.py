"""Bytes of a file in memory that a stranger may have, too."""

import fcntl
import os
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from device.pci._memfd import BLOCK, PAGE, Memfd, copy
from tests.descriptors import no_fd_leaks

SIZE = 4 * BLOCK


@pytest.fixture
def file() -> Iterator[Memfd]:
    made = Memfd("file", SIZE)
    yield made
    made.close()


@pytest.fixture
def stranger(file: Memfd) -> Iterator[int]:
    fd = file.share()
    yield fd
    os.close(fd)


def memory_of(fd: int) -> int:
    """Bytes of memory that the file has."""
    return os.fstat(fd).st_blocks * 512


def test_what_a_stranger_has_cut_off_reads_all_ones(file: Memfd, stranger: int) -> None:
    file.write(PAGE - 2, b"abcd")
    os.ftruncate(stranger, PAGE)
    assert file.read(PAGE - 3, 6) == b"\0ab\xff\xff\xff"
    assert file.read(SIZE - 1, 1) == b"\xff"


def test_a_write_does_not_make_a_file_longer(file: Memfd, stranger: int) -> None:
    os.ftruncate(stranger, PAGE)
    file.write(PAGE - 2, b"abcd")
    file.write(SIZE - 4, b"abcd")
    assert os.fstat(stranger).st_size == PAGE
    assert file.read(PAGE - 2, 2) == b"ab"


def test_a_write_goes_where_it_should_whatever_flags_a_stranger_sets(file: Memfd, stranger: int) -> None:
    fcntl.fcntl(stranger, fcntl.F_SETFL, os.O_APPEND)
    os.lseek(stranger, 77, os.SEEK_SET)
    file.write(PAGE, b"here")
    assert file.read(PAGE, 4) == b"here"
    assert os.fstat(stranger).st_size == SIZE


@pytest.mark.parametrize("seal", [fcntl.F_SEAL_SHRINK, fcntl.F_SEAL_GROW, fcntl.F_SEAL_WRITE, 0x10])
def test_a_stranger_cannot_forbid_anything(file: Memfd, stranger: int, seal: int) -> None:
    with pytest.raises(PermissionError):
        fcntl.fcntl(stranger, fcntl.F_ADD_SEALS, seal)
    file.cut(0)
    file.cut(SIZE)


def test_looking_for_memory_makes_none(file: Memfd, stranger: int) -> None:
    file.write(BLOCK + PAGE, b"x")
    before = memory_of(stranger)
    assert list(file.extents(0, SIZE)) == [(BLOCK + PAGE, BLOCK + 2 * PAGE)]
    assert file.read(0, SIZE).count(b"x") == 1
    assert memory_of(stranger) == before


def test_a_punched_page_gives_its_memory_back_and_reads_zero(file: Memfd, stranger: int) -> None:
    file.write(0, b"x" * 3 * PAGE)
    before = memory_of(stranger)
    file.punch(PAGE, 2 * PAGE)
    assert file.read(0, 3 * PAGE) == b"x" * PAGE + bytes(PAGE) + b"x" * PAGE
    assert memory_of(stranger) == before - PAGE
    file.punch(PAGE, PAGE)


def test_a_file_that_a_stranger_has_cut_can_still_be_punched(file: Memfd, stranger: int) -> None:
    os.ftruncate(stranger, 0)
    file.punch(0, SIZE)
    os.ftruncate(stranger, SIZE)
    assert file.read(0, SIZE) == bytes(SIZE)


def test_memory_is_looked_for_no_further_than_asked(file: Memfd, stranger: int) -> None:
    os.ftruncate(stranger, 4 * SIZE)
    os.pwrite(stranger, b"x" * (2 * SIZE), SIZE - PAGE)
    assert list(file.extents(0, SIZE)) == [(SIZE - PAGE, SIZE)]
    assert file.blocks(0, SIZE) == [(SIZE - PAGE, SIZE)]
    assert list(file.extents(0, SIZE - PAGE)) == []


def test_a_file_that_ends_within_a_page_has_all_of_the_page(file: Memfd, stranger: int) -> None:
    file.write(0, b"x" * (2 * PAGE))
    os.ftruncate(stranger, PAGE + 1)
    assert list(file.extents(0, SIZE)) == [(0, 2 * PAGE)]


@pytest.mark.parametrize("answer", ["hole", "gone"])
def test_a_stranger_that_takes_pages_away_while_they_are_looked_for_holds_nobody_up(
    file: Memfd, monkeypatch: pytest.MonkeyPatch, answer: str
) -> None:
    file.write(0, b"x" * 8 * PAGE)
    seek = os.lseek

    def raced(fd: int, at: int, how: int) -> int:
        if how != os.SEEK_HOLE:
            return seek(fd, at, how)
        if answer == "gone":
            raise OSError
        return at

    monkeypatch.setattr(os, "lseek", raced)
    assert list(file.extents(0, SIZE)) == [(at, at + PAGE) for at in range(0, 8 * PAGE, PAGE)]


def test_a_huge_file_with_little_in_it_is_looked_through_in_no_time() -> None:
    with_little = Memfd("huge", 1 << 44)
    for at in (0, 1 << 33, (1 << 44) - PAGE):
        with_little.write(at, b"x")
    assert list(with_little.extents(0, 1 << 44)) == [(at, at + PAGE) for at in (0, 1 << 33, (1 << 44) - PAGE)]
    assert [start for start, _ in with_little.blocks(0, 1 << 44)] == [0, 1 << 33, (1 << 44) - PAGE]
    with_little.close()


@given(st.sets(st.integers(0, SIZE // PAGE - 1), max_size=40), st.integers(0, 4), st.integers(0, 4))
def test_blocks_hold_every_page_of_memory_and_none_is_longer_than_a_block(
    pages: set[int], first: int, last: int
) -> None:
    file, target = Memfd("file", SIZE), Memfd("target", SIZE)
    start, end = first * BLOCK, last * BLOCK
    for page in pages:
        file.write(page * PAGE, b"x")
    blocks = file.blocks(start, end)
    assert all(0 < until - at <= BLOCK for at, until in blocks)
    for at, until in blocks:
        copy(file, target, at, until)
    there = {at // PAGE for at, until in target.extents(0, SIZE) for at in range(at, until, PAGE)}
    assert there == {page for page in pages if start <= page * PAGE < end}
    assert all(target.read(page * PAGE, 2) == b"x\0" for page in there)
    file.close()
    target.close()


def test_what_cannot_be_made_leaves_no_descriptor() -> None:
    with no_fd_leaks(), pytest.raises(OSError, match="Cannot allocate memory"):
        Memfd("too large for any process", 1 << 60)
