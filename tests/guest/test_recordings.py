"""What the kernel's drivers do to the card's registers, against the recordings that tests.traces does again.

See recording.py for how they are made anew.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from device.profiles import parse_profile
from tests.guest import Network, Root
from tests.guest.cards import serve_cards
from tests.guest.recording import Recordings, check
from tests.guest.vdpa.parents import ADD, IFCVF, VDPA, VP_VDPA, Parent
from tests.guest.vdpa.story import Story
from tests.traces.recordings import SECTION

PROCESSORS: Final = 4  # the IFC VF's driver asks for no more vectors than these


@dataclass(slots=True)
class Life:
    """A driver's, from where it takes the card of this number to where it lets go."""

    name: str
    card: int
    parent: Parent | None
    """None: virtio-pci."""
    lines: list[str] = field(default_factory=list)

    @property
    def script(self) -> str:
        modules = "modprobe virtio_net"
        take, start, stop = f"give virtio-pci $(card {self.card})", "", ""
        if self.parent is not None:
            modules += f"; modprobe virtio_vdpa; modprobe {self.parent.module}"
            take = f"give {self.parent.driver} $(card {self.card}); mgmt=pci/$(basename $(card {self.card}))"
            start, stop = ADD, f"vdpa dev del {VDPA}"
        return f"""
{modules}
tell begin; await_host
{take}
tell take; await_host
{start}
dev=$(nic)
ip addr add 10.77.0.2/24 dev $dev
bring_up $dev
tell up; await_host
for ping in first second; do ping -c 1 -W 5 10.77.0.1; done
tell traffic; await_host
ip link set $dev down
{stop}
tell down; await_host
echo $(basename $(card {self.card})) > $(card {self.card})/driver/unbind
tell release; await_host
"""


SECTIONS: Final = ("take", "up", "traffic", "down", "release")

PROFILES: Final = ("n3000", "n3000:vectors=shared", "n3000:vectors=one", "c5000x")
"""Each card's."""

LIVES: Final = (
    ("ifcvf", 0, IFCVF),
    ("virtio_pci", 0, None),
    ("vp_vdpa", 0, VP_VDPA),
    ("ifcvf-shared", 1, IFCVF),
    ("ifcvf-one", 2, IFCVF),
    ("ifcvf-c5000x", 3, IFCVF),
)

# The kernel has virtio-pci, but not the drivers above it.
NO_DRIVERS: Final = """
sysctl -qw net.ipv6.conf.default.disable_ipv6=1
n=0
while f=$(card $n); do echo ${f##*/} > $f/driver/unbind; n=$((n + 1)); done
"""


async def test_drivers_do_to_the_card_what_was_recorded(
    guest_root: Root, make_network: Callable[..., Network], tmp_path: Path
) -> None:
    lives = [Life(*life) for life in LIVES]
    networks = [make_network() for _ in PROFILES]
    ports = [f"tap:name={network.tap},netns={network.path}" for network in networks]
    story = Story()
    script = NO_DRIVERS + "".join(life.script for life in lives)
    profiles = [parse_profile(text) for text in PROFILES]
    async with serve_cards(tmp_path, ports, profiles=profiles) as cards:
        recordings = Recordings(cards)
        async with story.told(script, cards, guest_root, smp=PROCESSORS) as guest:
            for life in lives:
                await guest.expect("begin")
                recordings.take(life.card)
                guest.say()
                life.lines.append(f"# {PROFILES[life.card]}")
                for section in SECTIONS:
                    await guest.expect(section)
                    life.lines += [f"{SECTION}{section}", *recordings.take(life.card)]
                    guest.say()
    assert story.complaints == []
    for life in lives:
        check(life.name, life.lines)
