"""What both chips do alike: eventfds at their inputs, and a CPU that takes what they ask it to."""

from __future__ import annotations

import errno
import os
import resource
import select
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from typing import TypeVar

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import wait_all_tasks_blocked

from client._eventfd import take
from client.irqchip import IrqchipError
from client.irqchip.userspace import Ioapic, Pic, UserspaceChip, open_ioapic, open_pic
from tests.descriptors import open_fds, settled_fds

GSI = 10
Chip = TypeVar("Chip", bound=UserspaceChip)
Open = Callable[[], AbstractAsyncContextManager[UserspaceChip]]
both = pytest.mark.parametrize("open_chip", [open_pic, open_ioapic])


class Device:
    """Two eventfds, as a device with a level-triggered interrupt has them."""

    def __init__(self) -> None:
        self.trigger_fd = os.eventfd(0)
        self.resample_fd = os.eventfd(0)

    async def fire(self, times: int = 1) -> None:
        """Signal, and wait until all who wait for it have seen it."""
        os.eventfd_write(self.trigger_fd, times)
        await wait_all_tasks_blocked()

    def attach(self, chip: UserspaceChip, gsi: int = GSI) -> None:
        chip.attach(gsi, self.trigger_fd, self.resample_fd)

    def detach(self, chip: UserspaceChip, gsi: int = GSI) -> None:
        chip.detach(gsi, self.trigger_fd)

    @property
    def resampled(self) -> int:
        return take(self.resample_fd)

    def close(self) -> None:
        os.close(self.trigger_fd)
        os.close(self.resample_fd)


@contextmanager
def devices(count: int = 1) -> Iterator[list[Device]]:
    made = [Device() for _ in range(count)]
    try:
        yield made
    finally:
        for device in made:
            device.close()


@asynccontextmanager
async def active(open_chip: Callable[[], AbstractAsyncContextManager[Chip]]) -> AsyncIterator[Chip]:
    async with open_chip() as chip:
        chip.activate()
        yield chip


def serve(chip: UserspaceChip) -> int:
    """Take the next interrupt and end it; its input."""
    delivery = chip.acknowledge()
    assert delivery is not None
    chip.end(delivery)
    return delivery.gsi


@both
async def test_a_trigger_interrupts_and_its_end_is_told(open_chip: Open) -> None:
    with devices() as (device,):
        async with active(open_chip) as chip:
            device.attach(chip)
            os.eventfd_write(device.trigger_fd, 1)
            with trio.fail_after(5):
                await chip.wait()
            delivery = chip.acknowledge()
            assert delivery is not None
            assert delivery.gsi == GSI
            assert not chip.asks
            assert device.resampled == 0
            chip.end(delivery)
            assert device.resampled == 1
            assert not chip.asks
            chip.end(delivery)
            assert device.resampled == 0


@both
async def test_what_was_counted_before_counts_and_what_is_merged_is_told(open_chip: Open) -> None:
    with devices() as (device,):
        os.eventfd_write(device.trigger_fd, 3)
        async with active(open_chip) as chip:
            device.attach(chip)
            await wait_all_tasks_blocked()
            await device.fire()
            assert serve(chip) == GSI
            assert chip.acknowledge() is None
            counters = chip.counters[GSI]
            assert (counters.triggered, counters.merged, counters.raised) == (4, 3, 1)
            assert (counters.acknowledged, counters.ended, chip.spurious) == (1, 1, 1)


@both
async def test_all_who_share_an_input_are_let_go_and_told_at_the_end_of_interrupt(open_chip: Open) -> None:
    with devices(2) as (one, other):
        async with active(open_chip) as chip:
            one.attach(chip)
            other.attach(chip)
            await one.fire()
            assert serve(chip) == GSI
            assert (one.resampled, other.resampled) == (1, 1)
            await one.fire()
            await other.fire()
            assert serve(chip) == GSI
            assert not chip.asks
            assert chip.counters[GSI].raised == 2


@both
async def test_an_input_is_high_while_anybody_drives_it(open_chip: Open) -> None:
    with devices() as (device,):
        async with active(open_chip) as chip:
            device.attach(chip)
            chip.set_level(GSI, True)
            await device.fire()
            assert serve(chip) == GSI
            assert device.resampled == 1
            assert chip.asks
            chip.set_level(GSI, False)
            await device.fire()
            assert serve(chip) == GSI


@both
async def test_what_is_not_detached_yet_is_taken_and_what_is_detached_is_not(open_chip: Open) -> None:
    with devices() as (device,):
        async with active(open_chip) as chip:
            device.attach(chip)
            await wait_all_tasks_blocked()
            os.eventfd_write(device.trigger_fd, 1)
            device.detach(chip)
            await device.fire()
            assert take(device.trigger_fd) == 2
            assert not chip.asks
            assert chip.counters[GSI].triggered == 0


class DetachOnceReady(trio.abc.Instrument):
    """Detaches when the event loop knows of a trigger, and no task does yet."""

    def __init__(self, chip: UserspaceChip, device: Device) -> None:
        self.chip = chip
        self.device = device
        self.did = False

    def after_io_wait(self, timeout: float) -> None:
        if select.select([self.device.trigger_fd], [], [], 0)[0]:
            self.device.detach(self.chip)
            self.did = True


@both
async def test_a_watcher_that_is_about_to_run_does_not_touch_what_is_detached(open_chip: Open) -> None:
    with devices() as (device,):
        async with active(open_chip) as chip:
            device.attach(chip)
            await wait_all_tasks_blocked()
            instrument = DetachOnceReady(chip, device)
            trio.lowlevel.add_instrument(instrument)
            await device.fire()
            trio.lowlevel.remove_instrument(instrument)
            assert instrument.did
            assert take(device.trigger_fd) == 1
            assert not chip.asks


@both
async def test_what_is_detached_in_service_stays_so_and_its_end_tells_nobody(
    open_chip: Open,
) -> None:
    with devices() as (device,):
        async with active(open_chip) as chip:
            device.attach(chip)
            await device.fire()
            delivery = chip.acknowledge()
            assert delivery is not None
            device.detach(chip)
            assert chip.counters[GSI].withdrawn == 0
            chip.set_level(GSI, True)
            assert not chip.asks, "it is in service"
            chip.end(delivery)
            assert chip.asks
            assert device.resampled == 0


@both
async def test_only_the_one_that_is_detached_lets_go(open_chip: Open) -> None:
    with devices(2) as (one, other):
        async with active(open_chip) as chip:
            one.attach(chip)
            other.attach(chip)
            await one.fire()
            await other.fire()
            one.detach(chip)
            assert chip.counters[GSI].withdrawn == 0
            assert serve(chip) == GSI
            assert (one.resampled, other.resampled) == (0, 1)


@both
async def test_detaching_what_is_not_attached_there_does_nothing(open_chip: Open) -> None:
    with devices(2) as (one, other):
        async with active(open_chip) as chip:
            one.attach(chip)
            one.detach(chip, GSI + 1)
            other.detach(chip)
            chip.detach(GSI, -1)
            await one.fire()
            assert serve(chip) == GSI


@both
async def test_any_descriptor_of_an_eventfd_stands_for_it(open_chip: Open) -> None:
    with devices() as (device,):
        copy = os.dup(device.trigger_fd)
        async with active(open_chip) as chip:
            device.attach(chip)
            with pytest.raises(IrqchipError) as busy:
                chip.attach(GSI + 1, copy, device.resample_fd)
            assert busy.value.errno == errno.EBUSY
            chip.detach(GSI, copy)
            await device.fire()
            assert not chip.asks
        os.close(copy)


@both
async def test_descriptors_are_borrowed(open_chip: Open) -> None:
    before = settled_fds()
    with devices() as (device,):
        async with active(open_chip) as chip:
            device.attach(chip)
            trigger, resample = os.dup(device.trigger_fd), os.dup(device.resample_fd)
            device.close()
            os.eventfd_write(trigger, 1)
            await wait_all_tasks_blocked()
            assert serve(chip) == GSI
            assert take(resample) == 1
        device.trigger_fd, device.resample_fd = trigger, resample
    assert open_fds() == before


@both
async def test_an_inactive_chip_asks_no_cpu_and_leaves_eventfds_alone(open_chip: Open) -> None:
    with devices(2) as (one, other):
        async with active(open_chip) as chip:
            one.attach(chip)
            other.attach(chip, GSI + 1)
            await one.fire()
            chip.deactivate()
            assert not chip.active
            assert not chip.asks
            assert chip.acknowledge() is None
            await other.fire()
            os.eventfd_write(other.trigger_fd, 1)
            assert chip.counters[GSI + 1].triggered == 0
            chip.activate()
            await wait_all_tasks_blocked()
            assert {serve(chip), serve(chip)} == {GSI, GSI + 1}
            assert chip.counters[GSI + 1].triggered == 2
            assert chip.spurious == 0


@both
async def test_what_was_acknowledged_can_be_ended_at_a_chip_that_is_no_longer_active(open_chip: Open) -> None:
    with devices() as (device,):
        async with active(open_chip) as chip:
            device.attach(chip)
            await device.fire()
            delivery = chip.acknowledge()
            chip.deactivate()
            assert delivery is not None
            chip.end(delivery)
            assert device.resampled == 1
            assert chip.counters[GSI].ended == 1


@both
async def test_all_who_wait_are_told_and_one_who_comes_late_does_not_wait(open_chip: Open) -> None:
    async with active(open_chip) as chip:
        with trio.fail_after(5):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(chip.wait)
                nursery.start_soon(chip.wait)
                await wait_all_tasks_blocked()
                chip.set_level(GSI, True)
            await chip.wait()
            chip.deactivate()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(chip.wait)
                await wait_all_tasks_blocked()
                chip.activate()


@both
async def test_there_are_no_inputs_beyond_the_last_and_below_the_first(open_chip: Open) -> None:
    with devices() as (device,):
        async with active(open_chip) as chip:
            chip.set_level(chip.inputs - 1, True)
            for gsi in (-1, chip.inputs):
                with pytest.raises(IrqchipError) as error:
                    chip.set_level(gsi, True)
                assert error.value.errno == errno.EINVAL
                with pytest.raises(IrqchipError) as error:
                    device.attach(chip, gsi)
                assert error.value.errno == errno.EINVAL


@both
async def test_only_eventfds_can_be_attached(open_chip: Open) -> None:
    reader, writer = os.pipe()
    with devices() as (device,):
        async with active(open_chip) as chip:
            for fds in ((reader, device.resample_fd), (device.trigger_fd, writer), (-1, device.resample_fd)):
                with pytest.raises(IrqchipError) as error:
                    chip.attach(GSI, *fds)
                assert error.value.errno == errno.EINVAL
            device.attach(chip)
    os.close(reader)
    os.close(writer)


@both
async def test_without_room_for_descriptors_nothing_is_attached_and_nothing_leaks(open_chip: Open) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with devices() as (device,):
        async with active(open_chip) as chip:
            before = settled_fds()
            spare = os.dup(0)  # the lowest number that is free; reading /proc takes it for a while
            os.close(spare)
            try:
                resource.setrlimit(resource.RLIMIT_NOFILE, (spare + 1, limits[1]))
                with pytest.raises(IrqchipError) as error:
                    device.attach(chip)
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            assert error.value.errno == errno.EMFILE
            assert open_fds() == before
            device.attach(chip)
            await device.fire()
            assert serve(chip) == GSI


@both
async def test_a_chip_whose_block_is_over_touches_nothing_and_takes_nobody(open_chip: Open) -> None:
    with devices() as (device,):
        before = settled_fds()
        async with active(open_chip) as chip:
            device.attach(chip)
            await device.fire()
        assert open_fds() == before
        await device.fire()
        assert take(device.trigger_fd) == 1
        device.detach(chip)
        with pytest.raises(IrqchipError) as error:
            device.attach(chip)
        assert error.value.errno == errno.ENODEV


@both
def test_every_interrupt_is_accounted_for_whatever_comes_in_whatever_order(open_chip: Open) -> None:
    """Three devices share two inputs. A CPU ends what it acknowledged in its own time."""
    pick = st.integers(0, 2)
    steps = st.one_of(
        st.tuples(st.sampled_from(["attach", "detach", "fire", "fire"]), pick),
        st.tuples(
            st.sampled_from(["acknowledge", "acknowledge", "end", "deactivate", "activate"]), st.just(0)
        ),
    )

    @given(st.lists(steps, max_size=40))
    @settings(max_examples=60, derandomize=True)
    def check(script: list[tuple[str, int]]) -> None:
        trio.run(_play, open_chip, script)

    check()


async def _play(open_chip: Open, script: list[tuple[str, int]]) -> None:
    gsis = (GSI, GSI, GSI + 1)
    with devices(3) as all_devices:
        async with active(open_chip) as chip:
            attached: set[int] = set()
            fired = [0, 0, 0]
            in_service = []
            for step, which in script:
                device, gsi = all_devices[which], gsis[which]
                match step:
                    case "attach" if which not in attached:
                        device.attach(chip, gsi)
                        attached.add(which)
                        await wait_all_tasks_blocked()
                    case "detach":
                        device.detach(chip, gsi)
                        attached.discard(which)
                    case "fire":
                        await device.fire()
                        fired[which] += 1
                    case "acknowledge" if (delivery := chip.acknowledge()) is not None:
                        in_service.append(delivery)
                    case "end" if in_service:
                        delivery = in_service.pop()
                        for other in all_devices:
                            assert other.resampled in (0, 1)
                        chip.end(delivery)
                        ends = [other.resampled for other in all_devices]
                        shared = [
                            number in attached and gsis[number] == delivery.gsi for number in range(len(gsis))
                        ]
                        assert ends == shared
                    case "deactivate":
                        chip.deactivate()
                    case "activate":
                        chip.activate()
                        await wait_all_tasks_blocked()
            chip.activate()
            await wait_all_tasks_blocked()
            while in_service:
                chip.end(in_service.pop())
            for _ in range(100):
                if not chip.asks:
                    break
                if (delivery := chip.acknowledge()) is not None:
                    chip.end(delivery)
            assert not chip.asks
            for gsi in (GSI, GSI + 1):
                counters = chip.counters[gsi]
                assert counters.raised == counters.acknowledged + counters.withdrawn + counters.resampled
                assert counters.acknowledged == counters.ended
                assert counters.merged <= counters.triggered
            taken = sum(chip.counters[gsi].triggered for gsi in (GSI, GSI + 1))
            assert taken + sum(take(device.trigger_fd) for device in all_devices) == sum(fired)


@both
async def test_what_is_inactive_can_be_deactivated_again_and_hears_when_it_is_activated(
    open_chip: Open,
) -> None:
    with devices() as (device,):
        async with open_chip() as chip:
            device.attach(chip)
            await wait_all_tasks_blocked()
            chip.deactivate()
            chip.activate()
            await device.fire()
            assert chip.asks


@pytest.mark.parametrize("made", [Pic, Ioapic])
def test_a_chip_that_nobody_watches_has_no_descriptor_and_takes_none(
    made: Callable[[], UserspaceChip],
) -> None:
    before = settled_fds()
    chip = made()
    with devices() as (device,):
        with pytest.raises(IrqchipError) as refused:
            device.attach(chip)
        assert refused.value.errno == errno.ENODEV
    assert open_fds() == before
