"""`trionic serve` and a QEMU of the user's own, joined by nothing but the line that `serve` prints."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest
import trio

from device.revocation import Revocation
from tests.guest import Root
from tests.trionic.command import serving

# What is typed before the kernel has its serial port may be lost in part, so a comment comes first.
AT_THE_CONSOLE = b"""# # # # # # # # # # # # # # # #
ethtool -i eth0; ip link set eth0 up
until grep up /sys/class/net/eth0/operstate; do usleep 50000; done; exit
"""


@pytest.mark.parametrize("revocation", list(Revocation), ids=lambda way: way.value)
async def test_the_printed_line_plugs_the_card_into_a_qemu_of_ones_own(
    guest_root: Root, tmp_path: Path, serve_options: list[str | Path], revocation: Revocation
) -> None:
    options = ["--revocation", revocation.value, *serve_options]
    with serving("--socket", tmp_path / "card.sock", *options) as served:
        program, *arguments = shlex.split(served.said[-1])
        assert program == "qemu-system-x86_64"
        command: list[str | Path] = [
            *guest_root.qemu(),
            *arguments,
            *("-cpu", "max", "-nodefaults", "-display", "none", "-no-reboot", "-serial", "stdio"),
            *("-kernel", guest_root.kernel, "-initrd", guest_root.initramfs),
            *("-append", "console=ttyS0 no_timer_check quiet"),
        ]
        with trio.fail_after(60):
            guest = await trio.run_process(
                command,
                env=os.environ | guest_root.environment,
                stdin=AT_THE_CONSOLE,
                capture_stdout=True,
                stderr=subprocess.STDOUT,
            )
    assert b"driver: virtio_net" in guest.stdout
    assert b"\nup\n" in guest.stdout.replace(b"\r", b"")
