"""A guest with somebody at its console, as ``make guest`` boots it."""

from __future__ import annotations

import subprocess
import sys
from functools import partial

import trio

from tests.guest import Root
from tests.guest._root import IMAGE_FILES

PATIENCE = 60  # seconds for some five on an idle machine
PROMPT = "# \x1b[6n"  # the shell's, and its question where the cursor is


async def _type(lines: list[str], *arguments: str) -> str:
    """Boot a guest with a card on loopback, type a line at each prompt, and give all that was said.

    `arguments` are for ``python -m tests.guest shell``.
    """
    said = ""
    command = [sys.executable, "-m", "trionic", "guest", "--port", "loopback", "--", *arguments]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:
            process = await nursery.start(partial(trio.run_process, command, **pipes))
            async for chunk in process.stdout:
                said += chunk.decode(errors="replace")
                if lines and said.endswith(PROMPT):
                    await process.stdin.send_all(f"{lines.pop(0)}\n".encode())
    return said.replace("\r", "")


async def test_a_guest_does_what_its_greeting_proposes_and_has_what_was_asked_for(guest_root: Root) -> None:
    greeting = (IMAGE_FILES / "motd").read_text(encoding="utf-8")
    proposed = [line.strip() for line in greeting.splitlines() if line.startswith("    ")]
    assert len(proposed) == 2
    looks = ["basename $(readlink $(card)/driver)", "ethtool -i $(nic)", "ls /sys/class/iommu"]
    looks += ["qemu-system-x86_64 --version", "exit"]
    said = await _type([*proposed, *looks], "--iommu", "--with", "qemu")
    assert greeting in said
    assert "supported_classes net\n" in said
    assert "\nifcvf\n" in said
    assert "driver: virtio_net\n" in said
    assert "bus-info: vdpa0\n" in said
    assert "\ndmar0\n" in said
    assert "\nQEMU emulator version " in said
