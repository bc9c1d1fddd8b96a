"""Whatever is done to a function that enforces revocation, by software, by a client and by nature: messages
and mappings show what a model says.
"""

from __future__ import annotations

import errno
import mmap
import os

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from device.errors import DeviceError
from device.function import Identity, MemoryBar, PciFunction, RegionIndex, ResetKind, Revocation
from device.pci.capabilities import PowerManagement
from tests.device.pci.mapped import Mapping

PAGE = mmap.PAGESIZE
PAGES = 8
BACKED = 6
COMMAND, POWER = 0x04, 0x44
MEMORY = 1 << 1
EIO = "EIO"

pages = st.integers(0, PAGES - 1)
backed = st.integers(0, BACKED - 1)
values = st.integers(1, 254).map(lambda value: bytes([value]))


class Decoding(RuleBasedStateMachine):
    """A BAR of eight pages, six of which are there. The model is a byte for each of those, how many pages are
    shown, and how many the client's file has.
    """

    @initialize(command_memory=st.booleans())
    def power_on(self, command_memory: bool) -> None:
        self.command_memory = command_memory
        self.bar = MemoryBar(2, PAGES * PAGE, revocation=Revocation.ENFORCED, backing=BACKED * PAGE)
        self.function = PciFunction(
            "card",
            Identity(1, 2, 3, 4),
            bars=[self.bar],
            capabilities=[PowerManagement()],
            command_memory=command_memory,
        )
        self.content = [b"\0"] * BACKED
        self.poisoned: set[int] = set()
        self.memory = self.powered = True
        self.shown = self.length = 0
        self.back_to_power_on()
        self.client: Mapping | None = None
        self.connect()

    def connect(self) -> None:
        """A client maps the whole file, which it makes as long for that moment."""
        if self.client is not None:
            self.client.close()
        os.ftruncate(self.bar.fd, BACKED * PAGE)
        self.client = Mapping(self.bar.fd, BACKED * PAGE)
        os.ftruncate(self.bar.fd, self.length * PAGE)

    def teardown(self) -> None:
        if hasattr(self, "function"):
            self.function.close()
            assert self.client is not None
            assert [self.client.load(page * PAGE) for page in range(BACKED)] == [None] * BACKED
            self.client.close()

    # --- the model

    @property
    def decoded(self) -> bool:
        return self.powered and (self.memory or not self.command_memory)

    def show(self) -> None:
        shown = min(self.poisoned, default=BACKED) if self.decoded else 0
        if shown != self.shown:
            self.shown = self.length = shown

    def back_to_power_on(self) -> None:
        self.content = [b"\0"] * BACKED
        self.memory, self.powered = False, True
        self.shown = self.length = 0
        self.show()

    def by_message(self, page: int) -> str | bytes:
        if not self.decoded or page in self.poisoned:
            return EIO
        if page >= BACKED or self.length <= page < self.shown:
            return b"\xff"
        return self.content[page]

    # --- software

    @rule(memory=st.booleans())
    def write_command(self, memory: bool) -> None:
        self.function.region_write(RegionIndex.CONFIG, COMMAND, bytes([memory * MEMORY, 0]))
        self.memory = memory
        self.show()

    @rule(state=st.integers(0, 3))
    def write_power_state(self, state: int) -> None:
        self.function.region_write(RegionIndex.CONFIG, POWER, bytes([state]))
        if state in (0, 3):
            self.powered = state == 0
            self.show()

    @rule(kind=st.sampled_from(ResetKind))
    def reset(self, kind: ResetKind) -> None:
        self.function.reset(kind)
        self.back_to_power_on()
        if kind is ResetKind.LOST_CLIENT:
            assert self.client is not None
            assert self.client.load(0) is None
            self.connect()

    @rule(page=pages, value=values)
    def write_by_message(self, page: int, value: bytes) -> None:
        before = self.by_message(page)
        try:
            self.function.region_write(2, page * PAGE, value)
        except DeviceError as error:
            assert (error.errno, before) == (errno.EIO, EIO)
        else:
            assert before != EIO
            if before != b"\xff":
                self.content[page] = value

    # --- the client

    @rule(page=backed, value=values)
    def write_by_mapping(self, page: int, value: bytes) -> None:
        assert self.client is not None
        assert self.client.store(page * PAGE, value) == (page < self.length)
        if page < min(self.length, self.shown):
            self.content[page] = value

    @rule(length=st.integers(0, 2 * PAGES))
    def cut_or_grow_the_file(self, length: int) -> None:
        os.ftruncate(self.bar.fd, length * PAGE)
        for page in range(min(length, self.shown), self.shown):
            self.content[page] = b"\0"
        self.length = length

    # --- nature

    @rule(page=backed)
    @precondition(lambda self: len(self.poisoned) < 2)
    def poison(self, page: int) -> None:
        self.function.poison(2, page * PAGE)
        self.poisoned.add(page)
        self.content[page] = b"\0"
        self.show()

    @rule()
    def repair(self) -> None:
        self.bar.repair()
        self.poisoned.clear()
        self.show()

    # --- what is seen

    @invariant()
    def messages_show_the_model(self) -> None:
        for page in range(PAGES):
            try:
                seen: str | bytes = self.function.region_read(2, page * PAGE, 1)
            except DeviceError as error:
                assert error.errno == errno.EIO
                seen = EIO
            assert seen == self.by_message(page)

    @invariant()
    def mappings_show_the_model_as_far_as_the_file_goes(self) -> None:
        assert self.client is not None
        for page in range(BACKED):
            seen = self.client.load(page * PAGE)
            assert (seen is None) == (page >= self.length)
            if page < min(self.length, self.shown):
                assert seen == self.content[page]


TestDecoding = Decoding.TestCase
TestDecoding.settings = settings(max_examples=150, stateful_step_count=40)
