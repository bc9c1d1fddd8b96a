"""Processes of their own, for what may end a process."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
from pathlib import Path

PATIENCE = 60

PREPARE = """
import ctypes, os, threading
from client._pages import PAGE, Pages
def file_of(size):
    fd = os.memfd_create("device")
    os.truncate(fd, size)
    for at in range(0, min(size, 1 << 16), PAGE):
        os.pwrite(fd, b"D", at)
    return fd
"""

DEVICES_GUARD = """
from device.dma import DmaWindows
theirs = file_of(0x1000)
dma = DmaWindows()
dma.map(0, 0x1000, 3, theirs, 0)
"""
"""A device's windows in the same process, which have a guard of their own."""


def ran(code: str) -> tuple[int, str]:
    """The exit status of a child that runs `code`, negative for a signal, and what it said on stderr."""
    done = subprocess.run(
        [sys.executable, "-c", PREPARE + textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        cwd=Path(__file__).parents[2],
        check=False,
    )
    return done.returncode, done.stderr


def lived(code: str) -> str:
    """The child came to its end; what it said."""
    status, said = ran(code)
    assert status == 0, said
    return said


def died_of_sigbus(code: str) -> str:
    """It did not; what it said."""
    status, said = ran(code)
    assert status == -signal.SIGBUS, (status, said)
    return said
