"""A card and its driver in one process: frames go out through virtqueues and come back."""

import tempfile
from pathlib import Path

import trio

import trionic


async def main() -> None:
    """Serve a card on the loopback port, drive it over the socket, count what comes back."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "card.sock"
        settings = trionic.ServeConfig((trionic.CardConfig(path),))
        await play(path, settings)


async def play(path: Path, settings: trionic.ServeConfig) -> None:
    """Serve, drive, end."""
    async with trio.open_nursery() as nursery:
        await nursery.start(trionic.serve_cards, settings)
        async with trionic.connect(path) as session, trionic.open_net(session) as nic:
            assert nic.mac is not None
            for number in range(100):
                frame = nic.mac + nic.mac + b"\x88\xb5" + number.to_bytes(50, "big")
                await nic.send(frame)
                assert await nic.receive() == frame
        print("100 frames out and back")
        nursery.cancel_scope.cancel()


trio.run(main)
