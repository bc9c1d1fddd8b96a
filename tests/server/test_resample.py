import errno
import os
from types import SimpleNamespace

import pytest

from tests.server.raw import EVENTFD, INTX, SET_IRQS, TRIGGER, UNMASK, RawClient, irqs
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
