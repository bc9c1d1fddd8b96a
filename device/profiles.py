"""The card's personalities as data: who it says it is, which BARs it has and where virtio lies in them.

    BAR 0, registers                            BAR 2, memory                 BAR 4, registers
    0x0000  virtio common configuration         64-bit, prefetchable,         0x000  live migration
    0x1000  ISR status                          mappable                             (device.live_migration)
    0x2000  device configuration
    0x3000  doorbells, a page a queue
    0x6000  MSI-X table
    0x7000  MSI-X pending bits

Virtio structures lie in BAR 0 only. The kernel's driver of the IFC VF (drivers/vdpa/ifcvf) wants BARs 0, 2
and 4 to exist, takes what lies at the start of BAR 4 for the live-migration block, and finds no capability
that says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import Enum, auto
from types import MappingProxyType
from typing import Final

from device.identity import Identity
from device.virtio.features import Feature

QUEUES: Final = 3
"""Receive, transmit, control."""

REGISTERS_BAR: Final = 0
REGISTERS_SIZE: Final = 0x8000
COMMON: Final = 0x0000
ISR: Final = 0x1000
DEVICE_CONFIG: Final = 0x2000
DOORBELLS: Final = 0x3000
MSIX_TABLE: Final = 0x6000
MSIX_PBA: Final = 0x7000

MEMORY_BAR: Final = 2  # its size is for whoever makes the card to say

LIVE_MIGRATION_BAR: Final = 4
LIVE_MIGRATION_SIZE: Final = 0x1000

MIN_QUEUE_SIZE: Final = 64
"""Descriptors. The least that the IFC VF's driver takes; and a ring has to hold a frame in pieces."""

MAX_QUEUE_SIZE: Final = 32768
"""Descriptors of the longest split ring (virtio 1.3, 2.7), and of the IFC VF's."""


class Listed(Enum):
    """What configuration space can list, in the order of a profile."""

    POWER = auto()
    MSI = auto()
    MSIX = auto()
    EXPRESS = auto()
    COMMON = auto()
    ISR = auto()
    DEVICE = auto()
    NOTIFY = auto()
    PCI_ACCESS = auto()


class Vectors(Enum):
    """How many MSI-X vectors there are, and so how the IFC VF's driver shares them out."""

    PER_QUEUE = "per-queue"  # and one for configuration changes
    SHARED = "shared"  # one for all queues, one for configuration changes
    ONE = "one"  # for everything: the ISR says what happened

    @property
    def count(self) -> int:
        """Vectors in the MSI-X table."""
        return {Vectors.PER_QUEUE: QUEUES + 1, Vectors.SHARED: 2, Vectors.ONE: 1}[self]


class Visibility(Enum):
    """Whether those who see the function's BARs see the live-migration block."""

    EXPOSED = "exposed"
    HIDDEN = "hidden"  # there is no BAR with it: no size, no bytes, nothing to map


class RingLayout(Enum):
    """Where drivers find ring state in the live-migration block; see device.live_migration."""

    AUTO = "auto"  # told apart by the width of accesses
    PAIRS = "pairs"  # 2019's driver, DPDK's, Linux before 6.5
    WORDS = "words"  # Linux since 6.5


@dataclass(frozen=True, slots=True)
class Profile:
    """One personality. `withholds` are features, bits of Feature, that the card has and it does not offer.

    `queue_size` is what every queue has at most, in descriptors: a driver that asks for the greatest size of
    all gets it from each.
    """

    name: str
    identity: Identity
    bars: tuple[int, ...] = (REGISTERS_BAR, MEMORY_BAR, LIVE_MIGRATION_BAR)
    capabilities: tuple[Listed, ...] = tuple(Listed)
    withholds: int = 0
    queue_size: int = 256
    vectors: Vectors = Vectors.PER_QUEUE
    visibility: Visibility = Visibility.EXPOSED
    ring_layout: RingLayout = RingLayout.AUTO

    @property
    def text(self) -> str:
        """What `parse_profile` makes this from; with every option if it is none of PROFILES."""
        plain = PROFILES.get(self.name)
        said = [
            f"{key}={option.show(self)}"
            for key, option in OPTIONS.items()
            if plain is None or option.show(self) != option.show(plain)
        ]
        return f"{self.name}:{','.join(said)}" if said else self.name

    @property
    def has_live_migration(self) -> bool:
        """Whether there is a live-migration block, seen or not."""
        return LIVE_MIGRATION_BAR in self.bars

    @property
    def shown_bars(self) -> tuple[int, ...]:
        """The BARs that the function has: without that of a block that is hidden."""
        hidden = self.visibility is Visibility.HIDDEN
        return tuple(bar for bar in self.bars if not (hidden and bar == LIVE_MIGRATION_BAR))


# Intel's N3000, the IFC VF of 2019, with the ids of modern virtio-net.
N3000: Final = Profile(
    "n3000",
    Identity(vendor=0x1AF4, device=0x1041, subsystem_vendor=0x8086, subsystem=0x001A),
)

# Intel's C5000X-PL and F2000X-PL. The device id is that of transitional virtio-net, whose revision is 0 and
# whose subsystem id is the device type (virtio 1.3, 4.1.2.3): drivers take it for a network card by that, and
# drive it in modern mode, for it offers VERSION_1 and has no legacy registers. Its rings are the longest that
# QEMU's virtio-net takes, behind which it serves guests by vhost-vdpa.
C5000X: Final = Profile(
    "c5000x",
    Identity(vendor=0x1AF4, device=0x1000, subsystem_vendor=0x8086, subsystem=0x0001, revision=0),
    queue_size=1024,
)

# A plain virtio-net NIC. The subsystem repeats the ids, as other makers of modern-only devices do. QEMU's
# 1af4:1100 says "a machine of QEMU's", which this card cannot know, and any with 8086 would be taken by the
# IFC VF's driver. No virtio driver uses MSI. The device is software on the host's own processors, which keep
# memory in the order that ORDER_PLATFORM is there to ask hardware for: without it drivers use the cheaper
# barriers (6.1).
VIRTIO: Final = Profile(
    "virtio",
    Identity(vendor=0x1AF4, device=0x1041, subsystem_vendor=0x1AF4, subsystem=0x1041),
    bars=(REGISTERS_BAR, MEMORY_BAR),
    capabilities=tuple(part for part in Listed if part is not Listed.MSI),
    withholds=Feature.ORDER_PLATFORM,
)

PROFILES: Final[Mapping[str, Profile]] = MappingProxyType(
    {profile.name: profile for profile in (N3000, C5000X, VIRTIO)}
)


@dataclass(frozen=True, slots=True)
class Option:
    """What of a profile can be chosen: `take` raises ValueError for a text that is none of `wanted`."""

    help: str
    wanted: str
    take: Callable[[Profile, str], Profile]
    show: Callable[[Profile], str]


def _queue_size(profile: Profile, text: str) -> Profile:
    if not (text.isascii() and text.isdecimal() and len(text) <= len(str(MAX_QUEUE_SIZE))):
        raise ValueError(text)
    size = int(text)
    if not MIN_QUEUE_SIZE <= size <= MAX_QUEUE_SIZE or size & (size - 1):
        raise ValueError(text)
    return replace(profile, queue_size=size)


def _of_live_migration(take: Callable[[Profile, str], Profile]) -> Callable[[Profile, str], Profile]:
    def checked(profile: Profile, text: str) -> Profile:
        if not profile.has_live_migration:
            raise ValueError(text)
        return take(profile, text)

    return checked


OPTIONS: Final[Mapping[str, Option]] = MappingProxyType(
    {
        "vectors": Option(
            "MSI-X vectors",
            "per-queue, shared or one",
            lambda profile, text: replace(profile, vectors=Vectors(text)),
            lambda profile: profile.vectors.value,
        ),
        "queue-size": Option(
            "descriptors a queue",
            f"a power of two from {MIN_QUEUE_SIZE} to {MAX_QUEUE_SIZE}",
            _queue_size,
            lambda profile: str(profile.queue_size),
        ),
        "lm": Option(
            "the live-migration block in BAR 4",
            "exposed or hidden, of a profile that has one",
            _of_live_migration(lambda profile, text: replace(profile, visibility=Visibility(text))),
            lambda profile: profile.visibility.value,
        ),
        "ring-state": Option(
            "where drivers find ring state in that block",
            "auto, pairs or words, of a profile that has one",
            _of_live_migration(lambda profile, text: replace(profile, ring_layout=RingLayout(text))),
            lambda profile: profile.ring_layout.value,
        ),
    }
)


def parse_profile(text: str) -> Profile:
    """A profile from `NAME` or `NAME:key=value,...`; ValueError says what is allowed."""
    name, colon, rest = text.partition(":")
    profile = PROFILES.get(name)
    if profile is None:
        raise ValueError(f"profile {name[:40]!r} is none of {', '.join(PROFILES)}")
    taken: set[str] = set()
    for word in rest.split(",") if colon else ():
        key, _, value = word.partition("=")
        option = OPTIONS.get(key)
        if option is None:
            raise ValueError(f"profile {name}: {key[:40]!r} is none of {', '.join(OPTIONS)}")
        if key in taken:
            raise ValueError(f"profile {name}: {key} is given twice")
        taken.add(key)
        try:
            profile = option.take(profile, value)
        except ValueError:
            raise ValueError(
                f"profile {name}: {key}={value[:40]!r} should be {option.wanted}: {option.help}"
            ) from None
    return profile
