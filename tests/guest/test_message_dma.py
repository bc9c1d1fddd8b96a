"""A guest whose memory QEMU does not share: rings and frames are reached by DMA_READ and DMA_WRITE alone."""

from __future__ import annotations

import pytest

from server.libvfio_user.limits import Limit
from tests.guest import Network, Root
from tests.guest.cards import ServedCard
from tests.guest.conftest import BootGuest
from tests.guest.test_traffic import IPERF, UP, received

pytestmark = pytest.mark.needs_no(Limit.MESSAGE_DMA, Limit.IN_BAND_DMA)


async def test_frames_of_every_size_pass_by_message(boot_guest: BootGuest, card: ServedCard) -> None:
    sizes = [0, 17, 18, 500, 1472, 1473, 9000, 30000]
    pings = "\n".join(f"ping -c 1 -W 5 -s {size} -p a5 10.77.0.1" for size in sizes)
    async with boot_guest(f"{UP}\ntell up; await_host\n{pings}", [card.socket], shared=False) as guest:
        await guest.expect("up")
        windows = card.nic.function.dma.windows()
        assert windows
        assert not any(has_descriptor for *_, has_descriptor in windows)
        guest.say()
        result = await guest.wait()
    assert result.output.count(" 0% packet loss") == len(sizes)
    assert "wrong data" not in result.output


async def test_tcp_flows_both_ways_by_message(
    boot_guest: BootGuest, card: ServedCard, network: Network, guest_root: Root
) -> None:
    script = f"{UP} iperf3 -c 10.77.0.1 -t 2 -J; echo SPLIT; iperf3 -c 10.77.0.1 -t 2 -R -J"
    async with network.running(guest_root, "iperf3", "-s", port=IPERF):
        result = await boot_guest(script, [card.socket], shared=False)
    for report in result.output[result.output.index("{") :].split("SPLIT"):
        assert received(report) > 1_000_000
