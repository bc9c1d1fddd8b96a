"""QEMU as the client that is watched: what it does against the specification is known, and no more."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from conformance import (
    CLIENT_CHECKS,
    Judged,
    Verdict,
    judge,
    listening,
    read_expectations,
    watch,
)
from tests.guest import Root, boot

EXPECTED = Path(__file__).parents[1] / "conformance" / "qemu.toml"

# The device is let do DMA, and is looked at until it has asked what it wants to know.
SCRIPT = """
device=$(grep -l 0x0f0c /sys/bus/pci/devices/*/device)
config=${device%/device}/config
printf '\\006' | dd of=$config bs=1 seek=4 count=1 conv=notrunc 2>/dev/null
for again in 1 2 3 4 5 6 7 8 9 10; do dd if=$config of=/dev/null bs=1 count=64 2>/dev/null; done
"""

# What QEMU says of a device without a ROM, and of the command that nobody has.
SAID = ["unknown cmd 30583", "Device ROM size is zero", "Device option ROM", "Skip option ROM probe"]


@pytest.mark.parametrize("shared", [True, False])
async def test_qemu_differs_where_it_is_known_to(guest_root: Root, tmp_path: Path, shared: bool) -> None:
    path = tmp_path / "watch.sock"
    expected = read_expectations(EXPECTED, {check.id for check in CLIENT_CHECKS})
    judged: list[Judged] = []

    async def look() -> None:
        judged.extend(judge(result, expected) for result in await watch(listener, patience=30))

    with listening(path) as listener:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(look)
            async with boot(SCRIPT, [path], root=guest_root, shared=shared, expected_warnings=SAID) as guest:
                await guest.wait()
    assert [(each.result.check.id, each.result.detail) for each in judged if not each.verdict.good] == []
    passed = {each.result.check.id for each in judged if each.verdict is Verdict.PASSED}
    assert ("client-dma.read-data" if shared else "client-dma.without-descriptor") in passed
    assert len(passed) > 30
