"""The rig itself, with QEMU's own virtio card where a network is needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
import trio

from tests.guest import GuestError, Network, Root, boot
from tests.guest._initramfs import copy_programs
from tests.guest._packages import find_program
from tests.guest._qmp import QmpError
from tests.guest.conftest import BootGuest

_UP = """
modprobe virtio_net
dev=$(nic)
ip addr add 10.77.0.2/24 dev $dev
ip -6 addr add fd77::2/64 dev $dev nodad
bring_up $dev
"""


def _children(parent: int | None = None) -> set[str]:
    parent = parent or os.getpid()
    return set(Path(f"/proc/{parent}/task/{parent}/children").read_text().split())


async def test_a_script_runs_and_its_output_and_status_come_back(
    boot_guest: BootGuest, tmp_path: Path
) -> None:
    (tmp_path / "a,b").write_bytes(b"from the host\n")
    script = "uname -r; nproc; cat /run/files/given; echo to stderr >&2; printf 'no line end'"
    result = await boot_guest(script, smp=2, files={"given": tmp_path / "a,b"})
    release, processors, *rest = result.output.splitlines()
    assert release.startswith("6.12.")
    assert processors == "2"
    assert rest == ["from the host", "to stderr", "no line end"]
    assert (result.status, result.boots, result.qemu_stderr) == (0, 1, "")


async def test_a_tree_lies_over_the_guests_own_files(
    boot_guest: BootGuest, guest_root: Root, tmp_path: Path
) -> None:
    trees = [tmp_path / "programs", tmp_path / "more"]
    copy_programs(guest_root.tree, trees[0], guest_root.arch, [find_program(guest_root.tree, "zstd")])
    (trees[0] / "usr/bin/zstdcat").symlink_to("zstd")
    (trees[0] / "lib").symlink_to("usr/lib")
    (trees[1] / "etc").mkdir(parents=True)
    (trees[1] / "etc/motd").write_text("from the second tree\n")
    script = "echo packed | zstd | zstdcat; cat /etc/motd; cat /etc/passwd; readlink /lib"
    result = await boot_guest(script, trees=trees)
    assert result.output == "packed\nfrom the second tree\nroot::0:0:root:/root:/bin/sh\nusr/lib\n"


async def test_a_tree_takes_no_link_of_the_guest_away(boot_guest: BootGuest, tmp_path: Path) -> None:
    (tmp_path / "lib").mkdir()
    with pytest.raises(ValueError, match="guests have /lib as a link to usr/lib"):
        await boot_guest("true", trees=[tmp_path])


async def test_a_block_that_only_ends_still_demands_success(boot_guest: BootGuest) -> None:
    with pytest.raises(GuestError, match="exit status is 7") as failed:
        async with boot_guest("echo before; (exit 7); echo never"):
            pass
    assert failed.value.result.status == 7
    assert failed.value.result.output == "before\n"
    assert "before" in str(failed.value)


async def test_a_kernel_panic_ends_the_block_with_the_console(boot_guest: BootGuest) -> None:
    started = time.monotonic()
    with pytest.raises(GuestError, match="its kernel panicked") as failed:
        async with boot_guest("tell doomed; echo c > /proc/sysrq-trigger"):
            await trio.sleep_forever()
    assert "sysrq triggered crash" in failed.value.result.console
    assert time.monotonic() - started < 30


async def test_a_hanging_guest_is_given_up_at_its_deadline(boot_guest: BootGuest) -> None:
    before = _children()
    with pytest.raises(GuestError, match="its deadline passed") as failed:  # noqa: PT012
        async with boot_guest("echo i hang; tell up; sleep 1000") as guest:
            await guest.expect("up")
            guest.give_up_in(0.5)
    assert "i hang" in str(failed.value)
    assert _children() == before


async def test_qemu_that_does_not_start_is_told(boot_guest: BootGuest, tmp_path: Path) -> None:
    with pytest.raises(GuestError, match="QEMU ended with status 1") as failed:
        await boot_guest("true", [tmp_path / "nobody.sock"])
    assert "nobody.sock" in failed.value.result.qemu_stderr


async def test_the_blocks_own_error_comes_out_bare_with_the_guests_words(boot_guest: BootGuest) -> None:
    with pytest.raises(ZeroDivisionError) as raised:  # noqa: PT012
        async with boot_guest("echo words; tell up; sleep 1000") as guest:
            await guest.expect("up")
            _ = 1 // 0
    assert "words" in raised.value.__notes__[0]


async def test_cancelling_the_block_leaves_no_qemu_behind(guest_root: Root) -> None:
    before = _children()
    with trio.move_on_after(1) as scope:
        async with boot("sleep 1000", root=guest_root):
            await trio.sleep_forever()
    assert scope.cancelled_caught
    assert _children() == before


async def test_host_and_script_talk_across_a_reboot(boot_guest: BootGuest) -> None:
    script = """
        tell up $BOOT
        order=$(await_host)
        echo "boot $BOOT: $order"
        if [ "$order" = again ]; then reboot; fi
    """
    async with boot_guest(script) as guest:
        guest.say("again")  # long before the script asks
        assert await guest.expect("up") == "1"
        assert await guest.expect("up") == "2"
        await guest.reset()
        assert await guest.expect("up") == "3"
        guest.say("done now")
        result = await guest.wait()
    assert result.output == "boot 1: again\nboot 3: done now\n"
    assert result.boots == 3


async def test_a_reset_out_of_the_blue_is_a_failure(boot_guest: BootGuest) -> None:
    with pytest.raises(GuestError, match="reset itself"):
        await boot_guest("command reboot -f; sleep 10")


async def test_expecting_what_never_comes_is_a_failure(boot_guest: BootGuest) -> None:
    async with boot_guest("tell this one; exit 5") as guest:
        with pytest.raises(GuestError, match=r"expected `tell that`.* got `tell this one`"):
            await guest.expect("that")
        with pytest.raises(GuestError, match=r"the script ended \(status 5\) without `tell more`"):
            await guest.expect("more")
        with pytest.raises(GuestError, match="exit status is 5"):
            await guest.wait()
        assert (await guest.wait(check=False)).status == 5


async def test_a_program_is_steered_by_what_it_prints(boot_guest: BootGuest) -> None:
    script = """
        mkfifo /tmp/lines
        cat < /tmp/lines & exec 3> /tmp/lines
        while line=$(await_host); [ "$line" ]; do echo "$line; done" >&3; done
        exec 3>&-; wait
    """
    async with boot_guest(script) as guest:
        for line in ("one", "two"):
            guest.say(line)
            assert (await guest.printed("; done\n")) == line
        guest.say("")
        with pytest.raises(GuestError, match="the script ended without printing 'three'"):
            await guest.printed("three")


async def test_the_monitor_answers_and_tells_events(boot_guest: BootGuest) -> None:
    async with boot_guest("tell up; await_host; sleep 0.1") as guest:
        await guest.expect("up")
        assert (await guest.qmp("query-status"))["running"] is True
        assert "Host bridge" in await guest.monitor("info pci")
        with pytest.raises(QmpError, match=r"device_del: .*nothing"):
            await guest.qmp("device_del", id="nothing")
        guest.say()
        event = await guest.qmp_event("SHUTDOWN", guest=True)
        assert event["data"]["reason"] == "guest-shutdown"


def test_a_killed_test_run_takes_its_guests_with_it(guest_root: Root) -> None:
    command = [sys.executable, "-m", "tests.guest", "run", "--accel", "tcg", "-"]
    run = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert run.stdin is not None
    run.stdin.write(b"sleep 1000")
    run.stdin.close()
    give_up = time.monotonic() + 20
    while not (qemu := _children(run.pid)):
        assert time.monotonic() < give_up
        time.sleep(0.05)
    run.kill()
    run.wait()
    while any(Path("/proc", pid).exists() for pid in qemu):
        assert time.monotonic() < give_up
        time.sleep(0.05)


@pytest.mark.root
async def test_guest_and_namespace_reach_each_other(
    boot_guest: BootGuest, network: Network, guest_root: Root
) -> None:
    script = f"{_UP}\nping -c 1 -W 5 10.77.0.1\nping -c 1 fd77::1\ntell up\nawait_host"
    async with boot_guest(script, network=network, taps=[network.tap]) as guest:
        await guest.expect("up")
        assert " 0% packet loss" in await network.run(guest_root, "ping", "-c", "2", "-i", "0.2", "10.77.0.2")
        assert " 0% packet loss" in await network.run(guest_root, "ping", "-c", "1", "fd77::2")
        guest.say()
        result = await guest.wait()
    assert result.output.count(" 0% packet loss") == 2


@pytest.mark.root
async def test_iperf3_measures_the_baseline_both_ways(
    boot_guest: BootGuest, network: Network, guest_root: Root
) -> None:
    script = f"""{_UP}
        tell up
        await_host > /dev/null
        iperf3 -c 10.77.0.1 -t 1 -J > /tmp/up
        iperf3 -c 10.77.0.1 -t 1 -J -R > /tmp/down
        echo SPLIT; cat /tmp/up; echo SPLIT; cat /tmp/down
    """
    async with boot_guest(script, network=network, taps=[network.tap]) as guest:
        await guest.expect("up")
        async with network.running(guest_root, "iperf3", "-s", port=5201):
            guest.say()
            result = await guest.wait()
    for way, report in zip(("up", "down"), result.output.split("SPLIT\n")[1:], strict=True):
        speed = json.loads(report)["end"]["sum_received"]["bits_per_second"]
        assert speed > 10e6, way


@pytest.mark.root
async def test_two_guests_at_once_do_not_meet(
    boot_guest: BootGuest, make_network: Callable[..., Network]
) -> None:
    outputs: dict[int, str] = {}

    async def one(number: int) -> None:
        network = make_network()
        async with boot_guest(f"{_UP}\ntell up\nawait_host", network=network, taps=[network.tap]) as guest:
            await guest.expect("up")
            guest.say(f"you are {number}")
            outputs[number] = (await guest.wait()).output

    async with trio.open_nursery() as nursery:
        nursery.start_soon(one, 1)
        nursery.start_soon(one, 2)
    assert outputs == {1: "you are 1\n", 2: "you are 2\n"}


@pytest.mark.root
def test_a_network_disappears_with_its_owner() -> None:
    with Network() as network:
        path = Path(network.path)
        inode = path.stat().st_ino
        tap = network.open_tap()
        os.close(tap)
    assert not path.exists() or path.stat().st_ino != inode
    with Network() as first, Network() as second, closing(os.scandir("/sys/class/net")) as links:
        assert Path(first.path).stat().st_ino != Path(second.path).stat().st_ino
        assert network.tap not in {link.name for link in links}
