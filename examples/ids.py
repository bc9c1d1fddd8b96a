"""Reads the identity of any vfio-user device: `python examples/ids.py /tmp/nic.sock`."""

import sys

import trio

import trionic


async def main(path: str) -> None:
    """Print vendor and device as lspci -n would."""
    async with trionic.connect(path) as session:
        identity = await session.region_read(trionic.RegionIndex.CONFIG, 0, 4)
        vendor, device = (int.from_bytes(identity[at : at + 2], "little") for at in (0, 2))
        print(f"{vendor:04x}:{device:04x}")


trio.run(main, sys.argv[1])
