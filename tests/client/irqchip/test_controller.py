from __future__ import annotations

import errno
from collections.abc import Iterator

import pytest
import trio
import trio.testing
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from client import ClientError
from client.irqchip import NOWHERE, InterruptController, IntxMode, IntxRoute, IrqchipError
from client.irqchip.routes import LINES
from tests.client.irqchip.scripted import Journal, NotingChip, Place, nothing_left


@pytest.fixture
def place() -> Iterator[Place]:
    with nothing_left() as made:
        yield made


def enabled(gsi: int) -> IntxRoute:
    return IntxRoute(IntxMode.ENABLED, gsi)


async def nobody_is_told() -> None:
    raise AssertionError("a change that was none")


def test_the_first_irqchip_is_activated_and_lines_without_a_route_go_nowhere() -> None:
    journal: Journal = []
    controller = InterruptController(
        NotingChip("pic", journal), [enabled(3), IntxRoute(IntxMode.INVERTED, 4)]
    )
    assert journal == ["pic activate", "pic level 4 1"]
    assert [controller.route(line) for line in range(2, LINES)] == [NOWHERE, NOWHERE]


def test_more_routes_than_lines_are_refused() -> None:
    journal: Journal = []
    with pytest.raises(ClientError, match="5 routes"):
        InterruptController(NotingChip("pic", journal), [NOWHERE] * 5)
    assert journal == []


def test_a_first_route_to_no_input_is_refused_before_the_irqchip_is_touched() -> None:
    journal: Journal = []
    with pytest.raises(IrqchipError, match="a route to input 16"):
        InterruptController(NotingChip("pic", journal), [enabled(16)])
    assert journal == []


@pytest.mark.parametrize("line", [-1, 4])
async def test_a_line_that_is_none_is_refused(place: Place, line: int) -> None:
    with pytest.raises(ClientError, match=f"line {line}"):
        place.controller.route(line)
    with pytest.raises(ClientError, match=f"line {line}"):
        place.controller.assert_line(line, "device")
    with pytest.raises(ClientError, match=f"line {line}"):
        place.controller.deassert_line(line, "device")
    with pytest.raises(ClientError, match=f"line {line}"):
        await place.controller.set_route(line, NOWHERE)


async def test_a_line_is_high_while_anybody_drives_it(place: Place) -> None:
    place.controller.assert_line(0, "one")
    place.controller.assert_line(0, "other")
    place.controller.assert_line(0, "other")
    assert place.said() == ["xics level 5 1"]
    place.controller.deassert_line(0, "one")
    place.controller.deassert_line(0, "one")
    assert place.said() == []
    place.controller.deassert_line(0, "other")
    assert place.said() == ["xics level 5 0"]


async def test_levels_go_along_to_another_irqchip(place: Place) -> None:
    place.controller.assert_line(0, "device")
    await place.controller.activate(place.xive)
    assert place.said() == [
        "xics level 5 1",
        "xics level 5 0",
        "xics deactivate",
        "xive activate",
        "xive level 5 1",
    ]
    assert place.controller.chip is place.xive
    place.controller.deassert_line(0, "device")


async def test_levels_go_along_to_another_input(place: Place) -> None:
    place.controller.assert_line(0, "device")
    await place.controller.set_route(0, enabled(6))
    assert place.said() == ["xics level 5 1", "xics level 5 0", "xics level 6 1"]
    await place.controller.set_route(0, NOWHERE)
    assert place.said() == ["xics level 6 0"]
    place.controller.deassert_line(0, "device")


async def test_the_irqchip_that_is_active_already_is_no_change(place: Place) -> None:
    with place.controller.irqchip_change.subscribed(nobody_is_told):
        await place.controller.activate(place.xics)
    assert place.said() == []


async def test_an_irqchip_that_cannot_be_activated_leaves_the_old_one_and_tells_nobody(place: Place) -> None:
    place.controller.assert_line(0, "device")
    place.xive.refuses = {"activate"}
    with (
        place.controller.irqchip_change.subscribed(nobody_is_told),
        pytest.raises(IrqchipError, match="EBUSY"),
    ):
        await place.controller.activate(place.xive)
    assert place.controller.chip is place.xics
    assert place.xics.high == {5}
    assert place.said()[-2:] == ["xics activate", "xics level 5 1"]
    place.controller.deassert_line(0, "device")
    place.xive.refuses.clear()
    await place.controller.activate(place.xive)
    assert place.controller.chip is place.xive


async def test_an_irqchip_that_cannot_be_deactivated_stays_and_nobody_is_told(place: Place) -> None:
    place.controller.assert_line(0, "device")
    place.xics.refuses = {"deactivate"}
    with (
        place.controller.irqchip_change.subscribed(nobody_is_told),
        pytest.raises(IrqchipError, match="EBUSY"),
    ):
        await place.controller.activate(place.xive)
    assert place.controller.chip is place.xics
    assert place.xics.high == {5}
    assert "xive activate" not in place.said()
    place.controller.deassert_line(0, "device")


async def test_a_level_that_is_refused_keeps_the_change_from_nobody(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(gsi: int, level: bool) -> None:
        raise IrqchipError(f"input {gsi} to {level}", errno.EIO)

    told: list[str] = []

    async def irqchip_changed() -> None:
        told.append("irqchip")

    async def route_changed() -> None:
        told.append("route")

    place.controller.assert_line(0, "device")
    with (
        place.controller.irqchip_change.subscribed(irqchip_changed),
        place.controller.routing_change.subscribed(route_changed),
        monkeypatch.context() as patch,
    ):
        patch.setattr(place.xive, "set_level", broken)
        with pytest.raises(IrqchipError, match="input 5 to True"):
            await place.controller.activate(place.xive)
        with pytest.raises(IrqchipError, match="input 6 to True"):
            await place.controller.set_route(0, enabled(6))
    assert told == ["irqchip", "route"]
    assert place.controller.chip is place.xive
    assert place.controller.route(0) == enabled(6)
    place.controller.deassert_line(0, "device")
    assert not place.xive.high


async def test_a_route_to_no_input_is_refused_before_anything_changes(place: Place) -> None:
    place.controller.assert_line(0, "device")
    place.said()
    with (
        place.controller.routing_change.subscribed(nobody_is_told),
        pytest.raises(IrqchipError, match="xics: a route to input 16") as refused,
    ):
        await place.controller.set_route(0, enabled(16))
    assert refused.value.errno == errno.EINVAL
    assert place.controller.route(0) == enabled(5)
    assert place.said() == []
    place.controller.deassert_line(0, "device")


async def test_an_irqchip_with_too_few_inputs_for_the_routes_is_refused_before_anything_changes(
    place: Place,
) -> None:
    small = NotingChip("small", place.journal, inputs=5)
    with pytest.raises(IrqchipError, match="small: a route to input 5"):
        await place.controller.activate(small)
    assert place.controller.chip is place.xics
    assert place.said() == []
    await place.controller.set_route(0, enabled(4))
    await place.controller.activate(small)
    assert place.controller.chip is small


@pytest.mark.parametrize("told_of", ["irqchip_change", "routing_change"])
@pytest.mark.parametrize("wanted", ["activate", "set_route"])
async def test_a_subscriber_cannot_change_anything_itself(place: Place, told_of: str, wanted: str) -> None:
    controller = place.controller

    async def change() -> None:
        if wanted == "activate":
            await controller.activate(place.xics)
        else:
            await controller.set_route(1, NOWHERE)

    refused = pytest.RaisesExc(ClientError, match="wants a change before all have followed")
    with getattr(controller, told_of).subscribed(change), trio.fail_after(5), pytest.RaisesGroup(refused):
        if told_of == "irqchip_change":
            await controller.activate(place.xive)
        else:
            await controller.set_route(0, enabled(6))
    assert (controller.chip is place.xive) == (told_of == "irqchip_change"), "the change itself stands"
    await controller.set_route(0, enabled(7))
    assert controller.route(0).gsi == 7


async def test_changes_wait_for_each_other(place: Place) -> None:
    seen: list[tuple[str, int]] = []
    go_on = trio.Event()

    async def told() -> None:
        await go_on.wait()
        seen.append((place.controller.chip.name, place.controller.route(0).gsi))

    async with trio.open_nursery() as nursery:
        with (
            place.controller.irqchip_change.subscribed(told),
            place.controller.routing_change.subscribed(told),
        ):
            nursery.start_soon(place.controller.activate, place.xive)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(place.controller.set_route, 0, enabled(6))
            await trio.testing.wait_all_tasks_blocked()
            go_on.set()
            await trio.testing.wait_all_tasks_blocked()
    assert seen == [("xive", 5), ("xive", 6)]


async def test_a_cancelled_change_is_told_first_and_one_that_waits_does_not_happen(place: Place) -> None:
    seen: list[str] = []
    go_on = trio.Event()

    async def told() -> None:
        await go_on.wait()
        seen.append("told")

    scopes = [trio.CancelScope(), trio.CancelScope()]

    async def activate(chip: NotingChip, scope: trio.CancelScope) -> None:
        with scope:
            await place.controller.activate(chip)

    with place.controller.irqchip_change.subscribed(told):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(activate, place.xive, scopes[0])
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(activate, place.xics, scopes[1])
            await trio.testing.wait_all_tasks_blocked()
            for scope in scopes:
                scope.cancel()
            await trio.testing.wait_all_tasks_blocked()
            go_on.set()
    assert seen == ["told"]
    assert place.controller.chip is place.xive


GSIS = 3
MODES = st.sampled_from(
    [NOWHERE, *(IntxRoute(mode, gsi) for mode in list(IntxMode)[1:] for gsi in range(GSIS))]
)
INDEX = st.integers(0, LINES - 1)
DEVICES = st.sampled_from(["a", "b", "c"])


class Levels(RuleBasedStateMachine):
    """Inputs have the OR of the lines that go there, whatever is changed in whatever order; the irqchip that
    is not in use has no input high. (`NotingChip` asserts that no level is set twice.)
    """

    def __init__(self) -> None:
        super().__init__()
        self.chips = [NotingChip(name, [], inputs=GSIS) for name in ("pic", "apic")]
        self.controller = InterruptController(self.chips[0])
        self.driving: set[tuple[int, str]] = set()
        self.routes = [NOWHERE] * LINES
        self.active = 0

    @rule(line=INDEX, device=DEVICES)
    def assert_line(self, line: int, device: str) -> None:
        self.controller.assert_line(line, device)
        self.driving.add((line, device))

    @rule(line=INDEX, device=DEVICES)
    def deassert_line(self, line: int, device: str) -> None:
        self.controller.deassert_line(line, device)
        self.driving.discard((line, device))

    @rule(line=INDEX, route=MODES)
    def set_route(self, line: int, route: IntxRoute) -> None:
        trio.run(self.controller.set_route, line, route)
        self.routes[line] = route

    @rule(index=st.integers(0, 1), works=st.booleans())
    def activate(self, index: int, works: bool) -> None:
        self.chips[index].refuses = set() if works or index == self.active else {"activate"}
        try:
            trio.run(self.controller.activate, self.chips[index])
            self.active = index
        except IrqchipError:
            assert self.chips[index].refuses
            self.chips[index].refuses = set()

    @invariant()
    def levels_are_those_of_the_lines(self) -> None:
        expected = set()
        for line, route in enumerate(self.routes):
            high = any(driven == line for driven, _ in self.driving)
            if (route.mode, high) in {(IntxMode.ENABLED, True), (IntxMode.INVERTED, False)}:
                expected.add(route.gsi)
        assert self.chips[self.active].high == expected
        assert not self.chips[1 - self.active].high


TestLevels = Levels.TestCase
TestLevels.settings = settings(max_examples=100, stateful_step_count=30)
