"""A guest in which a program of ours has two cards by vhost-vdpa, one by each parent; what the host saw."""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import trio

from device.live_migration import RING_STATE
from device.profiles import parse_profile
from tests.guest import Root, boot
from tests.guest.cards import ServedCard, serve_cards
from tests.guest.programs import Step, program, read_steps
from tests.guest.seen import Windows, kept_warnings
from tests.guest.vdpa.kernel_log import KERNEL_ARGS
from tests.guest.vdpa.parents import ADD, IFCVF, VDPA, VP_VDPA, Parent

PATIENCE: Final = 120  # seconds for some ten on an idle machine

ROUNDS: Final = 24
BEGIN: Final = 0xFE00
"""Of the program's parts `state` and `pauses`."""

HOSTILE: Final = (
    *("tx_ahead", "tx_far_behind", "tx_ffff"),
    *("rx_ahead", "rx_far_behind"),
    *("control_ahead", "control_ffff"),
)
"""Ring state that is not so, of the program's part of that name."""

SHOWN: Final = {
    "questions": ("map", "unmap"),
    "frames": (
        *("mapped", "by_kick_eventfd", "by_doorbell_page", "link_down", "link_up"),
        *("invalidated", "disabled", "frames", "closed"),
    ),
    "state": (*["stopped"] * ROUNDS, "rounds"),
    "pauses": (*["stopped"] * ROUNDS, "rounds"),
    "hostile": ("hostile",),
}
"""When each part of the program shows the host how things are, in its order."""

_DEVICE: Final = "/dev/vhost-vdpa-0"
_LENGTH: Final = struct.Struct(">I")
_NUMBER_AT: Final = 14


@dataclass(frozen=True, slots=True)
class Setting:
    """One guest: its processors, and the profiles of its two cards."""

    processors: int
    profiles: dict[Parent, str]
    vector_per_queue: bool = True
    """Whether ifcvf has an interrupt for each queue."""
    shared: bool = True
    """Whether cards have a descriptor of the guest's memory, or have to ask for what is there."""

    def parts(self, parent: Parent) -> tuple[str, ...]:
        """What the program does with a parent. vp_vdpa takes no ring state from anybody; and of what a card
        holds in its hands while it asks for memory, a reset lets go.
        """
        if parent is VP_VDPA:
            return "questions", "frames"
        return "questions", "frames", "state" if self.shared else "pauses", "hostile"


SETTINGS: Final = {
    "a vector each": Setting(4, {IFCVF: "n3000", VP_VDPA: "virtio"}),
    "one vector": Setting(1, {IFCVF: "c5000x:vectors=one", VP_VDPA: "n3000"}, vector_per_queue=False),
    "memory by message": Setting(4, {IFCVF: "n3000", VP_VDPA: "c5000x"}, shared=False),
}


@dataclass(frozen=True, slots=True)
class QueueLook:
    """A queue of the card's."""

    enabled: bool
    last_avail: int
    used_index: int


@dataclass(frozen=True, slots=True)
class Look:
    """How a card was when the program showed something."""

    said: str
    """What the program said beside."""
    windows: Windows
    status: int
    queues: list[QueueLook]
    ring_state: list[int]
    """What the live-migration block tells by 16 bits of each queue; nothing without one."""
    counters: dict[str, int]
    promiscuous: bool
    frames: int
    """How many had come to the card's peer."""


@dataclass
class Seen:
    """What was seen of one parent."""

    parent: Parent
    card: ServedCard
    steps: dict[str, Step] = field(default_factory=dict)
    looks: dict[str, list[Look]] = field(default_factory=dict)
    numbers: list[int] = field(default_factory=list)
    """Those of the frames that came to the card's peer, in their order."""
    warnings: list[str] = field(default_factory=list)

    def good(self, *names: str) -> None:
        """AssertionError unless all these steps were made and went well."""
        assert [name for name in names if name not in self.steps] == []
        assert [self.steps[name] for name in names if not self.steps[name].good] == []

    def answers(self, *names: str) -> list[str]:
        """How these calls ended."""
        return [self.steps[name].detail for name in names]

    def look(self, name: str) -> Look:
        """The only one of this name."""
        (look,) = self.looks[name]
        return look


@dataclass
class Story:
    """One guest, from its start to its end."""

    setting: Setting
    parents: dict[Parent, Seen]
    console: str = ""
    qemu_stderr: str = ""
    status: int | None = None


def _look(seen: Seen, said: str) -> Look:
    nic = seen.card.nic
    block = nic.card.live_migration
    with nic.function.gate:
        return Look(
            said,
            sorted(nic.function.dma.windows()),
            int(nic.card.transport.status),
            [QueueLook(queue.enabled, queue.last_avail, queue.used_index) for queue in nic.card.queues],
            [block.read(RING_STATE + 4 * queue.index, 2) for queue in nic.card.queues] if block else [],
            seen.card.counters,
            nic.filter.promiscuous,
            len(seen.numbers),
        )


async def _send_back(stream: trio.SocketStream, seen: Seen) -> None:
    """Be the peer of a card: every frame goes back as it came, and its number is kept."""
    arrived = bytearray()
    async for part in stream:
        arrived += part
        whole = 0
        while len(arrived) - whole >= _LENGTH.size:
            end = whole + _LENGTH.size + _LENGTH.unpack_from(arrived, whole)[0]
            if end > len(arrived):
                break
            seen.numbers += struct.unpack_from("<I", arrived, whole + _LENGTH.size + _NUMBER_AT)
            whole = end
        await stream.send_all(arrived[:whole])
        del arrived[:whole]


@asynccontextmanager
async def _served(parent: Parent, folder: Path, profile: str) -> AsyncIterator[Seen]:
    """A card with a peer that sends everything back."""
    peers = folder / "peer.sock"
    with trio.socket.socket(trio.socket.AF_UNIX) as listener:
        await listener.bind(str(peers))
        listener.listen(1)
        port = f"stream:path={peers}"
        async with (
            serve_cards(folder, [port], profile=parse_profile(profile)) as (card,),
            trio.open_nursery() as nursery,
        ):
            seen = Seen(parent, card)
            peer, _ = await listener.accept()
            with peer:
                nursery.start_soon(_send_back, trio.SocketStream(peer), seen)
                yield seen
                nursery.cancel_scope.cancel()


def _script(setting: Setting) -> str:
    """Each parent takes a card of its own, and the program does its parts with each in turn."""
    lines = ["modprobe vhost_vdpa", "install -m 755 /run/files/vhost_vdpa /bin/vhost_vdpa"]
    for number, parent in enumerate(setting.profiles):
        lines += [
            parent.take(number),
            ADD,
            f"wait_for 10 test -e {_DEVICE}",
            f"echo parent {parent}",
            *(f"vhost_vdpa {part} {_DEVICE}" for part in setting.parts(parent)),
            f"vdpa dev del {VDPA}",
        ]
    return "\n".join(lines)


async def watch(root: Root, setting: Setting, folders: dict[Parent, Path]) -> Story:
    """Run a guest from its start to its end; each parent's card has its sockets in a folder of its own."""
    async with (
        _served(IFCVF, folders[IFCVF], setting.profiles[IFCVF]) as by_ifcvf,
        _served(VP_VDPA, folders[VP_VDPA], setting.profiles[VP_VDPA]) as by_vp_vdpa,
        boot(
            _script(setting),
            [by_ifcvf.card.socket, by_vp_vdpa.card.socket],
            root=root,
            smp=setting.processors,
            shared=setting.shared,
            kernel_args=KERNEL_ARGS,
            iommu=True,
            files={"vhost_vdpa": program("vhost_vdpa")},
            deadline=PATIENCE,
        ) as guest,
    ):
        story = Story(setting, {IFCVF: by_ifcvf, VP_VDPA: by_vp_vdpa})
        for parent, seen in story.parents.items():
            with kept_warnings(seen.warnings):
                for name in (name for part in setting.parts(parent) for name in SHOWN[part]):
                    said = await guest.expect(name)
                    seen.looks.setdefault(name, []).append(_look(seen, said))
                    if name in ("link_down", "link_up"):
                        seen.card.nic.set_link(name == "link_up")
                    guest.say()
        result = await guest.wait(check=False, clean_stderr=False)
    story.status, story.console, story.qemu_stderr = result.status, result.console, result.qemu_stderr
    for parent, seen in story.parents.items():
        own = result.output.partition(f"parent {parent}\n")[2].partition("parent ")[0]
        seen.steps = {step.name: step for step in read_steps(own)}
    return story
