"""Serving within this process, so that time can pass at once."""

import os
import signal
from pathlib import Path

import pytest
import trio
import trio.testing

from server import Listener
from tests.server.raw import connect
from trionic.config import CardConfig, ServeConfig
from trionic.serving import _serve_until_signal


async def test_clients_that_do_not_let_go_in_time_are_left(
    tmp_path: Path, autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "card.sock"
    settings = ServeConfig((CardConfig(path),), release_s=25)
    ready = trio.Event()
    with Listener(path) as listener:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_serve_until_signal, settings, [listener], ready.set)
            await ready.wait()
            client = await connect(path)
            (await client.negotiate()).close()
            start = trio.current_time()
            os.kill(os.getpid(), signal.SIGTERM)
        assert trio.current_time() - start == 25
        assert await client.hung_up()
        client.close()
    assert "clients did not let go" in caplog.text
