"""A card whose queues and packets lie in another card's memory, without a byte of the host's.

The first card is in a container, as behind an IOMMU, where the lender's memory is mapped. When the lender is
reset that is taken away first, from this process and from the card that works there. The driver is told, and
starts anew when it is back.
"""

import tempfile
from pathlib import Path

import trio

import trionic


async def main() -> None:
    """Serve two cards on loopback ports and let the first one live in the second one's BAR 2."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / "card.sock", Path(folder) / "lender.sock"]
        async with trio.open_nursery() as nursery:
            cards = tuple(trionic.CardConfig(path) for path in paths)
            await nursery.start(trionic.serve_cards, trionic.ServeConfig(cards))
            await play(*paths)
            nursery.cancel_scope.cancel()


async def play(card: Path, lender: Path) -> None:
    """Frames, a reset of the lender, and frames again."""
    async with (
        trionic.connect(card) as session,
        trionic.connect(lender) as lending,
        trionic.open_container() as container,
    ):
        await container.attach(session)
        control = trionic.PciControl(lending, await trionic.read_config(lending))
        await control.set_command(trionic.Command.MEMORY)
        with trionic.BarMapping(lending.regions[trionic.RegionIndex.BAR2], lending.decoding) as mapping:
            async with (
                trionic.bar_memory(container, mapping, size=2 << 20) as memory,
                trionic.open_net(session, memory=memory) as nic,
            ):
                await exchange(nic)
                await lending.reset()
                try:
                    await nic.receive()
                except trionic.DeviceError as error:
                    print(error)
                await control.set_command(trionic.Command.MEMORY)
                await nic.reset()
                await exchange(nic)


async def exchange(nic: trionic.NetDriver) -> None:
    """A hundred frames out and back."""
    assert nic.mac is not None
    for number in range(100):
        frame = nic.mac + nic.mac + b"\x88\xb5" + number.to_bytes(50, "big")
        await nic.send(frame)
        assert await nic.receive() == frame
    print("100 frames out and back")


trio.run(main)
