"""A mapping and what may befall it, in any order, against a model."""

from __future__ import annotations

import errno
import os

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from client.mapping import BarMapping, MappingError, MappingState, OnZapped
from client.phys_vec import PhysVec
from tests.client import pci_device as pci
from tests.client.bar_files import region_of
from tests.client.pci_device import Switch

ONES = 0xFFFF_FFFF


class Life(RuleBasedStateMachine):
    """A mapping of two areas, its device's decoding and its server's whims, against a model."""

    AREAS = ((0, 0x2000), (0x3000, 0x1000))
    SIZE = 0x4000

    @initialize(vf=st.booleans(), raises=st.booleans())
    def begin(self, vf: bool, raises: bool) -> None:
        self.fd = os.memfd_create("life")
        os.truncate(self.fd, self.SIZE)
        self.content = bytearray(self.SIZE)
        self.switch = Switch()
        self.switch.decoding.command_memory = not vf
        self.on_zapped = OnZapped.RAISE if raises else OnZapped.ONES
        region = region_of(self.fd, self.SIZE, *self.AREAS)
        self.bar = BarMapping(region, self.switch.decoding, on_zapped=self.on_zapped)
        self.vf = vf
        self.on = self.powered = True
        self.there = True  # the server's file
        self.present: dict[int, bool] = {0: False, 1: False}
        self.lost: set[int] = set()
        self.views: list[tuple[int, memoryview]] = []

    @property
    def answers(self) -> bool:
        return self.powered and (self.on or self.vf)

    def taken_away(self, *, reset: bool = False) -> None:
        if reset or not self.answers:
            for area in self.present:
                self.present[area] = False
            self.lost.clear()

    @rule(on=st.booleans())
    def command(self, on: bool) -> None:
        self.on = on
        self.switch.memory(on=on)
        self.taken_away()

    @rule(powered=st.booleans())
    def power(self, powered: bool) -> None:
        self.powered = powered
        self.switch.write(pci.PM + 4, pci.D0 if powered else pci.D3_HOT)
        self.taken_away()

    @rule(how=st.sampled_from(["message", "pcie", "af"]))
    def reset(self, how: str) -> None:
        self.on, self.powered = False, True
        if how == "message":
            self.switch.reset()
        elif how == "pcie":
            self.switch.write(pci.PCIE + 8, pci.FLR)
        else:
            self.switch.write(pci.AF + 4, pci.AF_FLR)
        self.taken_away(reset=True)

    @rule(there=st.booleans())
    def server_truncates(self, there: bool) -> None:
        if not there:
            self.content = bytearray(self.SIZE)
            self.lost |= {area for area, present in self.present.items() if present}
        os.truncate(self.fd, self.SIZE if there else 0)
        if there and not self.there:  # what was not touched meanwhile is there again
            self.lost &= {area for area, present in self.present.items() if present and self.known_lost(area)}
        self.there = there

    def known_lost(self, area: int) -> bool:
        return self.bar.lost(self.AREAS[area][0] + 8, 4)

    @rule(area=st.sampled_from([0, 1]))
    def fault(self, area: int) -> None:
        start, length = self.AREAS[area]
        if not self.answers or not self.there:
            with pytest.raises(MappingError) as refusal:
                self.bar.fault(start, length)
            assert refusal.value.errno == errno.EFAULT
            return
        self.bar.fault(start, length)
        self.faulted(area)
        assert self.bar.translate(start, length) == (PhysVec(start, length),)

    def faulted(self, area: int) -> None:
        self.present[area] = True
        self.lost.discard(area)

    @rule(area=st.sampled_from([0, 1]), value=st.integers(0, ONES))
    def write(self, area: int, value: int) -> None:
        at = self.AREAS[area][0] + 8
        if (error := self.refusal(area)) is not None:
            with pytest.raises(MappingError) as refusal:
                self.bar.write(at, 4, value)
            assert refusal.value.errno == error
            return
        self.bar.write(at, 4, value)
        if self.touched(area):
            self.content[at : at + 4] = value.to_bytes(4, "little")

    @rule(area=st.sampled_from([0, 1]))
    def read(self, area: int) -> None:
        at = self.AREAS[area][0] + 8
        if (error := self.refusal(area)) is not None:
            with pytest.raises(MappingError) as refusal:
                self.bar.read(at, 4)
            assert refusal.value.errno == error
            return
        value = self.bar.read(at, 4)
        expected = int.from_bytes(self.content[at : at + 4], "little") if self.touched(area) else ONES
        assert value == expected

    def refusal(self, area: int) -> int | None:
        """What an access is refused with."""
        if self.answers and not self.present[area] and not self.there:
            return errno.EFAULT
        gone = not self.answers or area in self.lost
        return errno.EIO if gone and self.on_zapped is OnZapped.RAISE else None

    def touched(self, area: int) -> bool:
        """Whether an access found the device."""
        if not self.answers or area in self.lost:
            return False
        self.faulted(area)
        return True

    @precondition(lambda self: len(self.views) < 4)
    @rule(area=st.sampled_from([0, 1]))
    def view(self, area: int) -> None:
        start, length = self.AREAS[area]
        if self.answers and not self.there:
            with pytest.raises(MappingError):
                self.bar.view(start, length)
            return
        if not self.answers and self.on_zapped is OnZapped.RAISE:
            with pytest.raises(MappingError):
                self.bar.view(start, length)
            return
        self.views.append((area, self.bar.view(start, length)))
        if self.answers:
            self.faulted(area)

    @precondition(lambda self: self.views)
    @rule()
    def let_go(self) -> None:
        self.views.pop()[1].release()

    @invariant()
    def views_show_the_devices_bytes_or_ones(self) -> None:
        for area, view in getattr(self, "views", ()):
            start = self.AREAS[area][0]
            here = self.present[area] and area not in self.lost
            found = bytes(view[8:12])
            assert found == (self.content[start + 8 : start + 12] if here else b"\xff" * 4)

    @invariant()
    def the_state_is_that_of_the_model(self) -> None:
        if not hasattr(self, "bar"):
            return
        if not self.answers:
            expected = MappingState.ZAPPED
        elif any(self.present.values()):
            expected = MappingState.MAPPED
        else:
            expected = MappingState.FAULTABLE
        assert self.bar.state is expected

    def teardown(self) -> None:
        if not hasattr(self, "bar"):
            return
        if self.views:
            with pytest.raises(BufferError):
                self.bar.close()
        for _, view in self.views:
            view.release()
        self.bar.close()
        assert self.bar.state is MappingState.UNMAPPED
        os.close(self.fd)


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=60, stateful_step_count=30)
