from __future__ import annotations

import struct
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from errno import EBUSY, EINVAL

import pytest
import trio
import trio.testing

import client
from client.mapping import BarMapping, MappingState
from client.pci import Command, PciControl, read_config
from protocol.vfio import RegionIndex
from tests.client import pci_device as pci
from tests.client.followers import Follower, followed, letting_go
from tests.client.pci_device import Device, Switch, config_space, pci_device
from tests.client.peer import REGION_WRITE, RESET, FakeRegion, session_with

Act = Callable[[Device], Awaitable[object]]

SWITCHES: dict[str, Act] = {
    "COMMAND": lambda device: device.switch(memory=False),
    "D3hot": lambda device: device.write_config(pci.PM + 4, pci.D3_HOT),
    "FLR": lambda device: device.write_config(pci.PCIE + 8, pci.FLR),
    "AF FLR": lambda device: device.write_config(pci.AF + 4, pci.AF_FLR),
    "DEVICE_RESET": lambda device: device.session.reset(),
}
"""Everything that takes a function's BARs away."""

each_switch = pytest.mark.parametrize("switch", SWITCHES.values(), ids=SWITCHES.keys())


@contextmanager
def mapped(device: Device) -> Iterator[tuple[BarMapping, memoryview]]:
    """BAR 0, faulted in."""
    with (
        BarMapping(device.session.regions[0], device.session.decoding) as mapping,
        mapping.view(0, 4) as view,
    ):
        yield mapping, view


# the order


@each_switch
async def test_a_bar_is_zapped_before_the_write_leaves(switch: Act) -> None:
    async with pci_device() as device:
        await read_config(device.session)
        with mapped(device) as (mapping, view):
            assert bytes(view) == b"here"
            seen: list[tuple[bytes, MappingState]] = []
            device.watch = lambda: seen.append((bytes(view), mapping.state))
            await switch(device)
            assert seen == [(b"\xff" * 4, MappingState.ZAPPED)]


@each_switch
async def test_everybody_has_let_go_before_the_write_leaves(switch: Act) -> None:
    async with followed() as (device, follower):
        follower.go = trio.Event()
        with device.session.decoding.followed_by(
            quick := Follower(device.session.decoding, follower.log, "2nd ")
        ):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(switch, device)
                await trio.testing.wait_all_tasks_blocked()
                assert follower.log == ["zap", "2nd zap", "2nd revoke"]
                follower.go.set()
            assert follower.log == ["zap", "2nd zap", "2nd revoke", "revoke", "write"]
        assert quick.decoding.enabled is False


async def test_they_come_back_after_memory_is_on() -> None:
    async with followed() as (device, follower):
        await device.switch(memory=False)
        await device.switch(memory=True)
        assert follower.log == ["zap", "revoke", "write", "write", "restore"]
        await device.switch(memory=True)
        assert follower.log[5:] == ["write"], "nobody was away"


async def test_a_power_state_alone_brings_back_what_it_took_away() -> None:
    async with followed() as (device, follower):
        await device.write_config(pci.PM + 4, pci.D3_HOT)
        await device.switch(memory=True)
        assert not device.session.decoding.enabled, "COMMAND does not wake it"
        await device.write_config(pci.PM + 4, pci.D0)
        assert device.session.decoding.enabled
        away = ["zap", "revoke", "write"]
        assert follower.log == [*away, *away, "write", "restore"], "to let go twice is to let go once"


@pytest.mark.parametrize("state", [b"\1\0", b"\2\0"], ids=["D1", "D2"])
async def test_a_function_answers_in_d1_and_d2(state: bytes) -> None:
    async with followed() as (device, follower):
        await device.write_config(pci.PM + 4, state)
        assert follower.log == ["write"]


async def test_a_function_that_keeps_nothing_in_d3hot_comes_back_without_memory() -> None:
    async with followed(config_space(no_soft_reset=False)) as (device, follower):
        await device.write_config(pci.PM + 4, pci.D3_HOT)
        await device.write_config(pci.PM + 4, pci.D0)
        assert not device.session.decoding.enabled
        await device.switch(memory=True)
        assert device.session.decoding.enabled
        assert follower.log[-1] == "restore"
        await device.write_config(pci.PM + 4, pci.D0)
        assert device.session.decoding.enabled, "from D0 to D0 is no way back"


async def test_a_bit_for_a_reset_that_the_function_has_not_is_no_reset() -> None:
    async with followed(config_space(flr=False)) as (device, follower):
        await device.write_config(pci.PCIE + 8, pci.FLR)
        await device.write_config(pci.AF + 4, pci.AF_FLR)
        assert follower.log == ["write", "write"]
        assert device.session.decoding.enabled


async def test_other_writes_disturb_nobody() -> None:
    async with followed() as (device, follower):
        for offset, data in (
            (0x0C, b"\x40"),
            (pci.COMMAND, struct.pack("<H", Command.MEMORY | Command.MASTER)),
            (pci.COMMAND + 1, b"\4"),
            (pci.PM, b"\0\0\0\0"),
            (pci.PCIE + 8, b"\xff\x7f"),
            (pci.AF + 4, b"\xfe"),
            (0xC0, b"\xff" * 64),
        ):
            await device.write_config(offset, data)
        assert set(follower.log) == {"write"}
        assert device.session.decoding.enabled


async def test_a_write_that_covers_the_registers_counts_as_one_that_begins_there() -> None:
    async with followed() as (device, follower):
        await device.write_config(0, bytes(16))
        assert follower.log == ["zap", "revoke", "write"]
        await device.write_config(0, b"\0\0\0\0\2\0" + bytes(0x3A))
        assert follower.log[3:] == ["write", "restore"]
        await device.write_config(0x30, bytes(0x10) + b"\1\x50\3\0\3\0")
        assert follower.log[5:] == ["zap", "revoke", "write"]


# virtual functions


async def test_a_virtual_function_ignores_command_memory_but_not_flr_nor_d3() -> None:
    async with followed() as (device, follower):
        decoding = device.session.decoding
        decoding.command_memory = False
        await device.switch(memory=False)
        assert follower.log == ["write"]
        assert decoding.enabled
        for reset in ("FLR", "AF FLR", "DEVICE_RESET"):
            follower.log.clear()
            await SWITCHES[reset](device)
            assert follower.log == ["zap", "revoke", "write", "restore"], "it answers as soon as it is reset"
        follower.log.clear()
        await device.write_config(pci.PM + 4, pci.D3_HOT)
        assert not decoding.enabled
        await device.write_config(pci.PM + 4, pci.D0)
        assert follower.log == ["zap", "revoke", "write", "write", "restore"]


# what goes wrong


@each_switch
async def test_a_write_that_is_refused_changes_nothing(switch: Act) -> None:
    async with followed() as (device, follower):
        device.refuse = EINVAL
        with pytest.raises(client.ServerError, match="EINVAL"):
            await switch(device)
        assert device.session.decoding.enabled
        assert follower.log == ["zap", "revoke", "write", "restore"]


async def test_a_refused_write_in_several_messages_may_have_been_done() -> None:
    small = b'{"capabilities":{"max_msg_fds":8,"max_data_xfer_size":4}}\0'
    async with pci_device(capabilities=small) as device:
        device.session.decoding.learn(await read_config(device.session))
        follower = Follower(device.session.decoding)
        with device.session.decoding.followed_by(follower):

            def refuse_the_second() -> None:
                device.refuse = EINVAL if len(device.log) == 2 else 0

            device.watch = refuse_the_second
            with pytest.raises(client.ServerError, match="EINVAL"):
                await device.write_config(pci.COMMAND, bytes(8))
            assert len(device.log) == 2
            assert not device.session.decoding.enabled
            await device.switch(memory=True)
            assert follower.log == ["zap", "revoke", "restore"]


async def test_what_keeps_somebody_from_letting_go_keeps_the_write_from_leaving() -> None:
    async with followed() as (device, follower):
        follower.error = client.MappingError(EBUSY, "in use")
        with device.session.decoding.followed_by(Follower(device.session.decoding, follower.log, "2nd ")):
            with pytest.raises(client.MappingError, match="in use"):
                await device.switch(memory=False)
            assert follower.log == ["zap", "2nd zap", "2nd revoke"], "others let go whatever becomes of it"
            assert device.log == []
            follower.error = None
            await device.switch(memory=False)
            assert follower.log[3:5] == ["zap", "2nd zap"]
            assert {*follower.log[5:7]} == {"revoke", "2nd revoke"}
            assert follower.log[7:] == ["write"]


async def test_several_reasons_come_together() -> None:
    async with followed() as (device, follower):
        follower.error = client.MappingError(EBUSY, "one")
        other = Follower(device.session.decoding)
        other.error = client.MappingError(EBUSY, "two")
        with device.session.decoding.followed_by(other):
            with pytest.raises(ExceptionGroup, match="2 users of the BARs could not revoke") as group:
                await device.session.reset()
            assert {str(error) for error in group.value.exceptions} == {"one", "two"}


async def test_who_gives_up_before_the_write_left_may_come_again() -> None:
    async with followed() as (device, follower):
        async with letting_go(device, follower) as nursery:
            nursery.cancel_scope.cancel()
        assert device.log == []
        assert not device.session.decoding.enabled, "they are still away"
        follower.go.set()
        await device.switch(memory=True)
        assert device.session.decoding.enabled
        assert follower.log == ["zap", "write", "restore"]


async def test_who_gives_up_on_the_answer_leaves_everybody_away_until_a_later_write() -> None:
    async with followed() as (device, follower):
        await device.switch(memory=False)
        device.silent = True
        async with trio.open_nursery() as nursery:

            async def on() -> None:
                await device.switch(memory=True)

            nursery.start_soon(on)
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        assert not device.session.decoding.enabled
        device.silent = False
        await device.switch(memory=True)
        assert device.session.decoding.enabled
        assert follower.log[-2:] == ["write", "restore"]


async def test_who_gives_up_while_they_come_back_leaves_the_rest_to_the_next() -> None:
    async with followed() as (device, follower):
        await device.switch(memory=False)
        follower.go_back = trio.Event()
        async with trio.open_nursery() as nursery:

            async def on() -> None:
                await device.switch(memory=True)

            nursery.start_soon(on)
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        assert "restore" not in follower.log
        follower.go_back.set()
        await device.switch(memory=True)
        assert follower.log[-1] == "restore"


async def test_changes_wait_for_each_other_in_the_order_of_their_calls() -> None:
    async with followed() as (device, follower):
        follower.go = trio.Event()

        async def switch(on: bool) -> None:
            await device.switch(memory=on)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(switch, False)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(switch, True)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(switch, False)
            await trio.testing.wait_all_tasks_blocked()
            assert device.log == []
            follower.go.set()
        assert [data for _, _, data in device.log] == [pci.MEMORY_OFF, pci.MEMORY_ON, pci.MEMORY_OFF]
        assert not device.session.decoding.enabled


async def test_one_who_follows_while_others_let_go_comes_back_with_them() -> None:
    async with followed() as (device, follower):
        async with letting_go(device, follower):
            with mapped(device) as (mapping, view):
                assert mapping.state is MappingState.ZAPPED
                assert bytes(view) == b"\xff" * 4
                follower.go.set()
        with device.session.decoding.followed_by(late := Follower(device.session.decoding)):
            await device.switch(memory=True)
            assert late.log == ["restore"]


async def test_one_who_does_not_follow_any_more_is_not_waited_for() -> None:
    async with pci_device() as device:
        follower = Follower(device.session.decoding)
        with device.session.decoding.followed_by(follower):
            pass
        await device.switch(memory=False)
        assert follower.log == []


# the end of the session


async def test_the_end_of_the_session_zaps_for_good() -> None:
    async with followed() as (device, follower):
        with mapped(device) as (mapping, view):
            device.session.hang_up("enough")
            assert bytes(view) == b"\xff" * 4
            assert follower.log == ["zap"]
            with pytest.raises(client.Disconnected):
                await device.switch(memory=True)
            assert mapping.state is MappingState.ZAPPED
            assert "restore" not in follower.log


async def test_a_server_that_leaves_while_somebody_lets_go_is_told_when_he_has() -> None:
    async with followed() as (device, follower):
        follower.go = trio.Event()
        async with trio.open_nursery() as nursery:

            async def off() -> None:
                with pytest.raises(client.Disconnected):
                    await device.switch(memory=False)

            nursery.start_soon(off)
            await trio.testing.wait_all_tasks_blocked()
            device.session.hang_up("enough")
            follower.go.set()
        assert follower.log == ["zap", "zap", "revoke"]


# where the capabilities are


async def test_capabilities_are_read_once_and_only_for_writes_that_may_reach_them() -> None:
    async with pci_device() as device:
        device.config[0x34] = 0  # no capability at all
        await device.write_config(0x3C, b"\0\0\0\0")
        device.config[0x34] = pci.PM
        await device.write_config(pci.PM + 4, pci.D3_HOT)
        assert not device.session.decoding.enabled, "read now, not before"
        await device.write_config(pci.PM + 4, pci.D0)
        device.config[0x34] = 0
        await device.write_config(pci.PM + 4, pci.D3_HOT)
        assert not device.session.decoding.enabled, "and not again"


async def test_a_list_of_capabilities_that_makes_no_sense_switches_nothing_off() -> None:
    config = config_space()
    config[pci.AF + 1] = pci.PM  # it loops
    async with followed(config) as (device, follower):
        await device.write_config(pci.PM + 4, pci.D3_HOT)
        assert follower.log == ["write"]


async def test_a_device_without_configuration_space_refuses_writes_itself() -> None:
    async with (
        session_with(regions={0: FakeRegion(0x1000)}) as (session, peer),
        trio.open_nursery() as nursery,
    ):

        async def refuse() -> None:
            peer.refuse(await peer.expect(REGION_WRITE), EINVAL)

        nursery.start_soon(refuse)
        with pytest.raises(client.ServerError, match="EINVAL"):
            await session.region_write(RegionIndex.CONFIG, 0x44, b"\3\0")


async def test_a_capability_that_is_cut_short_has_no_flr() -> None:
    config = config_space()
    struct.pack_into("<BB", config, 0xFC, 0x10, 0)
    config[pci.PM + 1] = 0xFC
    async with followed(config) as (device, follower):
        await device.write_config(0xFC, b"\xff" * 4)
        assert follower.log == ["write"]


async def test_what_a_driver_sets_is_followed() -> None:
    async with followed() as (device, follower):
        control = PciControl(device.session, await read_config(device.session))
        await control.set_command(Command.MEMORY, on=False)
        await control.set_command(Command.MEMORY)
        assert follower.log == ["zap", "revoke", "write", "write", "restore"]
        assert [region for region, _, _ in device.log] == [pci.CONFIG, pci.CONFIG]


async def test_the_reset_itself_leaves_as_a_message_of_its_own() -> None:
    async with followed() as (device, _):
        await device.session.reset()
        assert device.log == [(RESET, 0, b"")]


def test_a_decoding_of_its_own_can_be_switched_without_a_session() -> None:
    switch = Switch()
    switch.memory(on=False)
    assert not switch.decoding.enabled
