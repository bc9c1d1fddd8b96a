"""Vectors, ring sizes and profiles: many cards in one guest, each by the parent that takes it.

How many MSI-X vectors ifcvf gets depends on the guest's processors, for it wants each on another one, and on
how many the card has; by that it uses them in three ways. vp_vdpa wants one for each queue that has a
callback and one for the configuration, whatever the processors.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

import pytest
import trio

from device.profiles import parse_profile
from tests.guest import Network, Root
from tests.guest.cards import serve_cards
from tests.guest.conftest import engine_config, networks
from tests.guest.vdpa.parents import IFCVF, VP_VDPA, Parent
from tests.guest.vdpa.story import Story
from trionic.engines import Engine

EACH: Final = ("0", "1", "2", "config")
SHARED: Final = ("vqs-reused-irq", "config")
ONE: Final = ("dev-irq",)
"""How ifcvf names its interrupts: one for each queue, one for all of them, one for everything."""

TWO_QUEUES: Final = ("0", "1", "config")
"""How vp_vdpa does: virtio_net polls the control queue."""


@dataclass(frozen=True, slots=True)
class Place:
    """One card of a guest."""

    parent: Parent
    profile: str
    interrupts: tuple[str, ...]
    ring: int
    """Descriptors of each ring that the driver makes."""


# By the number of processors.
PLACES: Final = {
    1: (
        Place(IFCVF, "n3000", ONE, 256),
        Place(IFCVF, "c5000x:queue-size=64", ONE, 64),
        Place(VP_VDPA, "virtio", TWO_QUEUES, 256),
    ),
    2: (
        Place(IFCVF, "n3000", SHARED, 256),
        Place(IFCVF, "c5000x:vectors=one", ONE, 1024),
        Place(VP_VDPA, "n3000:lm=hidden", TWO_QUEUES, 256),
    ),
    4: (
        Place(IFCVF, "n3000", EACH, 256),
        Place(IFCVF, "n3000:vectors=shared", SHARED, 256),
        Place(IFCVF, "n3000:queue-size=32768", EACH, 32768),
        Place(VP_VDPA, "c5000x:queue-size=64", TWO_QUEUES, 64),
        Place(VP_VDPA, "virtio", TWO_QUEUES, 256),
    ),
}

REFUSED: Final = ("n3000:lm=hidden", "virtio")
"""Profiles that have nothing in BAR 4, which ifcvf asks for."""

SETUP: Final = """
modprobe virtio_vdpa
modprobe virtio_net
modprobe ifcvf
modprobe vp_vdpa
"""

REFUSE: Final = """
step refused_{card}
refused give ifcvf $(card {card})
"""

# Each stays as it is while the others come after it.
UP: Final = """
step interface_{card}
{take}
vdpa dev add name vdpa{card} mgmtdev $mgmt
dev=$(basename $(card {card})/virtio*/net/*)
ip addr add 10.77.{card}.2/24 dev $dev
bring_up $dev
ethtool -g $dev
"""

PING: Final = """
step traffic_{card}
for size in 20 700 1400; do ping -c 1 -W 5 -s $size 10.77.{card}.1; done
step interrupts_{card}
grep PCI-MSIX-$(basename $(card {card})) /proc/interrupts
"""

# The links are down by then.
CHANGED: Final = """
step changed_{card}
wait_for 10 grep -q 0 $(card {card})/virtio*/net/*/carrier
grep PCI-MSIX-$(basename $(card {card})) /proc/interrupts
"""


@dataclass(frozen=True, slots=True)
class Rig:
    """A guest with `PLACES` of that many processors, served by one engine."""

    processors: int
    engine: Engine

    def __str__(self) -> str:
        return f"{self.processors}-{self.engine.value}"

    @property
    def places(self) -> tuple[Place, ...]:
        """Its cards."""
        return PLACES[self.processors]

    @property
    def script(self) -> str:
        """Each card's driver, and then each card's traffic."""
        places = list(enumerate(self.places))
        return "".join(
            [
                SETUP,
                *(REFUSE.format(card=card) for card, place in places if place.profile in REFUSED),
                *(UP.format(card=card, take=place.parent.take(card)) for card, place in places),
                *(PING.format(card=card) for card, _ in places),
                "tell flowed; await_host\n",
                *(CHANGED.format(card=card) for card, _ in places),
                "step end\n",
            ]
        )


RIGS: Final = [Rig(1, Engine.NATIVE), Rig(2, Engine.LIBVFIO_USER), Rig(4, Engine.NATIVE)]


@pytest.fixture(scope="module", params=RIGS, ids=str)
def rig(request: pytest.FixtureRequest) -> Rig:
    """Each guest in turn."""
    found: Rig = request.param
    return found


@pytest.fixture(scope="module")
def story(
    rig: Rig, guest_root: Root, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Story:
    """The script, run to its end in a guest with all the cards, each on a TAP device of its own."""
    engine = engine_config(rig.engine, request)
    refusals = ["Failed to request MMIO region", "probe with driver ifcvf failed with error -22"]

    async def tell(links: list[Network]) -> Story:
        story = Story()
        ports = [f"tap:name={network.tap},netns={network.path}" for network in links]
        profiles = [parse_profile(place.profile) for place in rig.places]
        folder = tmp_path_factory.mktemp("vectors")
        async with (
            serve_cards(folder, ports, engine, profiles=profiles) as cards,
            story.told(
                rig.script,
                cards,
                guest_root,
                engine,
                smp=rig.processors,
                expected_complaints=refusals,
            ) as guest,
        ):
            await guest.expect("flowed")
            for network in links:
                await network.run(guest_root, "ip", "link", "set", network.tap, "down")
            guest.say()
        story.seen["counters"] = [card.counters for card in cards]
        return story

    with networks() as make:
        made = [make(tap=f"tap{card}", subnet=f"10.77.{card}") for card, _ in enumerate(rig.places)]
        return trio.run(tell, made)


def test_the_script_comes_to_its_end_and_the_kernel_has_nothing_to_say_but_refusals(story: Story) -> None:
    assert story.step("end") == ""
    assert story.complaints == []


def test_frames_of_every_card_go_both_ways(rig: Rig, story: Story) -> None:
    for card, _ in enumerate(rig.places):
        said = story.step(f"traffic_{card}")
        assert said.count(" 0% packet loss") == 3
        counters = story.seen["counters"][card]
        assert min(counters["tx_frames"], counters["rx_frames"]) >= 3
        assert counters["tx_dropped"] == counters["rx_dropped"] == 0


def interrupts(story: Story, step: str) -> dict[str, int]:
    """How often each of a card's interrupts came, by the names that its parent gave them."""
    return {
        line.rpartition("]-")[2]: sum(
            map(int, re.findall(r"\d+", line.partition(":")[2].partition("PCI")[0]))
        )
        for line in story.step(step).splitlines()
        if "PCI-MSIX" in line
    }


def test_interrupts_are_shared_out_as_there_are_vectors_and_processors(rig: Rig, story: Story) -> None:
    for card, place in enumerate(rig.places):
        counts = interrupts(story, f"interrupts_{card}")
        assert tuple(counts) == place.interrupts
        assert counts.get("config", 0) == 0
        assert 0 not in [count for name, count in counts.items() if name not in ("2", "config")]


def test_a_link_that_goes_down_is_announced_by_the_interrupt_for_that(rig: Rig, story: Story) -> None:
    """With one vector for everything, ifcvf asks the ISR what happened."""
    for card, place in enumerate(rig.places):
        before, after = (interrupts(story, f"{step}_{card}") for step in ("interrupts", "changed"))
        announced = place.interrupts[-1]
        assert after[announced] > before[announced]


def test_rings_are_as_long_as_the_profiles(rig: Rig, story: Story) -> None:
    for card, place in enumerate(rig.places):
        said = story.step(f"interface_{card}")
        assert re.findall(r"^[RT]X:\s+(\d+)$", said, re.MULTILINE) == [str(place.ring)] * 4


def test_ifcvf_refuses_cards_without_its_block_which_live_on_and_are_vp_vdpas(rig: Rig, story: Story) -> None:
    without = [card for card, place in enumerate(rig.places) if place.profile in REFUSED]
    assert without
    for card in without:
        assert "ifcvf does not take" in story.step(f"refused_{card}")
