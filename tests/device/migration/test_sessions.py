"""What one read of a session may cost, whatever the memory is like."""

from collections.abc import Iterator

import pytest

from device.migration.memory import RUN
from device.migration.sessions import MAX_RUNS_IN_VAIN, Outgoing
from device.pci.memory_bar import MemoryBar

SIZE = 4 * MAX_RUNS_IN_VAIN * RUN


class Counted(MemoryBar):
    """Memory that counts the runs that were looked at."""

    looked_at = 0

    def read(self, offset: int, count: int) -> bytes:
        self.looked_at += 1
        return super().read(offset, count)


@pytest.fixture
def bar() -> Iterator[Counted]:
    made = Counted(2, SIZE, sealed=True)
    yield made
    made.close()


def everything(session: Outgoing) -> int:
    total = 0
    while got := len(session.read(1 << 20)):
        total += got
    return total


def test_a_read_ahead_looks_at_a_part_of_unchanged_memory_and_the_next_at_more(bar: Counted) -> None:
    for offset in range(0, SIZE, RUN):
        bar.write(offset, b"x")
    session = Outgoing(b"", [bar])
    assert everything(session) > SIZE // RUN * 4096
    bar.write(SIZE - 1, b"y")
    bar.looked_at = reads = 0
    while not session.read(1):
        reads += 1
        assert bar.looked_at == reads * MAX_RUNS_IN_VAIN
    assert (reads, bar.looked_at) == (2, 3 * MAX_RUNS_IN_VAIN)  # one part was looked at before


def test_a_read_after_the_stop_gives_less_only_at_the_end(bar: Counted) -> None:
    for offset in range(0, SIZE, RUN):
        bar.write(offset, b"x")
    session = Outgoing(b"", [bar])
    everything(session)
    bar.write(SIZE - 1, b"y")
    session.finish({})
    assert len(session.read(4096)) == 4096
    assert 0 < len(session.read(4096)) < 4096
    assert session.read(4096) == b""
