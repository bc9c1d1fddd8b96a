"""What a session may cost, in time and memory, whatever the client does."""

import gc
import tracemalloc
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest

from device.errors import DeviceError
from device.migration.memory import RUN
from device.migration.sessions import MAX_RUNS_IN_VAIN, Incoming, Outgoing
from device.migration.stream import MAX_PAYLOAD
from device.pci.memory_bar import MemoryBar

SIZE = 4 * MAX_RUNS_IN_VAIN * RUN


class Counted(MemoryBar):
    """Memory that counts the runs that were looked at."""

    looked_at = 0

    def load(self, offset: int, count: int) -> bytes:
        self.looked_at += 1
        return super().load(offset, count)


@pytest.fixture
def bar() -> Iterator[Counted]:
    made = Counted(2, SIZE)
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


def test_nothing_is_kept_of_a_state_that_was_refused(bar: Counted) -> None:
    def stage(data: bytes) -> Callable[[], None]:
        raise ValueError("no part is like that")

    part = SimpleNamespace(save=lambda: bytes(MAX_PAYLOAD), stage=stage)
    source = Outgoing(b"", [])
    source.finish({b"PART": part})
    stream = source.read(2 * MAX_PAYLOAD)
    session = Incoming(b"", [bar], {b"PART": part})
    gc.disable()  # what only a collection would free can be piled up
    tracemalloc.start()
    try:
        for _ in range(2):
            with pytest.raises(DeviceError, match="no part is like that"):
                session.write(stream)
        assert tracemalloc.get_traced_memory()[0] < 1 << 20
    finally:
        tracemalloc.stop()
        gc.enable()
        session.close()
