import errno
import os
from types import SimpleNamespace

import pytest
import trio
import trio.testing

from server._resample import MOST_IN_A_ROW, REST_S
from tests.server.raw import EVENTFD, INTX, MASK, NONE, SET_IRQS, TRIGGER, UNMASK, RawClient, irqs
from tests.server.world import World


async def test_a_watch_that_there_is_no_descriptor_for_is_refused(
    served: World, client: RawClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_left(fd: int) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    trigger, resample = os.eventfd(0), os.eventfd(0)
    await client.do(SET_IRQS, irqs(EVENTFD | TRIGGER, INTX, 0, 1), [trigger])
    with monkeypatch.context() as patch:
        patch.setattr("server._resample.os", SimpleNamespace(dup=none_left, close=os.close))
        assert await client.refused(SET_IRQS, irqs(EVENTFD | UNMASK, INTX, 0, 1), [resample]) == errno.EMFILE
    assert served.function.unmask_fd is None
    await client.do(SET_IRQS, irqs(EVENTFD | UNMASK, INTX, 0, 1), [resample])
    os.close(trigger)
    os.close(resample)


async def test_a_mask_by_message_comes_after_what_the_eventfd_said_before(
    served: World, client: RawClient
) -> None:
    trigger, resample = os.eventfd(0, os.EFD_NONBLOCK), os.eventfd(0, os.EFD_NONBLOCK)
    await client.do(SET_IRQS, irqs(EVENTFD | TRIGGER, INTX, 0, 1), [trigger])
    await client.do(SET_IRQS, irqs(EVENTFD | UNMASK, INTX, 0, 1), [resample])
    served.function.interrupts.intx(True)
    assert os.eventfd_read(trigger) == 1
    os.eventfd_write(resample, 1)
    await client.do(SET_IRQS, irqs(NONE | MASK, INTX, 0, 1))
    assert os.eventfd_read(trigger) == 1, "it was unmasked while the line was high"
    served.function.interrupts.intx(False)
    await trio.testing.wait_all_tasks_blocked()
    served.function.interrupts.intx(True)
    await trio.testing.wait_all_tasks_blocked()
    with pytest.raises(BlockingIOError):
        os.eventfd_read(trigger)
    await client.do(SET_IRQS, irqs(NONE | UNMASK, INTX, 0, 1))
    assert os.eventfd_read(trigger) == 1
    os.close(trigger)
    os.close(resample)


@pytest.mark.parametrize("which", ["a semaphore", "the trigger itself"])
async def test_an_eventfd_that_never_runs_dry_is_read_at_leisure(
    served: World, client: RawClient, autojump_clock: trio.testing.MockClock, which: str
) -> None:
    trigger, semaphore = os.eventfd(0, os.EFD_NONBLOCK), os.eventfd(1 << 31, os.EFD_SEMAPHORE)
    resample = semaphore if which == "a semaphore" else trigger
    await client.do(SET_IRQS, irqs(EVENTFD | TRIGGER, INTX, 0, 1), [trigger])
    await client.do(SET_IRQS, irqs(EVENTFD | UNMASK, INTX, 0, 1), [resample])
    lines = served.function.interrupts.lines
    before = lines.signals
    served.function.interrupts.intx(True)
    for _ in range(10 * MOST_IN_A_ROW):
        await trio.lowlevel.checkpoint()
    assert lines.signals - before == 1 + MOST_IN_A_ROW, "one by the line, and one by each reading"
    await trio.sleep(2.5 * REST_S)
    assert lines.signals - before == 1 + 3 * MOST_IN_A_ROW, "it is heard, all the same"
    await client.read(7, 0, 4)
    os.close(trigger)
    os.close(semaphore)
