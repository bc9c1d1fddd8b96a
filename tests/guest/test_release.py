"""What QEMU does with the two interrupts that are not the guest's: REQ and ERR."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import trio

from tests.guest import Card, GuestError
from tests.guest.cards import serve_cards
from tests.guest.conftest import BootGuest
from tests.trionic.command import PATIENCE_S, Serving, serving


async def test_a_server_that_is_ended_waits_until_the_card_is_unplugged(
    boot_guest: BootGuest, tmp_path: Path
) -> None:
    """QEMU 11.1 does not listen for REQ: its vfio-user-pci lacks the property x-req that vfio-pci has
    (hw/vfio-user/pci.c). When this test fails because it was asked, QEMU is mended and unplugs by itself.
    """
    script = """
    modprobe virtio_net
    dev=$(nic)
    tell up
    wait_for 60 test ! -e /sys/class/net/$dev
    tell gone; await_host
    """
    path = tmp_path / "card.sock"
    # Without MSI-X: QEMU 11.1 aborts when it unplugs a card that has it (test_lifecycle.py).
    with serving("--socket", path, "--no-msix", "--release", "600") as served:
        async with boot_guest(script, [Card(path, root_port=True)]) as guest:
            await guest.expect("up")
            served.process.send_signal(signal.SIGTERM)
            await trio.to_thread.run_sync(read_until, served, "(no REQ); waiting")
            await guest.qmp("device_del", id="card0")
            await guest.expect("gone")
            await guest.qmp_event("DEVICE_DELETED", device="card0")
            _, errors = await trio.to_thread.run_sync(lambda: served.process.communicate(timeout=PATIENCE_S))
            guest.say()
            await guest.wait()
    assert served.process.returncode == 0
    assert "card.sock: client left" in errors
    assert "did not let go" not in errors


def read_until(served: Serving, text: str) -> None:
    """Read what the server says on standard error up to a line with `text`."""
    assert served.process.stderr is not None
    assert any(text in line for line in served.process.stderr)


async def test_qemu_stops_the_guest_of_a_card_that_reports_an_error(
    boot_guest: BootGuest, tmp_path: Path
) -> None:
    async with serve_cards(tmp_path, ["loopback"]) as (card,):

        async def fail() -> None:
            async with boot_guest("tell up; await_host", [card.socket]) as guest:
                await guest.expect("up")
                assert card.nic.function.report_error()
                await trio.sleep_forever()

        with pytest.raises(GuestError, match="QEMU stopped it: internal-error") as stopped:
            await fail()
    assert "error detected" in str(stopped.value)
