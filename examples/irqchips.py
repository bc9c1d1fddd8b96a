"""A card whose interrupt line leads through a machine's irqchip, and a machine that takes another irqchip.

The machine has a pair of 8259A and an I/O APIC, one of them active, and a processor that runs the driver's
handler. Frames go round all the while.
"""

import tempfile
from contextlib import AsyncExitStack
from pathlib import Path

import trio

import trionic

INPUT = 11


async def main() -> None:
    """Serve a card on the loopback port and change the irqchip under its driver ten times."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "card.sock"
        async with trio.open_nursery() as nursery:
            await nursery.start(trionic.serve_cards, trionic.ServeConfig((trionic.CardConfig(path),)))
            await play(path)
            nursery.cancel_scope.cancel()


async def play(path: Path) -> None:
    """The machine, the card's driver in slot 0, and the changes."""
    async with AsyncExitStack() as stack:
        pic = await stack.enter_async_context(trionic.open_pic())
        ioapic = await stack.enter_async_context(trionic.open_ioapic())
        routes = [trionic.IntxRoute(trionic.IntxMode.ENABLED, INPUT)]
        controller = trionic.InterruptController(pic, routes)
        cpu = await stack.enter_async_context(trionic.open_processor(controller))
        session = await stack.enter_async_context(trionic.connect(path))
        nic = await stack.enter_async_context(
            trionic.open_net(session, wiring=trionic.Wiring.INTX, slot=trionic.Slot(cpu))
        )
        assert nic.mac is not None
        for change in range(10):
            for number in range(100):
                frame = nic.mac + nic.mac + b"\x88\xb5" + number.to_bytes(50, "big")
                await nic.send(frame)
                assert await nic.receive() == frame
            await controller.activate(pic if change % 2 else ioapic)
        assert nic.line is not None
        print(f"1000 frames out and back, {nic.line.counters.changes} changes of the irqchip")


trio.run(main)
